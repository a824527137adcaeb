"""What the scripts share. It uses the standard library only."""

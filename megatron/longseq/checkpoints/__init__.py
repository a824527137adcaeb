"""Checkpoints: committed atomically, compared with what was saved, and chosen among the complete ones."""

"""Runnable examples; `quickstart` is what `scripts/quickstart.sh` runs."""

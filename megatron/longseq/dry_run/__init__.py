"""Dry run: build a rank's model of a large job on the meta device in one process, and report its memory."""

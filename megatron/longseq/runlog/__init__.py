"""The record of a run: what each logged step writes, and the commands that watch it and make a report of it."""

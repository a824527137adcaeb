"""Planner: predicts the time and memory of a training run, and searches for the fastest one.

`plan/` prices one configuration and imports neither torch nor upstream. `data/` holds models, clusters and published
measurements. `tools/` is the command line.
"""

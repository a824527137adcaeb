"""Pipeline schedules over segments of a sequence (Seq1F1B, arXiv 2406.03488).

`plan/` generates, validates and simulates schedules and imports neither torch nor upstream. `runtime/` runs one rank's
actions with upstream's forward and backward steps; `forward_backward` is the function that upstream calls. `tools/` is
the command line.
"""

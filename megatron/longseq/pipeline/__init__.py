"""Pipeline schedules over segments of a sequence (Seq1F1B, arXiv 2406.03488): planned, proven, simulated, executed.

Planning (imports neither torch nor upstream): `action` is the data, `orders` the generators, `proof` the checker,
`simulate` the clock, `cost` and `partition` the segment lengths, `timeline` what was simulated or measured, `draw` its
picture. Runtime: `executor` runs one rank's actions over upstream's forward and backward steps.
"""

"""FlexSP (arXiv 2412.01523): every step has sequence-parallel groups that fit the lengths of its sequences.

`plan/` has the cost model and the planners and imports neither torch nor upstream. `runtime/` trains, `tools/` is
the command line.
"""

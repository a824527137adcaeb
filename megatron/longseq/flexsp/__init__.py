"""FlexSP (arXiv 2412.01523): every step uses the sequence-parallel groups that its sequence lengths want.

`plan/` has the cost model and the planners and imports neither torch nor upstream. `runtime/` trains, `tools/` is
the command line.
"""

"""PaRO (arXiv 2310.06003): parameters, gradients and optimizer states, each sharded not, inside a group, or globally.

`arguments` has the flags. `plan/` holds strategies, ranks, collectives and their cost as data, without torch.
`runtime/` runs them on upstream's data-parallel wrapper and distributed optimizer. `tools/` is the command line.
"""

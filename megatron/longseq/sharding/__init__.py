"""PaRO (arXiv 2310.06003): parameters, gradients, optimizer states each sharded nowhere, inside a group, or globally.

Planning (imports neither torch nor upstream): `strategy` is the triplet, `groups` the ranks, `phases` the collectives
that a triplet takes, `memory` and `traffic` what they hold and send, `ring` the overlapped hierarchical ring as data,
`ringproof` its checker, `ringtime` its clock, `cost` the choice, `page` the tables.

Planning too: `order` puts phases on lanes, `linkfit` makes speeds of measured times.

Runtime (torch.distributed): `collectives` runs a phase on process groups, `lanekinds` are streams and threads, `lanes`
runs jobs on them beside the caller, `probe` measures links when a job starts.
"""

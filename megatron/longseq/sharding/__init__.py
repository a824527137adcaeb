"""PaRO (arXiv 2310.06003): parameters, gradients, optimizer states each sharded nowhere, inside a group, or globally.

Planning (imports neither torch nor upstream): `strategy` is the triplet, `groups` the ranks, `phases` the collectives
that a triplet takes, `memory` and `traffic` what they hold and send, `ring` the overlapped hierarchical ring as data,
`ringproof` its checker, `ringtime` its clock, `cost` the choice, `page` the tables.

Planning too: `order` puts phases on lanes, `linkfit` makes speeds of measured times, `decide` takes one flat collective
where that is as fast, `flags` and `settings` are the command line, `manifest` is what a checkpoint says of its run.

Runtime (torch.distributed): `collectives` and `messages` run a phase on process groups, `lanekinds` are streams and
threads, `lanes` runs jobs on them beside the caller, `probe` measures links when a job starts, `stores` is a bucket's
memory, `units` what is whole when.

On upstream: `layout`, `buffers`, `ddp` and `bucketgroup` are its data-parallel wrapper, `optimizer`, `optimizergroups`
and `restore` its distributed optimizer, with model states sharded.
"""

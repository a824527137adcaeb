"""System `data`: the processes that read samples, and the files that they read from."""

from patches.record import Record

RECORDS = (
    Record(
        id="data.workers",
        system="data",
        action="wrap",
        target="megatron.training.datasets.data_samplers:build_pretraining_data_loader",
        aliases=("megatron.training.training:build_pretraining_data_loader",),
        impl="patches.data.workers:end_with_their_rank",
        why="With --exit-signal-handler upstream's data workers ignore SIGTERM, by which Python ends them when their "
        "rank exits and something still holds their iterator (an exception's traceback does): the rank then waits for "
        "them for good.",
        when="patches.conditions:always",
        test="tests/distributed/test_data_workers.py::test_kept_iterators_do_not_keep_their_workers",
        remove_when="upstream shuts its data loaders down at exit, or its workers end when their rank exits",
        stage="start",
    ),
)

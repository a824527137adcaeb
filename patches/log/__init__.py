"""System `log`: log throughput, MFU and peak memory, count FLOPs of documents, compute norms of gathered parameters."""

from patches.hooks import PARAMS_NORM
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="log.throughput",
        system="log",
        action="wrap",
        target="megatron.training.training:training_log",
        impl="patches.log.throughput:with_our_lines",
        why="Upstream's --log-throughput prints TFLOP/s with one digit, and counts only the documents of an interval's "
        "last step. It prints neither tokens per second, nor MFU, nor the largest peak memory of any rank, nor "
        "fragmentation (--log-memory-fragmentation). It writes no record of a step that a program can read "
        "(--start-folder).",
        when="patches.log.throughput:logs_lines",
        test="tests/distributed/test_log.py::test_log_line_tells_tokens_flops_and_memory",
        remove_when="upstream logs tokens per second, MFU and peak memory",
    ),
    Record(
        id="log.documents",
        system="log",
        action="replace",
        target="megatron.training.training:update_seqlen_stats_from_cu_seqlens",
        impl="patches.log.documents:add_documents",
        why="Upstream counts too many FLOPs: it adds the documents of an evaluation to those of the next step, and "
        "with virtual stages it counts a micro-batch several times.",
        when="patches.conditions:always",
        test="tests/distributed/test_log.py::test_flops_are_those_of_the_documents",
        remove_when="upstream counts each micro-batch of a step once",
        stage="start",
    ),
    Record(
        id="log.document-sums",
        system="log",
        action="replace",
        target="megatron.training.training:consume_seqlen_stats_in_iteration",
        impl="patches.log.documents:take_sums",
        reads=("megatron.training.training:num_floating_point_operations",),
        why="Upstream sums the documents over all ranks, and hangs if some ranks have not reported any. In layers with "
        "a sliding window it counts whole documents.",
        when="patches.conditions:always",
        test="tests/distributed/test_log.py::test_flops_are_those_of_the_documents",
        remove_when="upstream counts the visible scores, and its ranks agree whether documents are packed",
        stage="start",
    ),
)

CALLBACKS = (
    Callback(
        id="log.params-norm",
        hook=PARAMS_NORM,
        impl="patches.log.norm:of_gathered",
        reads=("megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.start_param_sync",),
        why="With --overlap-param-gather and without --bf16, --log-params-norm reads parameters before they are "
        "gathered: a rank has the new values of its own shard and the old values of the others.",
        when="patches.log.norm:is_early",
        test="tests/distributed/test_log_figures.py::test_figures_are_those_of_one_rank",
        remove_when="upstream waits for the all-gather before it computes the norm",
    ),
)

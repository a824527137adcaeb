"""System `log`: throughput and peak memory beside upstream's log line, and the norm of gathered parameters."""

from patches.hooks import PARAMS_NORM
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="log.throughput",
        system="log",
        action="wrap",
        target="megatron.training.training:training_log",
        impl="patches.log.throughput:with_throughput_line",
        why="Upstream's --log-throughput prints TFLOP/s to one digit, and neither tokens per second nor the peak "
        "memory of the fullest rank.",
        when="patches.log.throughput:asked_for",
        test="tests/distributed/test_log.py::test_log_line_tells_tokens_flops_and_memory",
        remove_when="upstream's log line carries tokens per second and peak memory",
    ),
)

CALLBACKS = (
    Callback(
        id="log.params-norm",
        hook=PARAMS_NORM,
        impl="patches.log.norm:of_gathered",
        reads=("megatron.core.distributed.distributed_data_parallel:DistributedDataParallel.start_param_sync",),
        why="With --overlap-param-gather and without --bf16, --log-params-norm reads parameters of which a rank has "
        "its own shard of this step alone, and the others of the step before.",
        when="patches.log.norm:is_early",
        test="tests/distributed/test_log_figures.py::test_figures_are_those_of_one_rank",
        remove_when="upstream waits for the gather before it takes the norm",
    ),
)

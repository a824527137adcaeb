"""System `log`: add throughput and peak memory to upstream's log, and compute the norm of gathered parameters."""

from patches.hooks import PARAMS_NORM
from patches.record import Callback, Record

RECORDS = (
    Record(
        id="log.throughput",
        system="log",
        action="wrap",
        target="megatron.training.training:training_log",
        impl="patches.log.throughput:with_throughput_line",
        why="Upstream's --log-throughput prints TFLOP/s with one digit, but neither tokens per second nor the "
        "largest peak memory of any rank.",
        when="patches.log.throughput:asked_for",
        test="tests/distributed/test_log.py::test_log_line_tells_tokens_flops_and_memory",
        remove_when="upstream logs tokens per second and peak memory",
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

"""System `log`: the figures that long-sequence training is judged by, beside upstream's own log line."""

from patches.record import Record

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

"""The end of a dry run: build the model and the optimizer on the meta device, print the rank's memory, and exit."""

from collections.abc import Callable
from typing import Any


def on_meta_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `setup_model_and_optimizer`: afterwards, print what the rank would hold, and end the process with status 0.

    Raises:
        SystemExit: always; a dry run does not train.
    """

    def setup_model_and_optimizer(*args: Any, **named: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.training import get_args

        from megatron.longseq.dry_run.measure import measure
        from megatron.longseq.dry_run.meta_device import TensorsOnMeta, single_process
        from megatron.longseq.dry_run.report import report
        from megatron.longseq.refusals import explained_refusals

        with single_process(), TensorsOnMeta():
            with explained_refusals("the model of these flags"):
                model, optimizer, _ = original(*args, **named)
            memory = measure(get_args(), model, optimizer)
        place = {
            "tensor": parallel_state.get_tensor_model_parallel_rank(),
            "context": parallel_state.get_context_parallel_rank(),
            "data": parallel_state.get_data_parallel_rank(),
            "pipeline": parallel_state.get_pipeline_model_parallel_rank(),
        }
        print(report(get_args(), place, memory), flush=True)
        raise SystemExit(0)

    return setup_model_and_optimizer

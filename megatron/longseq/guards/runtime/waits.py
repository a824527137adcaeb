"""Say what a thread waits for, in terms of the schedule, from the Python frames that it is in.

A wait costs nothing while the run is healthy: nothing is recorded ahead of it. Frames are found by the module and the
name of their function, and their local variables hold the action, the process group and the peer.
"""

import linecache
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist

SLOW_PARTS = (  # these may take long without a step; `--first-step-timeout-minutes` is their limit
    "save_checkpoint",
    "load_checkpoint",
    "maybe_finalize_async_save",
    "build_train_valid_test_data_iterators",
)
PARTS = (*SLOW_PARTS, "evaluate", "train_step", "train", "setup_model_and_optimizer", "initialize_megatron")
OUTSIDE = "outside of training"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"
P2P = "megatron.core.pipeline_parallel.p2p_communication"
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "_coalescing_manager",
)
NAMES = {"_coalescing_manager": "several collectives"}  # data-parallel gradients, and others that are started at once
LIBRARIES = {"torch", *sys.stdlib_module_names}
Describe = Callable[[dict[str, Any]], str | None]


def frames_of(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a thread, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def part_of_run(frame: FrameType | None) -> str:
    """Return the part of the run that a thread is in, by the name of upstream's innermost function for it."""
    for one in frames_of(frame):
        if one.f_code.co_name in PARTS and _module(one).startswith("megatron."):
            return one.f_code.co_name
    return OUTSIDE


def describe_wait(frame: FrameType | None) -> str:
    """Describe what a thread is doing: the action of its schedule, then what it waits for, then the line of code."""
    found: dict[str, str] = {}
    for one in frames_of(frame):
        for kind, text in _of_frame(one):
            found.setdefault(kind, text)
    if frame is not None and not {"message", "collective"} & found.keys() and _waits_for_a_handle(frame):
        found["message"] = "waits until messages between ranks have arrived"
    found.setdefault("line", describe_line(frame))
    if "action" in found.get("schedule", ""):  # it names the micro-batch itself
        found.pop("pass", None)
    return "; ".join(found[kind] for kind in ("schedule", "pass", "message", "collective", "line") if kind in found)


def _waits_for_a_handle(frame: FrameType) -> bool:
    """Return whether a thread is in `handle.wait()`. That is no function of Python, so only the line of code tells."""
    is_between_ranks = _module(frame).startswith(("megatron.core.", "torch.distributed."))
    return is_between_ranks and ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def describe_line(frame: FrameType | None) -> str:
    """Name the innermost line outside of Python's library and torch."""
    own = [one for one in frames_of(frame) if _module(one).partition(".")[0] not in LIBRARIES]
    for one in own or list(frames_of(frame))[:1]:
        return f"in {one.f_code.co_name} ({one.f_code.co_filename}:{one.f_lineno})"
    return "its main thread has ended"


def _of_frame(frame: FrameType) -> Iterator[tuple[str, str]]:
    module, name = _module(frame), frame.f_code.co_name
    known = _KNOWN.get((module, name))
    if known is not None:
        kind, describe = known
        text = _try(describe, frame)
        if text:
            yield kind, text
    elif module == P2P and name.startswith(("recv", "send")):
        yield "message", _try(lambda local: _upstream_message(name, local), frame) or name
    elif module == "torch.distributed.distributed_c10d" and name in COLLECTIVES:
        yield "collective", _try(lambda local: _collective(name, local), frame) or f"waits in {NAMES.get(name, name)}"
    elif module == SCHEDULES and name.startswith("forward_backward"):
        yield "schedule", _try(_upstream_schedule, frame) or f"in {name}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _try(describe: Describe, frame: FrameType) -> str | None:
    """Describe a frame's local variables; None if they are not there yet, or are others than expected."""
    try:
        return describe(frame.f_locals)
    except Exception:
        return None


def _our_action(local: dict[str, Any]) -> str | None:
    executor, action, index = local["self"], local["action"], local["index"]
    stage = executor.pipeline.stage(executor.rank, action.vstage)
    text = f"stage {stage}, action {index + 1} of {len(executor.order)} ({action})"
    wait = executor.reporter.current()
    return text if wait is None else f"{text}, waits for {wait.what} from rank {wait.peer}"


def _our_end(local: dict[str, Any]) -> str | None:
    wait = local["self"].last_send
    return None if wait is None else f"waits until its last message, the output of the {wait.action}, has left"


def _upstream_schedule(local: dict[str, Any]) -> str | None:
    group = getattr(local.get("p2p_communicator"), "pp_group", None)
    stage = f"stage {group.rank()}, " if group is not None else ""
    count = local.get("num_microbatches")
    is_evaluation = " (evaluation)" if local.get("forward_only") else ""
    text = f"{stage}upstream's schedule of {count} micro-batches{is_evaluation}"
    if "i" not in local or "num_warmup_microbatches" not in local:
        return text
    turn, warmup, alive = local["i"], local["num_warmup_microbatches"], local.get("input_tensors") or ()
    # Its three loops share the variable i. Only the second one sets last_iteration, and the third one empties a list.
    if "last_iteration" not in local:
        return f"{text}, warm-up, micro-batch {turn}"
    if local["last_iteration"] and not local.get("forward_only") and len(alive) < warmup:
        return f"{text}, cool-down, backward of micro-batch {count - warmup + turn}"
    return f"{text}, steady phase, forward of micro-batch {turn + warmup} and backward of micro-batch {turn}"


def _upstream_pass(local: dict[str, Any]) -> str | None:
    return f"forward of micro-batch {local['current_microbatch']}"


def _upstream_message(name: str, local: dict[str, Any]) -> str | None:
    communicator = local["self"]
    before, after = communicator.prev_rank, communicator.next_rank
    parts = []
    if "recv_forward" in name:
        parts.append(f"hidden states from rank {before}")
    if "recv_backward" in name:
        parts.append(f"a gradient from rank {after}")
    if "send_forward" in name:
        parts.append(f"rank {after} to take hidden states")
    if "send_backward" in name:
        parts.append(f"rank {before} to take a gradient")
    return f"waits for {' and '.join(parts)} ({name})"


def _collective(name: str, local: dict[str, Any]) -> str | None:
    group = local.get("group") or local.get("pg")
    peer = next((local[key] for key in ("src", "dst") if local.get(key) is not None), None)
    ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    label = getattr(group, "group_desc", None)
    where = f" (group {label})" if label and label != "undefined" else ""
    if name in ("send", "recv"):
        return f"waits in {name} with rank {peer}{where}"
    return f"waits in {NAMES.get(name, name)} with ranks {_ranks(ranks)}{where}"


def _ranks(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _our_collectives(local: dict[str, Any]) -> str | None:
    return f"waits for the collectives of {local['submission'].label}"


def _sharded_task(local: dict[str, Any]) -> str | None:
    collective, submission = local["collective"], local["submission"]
    return f"{collective.kind} {collective.scope} of {submission.label}" if collective else None


_KNOWN: dict[tuple[str, str], tuple[str, Describe]] = {
    ("megatron.longseq.pipeline.runtime.executor", "_run"): ("schedule", _our_action),
    ("megatron.longseq.pipeline.runtime.p2p", "close"): ("message", _our_end),
    ("megatron.longseq.sharding.runtime.comm_queue", "_wait"): ("collective", _our_collectives),
    ("megatron.longseq.sharding.runtime.comm_queue", "task"): ("schedule", _sharded_task),
    (SCHEDULES, "forward_step"): ("pass", _upstream_pass),
}

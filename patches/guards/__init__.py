"""System `guards`: non-finite gradients, loss spikes, stalls, and requests to stop inside an evaluation or a save."""

from patches.hooks import FORWARD_BACKWARD, INITIALIZE, READ_CHECKPOINT
from patches.record import Callback, Record

_CONDITIONS = "megatron.longseq.guards.arguments"
_NONFINITE = "tests/distributed/test_guards.py::test_nan_is_located_under_every_system"
_SPIKES = "tests/distributed/test_guards.py::test_spike_is_skipped_on_all_ranks_and_after_resuming"
_STOPS = "tests/distributed/test_guards.py::test_request_to_stop_ends_an_evaluation"

RECORDS = (
    Record(
        id="guards.gradients",
        system="guards",
        action="wrap",
        target="megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.check_grads",
        impl="patches.guards.runtime:recording_norms",
        reads=("megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",),
        why="Upstream's check of a bucket waits for the device twice, names a bucket by its number, and does not act "
        "in the first step of a process.",
        when=f"{_CONDITIONS}:locates_gradients",
        test=_NONFINITE,
        remove_when="upstream names parameter and micro-batch of a gradient that is not finite",
    ),
    Record(
        id="guards.backward",
        system="guards",
        action="wrap",
        target="megatron.core.pipeline_parallel.schedules:backward_step",
        impl="patches.guards.runtime:noting_backwards",
        reads=(
            "megatron.core.pipeline_parallel.schedules:get_schedule_table",
            "megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining",
        ),
        why="Upstream does not say which micro-batch made a gradient NaN: gradients are sums over micro-batches.",
        when=f"{_CONDITIONS}:follows_steps",
        test=_NONFINITE,
        remove_when="upstream's schedules call a hook after each micro-batch",
    ),
    Record(
        id="guards.update",
        system="guards",
        action="wrap",
        target="megatron.training.training:train_step",
        impl="patches.guards.runtime:with_judged_update",
        why="Upstream's check of spikes repeats a step, but can neither skip its update nor stop before it.",
        when=f"{_CONDITIONS}:judges_losses",
        test=_SPIKES,
        remove_when="upstream calls a hook between the passes of a step and its update",
    ),
    Record(
        id="guards.evaluation",
        system="guards",
        action="wrap",
        target="megatron.training.training:evaluate",
        impl="patches.guards.stopping:ending_early",
        why="Upstream looks for a request to stop only after a training step. An evaluation may last longer than a "
        "scheduler waits. If its time limit cuts an evaluation off, the next one fails, and a run that resumes "
        "evaluates other samples.",
        when=f"{_CONDITIONS}:cuts_evaluations_off",
        test=_STOPS,
        remove_when="upstream looks for a request to stop in its evaluations",
    ),
    Record(
        id="guards.save",
        system="guards",
        action="wrap",
        target="megatron.training.training:checkpoint_and_decide_exit",
        impl="patches.guards.stopping:stopping_after_a_save",
        why="If the request to stop comes while a checkpoint is saved, upstream trains another step and saves again.",
        when=f"{_CONDITIONS}:stops_early",
        test="tests/distributed/test_guards.py::test_a_run_that_is_asked_to_stop_loses_nothing",
        remove_when="upstream looks for a request to stop after a save",
    ),
)

CALLBACKS = (
    Callback(
        id="guards.steps",
        hook=FORWARD_BACKWARD,
        impl="patches.guards.runtime:with_guarded_passes",
        reads=("megatron.core.rerun_state_machine:RerunStateMachine.validate_result",),
        why="Whether gradients are finite has to be known on all ranks before the optimizer's step, and requests to "
        "stop before a step of an evaluation.",
        when="patches.guards.runtime:acts_in_passes",
        test=_NONFINITE,
        remove_when="upstream calls hooks around the passes of a step",
    ),
    Callback(
        id="guards.monitor",
        hook=INITIALIZE,
        impl="patches.guards.monitor:with_stall_monitor",
        why="If a rank hangs, upstream's job waits until the backend times out, and does not say which rank, nor what "
        "the others wait for.",
        when=f"{_CONDITIONS}:watches_stalls",
        test="tests/distributed/test_guards.py::test_stall_is_reported_in_terms_of_the_schedule",
        remove_when="upstream reports what each rank waits for and ends the job",
    ),
    Callback(
        id="guards.history",
        hook=READ_CHECKPOINT,
        impl="patches.guards.runtime:continuing_history",
        why="A run that resumes must judge losses as one that was never interrupted.",
        when=f"{_CONDITIONS}:judges_losses",
        test=_SPIKES,
        remove_when="upstream keeps the last losses in its checkpoints",
    ),
)

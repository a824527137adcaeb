"""Flags of the guards, and numbers that they refuse."""

import math
from argparse import ArgumentParser, Namespace
from typing import Any

from megatron.longseq.refusals import is_dry_run, refuse_without_effect

POLICIES, POLICY = ("off", "warn", "skip", "stop"), "warn"
THRESHOLD, WINDOW = 10.0, 100
SMALLEST_WINDOW, LARGEST_WINDOW = 8, 100_000  # checkpoints hold the losses
FIRST_STEP = 60.0  # minutes
SHORTEST, LONGEST = 0.01, 1e6  # minutes; the monitor looks every 0.2 s, and threads cannot wait much longer
OF_BACKEND = 0.9  # default of --stall-timeout-minutes, as a part of --distributed-timeout-minutes


def add_guard_arguments(parser: ArgumentParser) -> None:
    """Add the group of arguments of the guards."""
    group = parser.add_argument_group(title="longseq: guards")
    group.add_argument(
        "--no-locate-nonfinite-gradients",
        action="store_false",
        dest="locate_nonfinite_gradients",
        help="leave upstream's check for NaN and Inf (--no-check-for-nan-in-loss-and-grad) as it is; by default it "
        "names rank, parameter and micro-batch, on all ranks at once, and checks the first step too",
    )
    group.add_argument(
        "--loss-spike-policy",
        choices=POLICIES,
        default=POLICY,
        help="what a loss spike causes: a warning, a step that does not change the model (its samples are consumed), "
        "or the end of the run before the model changes (default: %(default)s)",
    )
    group.add_argument(
        "--loss-spike-threshold",
        type=float,
        default=THRESHOLD,
        metavar="SCORE",
        help="robust standard deviations above the median of the last losses from which a loss is a spike (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--loss-spike-window",
        type=int,
        default=WINDOW,
        metavar="STEPS",
        help="number of losses that a loss is compared with, once half of them are there (default: %(default)s)",
    )
    group.add_argument(
        "--stall-timeout-minutes",
        type=float,
        metavar="MINUTES",
        help="end the job if a rank makes no progress for so long in a step or an evaluation, after reporting what "
        f"every rank waits for; 0: never (default: {OF_BACKEND} times --distributed-timeout-minutes)",
    )
    group.add_argument(
        "--first-step-timeout-minutes",
        type=float,
        default=FIRST_STEP,
        metavar="MINUTES",
        help="the same limit from the start to the end of the first step, and while a checkpoint is saved or loaded; "
        "0: never (default: %(default)s)",
    )


def check_guard_numbers(args: Namespace) -> None:
    """Refuse numbers that are out of range, and flags without effect.

    Raises:
        ValueError: names the flag.
    """
    window, threshold = getattr(args, "loss_spike_window", WINDOW), getattr(args, "loss_spike_threshold", THRESHOLD)
    if window < SMALLEST_WINDOW:
        raise ValueError(f"--loss-spike-window {window}: a median needs losses; give at least {SMALLEST_WINDOW}.")
    if window > LARGEST_WINDOW:
        raise ValueError(f"--loss-spike-window {window}: checkpoints hold its losses; give at most {LARGEST_WINDOW}.")
    if not (math.isfinite(threshold) and threshold > 0):
        raise ValueError(f"--loss-spike-threshold {threshold:g}: give a number of standard deviations above 0.")
    if getattr(args, "loss_spike_policy", "off") == "off":
        off = "--loss-spike-policy is off"
        refuse_without_effect(args, off, loss_spike_threshold=THRESHOLD, loss_spike_window=WINDOW)
    _refuse_graphs_of_whole_steps(args)
    for flag in ("stall_timeout_minutes", "first_step_timeout_minutes"):
        minutes = getattr(args, flag, None)
        if minutes is not None and minutes != 0 and not SHORTEST <= minutes <= LONGEST:
            name = flag.replace("_", "-")
            raise ValueError(
                f"--{name} {minutes:g}: give minutes from {SHORTEST:g} to {LONGEST:g}, or 0, which sets no limit."
            )


def _refuse_graphs_of_whole_steps(args: Namespace) -> None:
    defaults = {"policy": POLICY, "threshold": THRESHOLD, "window": WINDOW}
    for name, default in defaults.items():
        value = getattr(args, f"loss_spike_{name}", default)
        if _graphs_whole_steps(args) and value not in (default, "off"):
            raise ValueError(
                f"--loss-spike-{name} {value}: with --cuda-graph-impl full_iteration no loss is judged, because the "
                "host has no part in a step; leave one of the two out."
            )


def _graphs_whole_steps(args: Namespace) -> bool:
    return bool(getattr(args, "cuda_graph_impl", "none") == "full_iteration")  # the host has no part in a step


def locates_gradients(args: Namespace | None) -> bool:
    """Return whether non-finite gradients are located. Upstream switches its check off with dynamic loss scaling."""
    if args is None or is_dry_run(args) or _graphs_whole_steps(args):
        return False
    wanted: tuple[Any, ...] = (
        getattr(args, "locate_nonfinite_gradients", False),
        getattr(args, "check_for_nan_in_loss_and_grad", False),
    )
    return all(wanted) and getattr(args, "rerun_mode", "disabled") != "report_stats"


def judges_losses(args: Namespace | None) -> bool:
    """Return whether losses are compared with those before them."""
    if args is None or is_dry_run(args) or _graphs_whole_steps(args):
        return False
    return bool(getattr(args, "loss_spike_policy", "off") != "off")


def guards_steps(args: Namespace | None) -> bool:
    """Return whether gradients or losses are examined."""
    return locates_gradients(args) or judges_losses(args)


def stall_limits(args: Namespace) -> tuple[float, float]:
    """Return the limits of a stall in seconds, in steps and outside of them; 0: none."""
    in_steps = getattr(args, "stall_timeout_minutes", None)
    if in_steps is None:
        in_steps = OF_BACKEND * getattr(args, "distributed_timeout_minutes", 10)
    return 60 * in_steps, 60 * getattr(args, "first_step_timeout_minutes", 0.0)


def watches_stalls(args: Namespace | None) -> bool:
    """Return whether the ranks are watched for stalls."""
    return args is not None and not is_dry_run(args) and any(stall_limits(args))


def follows_steps(args: Namespace | None) -> bool:
    """Return whether anything here acts in the steps of a run."""
    return guards_steps(args) or watches_stalls(args)


def stops_early(args: Namespace | None) -> bool:
    """Return whether requests to stop are looked for in evaluations and after saves."""
    return bool(getattr(args, "exit_signal_handler", False)) and not is_dry_run(args)


def cuts_evaluations_off(args: Namespace | None) -> bool:
    """Return whether an evaluation may end before its last step: on a request to stop, or at the time limit."""
    has_limit = bool(getattr(args, "exit_duration_in_mins", None)) and not is_dry_run(args)
    return stops_early(args) or has_limit

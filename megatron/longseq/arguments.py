"""Add this project's command-line flags to upstream's parser, one argument group per system."""

import argparse
import json
import math
import os
from pathlib import Path

from megatron.longseq.attention.arguments import add_context_arguments, check_context_numbers
from megatron.longseq.checkpoints.arguments import add_checkpoint_arguments
from megatron.longseq.cross_entropy.arguments import add_cross_entropy_arguments, check_cross_entropy_numbers
from megatron.longseq.dry_run.arguments import add_dry_run_arguments, check_dry_run
from megatron.longseq.flexsp.arguments import add_flexsp_arguments, check_flexsp_numbers
from megatron.longseq.guards.arguments import add_guard_arguments, check_guard_numbers
from megatron.longseq.pipeline.arguments import add_pipeline_arguments, check_pipeline_numbers
from megatron.longseq.refusals import refuse_unwritable, refuse_without_effect
from megatron.longseq.sharding.arguments import add_sharding_arguments, check_sharding_numbers

START_FOLDER = "LONGSEQ_START_FOLDER"  # scripts/lib/rank.py sets it
ARGUMENTS = "arguments.json"
# Upstream's flags that are numbers of steps. Without a value they have no effect; upstream does not check the value.
INTERVALS = (
    "log_interval",
    "tensorboard_log_interval",
    "log_memory_interval",
    "eval_interval",
    "save_params_interval",
    "save_activations_interval",
    "save_tokens_per_expert_interval",
    "save_wgrads_interval",
    "save_dgrads_interval",
    "non_persistent_save_interval",
    "check_weight_hash_across_dp_replicas_interval",
    "gpu_sniff_test_interval",
    "adlr_autoresume_interval",
)


def add_longseq_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of every system to upstream's parser.

    Args:
        parser: upstream's parser.

    Returns:
        The same parser, as upstream's `extra_args_provider` requires.
    """
    _add_record_arguments(parser)
    _add_log_arguments(parser)
    add_checkpoint_arguments(parser)
    add_pipeline_arguments(parser)
    add_context_arguments(parser)
    add_sharding_arguments(parser)
    add_cross_entropy_arguments(parser)
    add_dry_run_arguments(parser)
    add_flexsp_arguments(parser)
    add_guard_arguments(parser)
    return parser


def validate_longseq_arguments(args: argparse.Namespace) -> None:
    """Refuse unsupported combinations of flags. Runs after parsing, before any process group exists.

    Raises:
        ValueError: a flag is not supported. The message names it, the reason and what to do.
    """
    check_dry_run(args)
    _check_intervals(args)
    _check_home(args)
    _validate_record_arguments(args)
    _check_log_arguments(args)
    _check_save(args)
    _check_checkpoint_step(args)
    _check_checkpoint_kinds(args)
    check_pipeline_numbers(args)
    check_context_numbers(args)
    check_sharding_numbers(args)
    check_cross_entropy_numbers(args)
    check_flexsp_numbers(args)
    check_guard_numbers(args)


def write_arguments_files(args: argparse.Namespace) -> None:
    """Write all arguments as sorted JSON to `--arguments-file` and into `--start-folder`, where they are given.

    Values without a JSON form are written as text.
    """
    file, folder = getattr(args, "arguments_file", None), getattr(args, "start_folder", None)
    text = json.dumps(vars(args), indent=1, sort_keys=True, default=str) + "\n"
    for path in ([Path(file)] if file else []) + ([Path(folder, ARGUMENTS)] if folder else []):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _add_record_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="longseq: record of a run")
    group.add_argument(
        "--arguments-file",
        metavar="FILE",
        help="write every argument, as upstream resolved it, to this file (JSON) when the run starts",
    )
    group.add_argument(
        "--start-folder",
        metavar="FOLDER",
        default=os.environ.get(START_FOLDER),
        help="print one line for each logged step, and write the same to steps.jsonl in this folder, beside "
        "arguments.json and a measured timeline (default: the folder of this start, if scripts/launch.sh started it)",
    )


def _add_log_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(title="longseq: log")
    group.add_argument(
        "--peak-tflops-per-gpu",
        type=float,
        metavar="TFLOPS",
        help="peak of a GPU in TFLOP/s, for the MFU in the log (default: by the device's name, dense bf16)",
    )
    group.add_argument(
        "--log-memory-fragmentation",
        action="store_true",
        help="log once per log interval how much GPU memory is reserved but not allocated, the most of all ranks",
    )


def _check_log_arguments(args: argparse.Namespace) -> None:
    peak = getattr(args, "peak_tflops_per_gpu", None)
    if peak is None:
        return
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"--peak-tflops-per-gpu {peak:g}: the peak of a GPU in TFLOP/s is a number above 0.")
    if not (getattr(args, "log_throughput", False) or getattr(args, "start_folder", None)):
        refuse_without_effect(args, "--log-throughput is not given", peak_tflops_per_gpu=None)


def _validate_record_arguments(args: argparse.Namespace) -> None:
    folder = getattr(args, "start_folder", None)
    if folder is not None:
        if not folder:
            raise ValueError("--start-folder is empty; name a folder, or leave it out.")
        refuse_unwritable(f"--start-folder {folder}", Path(folder), "name a folder that is writable, or new")
    if getattr(args, "arguments_file", None) is None:
        return
    flag = f"--arguments-file {args.arguments_file}"
    if not args.arguments_file or Path(args.arguments_file).is_dir():
        raise ValueError(f"{flag}: this is not a file name. Give a file in a writable folder.")
    refuse_unwritable(flag, Path(args.arguments_file).absolute().parent, "give a file in a writable folder")


def _check_intervals(args: argparse.Namespace) -> None:
    """Refuse numbers of steps by which upstream would divide in the middle of a run, and a number of workers below 0.

    Raises:
        ValueError: names the flag.
    """
    least = {**dict.fromkeys(INTERVALS, 1), "num_workers": 0}
    for name, smallest in least.items():
        value = getattr(args, name, None)
        if value is not None and value < smallest:
            advice = "; --eval-iters 0 switches evaluation off" if name == "eval_interval" else ""
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least {smallest}{advice}.")


def _check_home(args: argparse.Namespace) -> None:
    """Refuse values that begin with ~/. Shells do not expand it in --flag=~/x, and a folder ~ would be made."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            if isinstance(one, str) and one.startswith("~/"):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {one}: the shell has not expanded ~; leave out the =, or write the path.")


def _check_save(args: argparse.Namespace) -> None:
    """Refuse a --save path that is not a writable folder. Upstream would fail only at its first save."""
    save = getattr(args, "save", None)
    if save and "://" not in save and getattr(args, "rank", 0) == 0:
        refuse_unwritable(f"--save {save}", Path(save), "give a writable folder, or one that can be created")


def _check_checkpoint_step(args: argparse.Namespace) -> None:
    """Refuse a --ckpt-step that names no checkpoint: upstream would train from the beginning, or load the latest."""
    step = getattr(args, "ckpt_step", None)
    if step is not None and step < 1:
        raise ValueError(
            f"--ckpt-step {step}: give the iteration of a checkpoint, 1 or more, or leave it out to load the latest."
        )


def _check_checkpoint_kinds(args: argparse.Namespace) -> None:
    """Refuse values with which upstream would fail only at its first save, or after loading.

    Raises:
        ValueError: names the flag.
    """
    interval = getattr(args, "non_persistent_save_interval", None)
    if interval and getattr(args, "non_persistent_ckpt_type", "") is None:
        raise ValueError(
            f"--non-persistent-save-interval {interval}: --non-persistent-ckpt-type is not given, so nothing can be "
            "saved; give --non-persistent-ckpt-type global, or leave both out."
        )
    strictness = getattr(args, "dist_ckpt_strictness", None) or ""
    if strictness.startswith("return_"):
        raise ValueError(
            f"--dist-ckpt-strictness {strictness}: upstream's training cannot use what it returns; give log_all to "
            "list what differs."
        )

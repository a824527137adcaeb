"""Explain settings that differ between a run and the checkpoint that it loads."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

ADAM = ("adam_beta1", "adam_beta2", "adam_eps")  # settings that the optimizer takes from the checkpoint
MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "swiglu",
    "add_bias_linear",
    "normalization",
    "position_embedding_type",
    "untie_embeddings_and_output_weights",
)  # settings on which shapes and names of parameters depend
WEIGHTS_ONLY = "give --no-load-optim to load the weights only and start with new optimizer states."
FLAGS = {"max_lr": "--lr", "min_lr": "--min-lr"}  # by the name of the setting in a parameter group


def explain_group_mismatch(keys: Sequence[str], wanted: Sequence[Any], saved: Sequence[Mapping[str, Any]]) -> str:
    """Explain why a parameter group of this run is not among the saved ones.

    Args:
        keys: names of the settings by which upstream identifies a group.
        wanted: their values in this run.
        saved: the parameter groups of the checkpoint.

    Returns:
        A message that names each setting that differs from the most similar saved group.
    """

    def differing(group: Mapping[str, Any]) -> list[str]:
        pairs = [(key, value, group.get(key, group.get(f"pre_{key}"))) for key, value in zip(keys, wanted, strict=True)]
        return [f"{FLAGS.get(key, key)} is {ours}, was {theirs}" for key, ours, theirs in pairs if ours != theirs]

    nearest = min((differing(group) for group in saved), key=len, default=["the checkpoint has no parameter groups"])
    return (
        f"the optimizer cannot continue from the checkpoint: {'; '.join(nearest)}. Upstream identifies the saved "
        "parameter groups by these values, even with --override-opt-param-scheduler. Give the saved values, or "
        f"{WEIGHTS_ONLY}"
    )


def explain_other_optimizer(saved: Any, args: Namespace) -> str | None:
    """Explain why optimizer states cannot be loaded if one run has a distributed optimizer and the other one has not.

    Args:
        saved: the arguments in the checkpoint.
        args: upstream's arguments of this run, which could not load it.
    """
    before, now = (getattr(one, "use_distributed_optimizer", None) for one in (saved, args))
    if before is None or before == now or args.finetune or args.no_load_optim or getattr(saved, "no_save_optim", False):
        return None
    flag = "--use-distributed-optimizer (which --paro sets)"
    return (
        f"the optimizer cannot continue from the checkpoint: it was saved {'with' if before else 'without'} {flag}, "
        f"and this run is {'with' if now else 'without'} it. Do as that run did, or {WEIGHTS_ONLY}"
    )


def explain_other_model(saved: Namespace | None, args: Namespace) -> str | None:
    """Explain why a checkpoint cannot be loaded into this run's model.

    Args:
        saved: the arguments in the checkpoint; None if they are not known.
        args: upstream's arguments of this run.

    Returns:
        The settings that differ, or None if the models are the same.
    """
    changes = [] if saved is None else _changes(saved, args, MODEL)
    return (
        f"it holds another model: {'; '.join(changes)}. Give the saved values, or another --load" if changes else None
    )


def describe_changed_flags(saved: Namespace, args: Namespace) -> list[str]:
    """Describe flags that differ from those of a checkpoint and that upstream does not compare.

    Args:
        saved: the arguments in the checkpoint.
        args: upstream's arguments of this run, which loads it.

    Returns:
        One line for each flag: its two values, and what follows from the change.
    """
    lines = []
    if not (args.no_load_optim or args.finetune) and args.optimizer == getattr(saved, "optimizer", None) == "adam":
        lines = [
            f"{change}. The optimizer continues with the saved value; give --no-load-optim to start with new optimizer "
            "states"
            for change in _changes(saved, args, ADAM)
        ]
    for change in _changes(saved, args, ("vocab_size", "padded_vocab_size")):
        lines.append(
            f"{change}. Embedding and output layer keep the saved rows that both sizes have; additional rows are zero"
        )
        break  # the padded size follows from the other one
    return lines


def _changes(saved: Namespace, args: Namespace, names: Sequence[str]) -> list[str]:
    values = [(name, getattr(args, name, None), getattr(saved, name, None)) for name in names]
    return [
        f"--{name.replace('_', '-')} is {ours}, was {theirs}"
        for name, ours, theirs in values
        if None not in (ours, theirs) and ours != theirs
    ]

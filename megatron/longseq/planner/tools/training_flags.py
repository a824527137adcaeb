"""The flags of --training-flags: those of a run that the planner does not choose."""

import shlex
from collections.abc import Sequence
from typing import Any

from megatron.longseq.planner.plan import configuration
from megatron.longseq.planner.plan.flags import FURTHER, OWN, REFUSED_HERE, canonical, known_flags
from megatron.longseq.planner.plan.model import FIELDS as MODEL_FIELDS
from megatron.longseq.planner.plan.model import Architecture
from megatron.longseq.planner.plan.values import boolean, whole_number
from megatron.longseq.planner.tools.predict_command import flags_of

_FLAG = "--training-flags"
# What a run may choose itself: kernels and masks, which no plan sets. Plans are priced with them.
_KERNELS = (
    *("gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion", "deterministic_mode"),
    "create_attention_mask_in_dataloader",
)


def join_training_flags(words: Sequence[str]) -> list[str]:
    """Return a command line in which the value of --training-flags, which begins with dashes, belongs to it."""
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        found.append(f"{word}={rest.pop(0)}" if word == _FLAG and rest else word)
    return found


def is_planned(name: str) -> bool:
    """Return whether a flag is one that a plan sets, or one that changes its price otherwise than by another kernel.

    Args:
        name: the flag, in any spelling.
    """
    key, _ = canonical(name)
    if key is None or key in _KERNELS:
        return False
    priced = key in configuration.FIELDS or key in MODEL_FIELDS or key in FURTHER
    return priced or key in (*OWN, *REFUSED_HERE) or key.startswith("flexsp")


def training_words(text: str | None, model: Architecture) -> tuple[str, ...]:
    """Return the words of --training-flags.

    Args:
        text: its value; None: it is not given.
        model: the architecture that is planned.

    Raises:
        ValueError: a quotation is not closed, a flag is unknown or not modelled, or a plan sets it.
    """
    try:
        words = tuple(shlex.split(text or ""))
    except ValueError as error:
        raise ValueError(f"{_FLAG} {text}: {error}") from error
    try:
        flags = flags_of(words)
        twice = sorted(_spelled(name) for name, value in flags.items() if _contradicts(name, value, model))
        if not twice:
            known_flags(flags)
    except ValueError as error:
        raise ValueError(f"{_FLAG}: {error}") from error
    if twice:
        raise ValueError(
            f"{_FLAG}: a plan sets {', '.join(twice)}, or its price depends on it, so the launch command would "
            "contradict the plan; leave it out, or restrict the search"
        )
    return words


def kernel_flags(words: Sequence[str]) -> dict[str, bool]:
    """Return the flags of kernels among some words, with which plans are priced.

    Args:
        words: those of `training_words`.
    """
    known = known_flags(flags_of(words))
    return {name: boolean(name, known[name]) for name in _KERNELS if name in known}


def _spelled(name: str) -> str:
    return name.replace("_", "-")


def _contradicts(name: str, value: Any, model: Architecture) -> bool:
    """Return whether a flag could say something else than the plan. A tokenizer may need the priced vocabulary."""
    if canonical(name)[0] == "vocab_size" and model.vocab_size:
        return whole_number(name, value) != model.vocab_size
    return is_planned(name)

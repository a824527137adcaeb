"""Compute the losses of upstream's GPTModel in chunks, through the call of its own output layer.

The layer is called as upstream calls it, so that hooks run that gather its weight (upstream's overlapped all-gather,
PaRO) and all settings are the layer's own. For this call the function that multiplies by the weight is another one: it
returns losses where upstream's returns logits.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import layers

from megatron.longseq.cross_entropy.runtime.function import ChunkedLossCall, chunked_cross_entropy

type Tensor = torch.Tensor

FLAG = "--cross-entropy-chunk-tokens"


@dataclass(frozen=True, slots=True)
class ChunkedLoss:
    """An `output_processor` of upstream's GPTModel: from hidden states to losses.

    Attributes:
        chunk_tokens: tokens whose logits are computed at once.
        needs_gradient: see `ChunkedLossCall`.
    """

    chunk_tokens: int
    needs_gradient: bool = True

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        output_layer: layers.ColumnParallelLinear,
        output_weight: Tensor | None,
        labels: Tensor,
        runtime_gather_output: bool | None,
        config: Any,
        **_: Any,
    ) -> Tensor:
        """Return the losses.

        Args:
            hidden_states: [sequence, batch, hidden]; under sequence parallelism this rank's shard of the sequence.
            output_layer: the model's.
            output_weight: weight of a tied embedding on this stage; None: the layer has its own.
            labels: [batch, sequence].
            runtime_gather_output: whether the caller wants the logits of all tensor-parallel ranks.
            config: the model's.

        Returns:
            Losses, [batch, sequence].

        Raises:
            ValueError: the caller wants whole logits.
        """
        if runtime_gather_output:
            raise ValueError(
                f"{FLAG}: the script calls the model with labels and runtime_gather_output=True, which gathers whole "
                "logits; leave it out"
            )
        scale = config.mup_output_mult if config.use_mup else 1.0
        multiply = self._multiply(labels.transpose(0, 1).contiguous(), scale)
        with _forward_impl(output_layer, multiply):
            losses, _bias = output_layer(hidden_states, weight=output_weight)
        return losses.transpose(0, 1).contiguous()  # type: ignore[no-any-return]

    def _multiply(self, labels: Tensor, scale: float) -> Callable[..., Tensor]:
        """Return a function with the arguments of `ColumnParallelLinear._forward_impl` that returns losses."""

        def multiply(
            input: Tensor,
            weight: Tensor,
            *,
            gradient_accumulation_fusion: bool,
            allreduce_dgrad: bool,
            sequence_parallel: bool,
            tp_group: Any,
            **_: Any,
        ) -> Tensor:
            if torch.is_autocast_enabled(input.device.type):
                raise RuntimeError(f"{FLAG}: the model runs under autocast, which chunks do not support; leave one out")
            call = ChunkedLossCall(
                self.chunk_tokens,
                tp_group,
                gathers=sequence_parallel,
                reduces=allreduce_dgrad,
                fused=gradient_accumulation_fusion,
                needs_gradient=self.needs_gradient,
                scale=scale,
            )
            return chunked_cross_entropy(input, weight, labels, call)

        return multiply


@contextmanager
def _forward_impl(layer: layers.ColumnParallelLinear, function: Callable[..., Tensor]) -> Iterator[None]:
    """Let one layer multiply by another function. Zero-bubble schedules may have set one of their own."""
    before = layer.__dict__.get("_forward_impl")
    layer._forward_impl = function
    try:
        yield
    finally:
        del layer._forward_impl
        if before is not None:
            layer._forward_impl = before


def warn_of_whole_logits(why: str) -> None:
    """Warn, once per reason, that the script's call of the model does not use chunks."""
    warnings.warn(f"{FLAG}: {why}, so they are held whole in this call", stacklevel=3)


def check_model(chunk: torch.nn.Module) -> None:
    """Refuse a model chunk whose losses would not be computed in chunks, or not be the same.

    Args:
        chunk: with upstream's wrappers (data parallelism, 16 bit) or without.

    Raises:
        ValueError: names the module and the reason.
    """
    models = [module for module in chunk.modules() if isinstance(module, LanguageModule)]
    if not models:
        raise ValueError(f"{FLAG} supports GPTModel only; this model is {type(chunk).__name__}. Leave the flag out.")
    for model in models:
        why = _fault(model)
        if why is not None:
            raise ValueError(f"{FLAG} does not support this {type(model).__name__}: {why}. Leave the flag out.")


def _fault(model: LanguageModule) -> str | None:
    """Return the first reason why a model is not supported."""
    if not isinstance(model, GPTModel):
        return "it computes its loss from whole logits; only GPTModel is supported"
    if not model.post_process:
        return None
    layer = model.output_layer
    faults = {
        "its compute_language_model_loss is not upstream's, and reads whole logits": _is_own(
            model, "compute_language_model_loss"
        ),
        "its _scale_logits is not upstream's, and reads whole logits": _is_own(model, "_scale_logits"),
        f"its output layer is {type(layer).__name__}, not upstream's ColumnParallelLinear": (
            type(layer) is not layers.ColumnParallelLinear
        ),
        "its output layer has a bias": getattr(layer, "bias", None) is not None,
        "it gathers whole logits (parallel_output=False)": getattr(layer, "gather_output", False),
    }
    return next((why for why, holds in faults.items() if holds), None)


def _is_own(model: LanguageModule, name: str) -> bool:
    """Return whether a method is not the one of upstream's LanguageModule."""
    return name in model.__dict__ or getattr(type(model), name) is not getattr(LanguageModule, name)

"""Linear layers and norms."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class TransformerEngineBaseModule(nn.Module):
    """Writes an `_extra_state` into checkpoints, as TransformerEngine's modules do: empty without FP8."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        """Keep the group."""
        self.tp_group = tp_group

    def get_extra_state(self) -> Tensor:
        """Return no bytes."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take what was saved; without FP8 there is nothing in it."""
        if state is not None and state.numel():
            raise NotImplementedError("FP8 needs a GPU")


class _Linear(TransformerEngineBaseModule):
    def _create(self, sizes: tuple[int, int], given: dict[str, Any]) -> None:
        if given["fuse_wgrad_accumulation"] or given["parameters_split"]:
            raise NotImplementedError("no fused gradients")
        self.tp_size, self.parallel_mode = given["tp_size"], given["parallel_mode"]
        self.set_tensor_parallel_group(given["tp_group"])
        self.sequence_parallel = given["sequence_parallel"] and self.parallel_mode is not None and self.tp_size > 1
        inputs, outputs = sizes
        inputs //= self.tp_size if self.parallel_mode == "row" else 1
        outputs //= self.tp_size if self.parallel_mode == "column" else 1
        self.in_features, self.out_features = sizes = inputs, outputs
        self.use_bias, self.return_bias = given["bias"], given["return_bias"]
        dtype = given["params_dtype"] or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.empty(sizes[1], sizes[0], dtype=dtype, device=given["device"]))
        tracker: Callable[[], Any] | None = given["get_rng_state_tracker"]
        with tracker().fork() if tracker else nullcontext():
            (given["init_method"] or nn.init.xavier_normal_)(self.weight)
        self.weight.tensor_model_parallel = self.parallel_mode is not None
        self.weight.partition_dim = int(self.parallel_mode == "row")
        self.weight.partition_stride = 1
        if self.use_bias:
            self.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=given["device"]))

    def _multiply(self, x: Tensor) -> Any:
        product = self._joined(functional.linear(self._spread(x), self.weight))
        bias = self.bias if self.use_bias else None
        if self.return_bias:
            return product, bias
        return product if bias is None else product + bias

    def _spread(self, x: Tensor) -> Tensor:
        """Return the whole input of a column-parallel product."""
        from megatron.core.tensor_parallel import mappings  # which imports this package

        if self.tp_size == 1 or self.parallel_mode != "column":
            return x
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _joined(self, product: Tensor) -> Tensor:
        """Return the sum of a row-parallel product over its ranks."""
        from megatron.core.tensor_parallel import mappings

        if self.tp_size == 1 or self.parallel_mode != "row":
            return product
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(product, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(product, group=self.tp_group)


class Linear(_Linear):
    """y = x W' + b."""

    def __init__(  # noqa: PLR0917
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__(name)
        self._create((in_features, out_features), given)

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        """Return the product, and the bias where the constructor was told so."""
        return self._multiply(inp)


class LayerNormLinear(_Linear):
    """A norm, then a linear layer."""

    def __init__(  # noqa: PLR0917
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__(name)
        if return_layernorm_output or return_layernorm_output_gathered:
            raise NotImplementedError("the norm's output stays inside")
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.layer_norm_weight, bias_ = _norm_parameters(in_features, given)
        if normalization == "LayerNorm":
            self.layer_norm_bias = bias_
        self._create((in_features, out_features), given)

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        """Return the product, and the bias where the constructor was told so."""
        weight = self.layer_norm_weight + self.zero_centered_gamma
        if self.normalization == "RMSNorm":
            return self._multiply(functional.rms_norm(inp, weight.shape, weight, self.eps))
        return self._multiply(functional.layer_norm(inp, weight.shape, weight, self.layer_norm_bias, self.eps))


class LayerNorm(nn.Module):
    """Layer normalization."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = dict(locals()) | kwargs
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight, self.bias = _norm_parameters(normalized_shape or hidden_size, given)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor."""
        weight = self.weight + self.zero_centered_gamma
        return functional.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Root mean square normalization."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        given = dict(locals()) | kwargs
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight, _ = _norm_parameters(normalized_shape or hidden_size, given)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor."""
        weight = self.weight + self.zero_centered_gamma
        return functional.rms_norm(x, weight.shape, weight, self.eps)


class GroupedLinear(TransformerEngineBaseModule):
    """Upstream derives a class from it, for experts."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("grouped products need a GPU")


def _norm_parameters(size: Any, given: dict[str, Any]) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weight and bias; both say whether sequence parallelism has to sum their gradients."""
    like = {"dtype": given["params_dtype"] or torch.get_default_dtype(), "device": given.get("device", "cuda")}
    weight = torch.zeros(size, **like) if given["zero_centered_gamma"] else torch.ones(size, **like)
    pair = nn.Parameter(weight), nn.Parameter(torch.zeros(size, **like))
    for one in pair:
        one.sequence_parallel = bool(given["sequence_parallel"])
    return pair

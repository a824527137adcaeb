"""The shape of a model, under upstream's flag names, and the number of parameters on a rank.

A shape comes from a built-in name, from the `config.json` of a Hugging Face checkpoint, or from flags.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from megatron.longseq.pipeline.plan.segment_cost import ModelShape
from megatron.longseq.planner.plan.hugging_face import from_hugging_face

_AT_LEAST_ONE = ("num_layers", "hidden_size", "num_attention_heads", "make_vocab_size_divisible_by", "moe_layer_freq")
_SHARES = ("hidden_dropout", "attention_dropout", "rotary_percent")


def _check(name: str, kind: Any, value: Any) -> None:
    """Refuse a value that a field of an architecture cannot hold, wherever it comes from.

    Raises:
        ValueError: names the field.
    """
    if name == "moe_layer_freq" and isinstance(value, tuple):
        if any(one not in (0, 1) for one in value):
            raise ValueError("moe_layer_freq lists other numbers than 0 (a dense layer) and 1 (one with experts)")
        return
    if kind is bool or kind is str:
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}, {'neither true nor false' if kind is bool else 'not a text'}")
        return
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and not (is_number and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}, not a number")
    if kind is not float and not (is_number and isinstance(value, int)):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    least = int(name in _AT_LEAST_ONE)
    if value < least:
        raise ValueError(f"{name} must be {'at least 1' if least else '0 or more'}, not {value}")
    if name in _SHARES and value > 1:
        raise ValueError(f"{name} must be at most 1, not {value}")


class LayerParams(NamedTuple):
    """Parameters of one layer on a rank.

    Attributes:
        dense: parameters that the data-parallel and context-parallel ranks share.
        expert: parameters of the experts on the rank, which the expert-data-parallel ranks share.
    """

    dense: int
    expert: int


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. The fields are named as upstream's flags and have upstream's defaults.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        ffn_hidden_size: width of the MLP; 0: upstream's default.
        num_query_groups: heads of keys and values; 0: one per query head.
        kv_channels: channels per head; 0: hidden_size // num_attention_heads.
        vocab_size: tokens before padding.
        padded_vocab_size: rows of the embedding if the padding is known; 0: padded to a multiple of
            make_vocab_size_divisible_by * tensor_model_parallel_size.
        max_position_embeddings: rows of learned positions; 0: the sequence length.
        rotary_base, rotary_percent, rotary_seq_len_interpolation_factor, use_rope_scaling, rope_scaling_factor,
            layernorm_epsilon: change neither time nor memory; a launch command needs them.
        moe_layer_freq: every n-th layer has experts, or 0 and 1 per layer.
        not_in_flags: what the model has and no flag of the GPT script expresses: it is priced, but not launched.

    Raises:
        ValueError: the sizes contradict each other.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    vocab_size: int = 0
    padded_vocab_size: int = 0
    make_vocab_size_divisible_by: int = 128
    max_position_embeddings: int = 0
    position_embedding_type: str = "learned_absolute"
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    rotary_seq_len_interpolation_factor: int = 0
    use_rope_scaling: bool = False
    rope_scaling_factor: float = 8.0
    untie_embeddings_and_output_weights: bool = False
    swiglu: bool = False
    squared_relu: bool = False
    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    add_bias_linear: bool = True
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    window_size: int = 0
    num_experts: int = 0
    moe_ffn_hidden_size: int = 0
    moe_router_topk: int = 2
    moe_layer_freq: int | tuple[int, ...] = 1
    moe_shared_expert_intermediate_size: int = 0
    multi_latent_attention: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 32
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    name: str = ""
    not_in_flags: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, field.type, getattr(self, field.name))
        if isinstance(self.moe_layer_freq, tuple) and len(self.moe_layer_freq) != self.num_layers:
            raise ValueError(f"moe_layer_freq lists {len(self.moe_layer_freq)} layers of {self.num_layers}")
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"num_query_groups {self.groups} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if not self.kv_channels and self.hidden_size < self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is below num_attention_heads; give kv_channels")

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field) for field in self.__dataclass_fields__))

    def __hash__(self) -> int:
        return self._hash  # caches of costs look architectures up often

    @functools.cached_property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @functools.cached_property
    def ffn(self) -> int:
        """Width of the MLP of a layer without experts."""
        return self.shape(1).ffn

    @property
    def expert_ffn(self) -> int:
        """Width of an expert."""
        return self.moe_ffn_hidden_size or self.ffn

    @functools.cached_property
    def query_size(self) -> int:
        """Channels of the queries of all heads."""
        if self.multi_latent_attention:
            return self.num_attention_heads * (self.qk_head_dim + self.qk_pos_emb_head_dim)
        return self.num_attention_heads * self.kv_channels or self.hidden_size

    @functools.cached_property
    def value_size(self) -> int:
        """Channels of the attention's output of all heads."""
        return self.num_attention_heads * self.v_head_dim if self.multi_latent_attention else self.query_size

    def key_size(self, tensor: int = 1) -> int:
        """Channels of the keys of all heads; a tensor-parallel rank has at least one head of them."""
        return self.query_size * max(self.groups, tensor) // self.num_attention_heads

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, has experts."""
        if not self.num_experts:
            return False
        freq = self.moe_layer_freq
        return layer % freq == 0 if isinstance(freq, int) else bool(freq[layer])

    def padded(self, tensor: int) -> int:
        """Return the rows of the embedding, padded as upstream pads them for a tensor-parallel size."""
        if self.padded_vocab_size:
            return self.padded_vocab_size
        multiple = self.make_vocab_size_divisible_by * tensor
        return -(-self.vocab_size // multiple) * multiple

    def shape(self, seq_length: int) -> ModelShape:
        """Return the shape for the cost model of segments (`pipeline.plan.segment_cost`)."""
        return ModelShape(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            seq_length=seq_length,
            padded_vocab_size=self.padded(1),
            ffn_hidden_size=self.ffn_hidden_size,
            num_query_groups=self.groups,
            kv_channels=self.kv_channels,
            swiglu=self.swiglu,
            window=self.window_size or None,
        )

    def attention_params(self, tensor: int) -> int:
        """Return the parameters of attention on a tensor-parallel rank, with its norms and biases."""
        hidden = self.hidden_size
        if self.multi_latent_attention:
            return self._latent_params(tensor)
        qkv = self.query_size + 2 * self.key_size(tensor)
        count = hidden * qkv // tensor + self.value_size * hidden // tensor
        count += qkv // tensor if self.add_bias_linear or self.add_qkv_bias else 0
        count += hidden if self.add_bias_linear else 0
        return count + (2 * self.channels * self._norm if self.qk_layernorm else 0)

    def _latent_params(self, tensor: int) -> int:
        hidden, heads = self.hidden_size, self.num_attention_heads
        query = self.query_size // tensor
        count = hidden * query if not self.q_lora_rank else hidden * self.q_lora_rank + self.q_lora_rank * query
        count += hidden * (self.kv_lora_rank + self.qk_pos_emb_head_dim)
        count += self.kv_lora_rank * heads * (self.qk_head_dim + self.v_head_dim) // tensor
        count += heads * self.v_head_dim * hidden // tensor
        return count + (self.q_lora_rank + self.kv_lora_rank) * self._norm

    @property
    def _norm(self) -> int:
        """Parameters of a norm per channel."""
        return 1 if self.normalization == "RMSNorm" else 2

    def mlp_params(self, ffn: int, tensor: int) -> int:
        """Return the parameters of an MLP of a given width on a tensor-parallel rank.

        Args:
            ffn: width of the MLP.
            tensor: tensor-parallel size.
        """
        gates = 2 if self.swiglu else 1
        count = self.hidden_size * ffn * (gates + 1) // tensor
        return count + (gates * ffn // tensor + self.hidden_size if self.add_bias_linear else 0)

    def layer_params(self, layer: int, tensor: int = 1, expert: int = 1, expert_tensor: int = 1) -> LayerParams:
        """Return the parameters of a layer on a rank.

        Args:
            layer: number of the layer, from 0.
            tensor: tensor-parallel size.
            expert: expert-parallel size.
            expert_tensor: tensor-parallel size of experts.
        """
        dense = self.attention_params(tensor) + 2 * self.hidden_size * self._norm
        if not self.has_experts(layer):
            return LayerParams(dense + self.mlp_params(self.ffn, tensor), 0)
        dense += self.hidden_size * self.num_experts
        if self.moe_shared_expert_intermediate_size:
            dense += self.mlp_params(self.moe_shared_expert_intermediate_size, tensor)
        return LayerParams(dense, self.num_experts // expert * self.mlp_params(self.expert_ffn, expert_tensor))

    def embedding_params(self, tensor: int, seq_length: int = 0) -> int:
        """Return the parameters of the embedding on a tensor-parallel rank of the first stage.

        Args:
            tensor: tensor-parallel size.
            seq_length: rows of learned positions if `max_position_embeddings` is 0.
        """
        count = self.padded(tensor) // tensor * self.hidden_size
        if self.position_embedding_type == "learned_absolute":
            count += (self.max_position_embeddings or seq_length) * self.hidden_size
        return count

    def head_params(self, tensor: int) -> int:
        """Return the parameters of the output layer on a tensor-parallel rank of the last stage, and the last norm."""
        return self.padded(tensor) // tensor * self.hidden_size + self.hidden_size * self._norm

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        layers = sum(sum(self.layer_params(layer)) for layer in range(self.num_layers))
        tied = not self.untie_embeddings_and_output_weights
        head = self.hidden_size * self._norm if tied else self.head_params(1)
        return layers + self.embedding_params(1) + head


FIELDS = frozenset(field.name for field in fields(Architecture)) - {"not_in_flags"}


def names() -> tuple[str, ...]:
    """Return the names of the built-in models."""
    folder = resources.files("megatron.longseq.planner").joinpath("data/models")
    return tuple(sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")))


def _bare(name: str) -> str:
    """Return a model's name without case, separators and what publishers add: `Meta-Llama-3-8B-hf` is llama3-8b."""
    bare = re.sub(r"[-_ ]", "", name.lower().rsplit("/", 1)[-1]).removeprefix("meta").removesuffix("hf")
    return bare.replace("llama3.1", "llama3")  # the same sizes


@functools.lru_cache(maxsize=64)
def _built_in(name: str) -> dict[str, Any]:
    file = resources.files("megatron.longseq.planner").joinpath(f"data/models/{name}.json")
    return dict(json.loads(file.read_text()))


def architecture(model: str | None, overrides: Mapping[str, Any]) -> Architecture:
    """Return an architecture.

    Args:
        model: name of a built-in model, a file with upstream's flags in JSON, or a Hugging Face config.json (or its
            folder); None: the overrides give every size.
        overrides: upstream's flags in snake case; they replace the model's own.

    Raises:
        ValueError: there is no such model, or sizes are missing or contradict each other.
    """
    base: dict[str, Any] = {}
    if model:
        base = read_model(model)
    values = {**base, **{key: value for key, value in overrides.items() if key in FIELDS}}
    if isinstance(values.get("moe_layer_freq"), (list, tuple)):
        layers = None if "moe_layer_freq" in overrides else values.get("num_layers")
        values["moe_layer_freq"] = _layer_kinds(values["moe_layer_freq"], layers if type(layers) is int else None)
    missing = [key for key in ("num_layers", "hidden_size", "num_attention_heads") if values.get(key) is None]
    if missing:
        raise ValueError(f"the model lacks {', '.join(missing)}; give model (one of {', '.join(names())}) or the flags")
    return Architecture(**values)


def _layer_kinds(kinds: Sequence[int], layers: int | None) -> tuple[int, ...]:
    """Return which layers have experts, for another number of layers than the model has.

    A model with more or fewer layers keeps its share of dense layers at the beginning, which is at least one layer.

    Args:
        kinds: 0 or 1 for every layer of the model.
        layers: another number of layers; None: the model's own.
    """
    dense = next((index for index, kind in enumerate(kinds) if kind), len(kinds))
    if not layers or not kinds or layers == len(kinds) or not all(kinds[dense:]):
        return tuple(kinds)
    ahead = max(min(1, dense), round(dense * layers / len(kinds)))
    return (0,) * ahead + (1,) * (layers - ahead)


def read_model(model: str) -> dict[str, Any]:
    """Return the flags of a built-in model or of a file.

    Raises:
        ValueError: there is no such model, or the file is not understood.
    """
    built_in = {_bare(name): name for name in names()}
    if _bare(model) in built_in:
        name = built_in[_bare(model)]
        found = {**_built_in(name), "name": name}
        return found | {"use_rope_scaling": True} if "llama" in name and "3.1" in model else found
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no model {model!r}: neither a file nor one of {', '.join(names())}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    if "model_type" in content or ("hidden_size" in content and "num_hidden_layers" in content):
        return {**from_hugging_face(content), "name": path.parent.name or model}
    unknown = set(content) - FIELDS - {"not_in_flags"}
    if unknown:
        raise ValueError(f"{path}: unknown fields {sorted(unknown)}; fields are upstream's flags in snake case")
    return {**content, "name": path.stem}

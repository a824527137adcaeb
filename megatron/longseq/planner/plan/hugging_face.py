"""Read the `config.json` of a Hugging Face checkpoint as upstream's flags."""

import math
from collections.abc import Mapping
from typing import Any

# Values of model_type whose layers are those of Llama, with experts or latent attention as the config says.
_LIKE_LLAMA = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3")
_KINDS = {float: "number", int: "whole number"}
_INSTEAD = "give upstream's flags in a JSON file instead"
# Upstream's --use-rope-scaling has these numbers of Llama 3 built in.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of rotary positions; `not_in_flags` says what they cannot express."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, Mapping):
            raise ValueError(f"the Hugging Face config has {name} {value!r}, which is no JSON object")
    parameters, scaling = _stated(parameters), _stated(scaling)
    base = _number(parameters, "rope_theta", 0) or _number(config, "rope_theta", 0) or 10000.0
    percent = _number(parameters, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0))
    found: dict[str, Any] = {"rotary_base": int(base), "rotary_percent": float(percent)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = float(_number(scaling, "factor", 1.0))
    if kind in ("linear", "llama3") and "factor" not in scaling:
        raise ValueError(f"the Hugging Face config has rope_scaling {dict(scaling)}, which lacks a factor")
    if base != int(base):
        found["not_in_flags"] = f"rope_theta {base}, which is no whole number"
    elif kind == "llama3" and all(scaling.get(name, value) == value for name, value in _LLAMA3_SCALING.items()):
        found |= {"use_rope_scaling": True, "rope_scaling_factor": factor}
    elif kind == "linear" and factor == int(factor):
        found["rotary_seq_len_interpolation_factor"] = int(factor)
    elif kind != "default":
        found["not_in_flags"] = f"rope_scaling of type {kind!r} with {dict(scaling)}"
    return found


def from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a Hugging Face config.json of the Llama, Mistral, Qwen or DeepSeek families.

    Raises:
        ValueError: a size is missing, or the model is none of these families.
    """
    try:
        return _flags(_stated(config))
    except KeyError as error:
        kind = config.get("model_type", "unknown")
        raise ValueError(f"the Hugging Face config, of model_type {kind!r}, lacks {error}; {_INSTEAD}") from error


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are not null, as which libraries write what is not given."""
    return {name: value for name, value in config.items() if value is not None}


def _number(config: Mapping[str, Any], name: str, default: float, kind: type = float) -> Any:
    """Return a number of a config.

    Args:
        config: entries that are not null.
        name: of the entry.
        default: the number without such an entry.
        kind: float: any finite number; int: a whole number.

    Raises:
        ValueError: the entry is no such number.
    """
    value = config.get(name, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (kind is int and value != int(value)):
        raise ValueError(f"the Hugging Face config has {name} {value!r}, which is no {_KINDS[kind]}")
    return kind(value)


def _list(config: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of a config, which is empty without such an entry.

    Raises:
        ValueError: the entry is no list.
    """
    value = config.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"the Hugging Face config has {name} {value!r}, which is no list")
    return value


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Refuse a model whose layers are not Llama's.

    Raises:
        ValueError: says which entry of the config shows it.
    """
    for name in ("hidden_act", "hidden_activation"):
        if config.get(name, "silu") != "silu":
            raise ValueError(
                f"the Hugging Face config has {name} {config[name]!r}: only families with a gated MLP and SiLU are "
                f"read (Llama, Mistral, Qwen, DeepSeek); {_INSTEAD}"
            )
    kind = config.get("model_type", "llama")
    if kind not in _LIKE_LLAMA:
        raise ValueError(
            f"the Hugging Face config has model_type {kind!r}: its layers may differ from those that are read "
            f"({', '.join(_LIKE_LLAMA)}); {_INSTEAD}"
        )


def _window(config: Mapping[str, Any]) -> int:
    """Return the sliding window of all layers as upstream counts it; 0: none.

    Raises:
        ValueError: some layers have a window, and others have none.
    """
    size, layers = _number(config, "sliding_window", 0, int), config["num_hidden_layers"]
    if not size or not config.get("use_sliding_window", True):
        return 0
    kinds = _list(config, "layer_types")
    if kinds:
        count = sum(kind == "sliding_attention" for kind in kinds)
    elif "max_window_layers" in config:  # Qwen: the layers before it have no window
        count = max(0, layers - _number(config, "max_window_layers", 0, int))
    else:
        count = layers
    if count not in (0, layers):
        raise ValueError(
            f"the Hugging Face config has a sliding window of {size} tokens in {count} of {layers} layers: the planner "
            f"knows one window for all layers; {_INSTEAD}"
        )
    return max(0, size - 1) if count else 0  # Hugging Face counts the token itself, upstream does not


def _expert_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of experts: how many, and which layers have them."""
    count = config.get("num_local_experts") or config.get("n_routed_experts") or config.get("num_experts") or 0
    width = _number(config, "moe_intermediate_size", 0, int)
    found: dict[str, Any] = {
        "num_experts": count,
        "moe_router_topk": _number(config, "num_experts_per_tok", 2, int),
        "moe_ffn_hidden_size": width,
    }
    if not count:
        return found
    dense = _number(config, "first_k_dense_replace", 0, int)  # DeepSeek
    every = _number(config, "moe_layer_freq", 1, int) or 1
    step, without = _number(config, "decoder_sparse_step", 1, int) or 1, _list(config, "mlp_only_layers")  # Qwen
    kinds = tuple(
        int(layer >= dense and layer % every == 0 and (layer + 1) % step == 0 and layer not in without)
        for layer in range(config["num_hidden_layers"])
    )
    found["moe_layer_freq"] = 1 if all(kinds) else kinds
    shared = _number(config, "shared_expert_intermediate_size", 0, int)
    shared = shared or _number(config, "n_shared_experts", 0, int) * width
    found["moe_shared_expert_intermediate_size"] = shared
    return found


def _bias_flags(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of biases. Those of Qwen 2 are in the projections of queries, keys and values alone."""
    if config.get("model_type") in ("qwen2", "qwen2_moe"):
        return {"add_bias_linear": False, "add_qkv_bias": True}
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    found: dict[str, Any] = {"add_bias_linear": attention and mlp, "add_qkv_bias": attention}
    if attention != mlp:
        found["not_in_flags"] = f"biases in {'attention' if attention else 'the MLP'} alone"
    return found


def _flags(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    if isinstance(layers, bool) or not isinstance(layers, int):
        raise ValueError(f"num_layers is {layers!r}, not a whole number")
    found: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
    }
    _refuse_others(config)
    found |= {
        "num_query_groups": config.get("num_key_value_heads") or 0,
        "kv_channels": config.get("head_dim") or 0,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "max_position_embeddings": config.get("max_position_embeddings", 0),
        "position_embedding_type": "rope",
        **_bias_flags(config),
        **_rotary(config),
        "normalization": "RMSNorm",
        "layernorm_epsilon": _number(config, "rms_norm_eps", 1e-6),
        "swiglu": True,
        "qk_layernorm": str(config.get("model_type", "")).startswith("qwen3"),
        "hidden_dropout": 0.0,
        "attention_dropout": _number(config, "attention_dropout", 0.0),
        "window_size": _window(config),
        **_expert_flags(config),
    }
    if config.get("kv_lora_rank"):
        found |= {
            "multi_latent_attention": True,
            "q_lora_rank": config.get("q_lora_rank") or 0,
            "kv_lora_rank": config["kv_lora_rank"],
            "qk_head_dim": config["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
            "v_head_dim": config["v_head_dim"],
            "num_query_groups": 0,
            "kv_channels": 0,
        }
    return found

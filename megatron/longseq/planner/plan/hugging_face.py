"""Read the `config.json` of a Hugging Face checkpoint as upstream's flags."""

from collections.abc import Mapping
from typing import Any

# Upstream's --use-rope-scaling has these numbers of Llama 3 built in.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of rotary positions; `not_in_flags` says what they cannot express."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    base = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    percent = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    found: dict[str, Any] = {"rotary_base": int(base), "rotary_percent": float(percent)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    factor = float(scaling.get("factor", 1.0))
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
        ValueError: a size is missing.
    """
    try:
        found: dict[str, Any] = {
            "num_layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "num_attention_heads": config["num_attention_heads"],
            "ffn_hidden_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
        }
    except KeyError as error:
        kind = config.get("model_type", "unknown")
        raise ValueError(
            f"the Hugging Face config, of model_type {kind!r}, lacks {error}; give upstream's flags in a JSON "
            "file instead"
        ) from error
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(
            f"the Hugging Face config has hidden_act {config['hidden_act']!r}: only families with a gated MLP and SiLU "
            "are read (Llama, Mistral, Qwen, DeepSeek); give upstream's flags in a JSON file instead"
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    found |= {
        "num_query_groups": config.get("num_key_value_heads") or 0,
        "kv_channels": config.get("head_dim") or 0,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "max_position_embeddings": config.get("max_position_embeddings", 0),
        "position_embedding_type": "rope",
        **_rotary(config),
        "normalization": "RMSNorm",
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "swiglu": True,
        "add_bias_linear": bool(config.get("mlp_bias", False)),
        "add_qkv_bias": bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
        "qk_layernorm": config.get("model_type", "").startswith("qwen3"),
        "hidden_dropout": 0.0,
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "window_size": max(0, (window or 0) - 1),  # Hugging Face counts the token itself, upstream does not
        "num_experts": config.get("num_local_experts")
        or config.get("n_routed_experts")
        or config.get("num_experts", 0),
        "moe_router_topk": config.get("num_experts_per_tok") or 2,
        "moe_ffn_hidden_size": config.get("moe_intermediate_size") or 0,
    }
    if config.get("kv_lora_rank"):
        dense = config.get("first_k_dense_replace", 0)
        shared = config.get("n_shared_experts") or 0
        found |= {
            "multi_latent_attention": True,
            "q_lora_rank": config.get("q_lora_rank") or 0,
            "kv_lora_rank": config["kv_lora_rank"],
            "qk_head_dim": config["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
            "v_head_dim": config["v_head_dim"],
            "num_query_groups": 0,
            "kv_channels": 0,
            "moe_layer_freq": tuple(int(layer >= dense) for layer in range(found["num_layers"])),
            "moe_shared_expert_intermediate_size": shared * (config.get("moe_intermediate_size") or 0),
        }
    return found

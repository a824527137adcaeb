"""Layer specs that a script may bring along."""

from typing import Any


def naming_te_attention(config: Any) -> Any:
    """Return upstream's spec of TransformerEngine's layers, with its core attention named once more."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = TEDotProductAttention
    return spec

"""System `usp`: attention over context-parallel ranks (Ulysses x ring), in local and in TransformerEngine's layers."""

from patches.hooks import FORWARD_BACKWARD, INITIALIZE, RECOMPUTE, VALIDATE_ARGS
from patches.record import Callback, Record

_SPREAD = "patches.usp.conditions:spreads_attention"
_ASKED_FOR = "megatron.longseq.attention.arguments:wants_context"

RECORDS = (
    Record(
        id="usp.core-attention",
        system="usp",
        action="wrap",
        target="megatron.core.models.backends:LocalSpecProvider.core_attention",
        impl="patches.usp.runtime:with_chosen_attention",
        reads=(
            "megatron.core.transformer.attention:Attention.forward",
            "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        ),
        why="Without TransformerEngine, upstream's core attention refuses context parallelism.",
        when="patches.usp.conditions:replaces_local_attention",
        test="tests/distributed/test_context.py::test_equals_upstream_in_float64",
        remove_when="upstream's DotProductAttention supports context parallelism",
    ),
    Record(
        id="usp.te-layers",
        system="usp",
        action="wrap",
        target="megatron.core.extensions.transformer_engine_spec_provider:TESpecProvider.core_attention",
        impl="patches.usp.runtime:with_our_attention",
        reads=(
            "megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_with_transformer_engine_submodules",
            "megatron.core.extensions.transformer_engine:TEDotProductAttention.__init__",
        ),
        why="TransformerEngine's layers take its core attention; no flag of upstream's chooses another.",
        when="patches.usp.conditions:replaces_te_attention",
        test="tests/distributed/test_te_layers.py::test_ours_in_te_layers",
        remove_when="upstream lets a flag or a hook choose the core attention of TransformerEngine's layers",
    ),
    Record(
        id="usp.own-specs",
        system="usp",
        action="wrap",
        target="megatron.core.transformer.attention:Attention.__init__",
        impl="patches.usp.runtime:refusing_other_attention",
        why="A layer spec that names TransformerEngine's core attention itself does not ask the spec provider, and "
        "would have it where ours was chosen.",
        when="patches.usp.conditions:spreads_whole_sequences",
        test="tests/distributed/test_te_layers.py::test_a_spec_of_its_own_is_refused",
        remove_when="upstream lets a flag or a hook choose the core attention of any layer",
    ),
    Record(
        id="usp.batch",
        system="usp",
        action="wrap",
        target="megatron.core.utils:_get_batch_on_this_cp_rank_per_sequence_balancing",
        impl="patches.usp.batch:by_segment",
        reads=(
            "megatron.core.utils:get_batch_on_this_cp_rank",
            "megatron.core.utils:flatten_batch_for_packed_sequences",
        ),
        why="Upstream distributes a whole sequence over the ranks, but each segment has to be distributed. Of packed "
        "documents it joins the sequences of a micro-batch into one, which pipeline stages do not expect.",
        when="patches.packed.conditions:reads_documents",
        test="tests/distributed/test_context.py::test_segments_equal_upstream_in_float64",
        remove_when="upstream lets the caller pass the layout of a batch",
    ),
)

CALLBACKS = (
    Callback(
        id="usp.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.usp.arguments:with_context_plan",
        why="--context-parallel-auto sets --cp-comm-type before upstream validates its flags. Flags that our "
        "attention does not support are refused afterwards, before any process group exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_context_flags.py::test_upstreams_validation_refuses_what_context_cannot_serve",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Callback(
        id="usp.groups",
        hook=INITIALIZE,
        impl="patches.usp.runtime:with_context_groups",
        why="All ranks have to create the groups of the all-to-all and of the ring together. Upstream's own "
        "hierarchical groups need einops.",
        when=_SPREAD,
        test="tests/distributed/test_context.py::test_equals_upstream_in_float64",
        remove_when="upstream passes its groups to core attention and lets a caller add process groups",
    ),
    Callback(
        id="usp.recompute-cache",
        hook=RECOMPUTE,
        impl="patches.usp.runtime:with_recompute_cache",
        reads=("megatron.core.tensor_parallel.random:CheckpointFunction",),
        why="Recomputation would run distributed attention, with its communication, a second time. The result of the "
        "first forward is kept until the recomputation has used it.",
        when="patches.usp.conditions:recomputes_spread_attention",
        test="tests/unit/test_attention_kept.py::test_attention_of_a_recomputed_layer_runs_once",
        remove_when="upstream can pass results of the first forward to the recomputation",
    ),
    Callback(
        id="usp.loss",
        hook=FORWARD_BACKWARD,
        impl="patches.usp.loss:over_the_whole_sequence",
        reads=("megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",),
        why="Upstream divides a rank's loss by the valid tokens of its own part of the sequence. With an uneven loss "
        "mask, the weight of a token would depend on its rank.",
        when=_SPREAD,
        test="tests/distributed/test_context.py::test_any_mask",
        remove_when="upstream sums the number of tokens over the context-parallel ranks",
    ),
)

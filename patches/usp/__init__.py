"""System `usp`: attention over context-parallel ranks (Ulysses x ring) without TransformerEngine."""

from patches.hooks import FORWARD_BACKWARD, INITIALIZE, RECOMPUTE, VALIDATE_ARGS
from patches.record import Callback, Record

_SPREAD = "patches.usp.conditions:spreads_attention"
_ASKED_FOR = "patches.usp.conditions:context_parallel"

RECORDS = (
    Record(
        id="usp.core-attention",
        system="usp",
        action="wrap",
        target="megatron.core.models.backends:LocalSpecProvider.core_attention",
        impl="patches.usp.runtime:with_context_attention",
        reads=(
            "megatron.core.transformer.attention:Attention.forward",
            "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        ),
        why="Upstream's core attention without TransformerEngine refuses context parallelism.",
        when="patches.usp.conditions:spreads_local_attention",
        test="tests/distributed/test_context.py::test_equals_upstream_in_float64",
        remove_when="upstream's DotProductAttention serves context parallelism",
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
        why="With segments each of them is spread over all ranks, where upstream spreads the sequence as a whole. Of "
        "packed documents upstream joins the sequences of a micro-batch into one, which pipeline stages do not expect.",
        when="patches.packed.conditions:reads_documents",
        test="tests/distributed/test_context.py::test_segments_equal_upstream_in_float64",
        remove_when="upstream takes the layout of a batch from its caller",
    ),
)

CALLBACKS = (
    Callback(
        id="usp.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.usp.arguments:with_context_plan",
        why="--context-parallel-auto has to choose before upstream validates its flags, and what our attention cannot "
        "serve has to be refused after it and before any process group exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_context_flags.py::test_upstreams_validation_refuses_what_context_cannot_serve",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Callback(
        id="usp.groups",
        hook=INITIALIZE,
        impl="patches.usp.runtime:with_context_groups",
        why="Every rank has to make the groups of the all-to-all and of the ring at the same time, and upstream's own "
        "hierarchical groups want einops.",
        when=_SPREAD,
        test="tests/distributed/test_context.py::test_equals_upstream_in_float64",
        remove_when="upstream hands its groups to core attention and lets a caller add to them",
    ),
    Callback(
        id="usp.kept",
        hook=RECOMPUTE,
        impl="patches.usp.runtime:with_recompute_cache",
        reads=("megatron.core.tensor_parallel.random:CheckpointFunction",),
        why="Attention over ranks is not to run a second time where activations are computed again: its result is kept "
        "with the function that upstream keeps for that, and goes with it.",
        when="patches.usp.conditions:recomputes_spread_attention",
        test="tests/unit/test_attention_kept.py::test_attention_of_a_recomputed_layer_runs_once",
        remove_when="upstream hands a recomputed function what its first forward left",
    ),
    Callback(
        id="usp.loss",
        hook=FORWARD_BACKWARD,
        impl="patches.usp.loss:over_the_whole_sequence",
        reads=("megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",),
        why="Upstream divides a rank's loss by the valid tokens of its own part of the sequence, so an uneven loss "
        "mask weighs tokens by the rank that they fall on.",
        when=_SPREAD,
        test="tests/distributed/test_context.py::test_any_mask",
        remove_when="upstream sums the number of tokens over the context-parallel ranks",
    ),
)

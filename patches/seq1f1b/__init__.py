"""System `seq1f1b`: run pipeline schedules over segments of a sequence instead of upstream's own."""

from patches.hooks import FORWARD_BACKWARD, VALIDATE_ARGS
from patches.record import Callback, Record

_ASKED_FOR = "megatron.longseq.pipeline.arguments:wants_our_schedule"

RECORDS: tuple[Record, ...] = ()

CALLBACKS = (
    Callback(
        id="seq1f1b.schedule",
        hook=FORWARD_BACKWARD,
        reads=(
            "megatron.core.pipeline_parallel.schedules:forward_step",
            "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
            "megatron.core.pipeline_parallel.schedules:backward_step",
            "megatron.core.pipeline_parallel.schedules:deallocate_output_tensor",
            "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
            "megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_with_interleaving",
            "megatron.core.models.gpt.gpt_model:GPTModel.forward",
            "megatron.core.models.gpt.gpt_model:GPTModel._preprocess",
            "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",
            "megatron.core.transformer.attention:Attention.forward",
            "megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        ),
        impl="patches.seq1f1b.schedule:with_our_schedule",
        why="Upstream can choose only among its own schedules, which run whole sequences.",
        when=_ASKED_FOR,
        test="tests/distributed/test_seq1f1b.py::test_flag_changes_the_schedule",
        remove_when="upstream lets a caller register a schedule, or has sequence-level schedules itself",
    ),
    Callback(
        id="seq1f1b.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.seq1f1b.schedule:with_plan",
        why="Flags that the schedules do not support are refused after upstream has resolved its flags and before "
        "any process group exists.",
        when=_ASKED_FOR,
        test="tests/unit/test_pipeline_flags.py::test_upstreams_validation_refuses_what_segments_cannot_serve",
        remove_when="upstream calls a hook after validating its arguments",
    ),
)

"""System `packed`: packed documents (upstream's THD batches) without a mask, in our attention."""

from patches.hooks import FORWARD_BACKWARD, VALIDATE_ARGS
from patches.record import Callback, Record

_READS = "patches.packed.conditions:reads_documents"
_PACKS = "patches.packed.conditions:packs_documents"

RECORDS = (
    Record(
        id="packed.model",
        system="packed",
        action="wrap",
        target="megatron.core.models.gpt.gpt_model:GPTModel.forward",
        impl="patches.packed.model:with_documents",
        reads=(
            "megatron.core.packed_seq_params:PackedSeqParams",
            "megatron.core.transformer.attention:Attention.forward",
            "megatron.core.transformer.transformer_layer:TransformerLayer._maybe_unflatten_for_moe",
        ),
        why="Upstream's layers take packed documents in a layout that only TransformerEngine's attention reads, with "
        "one sequence per micro-batch.",
        when=_READS,
        test="tests/distributed/test_packed.py::test_packed_documents_equal_the_masks",
        remove_when="upstream's local layers take packed documents with context parallelism",
    ),
    Record(
        id="packed.positions",
        system="packed",
        action="wrap",
        target="megatron.core.models.gpt.gpt_model:GPTModel._preprocess",
        impl="patches.packed.model:with_positions_in_documents",
        reads=(
            "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.forward",
            "megatron.core.models.common.embeddings.rotary_pos_embedding:RotaryEmbedding.get_rotary_seq_len",
            "megatron.core.models.common.embeddings.yarn_rotary_pos_embedding:YarnRotaryEmbedding.forward",
            "megatron.core.models.common.embeddings.rope_utils:apply_rotary_pos_emb",
        ),
        why="Upstream's rotary embedding assumes that a rank holds a zigzag of every packed document. Our layouts "
        "divide whole sequences in a zigzag, so that the positions differ.",
        when=_READS,
        test="tests/distributed/test_packed.py::test_packed_documents_equal_the_masks",
        remove_when="upstream's rotary embedding takes the positions of its tokens",
    ),
    Record(
        id="packed.local-attention",
        system="packed",
        action="wrap",
        target="megatron.core.transformer.dot_product_attention:DotProductAttention.forward",
        impl="patches.packed.model:within_documents",
        reads=("megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",),
        why="Upstream's local core attention refuses packed documents.",
        when="patches.packed.conditions:reads_documents_on_one_rank",
        test="tests/distributed/test_packed.py::test_packed_documents_equal_the_masks",
        remove_when="upstream's DotProductAttention serves packed documents",
    ),
    Record(
        id="packed.samples",
        system="packed",
        action="wrap",
        target="megatron.core.datasets.gpt_dataset:GPTDataset.__getitem__",
        impl="patches.packed.data:ending_at_eod",
        reads=("megatron.core.datasets.gpt_dataset:_get_ltor_masks_and_position_ids",),
        why="With --reset-attention-mask upstream describes where documents end by a dense mask only.",
        when="patches.packed.conditions:ends_documents_at_eod",
        test="tests/unit/test_packed_batches.py::test_documents_end_where_the_dense_mask_ends_them",
        remove_when="upstream's data set returns cu_seqlens with --reset-attention-mask",
    ),
    Record(
        id="packed.padding",
        system="packed",
        action="wrap",
        target="megatron.training.datasets.sft_dataset:SFTDataset.__getitem__",
        impl="patches.packed.data:ending_before_padding",
        why="Upstream's data set joins the padding at the end of a sample to its last conversation, so attention and "
        "the count of FLOPs treat it as a part of the conversation.",
        when="patches.packed.conditions:packs_conversations",
        test="tests/unit/test_packed_batches.py::test_padding_at_the_end_is_no_conversation",
        remove_when="upstream's data set ends the last conversation before the padding",
    ),
    Record(
        id="packed.stages",
        system="packed",
        action="wrap",
        target="megatron.core.datasets.blended_megatron_dataset_builder:BlendedMegatronDatasetBuilder.__init__",
        impl="patches.packed.data:on_every_stage",
        why="Upstream's script reads cu_seqlens on every pipeline stage, but builds the data set of "
        "--dataloader-inter-document-masking only on the first and the last one.",
        when="patches.packed.conditions:reads_documents_everywhere",
        test="tests/distributed/test_packed.py::test_an_upstream_script_reads_documents_on_every_stage",
        remove_when="upstream's script builds that data set on every stage",
    ),
    Record(
        id="packed.batch",
        system="packed",
        action="wrap",
        target="megatron.core.utils:_get_batch_on_this_cp_rank_per_document_balancing",
        impl="patches.usp.batch:by_sequence",
        reads=(
            "megatron.core.utils:get_batch_on_this_cp_rank",
            "megatron.core.utils:flatten_batch_for_packed_sequences",
        ),
        why="Upstream cuts the batches of --sft over context-parallel ranks with TransformerEngine, and in a layout "
        "that its rotary embedding knows, but our attention does not.",
        when=_READS,
        test="tests/distributed/test_sft.py::test_an_upstream_script_trains_on_conversations",
        remove_when="upstream takes the layout of a batch from its caller",
    ),
)

CALLBACKS = (
    Callback(
        id="packed.arguments",
        hook=VALIDATE_ARGS,
        impl="patches.packed.arguments:with_packed_documents",
        why="Upstream decides while it validates flags whether data sets make a dense mask. Flags that attention "
        "within documents does not support have to be refused before any process group exists.",
        when=_READS,
        test="tests/unit/test_packed_flags.py::test_upstreams_validation_refuses_what_documents_cannot_serve",
        remove_when="upstream calls hooks before and after validating its arguments",
    ),
    Callback(
        id="packed.agreement",
        hook=FORWARD_BACKWARD,
        impl="patches.packed.agreement:of_stages",
        why="Every pipeline stage reads the documents of a micro-batch itself. Stages that read different ones would "
        "train another model without an error.",
        when=_PACKS,
        test="tests/distributed/test_packed.py::test_ranks_that_disagree_are_named",
        remove_when="upstream sends documents from stage to stage",
    ),
)

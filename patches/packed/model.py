"""The model's entry: packed documents are read once per micro-batch, and layers get them in a form of our own."""

import inspect
from collections.abc import Callable
from typing import Any

from patches.engine import session

ID = "packed.model"


def packed_reader() -> Any:
    """Return the `PackedReader` of this process, made at its first use."""
    state = session.SESSION.state
    if ID not in state:
        state[ID] = _make()
    return state[ID]


def _make() -> Any:
    from megatron.core import parallel_state
    from megatron.training import get_args, print_rank_0

    from megatron.longseq.attention.plan.comm_type import comm_types
    from megatron.longseq.attention.runtime.comm import GroupCollectives
    from megatron.longseq.attention.runtime.document_layouts import DocumentLayouts
    from megatron.longseq.attention.runtime.packed_batch import PackedReader
    from megatron.longseq.pipeline.plan.from_args import model_shape, segment_lengths
    from patches.packed.conditions import packs_documents

    args = get_args()
    lengths = segment_lengths(args) if args.seq1f1b_splits > 1 else None
    layouts = DocumentLayouts(lengths=lengths)
    if args.context_parallel_size > 1:
        is_known = args.context_parallel_layout != "auto" or packs_documents(args)
        layouts = DocumentLayouts(
            tuple(comm_types(args).values()),
            lengths,
            # A batch that the script packs itself may be cut as without documents.
            args.context_parallel_layout if is_known else "sequence",
            args.ring_window,
            model_shape(args).windows(),
            lambda line: print_rank_0(f"> {line}"),
        )
    group = parallel_state.get_tensor_and_context_parallel_group()
    return PackedReader(
        ranks=args.context_parallel_size,
        rank=parallel_state.get_context_parallel_rank(),
        agreement=GroupCollectives(group) if group.size() > 1 else None,
        layouts=layouts,
        always=packs_documents(args),
    )


def with_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GPTModel.forward`: turn the script's `packed_seq_params` into documents that our attention reads."""
    signature = inspect.signature(original)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.longseq.attention.runtime.packed_batch import (
            PackedDocuments,
            micro_batch_shape,
            refuse_unserved_model,
        )

        bound = signature.bind(self, *args, **kwargs)
        arguments = bound.arguments
        params, reader = arguments.get("packed_seq_params"), packed_reader()
        is_ready = isinstance(params, PackedDocuments)  # a segment's, see `SegmentedModel`
        is_training = arguments.get("inference_context") is None and arguments.get("inference_params") is None
        if is_ready or not is_training or (params is None and not reader.always):
            return original(self, *args, **kwargs)
        if arguments.get("attention_mask") is not None:
            raise ValueError("packed documents: the script hands the model an attention mask, too; hand it one of them")
        refuse_unserved_model(self)
        _refuse_other_attention(self)
        tensor = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        shape = micro_batch_shape(
            arguments, None if self.pre_process else self.decoder.input_tensor, reader.ranks, tensor
        )
        documents = reader.documents(params, *shape, chunk=id(self))
        reader.check_cut(documents, shape[1], arguments)
        packed = reader.packed(documents, shape[1], 0, next(self.parameters()).device)
        refuse_unserved_model(self, packed)
        arguments["packed_seq_params"] = packed
        return original(*bound.args, **bound.kwargs)

    return forward


def _refuse_other_attention(model: Any) -> None:
    """Refuse a model with a core attention that does not read our documents.

    Raises:
        ValueError: names the layer and its core attention.
    """
    from megatron.longseq.attention.module import refuse_core_attention

    for layer in model.decoder.layers:
        core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        if core is not None:
            refuse_core_attention(core, f"packed documents, layer {layer.layer_number}")


def with_positions_in_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GPTModel._preprocess`: rotary frequencies are those of each token's position in its document."""
    signature = inspect.signature(original)

    def _preprocess(self: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.core.packed_seq_params import PackedSeqParams

        from megatron.longseq.attention.runtime.packed_batch import PackedDocuments

        bound = signature.bind(self, *args, **kwargs)
        packed = bound.arguments.get("packed_seq_params")
        if not isinstance(packed, PackedDocuments):
            return original(self, *args, **kwargs)
        # In the THD format upstream makes the frequencies of a whole sequence on every rank.
        bound.arguments["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd", max_seqlen_q=packed.length, max_seqlen_kv=packed.length
        )
        hidden, rotary, *rest = original(*bound.args, **bound.kwargs)
        return hidden, None if rotary is None else packed.rotary(rotary), *rest

    return _preprocess


def within_documents(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DotProductAttention.forward`: attention within documents, if the model has got some."""

    def forward(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> Any:
        from megatron.longseq.attention.module import refuse_mask_type
        from megatron.longseq.attention.runtime.document_attention import DocumentAttention
        from megatron.longseq.attention.runtime.packed_batch import PackedDocuments

        if not isinstance(packed_seq_params, PackedDocuments):
            return original(self, query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        where = f"layer {self.layer_number}"
        refuse_mask_type(attn_mask_type if attn_mask_type is not None else self.attn_mask_type, where)
        if attention_mask is not None or attention_bias is not None or self.softmax_offset is not None:
            raise ValueError(
                f"{where}: attention within packed documents takes no mask, no bias and no offset of the softmax"
            )
        attend = session.SESSION.state.setdefault("packed.local-attention", DocumentAttention())
        return attend(self, query, key, value, packed_seq_params)

    return forward

"""Run a model chunk (virtual stage) segment by segment, without changes to its code.

The `forward` of the chunk's model and rotary embedding is replaced on these instances, so parameters, their names and
checkpoints stay as they are. The model gets its slice of the batch, rotary positions start where the segment starts,
and core attention sees the keys of earlier segments (`attention.module.run_in_segments`).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils import _pytree as pytree

from megatron.longseq.attention.kernels.base import copy_to
from megatron.longseq.attention.kernels.select import KernelSelector
from megatron.longseq.attention.module import (
    ContextParallel,
    SegmentState,
    refuse_config,
    refuse_core_attention,
    refuse_mask_type,
    refuse_window,
    run_in_segments,
)
from megatron.longseq.attention.plan.layout import Layout, Mesh
from megatron.longseq.attention.plan.packing import has_borders
from megatron.longseq.attention.plan.ranges import Documents
from megatron.longseq.attention.runtime.kv_cache import SegmentKVCache
from megatron.longseq.attention.runtime.packed_batch import (
    PackedReader,
    micro_batch_shape,
    refuse_unserved_model,
)
from megatron.longseq.attention.runtime.packed_documents import (
    document_starts,
    expand_to_batch,
    gather_document_starts,
    packed_documents,
    starts_of,
)
from megatron.longseq.pipeline.runtime.outputs import Outputs
from megatron.longseq.segment import Segment

ALONG_SEQUENCE = ("input_ids", "position_ids", "labels", "loss_mask", "padding_mask")  # [micro-batch, sequence]
UNSERVED = ("decoder_input", "inference_context", "inference_params", "output_processor")


@dataclass
class SegmentedModel:
    """A model chunk that runs segment by segment.

    Attributes:
        module: the chunk in upstream's wrappers (DDP, Float16Module).
        lengths: tokens per segment.
        cuts: tokens per segment of each micro-batch of this step; empty: `lengths` for all of them.
        needs_mask, sends_documents, context: see `ForwardBackward`.
        allows_documents: whether masks may separate documents: there is one stage, or documents are sent.
        packed: reads the documents that the script passes to the model as `packed_seq_params`.
        store: keys and values of earlier segments.
        outputs: outputs of segments and their gradients, on the last stage.
        starts: micro-batch -> position at which every token's document starts, [micro-batch, sequence].
        documents: micro-batch -> documents for the attention planner; None: every sequence is one document.
        read: micro-batch -> documents that were read from `packed_seq_params`; positions restart in each of them.
        has_run: whether the model has run since `enter`.
    """

    module: torch.nn.Module
    lengths: Sequence[int]
    cuts: Sequence[tuple[int, ...]] = ()
    needs_mask: bool = False
    allows_documents: bool = True
    sends_documents: bool = False
    context: ContextParallel | None = None
    packed: PackedReader = field(default_factory=lambda: PackedReader(1, 0))
    store: SegmentKVCache = field(default_factory=SegmentKVCache)
    outputs: Outputs = field(default_factory=Outputs)
    starts: dict[int, torch.Tensor] = field(default_factory=dict)
    documents: dict[int, Documents | None] = field(default_factory=dict)
    read: dict[int, Documents] = field(default_factory=dict)
    kernels: KernelSelector = field(default_factory=lambda: KernelSelector("segments"))
    bound: list[torch.nn.Module] = field(default_factory=list)
    undo_attention: list[Callable[[], None]] = field(default_factory=list)
    has_run: bool = False

    def attach(self) -> None:
        """Replace `forward` of the model, its rotary embedding and its core attentions.

        Raises:
            ValueError: this is not a GPT model of causal self-attention layers; then nothing was replaced.
        """
        models = [module for module in self.module.modules() if isinstance(module, GPTModel)]
        if len(models) != 1:
            raise ValueError(
                "--seq1f1b-splits supports model chunks with one GPTModel, but this chunk is "
                f"{type(self.module).__name__} and contains {len(models)} of them. Train it with --seq1f1b-splits 1."
            )
        for name, module in self.module.named_modules():
            if isinstance(module, TransformerLayer):
                _refuse_attention(name, module.self_attention)
        self._bind(models[0], self._model_forward(models[0]))
        rotary = getattr(models[0], "rotary_pos_emb", None)
        if rotary is not None:
            self._bind(rotary, self._rotary_forward(rotary.forward))
        segments = SegmentState(self.store, self.documents, self.kernels, self.context)
        for module in [*self.module.modules()]:
            if isinstance(module, SelfAttention):
                self.undo_attention.append(run_in_segments(module, segments))

    def detach(self) -> None:
        """Restore the `forward` of all instances."""
        while self.bound:
            del self.bound.pop().forward
        while self.undo_attention:
            self.undo_attention.pop()()

    def _bind(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self.bound.append(module)

    def enter(self, microbatch: int, segment: int, forward_only: bool) -> None:
        """Set the segment of the next forward, backward or recomputation.

        Args:
            microbatch: index of the micro-batch in the step.
            segment: index of the segment.
            forward_only: whether no backward follows.
        """
        lengths = self.cuts[microbatch] if self.cuts else tuple(self.lengths)
        self.store.current = Segment(microbatch, segment, lengths, forward_only)
        self.packed.layouts.lengths = lengths  # of the batch that the forward step cuts over context-parallel ranks
        self.has_run = False

    def learn_documents(self, microbatch: int, starts: torch.Tensor) -> None:
        """Set the documents of a micro-batch, read from its mask or received from the previous stage.

        Args:
            microbatch: index of the micro-batch in the step.
            starts: position at which every token's document starts, [micro-batch, sequence].
        """
        self.starts[microbatch], self.documents[microbatch] = starts, packed_documents(starts)

    def leave(self, microbatch: int) -> None:
        """Free a micro-batch after its last action."""
        self.store.release(microbatch)
        self.outputs.leave(microbatch)
        for known in (self.starts, self.documents, self.read):
            known.pop(microbatch, None)

    def reset(self) -> None:
        """Free all micro-batches, after a step that failed."""
        self.store.reset()
        self.outputs = Outputs()
        for known in (self.starts, self.documents, self.read):
            known.clear()

    def assert_empty(self) -> None:
        """Check at the end of a step that every segment was freed.

        Raises:
            RuntimeError: names the micro-batches that were not.
        """
        self.store.assert_empty()
        left = sorted({*self.outputs.wholes, *self.outputs.gradients, *self.documents})
        if left:
            raise RuntimeError(f"the step ended before micro-batches {left} were finished")

    def _model_forward(self, model: GPTModel) -> Callable[..., torch.Tensor]:
        original = model.forward
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            bound = signature.bind(*args, **kwargs)
            self._refuse_second_call()
            self._cut(bound.arguments, model)
            output = original(*bound.args, **bound.kwargs)
            return self.outputs.add(self._here(), output) if model.post_process else output

        return forward

    def _refuse_second_call(self) -> None:
        if self.has_run:
            raise RuntimeError(
                f"{self._here()}: the script's forward step calls the model twice, but --seq1f1b-splits needs one "
                "call per forward step. Train it with --seq1f1b-splits 1."
            )
        self.has_run = True

    def _cut(self, arguments: dict[str, Any], model: GPTModel) -> None:
        segment = self._here()
        unserved = [name for name, value in arguments.items() if value is not None and not _is_served(name, value)]
        if unserved:
            raise ValueError(f"--seq1f1b-splits cannot cut {', '.join(unserved)} into segments; leave it out.")
        if segment.index == 0 and (arguments.get("packed_seq_params") is not None or self.packed.always):
            self._read_packed(arguments, model)
        elif segment.index == 0:
            self._read_mask(arguments.get("attention_mask"), _sequences(arguments, model))
        arguments["attention_mask"] = None
        arguments["packed_seq_params"] = None
        if segment.microbatch in self.read:
            whole = self.store.current_segment(0)
            device = next(model.parameters()).device
            packed = self.packed.packed(self.read[segment.microbatch], whole.total, segment.index, device)
            refuse_unserved_model(model, packed)
            arguments["packed_seq_params"] = packed
        for name in ALONG_SEQUENCE:
            rows = arguments.get(name)
            if rows is not None and rows.shape[1] != segment.total:
                raise ValueError(
                    f"micro-batch {segment.microbatch}: the script hands the model {name} of {rows.shape[1]} tokens, "
                    f"but segments are cut from {segment.total} (--seq-length / --context-parallel-size); hand it "
                    "sequences of that length."
                )
            if rows is not None:
                arguments[name] = rows[:, segment.begin : segment.end]

    def _read_packed(self, arguments: dict[str, Any], model: GPTModel) -> None:
        """Read the documents of a micro-batch from what the script hands to the model at the first segment.

        Raises:
            ValueError: They are malformed, ranks or stages disagree, or there is a mask, too.
        """
        microbatch = self._here().microbatch
        if arguments.get("attention_mask") is not None:
            raise ValueError(
                f"micro-batch {microbatch}: the script hands the model packed_seq_params and an attention mask; hand "
                "it one of them."
            )
        refuse_unserved_model(model)
        length = self.store.current_segment(0).total
        sequences, _ = micro_batch_shape(arguments, None if model.pre_process else model.decoder.input_tensor, 1)
        documents = self.packed.documents(arguments.get("packed_seq_params"), sequences, length, chunk=id(self))
        self.packed.check_cut(documents, length, arguments)
        starts = starts_of(documents)
        if microbatch in self.starts and not torch.equal(self.starts[microbatch].cpu(), starts):
            raise ValueError(
                f"micro-batch {microbatch}: this pipeline stage was handed other documents than the previous one; hand "
                "every stage the packed_seq_params of the same micro-batch."
            )
        self.read[microbatch] = documents
        self.starts[microbatch] = copy_to(starts, next(model.parameters()).device)
        self.documents[microbatch] = documents if has_borders(documents) else None

    def _read_mask(self, mask: torch.Tensor | None, batch: int) -> None:
        """Read the documents of a micro-batch from the mask that the script gives the model at the first segment.

        Without a mask, the documents of the previous stage apply (`learn_documents`).
        """
        microbatch = self._here().microbatch
        if mask is None:
            if self.needs_mask and microbatch not in self.documents:
                raise ValueError(
                    f"micro-batch {microbatch}: --reset-attention-mask is given, but the script passes neither "
                    "packed_seq_params nor an attention mask to the model; pass those of the batch."
                )
            return
        self.learn_documents(microbatch, expand_to_batch(self._starts(mask), batch).contiguous())
        if self.documents[microbatch] is not None and not self.allows_documents:
            raise ValueError(
                f"micro-batch {microbatch}: the script's attention mask separates documents, but document boundaries "
                "are not sent between stages with --no-create-attention-mask-in-dataloader; leave that flag out."
            )

    def _starts(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the position at which every token's document starts, int32 [sequences of the mask, sequence]."""
        if self.context is None:
            return document_starts(mask).to(torch.int32)
        masks = self.context.masks
        return gather_document_starts(
            mask, Layout(Mesh(self._ranks(), 1), self.store.current_segment(0).lengths), masks.rank, masks.collectives
        )

    def _ranks(self) -> int:
        return 1 if self.context is None else self.context.size

    def _here(self) -> Segment:
        """Return the current segment with the lengths of this rank's shards."""
        return self.store.current_segment(0).per_rank(self._ranks())

    def _rotary_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(max_seq_len: int, offset: int = 0, **kwargs: Any) -> Any:
            # Upstream shards the result over context-parallel ranks, as it has sharded the segment's tokens. That of
            # packed documents is the whole sequence's, of which `PackedDocuments.rotary` takes rows.
            if kwargs.get("packed_seq"):
                return original(max_seq_len, offset=offset, **kwargs)
            return original(max_seq_len, offset=offset + self.store.current_segment(0).begin, **kwargs)

        return forward


def _is_served(name: str, value: Any) -> bool:
    """Return whether an argument of the model can be cut, or needs no cut. A script's model may have further ones."""
    if name in (*ALONG_SEQUENCE, "attention_mask"):
        return True
    leaves = pytree.tree_leaves(value)
    return name not in UNSERVED and not any(isinstance(leaf, torch.Tensor) and leaf.dim() > 1 for leaf in leaves)


def _sequences(arguments: dict[str, Any], model: GPTModel) -> int:
    """Return the number of sequences in a micro-batch."""
    for name in ALONG_SEQUENCE:
        if arguments.get(name) is not None:
            return arguments[name].shape[0]  # type: ignore[no-any-return]
    return model.decoder.input_tensor.shape[1]  # type: ignore[no-any-return]


def _refuse_attention(name: str, attention: torch.nn.Module) -> None:
    """Refuse a layer whose tokens see earlier segments by other means than core attention."""
    if isinstance(attention, SelfAttention):
        refuse_mask_type(attention.attn_mask_type, f"--seq1f1b-splits, layer {name}")
        refuse_window(attention.config, f"--seq1f1b-splits, layer {name}")
        refuse_config(attention.config, f"--seq1f1b-splits, layer {name}")
        refuse_core_attention(attention.core_attention, f"--seq1f1b-splits, layer {name}")
    elif not isinstance(attention, IdentityOp):
        raise ValueError(
            f"--seq1f1b-splits supports SelfAttention, but layer {name} has {type(attention).__name__}, which would "
            "attend to the tokens of one segment only. Train it with --seq1f1b-splits 1."
        )

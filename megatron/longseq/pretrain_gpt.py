"""Pretrain a GPT with upstream's `pretrain()`: batches, loss, forward step and datasets.

Upstream's wheel contains the training loop but no `pretrain_gpt.py`. This module takes its place and reads upstream's
flags. Call `patches.start()` before importing it, as `examples/pretrain_gpt.py` does.
"""

import sys
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import (
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain, print_rank_0, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron.longseq.conversation_dataset import ConversationDataset
from megatron.longseq.flexsp.arguments import wants_flexsp
from megatron.longseq.freeze import add_freeze_arguments, check_train_only, freeze_hook
from megatron.longseq.guards.arguments import locates_gradients
from megatron.longseq.refusals import explained_refusals
from megatron.longseq.unserved import refuse_unserved, without_effect

Batch = dict[str, torch.Tensor | None]
TOKENS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
DOCUMENTS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")

SPIKE = 10.0  # --check-for-spiky-loss: loss / largest loss so far; same value as in Megatron-LM's script
stragglers = StragglerDetector()  # --log-straggler; a singleton that upstream's training loop configures


def packs_documents(args: Any) -> bool:
    """Return whether samples have `cu_seqlens`, which say where their documents begin."""
    return bool(args.sft or args.dataloader_inter_document_masking)


def get_batch(data_iterator: Any, vp_stage: int | None, micro_batch_size: int) -> Batch:
    """Return this rank's part of the next micro-batch.

    Args:
        data_iterator: yields samples on tensor-parallel rank 0. Other ranks receive them by broadcast.
        vp_stage: virtual pipeline stage of the model chunk.
        micro_batch_size: number of sequences that the other tensor-parallel ranks expect.

    Returns:
        Tensors of shape [micro-batch, sequence / context-parallel size]. With packed documents also `cu_seqlens` of the
        whole micro-batch, int32 [1, documents + 1], and `max_seqlen`. Pipeline stages between the first and the last
        get those alone, or without documents an empty dict.

    Raises:
        ValueError: the samples do not have the expected size, or no `cu_seqlens`.
    """
    args = get_args()
    has_documents, has_tokens = packs_documents(args), is_first_or_last_pipeline_stage(vp_stage)
    if not has_tokens and not has_documents:
        return {}
    batch = _broadcast(_read(data_iterator, micro_batch_size), micro_batch_size)
    batch = flatten_batch_for_packed_sequences(batch)
    if not has_tokens:
        return {key: batch[key] for key in DOCUMENTS}
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def _read(data_iterator: Any, micro_batch_size: int) -> Batch:
    """Read the next micro-batch on tensor-parallel rank 0; return an empty dict on other ranks."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return {}
    args, sample = get_args(), next(data_iterator)
    keys = (*TOKENS, *DOCUMENTS) if packs_documents(args) else TOKENS
    if packs_documents(args) and "cu_seqlens" not in sample:
        raise ValueError(
            f"rank {args.rank}: documents are packed, but samples of the data set have no cu_seqlens. Use one of "
            "upstream's data sets."
        )
    if args.tensor_model_parallel_size > 1:
        _check_size(tuple(sample["tokens"].shape), (micro_batch_size, args.seq_length), args.rank)
    return {key: sample[key].cuda(non_blocking=True) if key in sample else None for key in keys}


def _broadcast(batch: Batch, micro_batch_size: int) -> Batch:
    """Return a micro-batch on every tensor-parallel rank, with the tensors that its pipeline stage needs."""
    args = get_args()
    sizes = {"micro_batch_size": micro_batch_size, "seq_length": args.seq_length}
    stage = {
        "is_pipeline_first_stage": mpu.is_pipeline_first_stage(),
        "is_pipeline_last_stage": mpu.is_pipeline_last_stage(),
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "mtp_on_this_rank": False,
    }
    group = {
        "tp_rank": mpu.get_tensor_model_parallel_rank(),
        "broadcast_group": mpu.get_tensor_model_parallel_group(),
        "broadcast_src_rank": mpu.get_tensor_model_parallel_src_rank(),
        "cp_size": args.context_parallel_size,
    }
    content = {
        "create_attention_mask_in_dataloader": args.create_attention_mask_in_dataloader,
        "has_cu_seqlens": packs_documents(args),
        "is_hybrid_cp": False,
    }
    return get_batch_on_this_tp_rank(batch, **sizes, **stage, **group, **content)


def _check_size(size: tuple[int, ...], expected: tuple[int, int], rank: int) -> None:
    if size != expected:
        raise ValueError(
            f"rank {rank}: the data loader returns samples of size {list(size)}, but the other "
            f"tensor-parallel ranks expect {list(expected)} ([micro-batch, sequence]). Use a data set whose batches "
            "all have the same size."
        )


def planned_batch(data_iterator: Any) -> tuple[Batch, PackedSeqParams]:
    """Return this rank's part of a micro-batch that FlexSP has planned, and its documents and group.

    Returns:
        Tokens, labels, loss mask and position ids by name, and the documents with their group.
    """
    planned = next(data_iterator)
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return {name: getattr(planned, name) for name in names}, planned.packed


def packed_documents(batch: Batch, tokens_per_sample: int) -> PackedSeqParams | None:
    """Return the documents of a micro-batch as upstream's models take them, or None if it has none.

    Args:
        batch: tensors by name; `cu_seqlens` and `cu_seqlens_padded` are [1, documents + 1].
        tokens_per_sample: tokens of a sequence.
    """
    borders = batch.get("cu_seqlens")
    if borders is None:
        return None
    padded, longest = batch.get("cu_seqlens_padded"), batch["max_seqlen"]
    training.update_seqlen_stats_from_cu_seqlens(borders[0])  # upstream's count of FLOPs
    borders = (borders if padded is None else padded)[0]
    own_padded = None if padded is None else borders
    assert longest is not None, "upstream's data sets return it with cu_seqlens"
    most = int(longest.max())  # on a GPU, the host waits
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=own_padded,
        cu_seqlens_kv_padded=own_padded,
        max_seqlen_q=most,
        max_seqlen_kv=most,
        tokens_per_sample=tokens_per_sample,
    )


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Sum the token losses of one micro-batch over its valid tokens.

    Args:
        loss_mask: [micro-batch, sequence], 1 for tokens that count and 0 for others.
        losses: [micro-batch, sequence], cross entropy per token.

    Returns:
        The sum, the number of valid tokens, and both as one tensor for upstream's log. By default upstream divides the
        sum by the number of tokens of the micro-batch, so every micro-batch has the same weight. With
        --calculate-per-token-loss it divides by the number of tokens in the global batch.
    """
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    args, rerun = get_args(), get_rerun_state_machine()
    is_examined_later = torch.is_grad_enabled() and locates_gradients(args)  # with the gradients, on all ranks at once
    if args.check_for_nan_in_loss_and_grad and not is_examined_later:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            rerun.validate_result(
                result=total,
                rejection_func=is_bad,
                message=f"{name} in the forward loss of rank {torch.distributed.get_rank()}",
                tolerance=0.0,
                fatal=True,
            )
    if args.check_for_spiky_loss:
        rerun.validate_result(
            result=total,
            rejection_func=partial(rerun.is_unexpectedly_large, threshold=SPIKE, context="loss"),
            message=f"spike in the forward loss of rank {torch.distributed.get_rank()}",
            tolerance=0.0,
            fatal=False,
        )
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Run the forward pass of one micro-batch on this rank's model chunk. Upstream's schedules call this.

    Returns:
        The output tensor, and the loss function that the last stage applies to it.
    """
    args, timers = get_args(), get_timers()
    size = args.micro_batch_size if model.training else args.eval_micro_batch_size
    timers("batch-generator", log_level=2).start()
    documents: PackedSeqParams | None = None
    with stragglers(bdata=True):
        if wants_flexsp(args):
            batch, documents = planned_batch(data_iterator)
        else:
            batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), size)
    timers("batch-generator").stop()
    names = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
    tokens, position_ids, attention_mask, labels, loss_mask = (batch.get(name) for name in names)
    if not wants_flexsp(args):
        documents = packed_documents(batch, args.seq_length)
    with stragglers:
        output = model(
            tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask, packed_seq_params=documents
        )
    return output, partial(loss_func, loss_mask)


def dataset_config(args: Any) -> GPTDatasetConfig:
    """Make the configuration of upstream's dataset builder from upstream's data flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Build the training, validation and test sets on the ranks that read data.

    Args:
        samples: number of samples of each set.
        vp_stage: virtual pipeline stage of the caller.

    Returns:
        The training, validation and test sets; under --flexsp, iterators of planned steps.
    """
    args = get_args()
    print_rank_0("> building train, validation and test datasets ...")

    def reads_data() -> bool:
        reads = packs_documents(args) or is_first_or_last_pipeline_stage(vp_stage)
        return mpu.get_tensor_model_parallel_rank() == 0 and reads

    dataset = ConversationDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    if wants_flexsp(args):
        from megatron.longseq.flexsp.runtime.data import planned_steps  # SciPy takes a second to import

        return planned_steps(args, samples, dataset_config(args))
    return BlendedMegatronDatasetBuilder(dataset, samples, reads_data, dataset_config(args)).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # upstream then calls it on every rank


def model_config(args: Any) -> GPTModelConfig:
    """Make the configuration of upstream's model builder from upstream's flags."""
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # upstream's function does not copy this flag
    return model


def main() -> None:
    """Parse the flags and run upstream's `pretrain()`."""
    args = parse_and_validate_args(extra_args_provider=add_freeze_arguments)
    refuse_unserved(args)
    if args.rank == 0:
        for line in without_effect(sys.argv[1:]):
            print(f"> WARNING: {line}", flush=True)
    with explained_refusals("the model of these flags"):
        model = model_config(args)
    if args.train_only is not None:
        check_train_only(args.train_only)
        model.pre_wrap_hooks.append(freeze_hook(args.train_only))
    config = pretrain_cfg_container_from_args(args, model)
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)

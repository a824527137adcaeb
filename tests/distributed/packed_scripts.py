"""Scripts other than ours that train on packed documents, planted into arms: see `run_arm(mutant=...)`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.regression.planted import Planted, wrapped


@contextmanager
def as_upstreams_script() -> Iterator[Planted]:
    """The script makes the calls of upstream's own script, in its order; `times` counts micro-batches.

    It joins the sequences of a micro-batch, leaves their separation to whoever wants it, and builds the data set of
    --dataloader-inter-document-masking on the first and the last stage alone.
    """
    from megatron.core import mpu
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.training import get_args
    from megatron.training.datasets.sft_dataset import SFTDataset
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def step(_: Any, iterator: Any, model: Any) -> Any:
        from megatron.core.utils import get_attr_wrapped_model

        planted.times += 1
        batch = _batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=_params(batch),
        )
        return output, partial(pretrain_gpt.loss_func, batch["loss_mask"])

    def provider(_: Any, samples: list[int], vp_stage: int | None = None) -> Any:
        args = get_args()

        def is_built() -> bool:
            return mpu.get_tensor_model_parallel_rank() == 0 and (args.sft or is_first_or_last_pipeline_stage(vp_stage))

        kind = SFTDataset if args.sft else GPTDataset
        return BlendedMegatronDatasetBuilder(kind, samples, is_built, pretrain_gpt.dataset_config(args)).build()

    with wrapped(pretrain_gpt, "forward_step", step), wrapped(pretrain_gpt, "datasets_provider", provider):
        yield planted


KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
LENGTHS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")


def _batch(iterator: Any, vp_stage: int | None) -> dict[str, Any]:
    from megatron.core import mpu, utils
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args, rank = get_args(), mpu.get_tensor_model_parallel_rank()
    drawn = next(iterator) if rank == 0 else {}
    batch = utils.get_batch_on_this_tp_rank(
        {key: drawn.get(key) for key in (*KEYS, *LENGTHS)} if rank == 0 else {},
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        tp_rank=rank,
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        cp_size=args.context_parallel_size,
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        has_cu_seqlens=True,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        mtp_on_this_rank=False,
        is_hybrid_cp=False,
    )
    joined = utils.flatten_batch_for_packed_sequences(batch)
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS) | {key: joined[key] for key in LENGTHS}
    return utils.get_batch_on_this_cp_rank(  # type: ignore[no-any-return]
        joined,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def _params(batch: dict[str, Any]) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    borders, longest = batch["cu_seqlens"][0], int(batch["max_seqlen"].max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=longest, max_seqlen_kv=longest
    )


@contextmanager
def own_borders() -> Iterator[Planted]:
    """The script hands the model `PackedSeqParams` of its own: documents end after multiples of 7."""
    with _ends_of_its_own(as_mask=False) as planted:
        yield planted


@contextmanager
def own_mask() -> Iterator[Planted]:
    """As `own_borders`, by a dense mask."""
    with _ends_of_its_own(as_mask=True) as planted:
        yield planted


@contextmanager
def _ends_of_its_own(*, as_mask: bool) -> Iterator[Planted]:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron.longseq import pretrain_gpt

    planted, borders = Planted(), []

    def cut(original: Any, batch: Any, **where: Any) -> Any:
        tokens, labels = batch.get("tokens"), batch.get("labels")
        content = tokens[:, 1:] if tokens is not None else labels[:, :-1]  # labels are the tokens that follow
        starts = torch.cat((torch.ones(len(content), 1, dtype=torch.bool), content % 7 == 0), dim=1)
        planted.times += 1
        if as_mask:
            document = starts.cumsum(1)
            seen = (document[:, :, None] == document[:, None, :]).tril()
            batch["attention_mask"] = ~seen[:, None]
        else:
            flat = torch.nonzero(starts.flatten()).flatten()
            borders[:] = [torch.cat((flat, flat.new_tensor([starts.numel()]))).int()]
            batch["attention_mask"] = None
        return original(batch, **where)

    def packed_documents(_: Any, *__: Any) -> Any:
        if not borders:
            return None
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders[0], cu_seqlens_kv=borders[0])

    with (
        wrapped(pretrain_gpt, "get_batch_on_this_cp_rank", cut),
        wrapped(pretrain_gpt, "packed_documents", packed_documents),
    ):
        yield planted


@contextmanager
def other_documents_on_rank_one() -> Iterator[Planted]:
    """The script hands rank 1 a border that is one token late."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def packed_documents(original: Any, *args: Any) -> Any:
        params = original(*args)
        if torch.distributed.get_rank() == 1:
            planted.times += 1
            moved = params.cu_seqlens_q.clone()
            moved[1:-1] += ((moved[2:] - moved[1:-1]) > 1).int()
            params.cu_seqlens_q = params.cu_seqlens_kv = moved
        return params

    with wrapped(pretrain_gpt, "packed_documents", packed_documents):
        yield planted


@contextmanager
def no_documents_on_rank_one() -> Iterator[Planted]:
    """The script hands rank 1 no documents."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def packed_documents(original: Any, *args: Any) -> Any:
        params = original(*args)
        planted.times += 1
        return None if torch.distributed.get_rank() == 1 else params

    with wrapped(pretrain_gpt, "packed_documents", packed_documents):
        yield planted


@contextmanager
def windowed_mask() -> Iterator[Planted]:
    """The mask of the documents also hides all keys but a token's own and the nine before it."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def cut(original: Any, batch: Any, **where: Any) -> Any:
        mask = batch["attention_mask"]
        planted.times += 1
        batch["attention_mask"] = mask | torch.ones_like(mask).tril(-10)
        return original(batch, **where)

    with wrapped(pretrain_gpt, "get_batch_on_this_cp_rank", cut):
        yield planted


@contextmanager
def counted_cuts() -> Iterator[Planted]:
    """Nothing is changed; `times` counts the different segment lengths of micro-batches (--seq1f1b-partition)."""
    from megatron.longseq.pipeline.runtime.document_cuts import DocumentCuts

    planted, known = Planted(), set()

    def of_step(original: Any, *args: Any) -> Any:
        data, lengths = original(*args)
        known.update(lengths)
        planted.times = len(known)
        return data, lengths

    with wrapped(DocumentCuts, "of_step", of_step):
        yield planted


class _Census(TorchDispatchMode):
    """Counts tensors of at least so many elements that any operation returns, forward, backward and in the data set."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.found, self.operations = least, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for one in result if isinstance(result, tuple | list) else [result]:
            # A view of few elements may be expanded to many; what counts is memory.
            if isinstance(one, torch.Tensor) and one.untyped_storage().nbytes() >= self.least * one.element_size():
                self.found += 1
        return result


@contextmanager
def counted_squares() -> Iterator[Planted]:
    """Nothing is changed; `times` counts tensors of at least sequence x sequence / context-parallel size elements.

    Raises:
        AssertionError: No operation was seen.
    """
    from megatron.training import training

    planted = Planted()

    def train_step(original: Any, *args: Any, **named: Any) -> Any:
        from megatron.training import get_args

        flags = get_args()
        with _Census(flags.seq_length**2 // flags.context_parallel_size) as census:
            result = original(*args, **named)
        assert census.operations > 100, "the census has not seen the step"
        planted.times += census.found
        return result

    with ExitStack() as stack:
        stack.enter_context(wrapped(training, "train_step", train_step))
        yield planted

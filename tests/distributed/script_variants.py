"""Variations of a script, for both arms of a comparison: see `run_arm(mutant=...)`."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.regression.planted import Planted, wrapped


@contextmanager
def fused_weight_gradients() -> Iterator[Planted]:
    """Turn on upstream's --gradient-accumulation-fusion, with a product of PyTorch in place of apex's CUDA kernel."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers

    planted = Planted()

    def add(total: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        planted.times += 1
        main_grad.add_((grad_output.float().t() @ total.float()).to(main_grad.dtype))

    def fuse(original: Any, config: Any) -> None:
        original(config)
        config.gradient_accumulation_fusion = True

    kernels = SimpleNamespace(wgrad_gemm_accum_fp16=add, wgrad_gemm_accum_fp32=add)
    with (
        wrapped(ModelParallelConfig, "__post_init__", fuse),
        mock.patch.object(layers, "_grad_accum_fusion_available", new=True),
        mock.patch.object(layers, "fused_weight_gradient_mlp_cuda", kernels, create=True),
    ):
        yield planted


@contextmanager
def ragged_mask() -> Iterator[Planted]:
    """Mask three in ten tokens, and the first 40 tokens of every second micro-batch (whole segments)."""
    with _masked(slice(40)) as planted:
        yield planted


@contextmanager
def empty_ranks() -> Iterator[Planted]:
    """Mask as `ragged_mask` does; in every second micro-batch only the first 4 tokens, all on one rank, can count."""
    with _masked(slice(4, None)) as planted:
        yield planted


@contextmanager
def empty_ranks_without_the_record() -> Iterator[Planted]:
    """Mask as `empty_ranks` does, and remove the record `usp.loss` from the ledger."""
    from patches.engine.session import SESSION
    from tests.ledgers import without

    SESSION.ledger = without(SESSION.ledger, "usp.loss")
    with empty_ranks() as planted:
        yield planted


@contextmanager
def _masked(silent: slice) -> Iterator[Planted]:
    """Change the loss mask of the whole sequence, before a context-parallel rank takes its part."""
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def cut(original: Any, batch: Any, **where: Any) -> Any:
        mask = batch.get("loss_mask")
        if mask is not None:
            generator = torch.Generator().manual_seed(int(batch["labels"].sum()))  # the same in every layout
            mask = mask * (torch.rand(mask.shape, generator=generator) > 0.3)
            if int(batch["labels"][0, 0]) % 2:
                mask[:, silent] = 0
            batch["loss_mask"] = mask
            planted.times += 1
        return original(batch, **where)

    with wrapped(pretrain_gpt, "get_batch_on_this_cp_rank", cut):
        yield planted


@contextmanager
def mean_loss() -> Iterator[Planted]:
    """Return upstream's older pair from the loss function: a mean, and its report.

    The mean is a view of another tensor: right for upstream wherever it does not deallocate the loss, which is on one
    stage and with virtual stages.
    """
    from megatron.longseq import pretrain_gpt

    planted = Planted()

    def loss_func(original: Any, *args: Any) -> Any:
        planted.times += 1
        total, tokens, _ = original(*args)
        mean = total / tokens.clamp(min=1)
        return mean.view(1), {"lm loss": mean.detach().clone().view(1)}

    with wrapped(pretrain_gpt, "loss_func", loss_func):
        yield planted


@contextmanager
def counted_forwards() -> Iterator[Planted]:
    """Change nothing; count the forwards of a stage's layers in `times`."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    planted = Planted()

    def forward(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        return original(*args, **named)

    with wrapped(TransformerBlock, "forward", forward):
        yield planted


@contextmanager
def counted_forwards_without_the_schedule() -> Iterator[Planted]:
    """Count as `counted_forwards` does, without the record `seq1f1b.schedule`, so that its flags have no effect."""
    from patches.engine.session import SESSION
    from tests.ledgers import without

    SESSION.ledger = without(SESSION.ledger, "seq1f1b.schedule")
    with counted_forwards() as planted:
        yield planted


@contextmanager
def nan_gradient_on_rank_one() -> Iterator[Planted]:
    """Set one element of a gradient of rank 1 to NaN in the fifth step, before gradients are reduced."""
    from megatron.training import get_args

    from megatron.longseq import pretrain_gpt

    planted, watched = Planted(), set[int]()

    def insert_nan(grad: torch.Tensor) -> torch.Tensor:
        if get_args().curr_iteration != 4:
            return grad
        planted.times += 1
        with_nan = grad.clone()
        with_nan.view(-1)[-1] = torch.nan
        return with_nan

    def forward_step(original: Any, data_iterator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        if torch.distributed.get_rank() == 1 and id(model) not in watched:
            watched.add(id(model))
            next(p for name, p in model.named_parameters() if name.endswith("mlp.linear_fc2.weight")).register_hook(
                insert_nan
            )
        return original(data_iterator, model, *rest, **named)

    with wrapped(pretrain_gpt, "forward_step", forward_step):
        yield planted


@contextmanager
def counted_parameter_sends() -> Iterator[Planted]:
    """Change nothing; count the elements of buckets whose parameters are sent after a step in `times`."""
    from megatron.longseq.sharding.runtime.bucket_storage import ParamStore

    planted = Planted()

    def sync(original: Any, store: Any, label: str) -> None:
        planted.times += store.numel
        original(store, label)

    with wrapped(ParamStore, "sync", sync):
        yield planted


@contextmanager
def counted_frozen_without_memory() -> Iterator[Planted]:
    """Change nothing; count frozen parameters without memory at the start of the optimizer's step in `times`.

    Raises:
        AssertionError: one has.
    """
    from megatron.longseq.sharding.runtime.ddp import ShardedDataParallel

    planted = Planted()

    def release_all(original: Any, chunk: Any) -> None:
        original(chunk)
        for name, param in chunk.named_parameters():
            if not param.requires_grad:
                assert param.untyped_storage().nbytes() == 0, f"{name} is frozen, sharded and whole between its uses"
                planted.times += 1

    with wrapped(ShardedDataParallel, "release_all", release_all):
        yield planted


@contextmanager
def own_masks() -> Iterator[Planted]:
    """Create attention masks in the script, of a different kind in every micro-batch. The first one is plain causal.

    Plain, no mask at all, documents of every sequence, documents of one sequence for all (without the dimensions of
    batch and heads), and documents written in place into a tensor that was handed before.
    """
    with _own_masks(always=True) as planted:
        yield planted


@contextmanager
def masks_of_tokens() -> Iterator[Planted]:
    """Create masks as `own_masks` does, but only on stages that have tokens."""
    with _own_masks(always=False) as planted:
        yield planted


@contextmanager
def _own_masks(*, always: bool) -> Iterator[Planted]:
    from megatron.longseq import pretrain_gpt

    planted, again, sums = Planted(), {}, []

    def cut(original: Any, batch: Any, **where: Any) -> Any:
        tokens, labels = batch.get("tokens"), batch.get("labels")
        if tokens is not None or labels is not None:
            # The same on the first and on the last stage: labels are the tokens that follow.
            content = tokens[:, 1:] if tokens is not None else labels[:, :-1]
            sums.append(int(content[0].sum()))
            mask = _mask_of_kind((sums[-1] - sums[0]) % 5, content, again)
            batch["attention_mask"] = mask if always or tokens is not None else None
            planted.times += 1
        return original(batch, **where)

    with wrapped(pretrain_gpt, "get_batch_on_this_cp_rank", cut):
        yield planted


def _mask_of_kind(kind: int, content: torch.Tensor, again: dict[str, torch.Tensor]) -> torch.Tensor | None:
    size = content.shape[1] + 1
    sequences = 1 if kind == 3 else content.shape[0]
    mask = torch.ones(sequences, 1, size, size, dtype=torch.bool).triu(1)
    if kind == 1:
        return None
    if kind > 1:
        for sequence in range(sequences):
            border = 1 + int(content[sequence, 0]) % (size - 2)
            for start in (border, (border + size) // 2):
                mask[sequence, 0, start:, :start] = True
    if kind == 4:
        whole = again.setdefault("mask", torch.empty_like(mask))
        whole.data.copy_(mask)  # unseen by autograd, as a copy from NumPy is
        return whole
    return mask[0, 0] if kind == 3 else mask


def random_documents(tokens: torch.Tensor) -> torch.Tensor:
    """Return ends of packed documents that depend on the tokens alone, int32 [documents + 1], for [b, s] tokens.

    Some sequences are one document, some have many, so that steps differ.
    """
    generator = torch.Generator().manual_seed(int(tokens.sum()))
    inner = torch.randint(1, tokens.numel(), (int(tokens.sum()) % 3 * 10,), generator=generator)
    rows = torch.arange(0, tokens.numel() + 1, tokens.shape[1])
    return torch.cat([rows, inner]).unique().to(torch.int32)


@contextmanager
def reported_documents() -> Iterator[Planted]:
    """Ranks that read a batch report its documents to upstream, those of later stages several times.

    The other stages and ranks report nothing.
    """
    from megatron.core import mpu
    from megatron.training import training

    from megatron.longseq import pretrain_gpt

    planted = Planted()

    class Samples:
        def __init__(self, samples: Any) -> None:
            self.samples = samples

        def __next__(self) -> Any:
            sample = next(self.samples)
            for _ in range(1 + mpu.get_pipeline_model_parallel_rank()):
                training.update_seqlen_stats_from_cu_seqlens(random_documents(sample["tokens"]))
            planted.times += 1
            return sample

    def get_batch(original: Any, samples: Any, *rest: Any) -> Any:
        return original(samples and Samples(samples), *rest)

    with wrapped(pretrain_gpt, "get_batch", get_batch), printed_sums():
        yield planted


@contextmanager
def printed_sums() -> Iterator[Planted]:
    """Every rank prints tokens and squares of the documents of each step."""
    from megatron.training import training

    planted = Planted()

    def consume(original: Any) -> Any:
        sums = original()
        print(f"sums of documents: {sums}")
        planted.times += 1
        return sums

    with wrapped(training, "consume_seqlen_stats_in_iteration", consume):
        yield planted


@contextmanager
def counted_flops() -> Iterator[Planted]:
    """Count the FLOPs of all matrix products of the training steps."""
    from megatron.training import training
    from torch.utils.flop_counter import FlopCounterMode

    planted = Planted()

    def train_step(original: Any, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = original(*args, **kwargs)
        planted.times += counter.get_total_flops()
        return result

    with wrapped(training, "train_step", train_step):
        yield planted


@contextmanager
def _killed_while_saving(point: str) -> Iterator[Planted]:
    """Kill a rank at a point of the second save: see `KILLED_WHILE_SAVING`."""
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from torch.distributed.checkpoint.filesystem import _FileSystemWriter

    from megatron.longseq.checkpoints import commit

    planted = Planted()
    owner, name, rank = {
        "tensors": (FileSystemWriterAsync, "write_preloaded_data", 1),
        "list": (_FileSystemWriter, "finish", 0),
        "description": (serialization, "save_config", 0),
        "manifest": (commit, "write_manifest", 0),
        "name": (commit.Path, "rename", 0),
        "tracker": (commit, "commit", 0),
    }[point]

    def act(original: Any, *args: Any, **named: Any) -> Any:
        if point != "name" or args[0].name.startswith("saving_"):
            planted.times += 1
        # A save finishes two lists: that of its common state, and that of its tensors.
        is_due = "0000002" in str(args[0].path) if point == "list" else planted.times == 2
        if not is_due or torch.distributed.get_rank() != rank:
            return original(*args, **named)
        if point in ("tensors", "manifest", "tracker"):
            original(*args, **named)
        if point == "tensors":
            file = named["write_bucket"][0]
            os.truncate(file, os.path.getsize(file) // 2)
        if point == "manifest":
            os.truncate(args[0] / "longseq_manifest.json", 100)
        if point == "tracker":  # upstream has just opened it
            (args[0].parent / "latest_checkpointed_iteration.txt").write_text("")
        os._exit(9)

    with wrapped(owner, name, act):
        yield planted


@contextmanager
def watched_commits() -> Iterator[Planted]:
    """Require that no call that starts a save commits a checkpoint, and count the commits that come later."""
    from megatron.longseq.checkpoints import commit
    from patches.checkpoint import saving

    planted, starting = Planted(), list[bool]()

    def save(original: Any, write: Any, folder: Path, *rest: Any, **named: Any) -> Any:
        starting.append(True)
        request = original(write, folder, *rest, **named)
        starting.pop()
        assert request is not None and not folder.exists()
        return request

    def committed(original: Any, *args: Any, **named: Any) -> Any:
        assert not starting
        planted.times += 1
        return original(*args, **named)

    with wrapped(saving, "save_atomically", save), wrapped(commit, "commit", committed):
        yield planted


@contextmanager
def killed_behind_the_second_save() -> Iterator[Planted]:
    """Kill rank 1 when the second save has been started in the background."""
    from megatron.training import async_utils, checkpointing

    planted = Planted()

    def save(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        if planted.times == 2:  # upstream lets several saves be under way; the first one ends here
            async_utils.maybe_finalize_async_save(blocking=True)
        request = original(*args, **named)
        if planted.times == 2:
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 1:
                os._exit(9)
        return request

    with wrapped(checkpointing, "schedule_async_save", save):
        yield planted


@contextmanager
def saves_that_end_late() -> Iterator[Planted]:
    """Let saves in the background end only when the run waits for them; count those that wait together."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    planted = Planted()

    def finalize(original: Any, self: Any, blocking: bool = False, **named: Any) -> Any:
        if not blocking:
            return []
        planted.times = max(planted.times, self.get_num_unfinalized_calls())
        return original(self, blocking, **named)

    with wrapped(AsyncCallsQueue, "maybe_finalize_async_calls", finalize):
        yield planted


@contextmanager
def killed_background_writer() -> Iterator[Planted]:
    """Kill rank 1's process that writes checkpoints in the background before the second save."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import checkpointing

    planted = Planted()

    def save(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        if planted.times == 2 and torch.distributed.get_rank() == 1:
            PersistentAsyncCaller._persistent_process.kill()
        return original(*args, **named)

    with wrapped(checkpointing, "schedule_async_save", save):
        yield planted


KILLED_WHILE_SAVING = ("tensors", "list", "description", "manifest", "name", "tracker")
killed_in_tensors = functools.partial(_killed_while_saving, "tensors")
killed_before_list = functools.partial(_killed_while_saving, "list")
killed_before_description = functools.partial(_killed_while_saving, "description")
killed_in_manifest = functools.partial(_killed_while_saving, "manifest")
killed_before_name = functools.partial(_killed_while_saving, "name")
killed_in_tracker = functools.partial(_killed_while_saving, "tracker")


@contextmanager
def flipped_bit_on_the_way_to_the_disk() -> Iterator[Planted]:
    """Flip a bit of a tensor that rank 1 writes in the second save, in the copy that is written."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    planted = Planted()

    def write(original: Any, *args: Any, **named: Any) -> Any:
        planted.times += 1
        if planted.times == 2 and torch.distributed.get_rank() == 1:
            _, _, (_, tensors) = named["write_bucket"]
            item, tensor = next(pair for pair in tensors if "exp_avg_sq" in pair[0].index.fqn)
            flipped = tensor.clone()
            flipped.view(-1).view(torch.int32)[3] ^= 1
            tensors[tensors.index((item, tensor))] = item, flipped
        return original(*args, **named)

    with wrapped(FileSystemWriterAsync, "write_preloaded_data", write):
        yield planted


@contextmanager
def nan_in_the_second_save() -> Iterator[Planted]:
    """Set an element of a second moment on rank 1 to NaN while the second checkpoint is saved."""
    from megatron.training import training

    planted = Planted()

    def save(original: Any, iteration: int, model: Any, optimizer: Any, *rest: Any, **named: Any) -> Any:
        planted.times += 1
        inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
        state = next(state for state in inner.state.values() if state["exp_avg_sq"].numel())["exp_avg_sq"].view(-1)
        before = state[-1].clone()
        if planted.times == 2 and torch.distributed.get_rank() == 1:
            state[-1] = torch.nan
        try:
            return original(iteration, model, optimizer, *rest, **named)
        finally:
            state[-1] = before

    with wrapped(training, "save_checkpoint_and_time", save):
        yield planted


class _Code:
    """An object whose pickle runs code: it creates a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.makedirs, (self.folder, 0o777, True)  # upstream loads it twice


@contextmanager
def code_in_the_checkpoint() -> Iterator[Planted]:
    """Save an argument whose pickle runs code."""
    from megatron.training import checkpointing

    planted = Planted()

    def generate(original: Any, args: Any, *rest: Any, **named: Any) -> Any:
        planted.times += 1
        args.with_code = _Code(f"{args.save}/created-by-code")
        return original(args, *rest, **named)

    with wrapped(checkpointing, "generate_state_dict", generate):
        yield planted

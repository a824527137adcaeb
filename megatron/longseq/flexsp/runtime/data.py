"""Data iterators of a run under --flexsp, from upstream's data flags."""

from argparse import Namespace
from dataclasses import fields

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training import print_rank_0

from megatron.longseq.flexsp.from_args import cost_model, planner_of
from megatron.longseq.flexsp.runtime.conversations import jsonl_files, tokenize_conversations
from megatron.longseq.flexsp.runtime.documents import DocumentDataset, DocumentDatasetConfig, DocumentSource
from megatron.longseq.flexsp.runtime.steps import GlobalBatches, Lookahead, StepIterator


def planned_steps(args: Namespace, samples: list[int], config: GPTDatasetConfig) -> tuple[StepIterator | None, ...]:
    """Return the iterators of the training, validation and test documents; None for a part without documents.

    Every rank reads the documents of its own groups, so all ranks build the data sets.

    Args:
        args: upstream's arguments. Samples that a checkpoint has consumed are skipped.
        samples: documents that upstream expects each part to give.
        config: upstream's configuration of the data.

    Raises:
        ValueError: A part holds no document that can be trained, or conversations cannot be tokenized.
    """
    fields_of_upstream = {field.name: getattr(config, field.name) for field in fields(GPTDatasetConfig) if field.init}
    files = jsonl_files(config.blend, config.blend_per_split) if args.sft else []
    own = DocumentDatasetConfig(
        **fields_of_upstream,
        overlong=args.flexsp_overlong,
        conversations=args.sft,
        tokenized=tokenize_conversations(args, files),
    )
    step, sample = training_start(args)
    if samples[0] is not None:  # a run that resumes with another global batch wants other numbers than upstream counts
        samples = [max(samples[0], sample + (args.train_iters - step) * args.global_batch_size), *samples[1:]]
    datasets = BlendedMegatronDatasetBuilder(DocumentDataset, samples, lambda: True, own).build()
    size = args.eval_global_batch_size
    begins = (args.iteration, args.consumed_valid_samples // size, 0)
    firsts = ((step, sample), (0, 0), (0, 0))
    sizes = (args.global_batch_size, size, size)
    plan, cost = planner_of(args), cost_model(args, on_gpu=torch.cuda.is_available())
    iterators: list[StepIterator | None] = []
    parts = zip(("train", "valid", "test"), datasets, samples, sizes, begins, firsts, strict=True)
    for part, dataset, wanted, documents, begin, first in parts:
        if dataset is None:
            iterators.append(None)
            continue
        source = DocumentSource(dataset, wanted)
        print_rank_0(f"> FlexSP, {part}: {source.describe()}")
        batches = GlobalBatches(source.length, documents, args.flexsp_batch_tokens, *first)
        iterators.append(StepIterator(Lookahead(batches, plan, cost, args.flexsp_plan_ahead), source, begin))
    return tuple(iterators)


def training_start(args: Namespace) -> tuple[int, int]:
    """Return a step and its first document, from which those of all later steps are counted.

    A checkpoint says how many documents were trained, so that a run may resume with another global batch. Without that
    number (from a run without --flexsp, or with --override-ckpt-iteration), a batch in tokens is counted from the
    beginning.

    Args:
        args: upstream's arguments, after the checkpoint is loaded.
    """
    saved: tuple[int, int] | None = getattr(args, "flexsp_saved", None)
    if saved is not None and saved[0] == args.iteration:
        return saved
    return (args.iteration, args.consumed_train_samples) if args.flexsp_batch_tokens is None else (0, 0)

"""Generated command lines of trainings."""

import os
from argparse import Action, ArgumentParser, Namespace
from random import Random

from tests.distributed.flags import TINY, flags
from tests.faults.fuzz import INTEGERS, NUMBERS, WORDS, FuzzReport, judge

# Upstream's flags: (flag, values), None for none.
UPSTREAM: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("--tensor-model-parallel-size", ("1", "2", "3", "4", "0")),
    ("--pipeline-model-parallel-size", ("1", "2", "3", "4", "8", "0", "-1")),
    ("--context-parallel-size", ("1", "2", "3", "4", "8", "0")),
    ("--expert-model-parallel-size", ("1", "2")),
    ("--num-layers-per-virtual-pipeline-stage", ("1", "2", "0")),
    ("--num-virtual-stages-per-pipeline-rank", ("1", "2", "0")),
    ("--num-layers", ("1", "2", "3", "8", "0")),
    ("--hidden-size", ("64", "63", "0")),
    ("--num-attention-heads", ("1", "2", "3", "4", "0")),
    ("--num-query-groups", ("1", "2", "3", "0")),
    ("--kv-channels", ("16", "1", "0")),
    ("--seq-length", ("1", "63", "64", "128", "0")),
    ("--max-position-embeddings", ("64", "32", "0")),
    ("--micro-batch-size", ("1", "2", "0", "3")),
    ("--global-batch-size", ("1", "4", "6", "8", "0")),
    ("--train-iters", ("1", "0", "5")),
    ("--lr-decay-iters", ("1", "0")),
    ("--eval-iters", ("1", "0", "-1")),
    ("--eval-interval", ("1", "0")),
    ("--log-interval", ("1", "0")),
    ("--save-interval", ("1", "0")),
    ("--window-size", ("8,0", "8,8", "-1,0", "8", "x")),
    ("--split", ("90,5,5", "0,0,0", "1", "a,b", "100,0,0")),
    ("--vocab-size", ("1", "256", "0")),
    ("--num-experts", ("1", "4", "3")),
    ("--moe-router-topk", ("1", "2", "8")),
    ("--recompute-granularity", ("full", "selective")),
    ("--recompute-num-layers", ("1", "0")),
    ("--decoder-first-pipeline-num-layers", ("1", "0", "9")),
    ("--cp-comm-type", ("p2p", "a2a", "a2a+p2p", "allgather", "x")),
    ("--position-embedding-type", ("rope", "learned_absolute", "mrope", "none")),
    ("--step-batch-size-schedule", ("0:4 10:8", "0:3", "x", "")),
    ("--data-path", ("missing", "/dev/null", "")),
    ("--sequence-parallel", None),
    ("--bf16", None),
    ("--fp16", None),
    ("--use-distributed-optimizer", None),
    ("--overlap-grad-reduce", None),
    ("--overlap-param-gather", None),
    ("--sft", None),
    ("--reset-position-ids", None),
    ("--reset-attention-mask", None),
    ("--eod-mask-loss", None),
    ("--dataloader-inter-document-masking", None),
    ("--calculate-per-token-loss", None),
    ("--full-validation", None),
    ("--exit-signal-handler", None),
    ("--log-throughput", None),
    ("--tp-comm-overlap", None),
    ("--moe-grouped-gemm", None),
    ("--use-cpu-initialization", None),
)
WORLDS = (1, 1, 2, 3, 4, 8, 16, 64)


class FlagChecker:
    """Validates command lines as a training script does, without the cost of building upstream's parser each time."""

    def __init__(self) -> None:
        import patches

        patches.start()
        from megatron.training import arguments as upstream

        from megatron.longseq.arguments import add_longseq_arguments
        from megatron.longseq.freeze import add_freeze_arguments
        from patches.entry.hooks import escape_help

        parser = upstream.add_megatron_arguments(ArgumentParser(prog="pretrain_gpt.py", allow_abbrev=False))
        escape_help(parser)
        known = len(parser._actions)
        self.parser = add_longseq_arguments(add_freeze_arguments(parser))
        self.ours = self.parser._actions[known:]
        self.validate_upstream = upstream.validate_args
        self.validate_upstream = getattr(self.validate_upstream, "__wrapped__", self.validate_upstream)

    def check(self, words: list[str], world: int) -> None:
        """Parse and validate a command line up to where the model's configuration is made.

        Raises:
            ValueError, SystemExit: the flags are refused.
        """
        import torch

        from megatron.longseq.arguments import validate_longseq_arguments
        from megatron.longseq.pretrain_gpt import model_config
        from megatron.longseq.refusals import explained_refusals
        from megatron.longseq.unserved import refuse_unserved

        args = self.parser.parse_args(words)
        args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
        args.rank, args.world_size = 0, world
        validate_longseq_arguments(args)
        self._validate(args)
        refuse_unserved(args)
        with explained_refusals("the model of these flags"):
            model_config(args)
        assert not torch.distributed.is_initialized()

    def _validate(self, args: Namespace) -> None:
        """Call `validate_args` with the callbacks that these flags ask for."""
        from patches import hooks, ledger
        from patches.engine.place import load
        from patches.engine.session import accepts

        validate = self.validate_upstream
        for callback in ledger.by_id(hooks.VALIDATE_ARGS).callbacks:
            if accepts(callback, args):
                validate = load(callback.impl, callback.id)(validate)
        validate(args, {})


def fuzz_flags(count: int, seed: int) -> FuzzReport:
    """Check command lines of trainings: the tiny model's, with one to four flags of ours and of upstream's changed."""
    report, random, checker = FuzzReport(), Random(seed), FlagChecker()
    environment = dict(os.environ)
    for _ in range(count):
        words = flags(TINY)
        for _ in range(random.randint(1, 4)):
            words += _random_flag(random, checker.ours)
        world = random.choice(WORLDS)
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(min(world, 8)), "RANK": "0"}
        shown = f"world {world}: {' '.join(words[len(flags(TINY)) :])}"
        judge(report, shown, lambda words=words, world=world: checker.check(words, world))  # type: ignore[misc]
    os.environ.clear()
    os.environ |= environment
    return report


def _random_flag(random: Random, ours: list[Action]) -> list[str]:
    if random.random() < 0.5:
        flag, values = random.choice(UPSTREAM)
        return [flag] if values is None else [flag, random.choice(values)]
    return action_words(random, random.choice([action for action in ours if action.option_strings]))


def action_words(random: Random, action: Action) -> list[str]:
    """Return a flag with values that its type suggests, some of them wrong."""
    flag = random.choice(action.option_strings)
    if action.nargs == 0:
        return [flag]
    if action.choices:
        pool: tuple[str, ...] = (*map(str, action.choices), "x")
    else:
        pool = INTEGERS if action.type is int else NUMBERS if action.type is float else (*WORDS, *INTEGERS)
    count = action.nargs if isinstance(action.nargs, int) else random.randint(1, 3) if action.nargs else 1
    return [flag, *random.choices(pool, k=count)]

"""What the ledger does at upstream's argument parsing and initialisation."""

import functools
import inspect
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.longseq import arguments
from megatron.longseq.attention.arguments import serves_core_attention
from megatron.longseq.attention.plan.model_difference import READS, model_difference
from megatron.longseq.refusals import explained_refusals
from patches.conditions import has_local_layers, no_cuda
from patches.engine import digest, session
from patches.errors import RankMismatch
from patches.packed.conditions import serves_documents

ROOT = Path(__file__).resolve().parents[2]
Provider = Callable[[ArgumentParser], ArgumentParser]


@dataclass
class _Parsing:
    """What is kept from one call of `parse_args` to the next: upstream parses twice, the second time in `pretrain`."""

    script: Provider | None = None
    printed_digest: str = ""


def choose_patches(parse_args: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's `parse_args`: add our flags to the script's own, then apply the patches that the flags need."""

    def parse(extra_args_provider: Provider | None = None, ignore_unknown_args: bool = False) -> Any:
        kept: _Parsing = session.SESSION.state.setdefault("entry.parse-args", _Parsing())
        kept.script = extra_args_provider or kept.script  # the second time, upstream has lost the script's flags

        def provider(parser: ArgumentParser) -> ArgumentParser:
            escape_help(parser)
            explain_names(parser)
            return arguments.add_longseq_arguments(kept.script(parser) if kept.script else parser)

        args = parse_args(provider, ignore_unknown_args)
        if getattr(args, "yaml_cfg", None) is not None:
            _keep_our_flags(args)
        arguments.validate_longseq_arguments(args)
        session.SESSION.select_and_apply(args)
        _record(args)
        if args.rank == 0 and kept.printed_digest != args.longseq_patch_digest:
            kept.printed_digest = args.longseq_patch_digest
            print(
                "\n".join(f"> {line}" for line in digest.report(session.SESSION.records, session.SESSION.hashes)),
                flush=True,
            )
            _print_model_difference(args)
        return args

    return parse


def _print_model_difference(args: Any) -> None:
    """Print where upstream's attention and ours compute different models from the same flags."""
    if not all(hasattr(args, name) for name in READS):  # of a YAML file that leaves flags out
        return
    is_local, is_distributed = has_local_layers(args), args.context_parallel_size > 1
    serves_ranks = is_distributed and serves_core_attention(args, is_local=is_local)
    is_ours = getattr(args, "seq1f1b_splits", 1) > 1 or serves_ranks
    if is_distributed and not is_ours:  # local layers may hold TransformerEngine's attention
        is_local = False
    is_dense = not serves_documents(args)
    text = model_difference(args, is_ours=is_ours, is_local=is_local, on_gpu=not no_cuda(args), is_dense=is_dense)
    if text is not None:
        print(text, flush=True)


def _keep_our_flags(args: Any) -> None:
    """Parse our flags again after upstream's YAML file, which replaces all parsed flags."""
    ours, _ = arguments.add_longseq_arguments(ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args()
    for name, value in vars(ours).items():
        if not hasattr(args, name):
            setattr(args, name, value)


def _record(args: Any) -> None:
    """Put the applied set into the arguments, which upstream logs and saves in its checkpoints."""
    hashes = session.SESSION.hashes
    args.longseq_patches = list(hashes)
    args.longseq_patch_hashes = hashes
    args.longseq_patch_digest = digest.combined(hashes)


def escape_help(parser: ArgumentParser) -> None:
    """Escape percent signs in help texts that argparse cannot format."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except (ValueError, KeyError, TypeError):
            action.help = (action.help or "").replace("%", "%%")


def explain_names(parser: ArgumentParser) -> None:
    """Let flags whose values are names of an enumeration refuse another name as argparse refuses a wrong choice.

    Upstream looks the name up, and argparse does not expect the KeyError of an unknown one.
    """
    for action in parser._actions:
        if inspect.isfunction(action.type):
            action.type = _explained(action.type)


def _explained(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(convert)
    def converted(text: str) -> Any:
        try:
            return convert(text)
        except KeyError:
            raise ArgumentTypeError(f"{text!r} is no name that this flag knows") from None

    return converted


def with_explained_refusals(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: an assertion of upstream's becomes an error that says which check failed.

    Raises:
        ValueError: upstream refuses the flags.
    """

    def validate_args(args: Any, defaults: dict[str, Any] | None = None) -> Any:
        with explained_refusals("these flags"):
            return original(args, defaults or {})

    return validate_args


def agree_on_patches(initialize_megatron: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's `initialize_megatron`: once the ranks are connected, they compare their patches."""

    def initialize(*args: Any, **kwargs: Any) -> Any:
        finish = initialize_megatron(*args, **kwargs)
        if callable(finish):  # with --lazy-mpu-init the caller connects the ranks later, by this function
            return agree_on_patches(finish)
        compare_ranks(session.SESSION.hashes)
        compare_code()
        _write_arguments()
        return finish

    return initialize


def _write_arguments() -> None:
    from megatron.training.global_vars import get_args  # type: ignore[import-untyped]

    args = get_args()
    if args.rank == 0:
        arguments.write_arguments_files(args)


def compare_ranks(hashes: Mapping[str, str]) -> None:
    """Gather every rank's patches over the default group, and refuse to go on if they differ.

    Without an initialised torch.distributed (upstream's `skip_mpu_initialization`) there is no other rank to ask.

    Raises:
        RankMismatch: on every rank; names the ranks and what they have differently from the largest agreeing set.
    """
    import torch.distributed as dist

    if not dist.is_initialized():
        print("> patches: torch.distributed is not initialized, ranks were not compared", file=sys.stderr, flush=True)
        return
    if dist.get_backend() == "fake":  # a dry run: there is no other rank
        return
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(hashes))
    refuse_disagreement(gathered)


def compare_code() -> None:
    """Compare the source files of this project on all nodes; the first rank of each node reads them.

    Raises:
        RankMismatch: on every rank; names the ranks whose node has other files than most.
    """
    import torch.distributed as dist

    from megatron.longseq.preflight.facts import code_digest

    if not dist.is_initialized() or dist.get_backend() == "fake":
        return
    own = (
        code_digest((ROOT / "megatron/longseq", ROOT / "patches")) if os.environ.get("LOCAL_RANK", "0") == "0" else None
    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    ranks: dict[str, list[int]] = {}
    for rank, digest_of_node in enumerate(gathered):
        if digest_of_node is not None:
            ranks.setdefault(digest_of_node, []).append(rank)
    if len(ranks) > 1:
        most, *others = sorted(ranks, key=lambda key: (-len(ranks[key]), ranks[key]))
        raise RankMismatch(
            "the nodes have different versions of this project's code",
            where="; ".join(f"ranks {_spans(ranks[key])}: {key}" for key in others)
            + f" (compared with ranks {_spans(ranks[most])}: {most})",
            why="they would diverge or hang later",
            todo="install the same version on all nodes, or use scripts/launch.sh, which copies the code of a run",
        )


def refuse_disagreement(gathered: list[dict[str, str]]) -> None:
    """Compare the patches (id to hash) of all ranks, listed by rank.

    Raises:
        RankMismatch: not all are the same.
    """
    ranks: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for rank, hashes in enumerate(gathered):
        ranks.setdefault(tuple(hashes.items()), []).append(rank)
    if len(ranks) == 1:
        return
    most, *others = sorted(ranks, key=lambda key: (-len(ranks[key]), ranks[key]))
    lines = [f"ranks {_spans(ranks[key])}: {digest.difference(dict(key), dict(most))}" for key in others]
    raise RankMismatch(
        "the ranks have different patches",
        where="; ".join(lines) + f" (compared with ranks {_spans(ranks[most])}, digest {digest.combined(dict(most))})",
        why="they would hang or diverge later",
        todo="start all ranks with the same flags, the same installation of this project and the same kind of device",
    )


def _spans(ranks: list[int]) -> str:
    """Return ascending ranks as text with ranges: [0, 1, 2, 5] is `0-2, 5`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)

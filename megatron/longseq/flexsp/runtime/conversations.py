"""Conversations in jsonl files (--sft), which are tokenized before the run because plans need their lengths."""

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.longseq.data import manifest
from megatron.longseq.data.chat import chat_spec
from megatron.longseq.data.corpus import find_files
from megatron.longseq.data.encode import EncodeOptions
from megatron.longseq.data.prepare import PrepareRequest, prepare
from megatron.longseq.flexsp.from_args import Blend

CACHE = "cache"  # folder beside a jsonl file, without --data-cache-path


def jsonl_files(blend: Blend, per_part: Iterable[Blend] | None) -> list[str]:
    """Return the paths that are no indexed data sets, each once.

    Args:
        blend, per_part: data of the run, as upstream's `get_blend_and_blend_per_split` returns it.
    """
    paths = [path for one in (blend, *(per_part or ())) if one is not None for path in one[0]]
    return [path for path in dict.fromkeys(paths) if not Path(f"{path}.idx").is_file()]


def check_conversations(args: Namespace, files: Iterable[str]) -> None:
    """Refuse conversations that cannot be tokenized, before the ranks connect.

    Args:
        args: upstream's arguments.
        files: jsonl files of the run.

    Raises:
        ValueError: A file or the tokenizer's folder is missing.
    """
    files = list(files)
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"--sft: {path} is neither a jsonl file nor the prefix of an indexed data set (no .idx).")
    if files and not Path(args.tokenizer_model or "").is_dir():
        raise ValueError(
            f"--flexsp --sft with {files[0]}: conversations are tokenized before they are planned, which requires the "
            f"local folder of a Hugging Face tokenizer; --tokenizer-model {args.tokenizer_model} is none."
        )


def tokenize_conversations(args: Namespace, files: list[str]) -> dict[str, str]:
    """Tokenize jsonl files on the first rank, unless an earlier run has; return the prefix of each one's output.

    Outputs are kept in --data-cache-path, or in a folder `cache` beside the file. Their names depend on the path, size
    and time of the file, and on the content of the tokenizer. All ranks call this.

    Args:
        args: upstream's arguments.
        files: jsonl files of the run.

    Raises:
        ValueError: A file cannot be tokenized, or this rank does not see the output.
    """
    if not files:
        return {}
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [{path: _tokenize(args, path) for path in files}]
        except (ValueError, OSError) as error:
            found = [f"--sft: {error}"]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    outputs: dict[str, str] = found[0]
    for prefix in outputs.values():
        if not Path(f"{prefix}.idx").is_file():
            raise ValueError(
                f"FlexSP, rank {dist.get_rank()}: the first rank has tokenized conversations into {prefix}, which this "
                "rank does not see. Give a --data-cache-path that all nodes share, or prepare the conversations on "
                "every node: python -m megatron.longseq.data prepare --format conversations."
            )
    return outputs


def _tokenize(args: Namespace, path: str) -> str:
    """Return the prefix of a file's output, which is made if it is missing."""
    spec = chat_spec(args.tokenizer_model, args.sft_tokenizer_prompt_format)
    found, options = find_files([path], kind="conversations"), EncodeOptions("messages")
    folder = Path(args.data_cache_path) if args.data_cache_path else Path(path).absolute().parent / CACHE
    key = manifest.identity(found, options, spec).key[:16]
    prefix = folder / f"{Path(path).stem}-{key}"
    # One process: workers would start the training script again.
    prepare(PrepareRequest(found, str(prefix), spec, options), lambda line: print(f"> {line}", flush=True))
    return str(prefix)

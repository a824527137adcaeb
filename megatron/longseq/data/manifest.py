"""Read and write the manifest of an output: its inputs, its contents, and upstream's flags that train on it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import LOSS_MASK, DataError, splits
from megatron.longseq.data.corpus import SourceFile
from megatron.longseq.data.encode import EncodeOptions
from megatron.longseq.data.tokenizer import TokenizerSpec

FORMAT = "megatron-longseq-data-1"
MOST_LISTED = 1000  # malformed documents listed in a manifest
MOST_NAMED = 5  # changed files named in a message


@dataclass(frozen=True)
class Identity:
    """Everything that determines an output bit for bit.

    Attributes:
        files: stamp of each input file by path, in the order of the inputs.
        options: fields of `EncodeOptions`.
        tokenizer: fields of `TokenizerSpec`.
    """

    files: dict[str, str]
    options: dict[str, Any]
    tokenizer: dict[str, Any]

    @property
    def inputs_digest(self) -> str:
        """Return the sha256 of all paths and stamps in order."""
        return hashlib.sha256(json.dumps(list(self.files.items())).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Return the sha256 of everything that determines the output."""
        return hashlib.sha256(json.dumps([FORMAT, list(self.files.items()), asdict(self)]).encode()).hexdigest()


def identity(files: Sequence[SourceFile], options: EncodeOptions, tokenizer: TokenizerSpec) -> Identity:
    """Collect what determines an output."""
    fields = {name: value for name, value in asdict(tokenizer).items() if value is not None}
    return Identity({file.path: file.stamp for file in files}, asdict(options), fields)


def differences(old: Identity, new: Identity) -> list[str]:
    """Describe the differences of two identities. The list is empty if the outputs would be equal."""
    words = []
    for name in ("options", "tokenizer"):
        before, after = getattr(old, name), getattr(new, name)
        for key in sorted(set(before) | set(after)):
            # A tokenizer file may be moved; its sha256 identifies it.
            if before.get(key) != after.get(key) and (name, key) != ("tokenizer", "model"):
                words.append(f"{name}.{key}: {before.get(key)} -> {after.get(key)}")
    shared = old.files.keys() & new.files.keys()
    groups = {
        "new inputs": [path for path in new.files if path not in shared],
        "missing inputs": [path for path in old.files if path not in shared],
        "inputs with another size or time": [
            path for path in new.files if path in shared and old.files[path] != new.files[path]
        ],
    }
    words += [f"{len(paths)} {name}: {_first(paths)}" for name, paths in groups.items() if paths]
    if not words and list(old.files) != list(new.files):
        words.append("the order of the inputs")
    return words


def _first(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(paths[:MOST_NAMED]) + more


def length_statistics(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Return minimum, mean, quantiles and maximum of document lengths in tokens. Quantiles are lengths that occur.

    Args:
        lengths: [documents], in tokens.
    """
    p50, p90, p99 = np.quantile(lengths, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    mean = round(float(lengths.mean()), 1)
    return {"min": int(lengths.min()), "mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": int(lengths.max())}


def training_flags(prefix: str, tokenizer: dict[str, Any], documents: int) -> list[str]:
    """Return the flags that train on an output: upstream's for documents, those of our GPT script for conversations.

    Training needs the vocabulary size and the ids of the end of a document and of padding, but no tokenizer. If there
    are few documents, the flags contain a `--split`, because upstream's default would leave validation or test without
    documents.

    Args:
        prefix: path of the output without suffix.
        tokenizer: fields of `TokenizerSpec`.
        documents: number of documents.
    """
    pad_id = tokenizer.get("pad_id")
    return [
        *(("--sft",) if tokenizer["type"] == "sft" else ()),
        *("--data-path", prefix),
        *("--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", str(tokenizer["vocab_size"])),
        *("--null-tokenizer-eod-id", str(tokenizer["eod_id"])),
        *(() if pad_id is None else ("--null-tokenizer-pad-id", str(pad_id))),
        *splits.suggest_split_flags(documents),
    ]


def build(
    made: Identity, prefix: str, lengths: NDArray[np.int64], dtype: str, counts: dict[str, Any]
) -> dict[str, Any]:
    """Build the content of a manifest.

    Args:
        made: what the output was made from.
        prefix: path of the output without suffix.
        lengths: tokens of each document.
        dtype: name of the dtype of the ids.
        counts: numbers of documents that were left out, as entries of the manifest.
    """
    sizes = [int(stamp.split(":")[1]) for stamp in made.files.values()]
    tokens = int(lengths.sum())
    return {
        "format": FORMAT,
        "documents": len(lengths),
        "tokens": tokens,
        "dtype": dtype,
        "bin_bytes": tokens * np.dtype(dtype).itemsize,
        "lengths": length_statistics(lengths),
        **counts,
        "tokenizer": made.tokenizer,
        "options": made.options,
        "flags": training_flags(prefix, made.tokenizer, len(lengths)),
        "inputs": {"files": len(sizes), "bytes": sum(sizes), "sha256_of_stamps": made.inputs_digest},
        "input_stamps": made.files,
    }


def read(prefix: str) -> dict[str, Any]:
    """Read the manifest of an output.

    Raises:
        DataError: the manifest is missing, damaged or of another version, or it does not match the `.bin` files.
    """
    path = Path(f"{prefix}.json")
    try:
        content = json.loads(path.read_text("utf-8"))
        found = content["format"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such manifest; give the PREFIX of an output of prepare (without .bin)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of prepare ({error}); rebuild the output with --overwrite") from error
    if found != FORMAT:
        raise DataError(
            f"{path}: its format is {found}, but this version reads {FORMAT}; rebuild the output with --overwrite"
        )
    sizes = {prefix: content["bin_bytes"]}
    if "tokens_in_loss" in content:  # conversations
        sizes[prefix + LOSS_MASK] = content["tokens"]
    for part, expected in sizes.items():
        for suffix in (".bin", ".idx"):
            if not Path(part + suffix).is_file():
                raise DataError(f"{part}{suffix} is missing, but {path} exists; rebuild the output with --overwrite")
        size = Path(f"{part}.bin").stat().st_size
        if size != expected:
            raise DataError(f"{part}.bin has {size} bytes, but {path} says {expected}; rebuild with --overwrite")
    return dict(content)


def identity_from(content: dict[str, Any]) -> Identity:
    """Return the identity that a manifest contains."""
    return Identity(content["input_stamps"], content["options"], content["tokenizer"])

"""The manifest beside an output: where it came from, what is in it, and upstream's flags that train on it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import DataError, splits
from megatron.longseq.data.corpus import SourceFile
from megatron.longseq.data.encode import Options
from megatron.longseq.data.tokenizer import TokenizerSpec

FORMAT = "megatron-longseq-data-1"
MOST_LISTED = 1000
MOST_NAMED = 5


@dataclass(frozen=True)
class Identity:
    """What fixes an output bit for bit: the inputs' stamps by path in their order, the options and the tokenizer."""

    files: dict[str, str]
    options: dict[str, Any]
    tokenizer: dict[str, Any]

    @property
    def inputs_digest(self) -> str:
        """The sha256 over every path and stamp, in order."""
        return hashlib.sha256(json.dumps(list(self.files.items())).encode()).hexdigest()

    @property
    def key(self) -> str:
        """The sha256 over everything."""
        return hashlib.sha256(json.dumps([FORMAT, list(self.files.items()), asdict(self)]).encode()).hexdigest()


def identity(files: Sequence[SourceFile], options: Options, tokenizer: TokenizerSpec) -> Identity:
    """Collect what fixes an output."""
    return Identity({file.path: file.stamp for file in files}, asdict(options), asdict(tokenizer))


def differences(old: Identity, new: Identity) -> list[str]:
    """Say in words what changed from one identity to another; nothing when the output would be the same."""
    words = []
    for name in ("options", "tokenizer"):
        before, after = getattr(old, name), getattr(new, name)
        for key in sorted(set(before) | set(after)):
            # Where a tokenizer file lies does not matter; its sha256 does.
            if before.get(key) != after.get(key) and (name, key) != ("tokenizer", "model"):
                words.append(f"{name}.{key}: {before.get(key)} -> {after.get(key)}")
    shared = old.files.keys() & new.files.keys()
    groups = {
        "new inputs": [path for path in new.files if path not in shared],
        "inputs gone": [path for path in old.files if path not in shared],
        "inputs with another size or time": [
            path for path in new.files if path in shared and _stamps_differ(path, old, new)
        ],
    }
    words += [f"{len(paths)} {name}: {_few(paths)}" for name, paths in groups.items() if paths]
    if not words and list(old.files) != list(new.files):
        words.append("the order of the inputs")
    return words


def _stamps_differ(path: str, old: Identity, new: Identity) -> bool:
    return old.files[path] != new.files[path]


def _few(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(paths[:MOST_NAMED]) + more


def length_statistics(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Return document lengths in tokens: min, mean, and the quantiles as lengths that occur."""
    p50, p90, p99 = np.quantile(lengths, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
    mean = round(float(lengths.mean()), 1)
    return {"min": int(lengths.min()), "mean": mean, "p50": p50, "p90": p90, "p99": p99, "max": int(lengths.max())}


def training_flags(prefix: str, tokenizer: dict[str, Any], documents: int) -> list[str]:
    """Return upstream's flags for an output: training needs its vocabulary's size and eod, never its text.

    Few documents need a `--split` too: upstream's default would leave validation or test without any.
    """
    return [
        *("--data-path", prefix),
        *("--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", str(tokenizer["vocab_size"])),
        *("--null-tokenizer-eod-id", str(tokenizer["eod_id"])),
        *splits.fitting(documents),
    ]


def compose(
    made: Identity, prefix: str, lengths: NDArray[np.int64], dtype: str, counts: dict[str, Any]
) -> dict[str, Any]:
    """Build the manifest's content; `counts` holds what was left out (empty documents, malformed lines)."""
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
        DataError: there is none, it is damaged or of another format, or the `.bin` beside it has another size.
    """
    path = Path(f"{prefix}.json")
    try:
        content = json.loads(path.read_text("utf-8"))
        found = content["format"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such manifest; give the PREFIX that prepare wrote (without .bin)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of prepare ({error}); rebuild with --overwrite") from error
    if found != FORMAT:
        raise DataError(f"{path}: its format is {found}, this version reads {FORMAT}; rebuild with --overwrite")
    for suffix in (".bin", ".idx"):
        if not Path(prefix + suffix).is_file():
            raise DataError(f"{prefix}{suffix} is missing beside {path}; rebuild with --overwrite")
    size = Path(f"{prefix}.bin").stat().st_size
    if size != content["bin_bytes"]:
        raise DataError(f"{prefix}.bin has {size} bytes, {path} says {content['bin_bytes']}; rebuild with --overwrite")
    return dict(content)


def identity_of(content: dict[str, Any]) -> Identity:
    """Return the identity that a manifest records."""
    return Identity(content["input_stamps"], content["options"], content["tokenizer"])

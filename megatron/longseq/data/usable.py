"""Whether the data sets of a run can give what it asks of them; checked before any process group exists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.longseq.data.index import Index, read_index
from megatron.longseq.data.splits import NAMES, fitting, shares

Blend = tuple[Sequence[str], Sequence[float] | None]  # prefixes, and their weights where they are given

MORE = "A text file is one document: prepare .jsonl, one document a line, for more of them."


@dataclass(frozen=True)
class Wanted:
    """What upstream's flags ask of the data.

    Attributes:
        blend: the data that `split` divides; None: each part has its own.
        per_part: the data of train, valid and test, where each has its own.
        split: upstream's --split.
        sequence: tokens per sample.
        full_validation: --full-validation: validation takes each of its samples once.
        separate_validation: --multiple-validation-sets: validation data are not blended, so their weights are not read.
    """

    blend: Blend | None
    per_part: Sequence[Blend | None] | None
    split: str | None
    sequence: int
    full_validation: bool = False
    separate_validation: bool = False


def refuse_unusable(wanted: Wanted) -> None:
    """Refuse data sets that give a part of the run no document, no token or no sample.

    For a part without tokens upstream would look for samples without end. Data that are not on this machine's disk are
    left to upstream, which says what it misses.

    Raises:
        ValueError: names the data, the part, and flags that work.
    """
    if wanted.blend is not None and wanted.split is not None:
        _refuse_weights(wanted.blend, "--data-path")
        found = [index for prefix in wanted.blend[0] if (index := _index(prefix)) is not None]
        for index in found:
            _refuse_empty(index, "--data-path")
        _refuse_split(found, wanted.split)
        whole = len(wanted.blend[0]) > 1 and wanted.blend[1] is None
        for index in found:
            for name, share in zip(NAMES, shares(wanted.split, index.documents), strict=True):
                if share is not None:
                    once = whole or (wanted.full_validation and name == "valid")
                    _refuse_short(index, share, name, wanted.sequence if once else 0)
    for name, blend in zip(NAMES, wanted.per_part or (), strict=False):
        if blend is None:
            continue
        is_blended = len(blend[0]) > 1 and not (wanted.separate_validation and name == "valid")
        if is_blended:
            _refuse_weights(blend, f"the {name} data")
        once = (is_blended and blend[1] is None) or (wanted.full_validation and name == "valid")
        for index in [index for prefix in blend[0] if (index := _index(prefix)) is not None]:
            _refuse_empty(index, f"the {name} data")
            _refuse_short(index, range(index.documents), name, wanted.sequence if once else 0)


def _index(prefix: str) -> Index | None:
    return None if "://" in prefix else read_index(prefix)


def _refuse_weights(blend: Blend, where: str) -> None:
    for prefix, weight in zip(blend[0], blend[1] or (), strict=False):
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"{where}: {prefix} has the weight {weight:g}, and upstream blends weights above 0 alone. Leave it "
                "out, or give it a weight."
            )


def _refuse_empty(index: Index, where: str) -> None:
    if not index.documents:
        raise ValueError(f"{where}: {index.prefix} holds no documents. Leave it out, or prepare it again.")


def _refuse_split(found: Sequence[Index], split: str) -> None:
    """Refuse a split under which a part of a data set holds none of its documents."""
    lines = []
    for index in found:
        for name, share in zip(NAMES, shares(split, index.documents), strict=True):
            if share is not None and not share:
                lines.append(f"  {name}: none of the {index.documents} document(s) of {index.prefix}")
    if not lines:
        return
    fewest = min(index.documents for index in found)
    works = " ".join(fitting(fewest) or ["--split", "969,30,1"])
    raise ValueError(
        f"--split {split.replace(' ', '')} leaves parts without a document, in which upstream would look for samples "
        "without end:\n"
        + "\n".join(lines)
        + f"\nGive {works}, or 1,0,0 with --eval-iters 0 to train alone, or data for each part (--train-data-path, "
        f"--valid-data-path, --test-data-path). {MORE}"
    )


def _refuse_short(index: Index, share: range, name: str, sequence: int) -> None:
    """Refuse documents without a token, or, where each sample is taken once, with less than one sample."""
    if not index.reaches(share, 1):
        raise ValueError(
            f"{name}: documents {share.start} to {share.stop - 1} of {index.prefix} hold no token, and upstream would "
            "look for samples without end. Prepare the data again, or choose another --split."
        )
    if sequence and not index.reaches(share, sequence + 1):
        raise ValueError(
            f"{name}: documents {share.start} to {share.stop - 1} of {index.prefix} hold fewer than the "
            f"{sequence + 1} tokens of one sample (--seq-length {sequence}), and each sample is taken once here "
            "(--full-validation, or several data sets without weights). Give longer data, or a shorter --seq-length."
        )


def fits(lengths: np.ndarray, documents: np.ndarray, samples: np.ndarray, sequence: int) -> bool:
    """Whether sample indices belong to data of these document lengths.

    Args:
        lengths: tokens of each document.
        documents: the documents in the order in which they are read.
        samples: [samples + 1, 2], where each sample begins: a place in `documents`, and a token of that document.
        sequence: tokens per sample, by which one begins after another. The last sample may be shorter.
    """
    if not len(documents):
        return len(samples) == 1
    if int(documents.max()) >= len(lengths):
        return False

    def reached(row: int) -> int | None:
        place, token = (int(number) for number in samples[row])
        if place >= len(documents) or token > int(lengths[documents[place]]):
            return None
        return int(lengths[documents[:place]].sum(dtype=np.int64)) + token

    last = len(samples) - 1
    end = reached(last)
    if end is None or not (last - 1) * sequence < end <= last * sequence:
        return False
    return last < 1 or reached(last - 1) == (last - 1) * sequence

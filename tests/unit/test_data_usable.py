"""Data without samples for a part of a run are refused instead of looping; the flags that `prepare` prints work."""

import random
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from megatron.longseq.data import splits
from megatron.longseq.data.__main__ import main
from megatron.longseq.data.validate import HEADER, read_index
from tests.distributed.flags import TINY, flags
from tests.pool import RankFailure, RankPool
from tests.regression.arm import run_arm

BARE = [word for word in flags(TINY.replace("--mock-data --split 90,5,5", ""))]
EVALUATED = flags("--train-iters 2 --eval-iters 1 --eval-interval 1")


def text_files(folder: Path, count: int, text: str = "some text, " * 40) -> str:
    """Prepare text files of one document each, and return the prefix."""
    source = folder / f"in{count}"
    source.mkdir()
    for number in range(count):
        (source / f"{number:02d}.txt").write_text(text)
    out = str(folder / f"out{count}")
    assert main(["prepare", str(source), "--output", out, "--workers", "1"]) == 0
    return out


def index_of(folder: Path, name: str, lengths: list[int]) -> str:
    """Write a data set of documents of these lengths, empty ones too, with upstream's builder; return the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(folder / name)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    for length in lengths:
        builder.add_document(torch.zeros(length, dtype=torch.int32), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_shares_are_upstreams() -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    rng = random.Random(0)
    texts = [splits.DEFAULT, "1", "95,5,0", "0,1,0", "969, 30, 1"]
    texts += [f"{rng.randrange(1, 99)},{rng.randrange(9)},{rng.random():.3f}" for _ in range(200)]
    for text in texts:
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
        for documents in (0, 1, 2, 3, 10, 97, 683, rng.randrange(10**6)):
            theirs = [part and range(*(round(end * float(documents)) for end in part)) for part in matrix]
            assert splits.split_ranges(text, documents) == theirs, (text, documents)
    for bad in ("", "0,0,0", "1,2,3,4"):
        with pytest.raises(ValueError, match="one to three numbers"):
            splits.split_ranges(bad, 10)


def test_the_printed_split_gives_every_part_a_document() -> None:
    for documents in range(1, 3000):
        given = splits.suggest_split_flags(documents)
        split = given[1] if given else splits.DEFAULT
        assert not splits.empty_parts(split, documents), documents
        assert [share is not None for share in splits.split_ranges(split, documents)] == [
            True,
            documents > 1,
            documents > 2,
        ]


def build_without_documents(prefix: str, samples: int) -> str:
    """Make upstream's builder build a split without documents, and return its error. Runs on a rank."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    import patches

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([prefix], None),
        split=splits.DEFAULT,
        tokenizer=SimpleNamespace(vocab_size=256, eod=0, pad=1, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    with patches.applied("data.epochs"):
        try:
            BlendedMegatronDatasetBuilder(GPTDataset, [4, samples, samples], lambda: True, config).build()
        except ValueError as error:
            return str(error)
    return "built"


@pytest.mark.parametrize("samples", [0, 4])
def test_the_loop_over_epochs_ends(ranks: RankPool, tmp_path: Path, samples: int) -> None:
    prefix = index_of(tmp_path, "ten", [300] * 10)
    (output,) = ranks.run(1, build_without_documents, prefix, samples)
    assert f"the valid split gets no tokens of {prefix} (0 documents), but {samples} samples are requested" in output


def messages_of_upstreams_validation(cases: list[list[str]]) -> list[str | None]:
    """Parse and validate each command line as upstream's scripts do; return what is refused. Runs on a rank."""
    import patches

    patches.start()
    from megatron.training import arguments

    messages: list[str | None] = []
    for case in cases:
        sys.argv = ["pretrain_gpt.py", *case]
        try:
            arguments.validate_args(arguments.parse_args())
            messages.append(None)
        except ValueError as error:
            messages.append(str(error))
        assert not torch.distributed.is_initialized()
    return messages


def damaged(folder: Path) -> dict[str, str]:
    """Return data sets whose files do not fit, and what is said of each."""
    cut = index_of(folder, "cut", [100] * 20)
    Path(f"{cut}.bin").write_bytes(Path(f"{cut}.bin").read_bytes()[:-2])
    short = index_of(folder, "short", [100] * 20)
    Path(f"{short}.idx").write_bytes(Path(f"{short}.idx").read_bytes()[:200])
    head = index_of(folder, "head", [100] * 20)
    Path(f"{head}.idx").write_bytes(Path(f"{head}.idx").read_bytes()[: HEADER - 1])
    other = index_of(folder, "other", [100] * 20)
    Path(f"{other}.idx").write_bytes(b"garbage " * 100)
    kind = index_of(folder, "kind", [100] * 20)
    content = bytearray(Path(f"{kind}.idx").read_bytes())
    content[17] = 99
    Path(f"{kind}.idx").write_bytes(content)
    return {
        cut: "cut.bin has 3,998 bytes, but cut.idx describes 4,000",
        short: "short.idx has 200 bytes, but needs 442 for its 20 documents",
        head: "head.idx is not an index of upstream's (it begins with b'MMIDIDX",
        other: "other.idx is not an index of upstream's (it begins with b'garbage g')",
        kind: "kind.idx names a dtype that upstream does not have (code 99)",
    }


def test_upstreams_validation_refuses_a_split_without_documents(ranks: RankPool, tmp_path: Path) -> None:
    ten, one = index_of(tmp_path, "ten", [300] * 10), index_of(tmp_path, "one", [300])
    empty, mute = index_of(tmp_path, "empty", []), index_of(tmp_path, "mute", [300] * 8 + [0] * 2)
    for name, content in {"blank": "\n", "list": "[]", "half": f'{{"train": "{ten}"}}'}.items():
        (tmp_path / name).write_text(content)
    cases: dict[str, str | None] = {
        f"--data-path {ten} --split 8,1,1": None,
        f"--data-path {ten} --split 1,0,0": None,
        f"--data-path {ten}": f"valid: none of the 10 document(s) of {ten}\n  test: none of",
        f"--data-path {ten} --eval-iters 0": "Give --split 8,1,1, or 1,0,0 with --eval-iters 0",
        f"--data-path {ten} --split 8,2,0.1": "test: none of the 10 document(s)",
        f"--data-path {one} --split 9,1": "Give --split 1,0,0 --eval-iters 0, or",
        f"--data-path 1 {ten} 1 {one} --split 8,1,1": f"valid: none of the 1 document(s) of {one}",
        f"--data-path 1 {ten} 0 {one} --split 1,0,0": f"{one} has the weight 0",
        f"--data-path 1 {ten} -2 {one} --split 1,0,0": f"{one} has the weight -2",
        f"--data-path {empty} --split 1,0,0": f"{empty} holds no documents",
        f"--data-path {mute} --split 8,1,1": f"valid: documents 8 to 8 of {mute} hold no token",
        f"--train-data-path {ten} --valid-data-path {one}": None,
        f"--train-data-path {ten} --valid-data-path 0 {one}": None,  # upstream reads no weight of a single prefix
        f"--train-data-path {ten} --valid-data-path 0 {one} 1 {ten}": f"{one} has the weight 0",
        f"--train-data-path {ten} --valid-data-path 0 {one} 1 {ten} --multiple-validation-sets": None,
        f"--data-args-path {tmp_path}/none": f"--data-args-path {tmp_path}/none: No such file or directory. The file",
        f"--data-args-path {tmp_path}/blank": f"--data-args-path {tmp_path}/blank: ValueError: not enough values",
        f"--per-split-data-args-path {tmp_path}": f"{tmp_path}: Is a directory. The file must contain a JSON object",
        f"--per-split-data-args-path {tmp_path}/blank": f"{tmp_path}/blank: JSONDecodeError: Expecting value",
        f"--per-split-data-args-path {tmp_path}/list": f"{tmp_path}/list: TypeError: list indices must be",
        f"--per-split-data-args-path {tmp_path}/half": f"{tmp_path}/half: KeyError: 'valid'. The file must contain",
        f"--train-data-path {ten} --valid-data-path {empty}": f"the valid data: {empty} holds no documents",
        f"--data-path {ten} --split 8,1,1 --full-validation --seq-length 64": None,
        f"--data-path {ten} --split 8,1,1 --full-validation --seq-length 512 --max-position-embeddings 512": (
            "hold fewer than the 513 tokens of one sample"
        ),
        f"--train-data-path {ten} --valid-data-path {ten} {one} {ten} --multiple-validation-sets --full-validation "
        "--seq-length 512 --max-position-embeddings 512": f"valid: documents 0 to 0 of {one} hold fewer",
        f"--data-path {ten}.nothing --split 8,1,1": None,  # upstream names what it does not find
    }
    cases |= {f"--data-path {prefix} --split 8,1,1": message for prefix, message in damaged(tmp_path).items()}
    (messages,) = ranks.run(1, messages_of_upstreams_validation, [[*BARE, *case.split()] for case in cases])
    for (case, want), message in zip(cases.items(), messages, strict=True):
        assert (message is None) == (want is None), (case, message)
        assert want is None or (message is not None and want in message), (case, message)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_the_printed_flags_train(
    ranks: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    text_files(tmp_path, count)
    output = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("warning: upstream's default --split") and f" {count} document(s)" in line for line in output
    )
    own = [*BARE, *EVALUATED, *shlex.split(output[-1]), "--vocab-size", "257"]
    run = run_arm(ranks, "O", 1, own)
    assert [step["iteration"] for step in run.curve] == [1, 2]
    if count == 10:
        with pytest.raises(RankFailure, match="leaves parts without a document"):
            run_arm(ranks, "O", 2, [*own, "--split", splits.DEFAULT])


def test_has_tokens_compares_the_length_of_documents(tmp_path: Path) -> None:
    index = read_index(index_of(tmp_path, "some", [0, 3, 0, 5]))
    assert index is not None and index.documents == 4
    assert index.has_tokens(range(4), 8) and not index.has_tokens(range(4), 9)
    assert not index.has_tokens(range(1), 1) and index.has_tokens(range(3, 4), 5)
    assert read_index(str(tmp_path / "none")) is None

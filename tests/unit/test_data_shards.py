"""Shards cover every byte once, and ranges of a jsonl file yield every line once for any cut."""

import io
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.longseq.data.corpus import SourceFile
from megatron.longseq.data.shards import LARGEST, SMALLEST, default_shard_bytes, owned_lines, plan_shards

CONTENT = st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\n\n", b"xyz", "é".encode(), b"\r", b" "]), max_size=40)


def source(name: str, size: int, kind: str = "jsonl") -> SourceFile:
    return SourceFile(name, size, 0, kind)


def lines_of(content: bytes) -> list[bytes]:
    lines = content.split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


@given(CONTENT.map(b"".join), st.integers(1, 50))
def test_ranges_yield_every_line_once_and_in_order(content, shard_bytes):
    shards = plan_shards([source("f", len(content))], shard_bytes)
    stream = io.BytesIO(content)
    found = [line for s in shards for p in s.ranges for line in owned_lines(stream, p.start, p.stop)]
    assert found == lines_of(content)


@given(CONTENT.map(b"".join), st.data())
def test_any_cuts_yield_every_line_once(content, data):
    cuts = sorted({0, len(content), *data.draw(st.lists(st.integers(0, len(content)), max_size=6))})
    stream = io.BytesIO(content)
    assert [line for a, b in pairwise(cuts) for line in owned_lines(stream, a, b)] == lines_of(content)


@given(st.lists(st.tuples(st.integers(0, 5000), st.sampled_from(["text", "jsonl"])), max_size=20), st.integers(1, 9000))
def test_a_plan_covers_every_byte_once_in_order_and_never_cuts_text(sizes, shard_bytes):
    files = [source(f"f{i}", size, kind) for i, (size, kind) in enumerate(sizes)]
    shards = plan_shards(files, shard_bytes)
    assert [shard.index for shard in shards] == list(range(len(shards)))
    assert all(shard.ranges for shard in shards)
    pieces = [piece for shard in shards for piece in shard.ranges]
    assert list(dict.fromkeys(piece.path for piece in pieces)) == [file.path for file in files]
    for file in files:
        own = [piece for piece in pieces if piece.path == file.path]
        assert own[0].start == 0 and own[-1].stop == file.size
        assert all(a.stop == b.start for a, b in pairwise(own))
        assert file.kind == "jsonl" or len(own) == 1
        assert file.kind == "text" or all(piece.size <= shard_bytes for piece in own)


def test_many_tiny_files_share_shards_and_one_huge_file_gets_many():
    assert len(plan_shards([source(f"f{i}", 10, "text") for i in range(10_000)], 1 << 20)) == 40
    assert len(plan_shards([source("huge", 100 << 20)], 1 << 20)) == 100


def test_the_default_size_follows_the_input_within_limits():
    assert default_shard_bytes([source("f", 10)]) == SMALLEST
    assert default_shard_bytes([source("f", 10 << 30)]) == 10 << 20
    assert default_shard_bytes([source("f", 10 << 40)]) == LARGEST


def test_a_size_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one byte"):
        plan_shards([source("f", 1)], 0)

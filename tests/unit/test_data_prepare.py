"""Upstream's reader returns the documents that were prepared, for any number of workers."""

import json
import random
from pathlib import Path

import pytest

from megatron.longseq.data import DataError, manifest
from megatron.longseq.data.__main__ import main
from megatron.longseq.data.tokenizer import byte_spec, load
from megatron.longseq.data.write import indexed_dataset

TEXTS = ["plain\n", "CRLF\r\nand tabs\t\r\n", "no final newline", "ü € 𝄞 \u0000 \u2028 end", "x" * 70_000, " ", "\n"]


def documents(prefix: Path) -> list[list[int]]:
    dataset = indexed_dataset().IndexedDataset(str(prefix))
    # One sequence per document, as upstream's GPT data sets want it.
    assert dataset.document_indices.tolist() == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def decoded(prefix: Path) -> list[str]:
    return [load(byte_spec()).decode(ids) for ids in documents(prefix)]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    path.write_bytes(b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts)))
    return path


def test_text_files_come_back_byte_for_byte_with_eod(tmp_path):
    (tmp_path / "in").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / f"in/{i}.txt").write_bytes(text.encode())
    (tmp_path / "in/empty.txt").touch()
    assert main(["prepare", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    assert documents(tmp_path / "out") == [[*text.encode(), 256] for text in TEXTS]
    content = manifest.read(str(tmp_path / "out"))
    lengths = sorted(len(text.encode()) + 1 for text in TEXTS)
    assert (content["documents"], content["tokens"], content["empty_documents"]) == (len(TEXTS), sum(lengths), 1)
    assert content["dtype"] == "uint16"
    assert content["lengths"]["max"] == lengths[-1] and content["lengths"]["p50"] == lengths[len(lengths) // 2]


def test_jsonl_comes_back_in_order_for_any_shard_size_and_key(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS * 5, key="body")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b'\n   \n{"body": "last, no newline"}')
    for shard_mb in ("0.001", "0.05", "10"):
        out = tmp_path / f"out{shard_mb}"
        assert main(["prepare", str(path), "--json-key", "body", "--shard-mb", shard_mb, "--output", str(out)]) == 0
        assert decoded(out) == [*TEXTS * 5, "last, no newline"]
        assert manifest.read(str(out))["empty_documents"] == 2


def test_without_eod_nothing_is_added(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", ["one", "two"])
    assert main(["prepare", str(path), "--no-append-eod", "--output", str(tmp_path / "out")]) == 0
    assert documents(tmp_path / "out") == [list(b"one"), list(b"two")]


@pytest.mark.parametrize("seed", [[], ["--shuffle-seed", "7"]])
def test_three_workers_write_what_one_writes(tmp_path, seed):
    rng = random.Random(0)
    texts = [rng.randbytes(rng.randrange(1, 300)).hex() for _ in range(400)]
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in/a.jsonl", texts[:300])
    for i, text in enumerate(texts[300:]):
        (tmp_path / f"in/b{i:03d}.txt").write_text(text)
    for workers, shard_mb in (("1", "1"), ("3", "0.01")):
        out = str(tmp_path / f"out{workers}")
        options = ["--workers", workers, "--shard-mb", shard_mb, *seed]
        assert main(["prepare", str(tmp_path / "in"), "--output", out, *options]) == 0
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path}/out1{suffix}").read_bytes() == Path(f"{tmp_path}/out3{suffix}").read_bytes()
    found = decoded(tmp_path / "out1")
    assert sorted(found) == sorted(texts)
    assert (found == texts) == (not seed)


def test_the_standard_library_is_shuffled_by_its_seed_alone(tmp_path, monkeypatch, capsys):
    library = tmp_path / "lib"
    library.mkdir()
    for i in range(50):
        (library / f"m{i:02d}.py").write_text(f"# {i}\n")
    (library / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    monkeypatch.setattr("megatron.longseq.data.corpus.sysconfig.get_path", lambda _: str(library))
    orders = []
    for name, options in (("a", []), ("b", []), ("c", ["--shuffle-seed", "5"])):
        assert main(["stdlib", "--output", str(tmp_path / name), *options]) == 0
        orders.append(decoded(tmp_path / name))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(f"# {i}\n" for i in range(50)) != orders[0]
    assert f"{library}/latin.py:2: invalid UTF-8: byte 0xe9 at byte 3" in capsys.readouterr().out


def test_inspect_and_flags_print_statistics_a_document_and_the_flags(tmp_path, capsysbinary):
    out = str(tmp_path / "out")
    assert main(["prepare", str(write_jsonl(tmp_path / "in.jsonl", ["one", "zwölf\n"])), "--output", out]) == 0
    capsysbinary.readouterr()
    assert main(["inspect", out, "--document", "-1"]) == 0
    shown = capsysbinary.readouterr().out.decode()
    assert "2 documents, 12 tokens (uint16)" in shown and shown.endswith("document 1: 8 tokens\nzwölf\n")
    assert main(["flags", out]) == 0
    flags = f"--data-path {out} --tokenizer-type NullTokenizer --vocab-size 257 --null-tokenizer-eod-id 256 "
    flags += "--split 1,1,0\n"  # upstream's default would leave validation and test without a document
    assert capsysbinary.readouterr().out.decode() == flags
    assert main(["inspect", out, "--document", "2"]) == 1
    assert b"holds documents 0 to 1" in capsysbinary.readouterr().err


def test_a_damaged_output_is_named(tmp_path):
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match=r"out\.json: no such manifest"):
        manifest.read(out)
    assert main(["prepare", str(write_jsonl(tmp_path / "in.jsonl", ["one"])), "--output", out]) == 0
    Path(f"{out}.bin").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"out\.bin has 3 bytes, but .*out\.json says 8"):
        manifest.read(out)

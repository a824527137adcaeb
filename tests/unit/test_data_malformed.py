"""Malformed documents are refused by file and line, for any shard size, and nothing is written."""

import json
from pathlib import Path

import pytest

from megatron.longseq.data import manifest
from megatron.longseq.data.__main__ import main
from megatron.longseq.data.encode import encode_shard

GOOD = b'{"text": "fine"}'
BAD = {
    b'{"text": "cut': "not JSON: Unterminated string starting at, column 10",
    b'["text"]': "expected a JSON object, found a list",
    b'{"txt": 1, "a": 2}': "no key 'text' (its keys: a, txt)",
    b'{"text": null}': "key 'text' holds null, not a string",
    b'{"text": 3.5}': "key 'text' holds a number, not a string",
    b'{"text": "\xff"}': "invalid UTF-8: byte 0xff at byte 11 of the line",
    b'{"text": "\\ud800"}': "key 'text' holds a lone surrogate at character 0, which UTF-8 cannot represent",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON: ",
}


def run(tmp_path: Path, *options: str) -> int:
    return main(["prepare", str(tmp_path / "in"), "--output", str(tmp_path / "made/out"), *options])


def made(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "made").iterdir())


@pytest.fixture
def mixed(tmp_path: Path) -> dict[str, str]:
    """Write two files with one malformed line of each kind; return what is to be said of each, by file and line."""
    (tmp_path / "in").mkdir()
    expected, lines = {}, []
    for line, reason in BAD.items():
        lines += [GOOD, b"", line]
        expected[f"{tmp_path}/in/a.jsonl:{len(lines)}"] = reason
    (tmp_path / "in/a.jsonl").write_bytes(b"\r\n".join([*lines, GOOD]))
    (tmp_path / "in/b.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    expected[f"{tmp_path}/in/b.txt:3"] = "invalid UTF-8: byte 0xe9 at byte 4 of the line"
    return expected


@pytest.mark.parametrize("options", [(), ("--shard-mb", "0.00002"), ("--shard-mb", "0.00004", "--workers", "2")])
def test_every_kind_is_refused_by_file_and_line_and_nothing_is_made(tmp_path, mixed, capsys, options):
    assert run(tmp_path, *options) == 1
    messages = [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]
    assert len(messages) == len(mixed)
    for line, (where, reason) in zip(messages, mixed.items(), strict=True):
        assert line.startswith(f"{where}: {reason}")
    assert made(tmp_path) == []


def test_skipping_counts_and_lists_them(tmp_path, mixed, capsys):
    assert run(tmp_path, "--skip-malformed", "--shard-mb", "0.00001") == 0
    content = manifest.read(str(tmp_path / "made/out"))
    assert content["documents"] == len(BAD) + 1
    assert content["malformed"]["count"] == len(mixed)
    assert [entry.split(": ")[0] for entry in content["malformed"]["listed"]] == list(mixed)
    assert f"{len(mixed)} malformed documents skipped" in capsys.readouterr().out


def test_a_line_nested_too_deep_is_malformed_and_no_crash(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(GOOD + b'\n{"text": ' + b"[" * 200_000)
    assert run(tmp_path) == 1
    assert f"{tmp_path}/in/a.jsonl:2: not JSON: maximum recursion depth exceeded" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_first_twenty_are_collected_and_the_rest_is_not_read(tmp_path, capsys, monkeypatch, workers):
    handed_out = []
    if workers == "1":
        counting = lambda *args: handed_out.append(args) or encode_shard(*args)  # noqa: E731
        monkeypatch.setattr("megatron.longseq.data.encode.encode_shard", counting)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(b"bad %d\n" % i if i < 20 else b"[%d]\n" % i for i in range(5000)))
    assert run(tmp_path, "--shard-mb", "0.0001", "--workers", workers) == 1
    assert workers == "2" or len(handed_out) == 2
    messages = capsys.readouterr().err.splitlines()[1:]
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in messages] == [str(i) for i in range(1, 21)]
    assert all("not JSON" in line for line in messages)
    assert made(tmp_path) == []


def test_nothing_but_empty_documents_is_refused(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": ""}\n\n')
    assert run(tmp_path) == 1
    assert "no documents in the inputs (2 empty, 0 malformed)" in capsys.readouterr().err
    assert made(tmp_path) == []


def test_options_that_make_no_sense_are_refused(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "x"}))
    assert main(["prepare", str(path), "--output", str(tmp_path)]) == 1
    assert main(["prepare", str(path), "--output", f"{tmp_path}/new/"]) == 1
    assert main(["prepare", str(path), "--output", str(tmp_path / "o"), "--eod-token", "</s>"]) == 1
    assert main(["prepare", str(path), "--output", str(tmp_path / "o"), "--tokenizer-model", str(path)]) == 1
    messages = capsys.readouterr().err
    assert messages.count("give the prefix of three files") == 2
    assert "give --tokenizer-model too" in messages and "not a Hugging Face tokenizer file" in messages
    for bad in ("--workers=0", "--shard-mb=-1", "--shard-mb=nan"):
        with pytest.raises(SystemExit):
            main(["prepare", str(path), "--output", str(tmp_path / "o"), bad])

"""Compressed and binary inputs are refused with their format before any work; text is accepted."""

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path

import pytest

from megatron.longseq.data import manifest
from megatron.longseq.data.__main__ import main

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 30
LINES = "".join(json.dumps({"text": f"{number} {TEXT}"}) + "\n" for number in range(50))


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", content)
    return stream.getvalue()


PACKED = {
    "a.txt.gz": (gzip.compress(TEXT.encode()), "compressed by gzip (convert it with gunzip -k)"),
    "a.jsonl": (gzip.compress(LINES.encode()), "compressed by gzip"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x24\x01" + bytes(range(200)), "compressed by zstd (convert it with zstd -d"),
    "a.bz2": (bz2.compress(TEXT.encode()), "compressed by bzip2"),
    "a.xz": (lzma.compress(TEXT.encode()), "compressed by xz"),
    "a.zip": (zipped(TEXT.encode()), "a zip archive (convert it with unzip)"),
    "a.txt": (TEXT.encode("utf-16"), "encoded in UTF-16 (convert it with iconv -f UTF-16 -t UTF-8"),
    "le.txt": (TEXT.encode("utf-16-le"), "probably encoded in UTF-16LE"),
    "be.jsonl": (LINES.encode("utf-16-be"), "probably encoded in UTF-16BE"),
    "a32.txt": (TEXT.encode("utf-32"), "encoded in UTF-32"),
    "a.parquet": (b"PAR1" + bytes(300), "a Parquet table"),
    "a.bin": (bytes(range(256)) * 4, "binary"),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_inputs_are_named_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content, reason = PACKED[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    (tmp_path / "in" / "good.txt").write_text("good")
    command = ["prepare", str(tmp_path / "in"), "--output", str(tmp_path / "made/out"), "--workers", "1"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/in/{name}: {reason}" in error and "UTF-8 text or jsonl" in error
    assert not (tmp_path / "made").exists()


def test_text_stays_text(tmp_path: Path) -> None:
    texts = [
        "BZh is how bzip2 begins",
        "PK is no zip",
        "a\0b",
        "\ufeffwith a mark",
        "日本語" * 400,
        "é" * 513,
        "x",
        "ab\0\0",
    ]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / f"in/{number}.txt").write_text(text, "utf-8")
    out = str(tmp_path / "out")
    assert main(["prepare", str(tmp_path / "in"), "--output", out, "--workers", "1"]) == 0
    assert manifest.read(out)["documents"] == len(texts)

"""Prepare the corpora of all arms: paragraphs of the standard library as bytes, and documents of chosen lengths."""

import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megatron.longseq.data.corpus import find_files
from megatron.longseq.data.prepare import PrepareRequest, prepare
from megatron.longseq.data.tokenizer import byte_spec
from tests.packed_corpus import ALIGNED, RAGGED, write_documents

PACKAGES = ("asyncio", "email", "http", "json", "logging")


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: upstream's flags that train on it, and the sha256 of its tokens."""

    flags: tuple[str, ...]
    sha256: str


CHOSEN = {"ragged": RAGGED, "aligned": ALIGNED}  # lengths of documents
NAMES = ("paragraphs", *CHOSEN)
CHOSEN_TOKENS = 30_000


def make_corpus(folder: Path, name: str = "paragraphs") -> Corpus:
    """Write a corpus into `folder`. Sequences hold many documents: paragraphs, or those of chosen lengths."""
    if name != "paragraphs":
        flags = tuple(write_documents(folder / "corpus", CHOSEN[name], CHOSEN_TOKENS))
        return Corpus(flags, hashlib.sha256((folder / "corpus.bin").read_bytes()).hexdigest())
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = sorted(path for package in PACKAGES for path in (library / package).glob("*.py"))
    paragraphs = [text for path in sources for text in path.read_text("utf-8").split("\n\n") if text.strip()]
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "corpus.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs), "utf-8")
    tokenizer, prefix = byte_spec(), folder / "corpus"
    prepare(
        PrepareRequest(find_files([str(lines)], [], None), str(prefix), tokenizer, overwrite=True),
        say=lambda text: None,
    )
    flags = (
        *("--data-path", str(prefix), "--data-cache-path", str(folder / "cache"), "--split", "90,5,5"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(tokenizer.vocab_size)),
        *("--null-tokenizer-eod-id", str(tokenizer.eod_id)),
    )
    return Corpus(flags, hashlib.sha256(prefix.with_suffix(".bin").read_bytes()).hexdigest())

"""Prepare the corpora of all arms: paragraphs of the standard library as bytes, and documents of chosen lengths."""

import hashlib
import json
import random
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
    """A prepared corpus.

    Attributes:
        flags: upstream's flags that train on it.
        sha256: hash of its tokens.
        seed_flags: flags of other data with the same vocabulary, on which upstream's local layers run without a script
            of their own; empty: `flags`.
    """

    flags: tuple[str, ...]
    sha256: str
    seed_flags: tuple[str, ...] = ()


CHOSEN = {"ragged": RAGGED, "aligned": ALIGNED}  # lengths of documents
NAMES = ("paragraphs", "conversations", *CHOSEN)
CHOSEN_TOKENS = 30_000


def make_corpus(folder: Path, name: str = "paragraphs") -> Corpus:
    """Write a corpus into `folder`. Sequences hold many documents: paragraphs, conversations, or of chosen lengths."""
    if name == "conversations":
        return _conversations(folder)
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


def _conversations(folder: Path) -> Corpus:
    """Write conversations, and make a tokenizer for them.

    Their lengths are multiples of 4, so that upstream's data set needs no padding between them on two context-parallel
    ranks: samples are those of one process then.
    """
    from megatron.core.tokenizers.text.libraries.sft_tokenizer import SFTTokenizer

    from tests.distributed.conversations import WORDS, write_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, prompt, draw = write_tokenizer(folder / "tokenizer"), "nemotron-h-aligned", random.Random(1)
    measure = SFTTokenizer(str(tokenizer), prompt)

    def length(messages: list[dict[str, str]]) -> int:
        return len(measure.tokenize_conversation(messages, return_target=True, add_generation_prompt=False)[0])

    def words(count: int) -> str:
        first = draw.randrange(8)  # few, so that a model learns within some steps
        return " ".join(f"w{(first + step) % 240}" for step in range(count))

    lines = []
    for _ in range(300):
        line: list[dict[str, str]] = []
        used, most = 0, draw.choice((60, 100, 128))
        while True:
            asked = [{"role": "system", "content": words(1)}, {"role": "user", "content": words(draw.randint(1, 3))}]
            answer = draw.choice((3, 5, 11, 40))
            answer += -length([*asked, {"role": "assistant", "content": words(answer)}]) % 4
            one = [*asked, {"role": "assistant", "content": words(answer)}]
            if used + length(one) > most:
                break
            line, used = [*line, *one], used + length(one)
        if line:
            lines.append(json.dumps({"messages": line}) + "\n")
    data = folder / "conversations.jsonl"
    data.write_text("".join(lines), "utf-8")
    flags = (
        *("--sft", "--no-create-attention-mask-in-dataloader", "--data-path", str(data), "--split", "1,0,0"),
        *("--tokenizer-type", "SFTTokenizer", "--tokenizer-model", str(tokenizer)),
        *("--sft-tokenizer-prompt-format", prompt),
    )
    mock = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", str(WORDS), "--split", "1,0,0")
    return Corpus(flags, hashlib.sha256(data.read_bytes()).hexdigest(), mock)

"""Two tokenizers behind one interface: bytes (256 ids and the end of document), or a Hugging Face tokenizer file."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import DataError

Ids = NDArray[np.integer[Any]]
BYTE_IDS = 256


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that fixes the ids: what a worker needs to load it, and what the manifest records.

    `type` is `byte` or `huggingface`; `model` the file's path (empty for bytes); `sha256` of that file or, for bytes,
    of the rule; `special_tokens` whether the file's own post-processor may add tokens (BOS and the like).
    """

    type: str
    vocab_size: int
    eod_id: int
    sha256: str
    model: str = ""
    special_tokens: bool = True


class Tokenizer(Protocol):
    """Text to ids and back; `encode` returns one-dimensional integers in `[0, vocab_size)`, without the eod."""

    def encode(self, text: str) -> Ids:
        """Return the ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, eod left out."""


def byte_spec() -> TokenizerSpec:
    """Return the byte-level tokenizer: id = byte of the UTF-8 text, 256 = end of document."""
    rule = b"byte-level: the id is the byte of the UTF-8 text, end of document is 256"
    return TokenizerSpec("byte", BYTE_IDS + 1, BYTE_IDS, hashlib.sha256(rule).hexdigest())


def file_spec(model: str, eod_token: str | None = None, special_tokens: bool = True) -> TokenizerSpec:
    """Describe a Hugging Face `tokenizer.json`; the end of document is `eod_token`, else the `eos_token` of its config.

    Raises:
        DataError: no such file, no tokenizer in it, or no end-of-document token.
    """
    path = Path(model).absolute()
    digest, tokenizer = _load_file(path)
    token = eod_token or _eos_of_config(path)
    if token is None:
        special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        raise DataError(
            f"tokenizer {path}: the file does not say which token ends a document and no tokenizer_config.json "
            f"beside it does; name it with --eod-token (its special tokens: {', '.join(special[:12]) or 'none'})"
        )
    eod_id = tokenizer.token_to_id(token)
    if eod_id is None:
        raise DataError(f"tokenizer {path}: its vocabulary has no token {token!r}; choose another --eod-token")
    # Ids may have holes: the embedding needs a row for the highest one.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TokenizerSpec("huggingface", vocab_size, eod_id, digest, str(path), special_tokens)


@lru_cache(maxsize=1)
def load(spec: TokenizerSpec) -> Tokenizer:
    """Load the tokenizer, once per process.

    Raises:
        DataError: the tokenizer file is gone, or is not the one that the spec describes.
    """
    if spec.type == "byte":
        return _Bytes()
    digest, tokenizer = _load_file(Path(spec.model))
    if digest != spec.sha256:
        raise DataError(f"tokenizer {spec.model}: its content changed since it was described; put the old file back")
    return _HuggingFace(tokenizer, spec)


class _Bytes:
    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTE_IDS).decode("utf-8", errors="replace")


class _HuggingFace:
    def __init__(self, tokenizer: Any, spec: TokenizerSpec) -> None:
        self._tokenizer = tokenizer
        self._spec = spec

    def encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=self._spec.special_tokens).ids, dtype=np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if i != self._spec.eod_id]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))


def _load_file(path: Path) -> tuple[str, Any]:
    try:
        from tokenizers import Tokenizer as FileTokenizer
    except ModuleNotFoundError as error:
        raise DataError(f"--tokenizer-model {path} needs the package `tokenizers`: pip install tokenizers") from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--tokenizer-model {path}: {error.strerror}; give the path of a tokenizer.json") from error
    try:
        tokenizer = FileTokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"--tokenizer-model {path}: not a Hugging Face tokenizer file ({error})") from error
    # A limit stored in the file would silently cut long documents, which are what this project is about.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return hashlib.sha256(content).hexdigest(), tokenizer


def _eos_of_config(path: Path) -> str | None:
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        token = json.loads(config.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{config}: no JSON object ({error}); repair it or name the token with --eod-token") from error
    return token.get("content") if isinstance(token, dict) else token

"""Tokenize text by bytes or with a Hugging Face tokenizer file, through one interface. `chat.py` has conversations."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import DataError

Ids = NDArray[np.integer[Any]]
BYTE_IDS = 256


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that determines the ids. Workers load the tokenizer from it, and the manifest contains it.

    Attributes:
        type: `byte`, `huggingface`, or `sft` for conversations.
        vocab_size: number of ids.
        eod_id: id of the end of a document.
        sha256: hash of the tokenizer file or of the files of its folder, or of the rule of the byte tokenizer.
        model: path of the tokenizer file, or of its folder for conversations; empty for bytes.
        special_tokens: whether the file's post-processor may add tokens such as BOS.
        prompt_format: upstream's --sft-tokenizer-prompt-format, for conversations only.
        pad_id: id of padding, which never counts in the loss; for conversations only.
    """

    type: str
    vocab_size: int
    eod_id: int
    sha256: str
    model: str = ""
    special_tokens: bool = True
    prompt_format: str | None = None
    pad_id: int | None = None

    @property
    def is_chat(self) -> bool:
        """Return whether documents are conversations, whose tokens do not all count in the loss."""
        return self.type == "sft"


def byte_spec() -> TokenizerSpec:
    """Return the byte tokenizer. Ids are the bytes of the UTF-8 text, and 256 ends a document."""
    rule = b"byte-level: the id is the byte of the UTF-8 text, end of document is 256"
    return TokenizerSpec("byte", BYTE_IDS + 1, BYTE_IDS, hashlib.sha256(rule).hexdigest())


def file_spec(model: str, eod_token: str | None = None, special_tokens: bool = True) -> TokenizerSpec:
    """Describe the tokenizer of a Hugging Face `tokenizer.json` file.

    Args:
        model: path of the file.
        eod_token: the token that ends a document. None uses the `eos_token` of `tokenizer_config.json` in the same
            folder.
        special_tokens: whether the file's post-processor may add tokens such as BOS.

    Raises:
        DataError: the file does not exist or is not a tokenizer, or the end-of-document token is unknown.
    """
    path = Path(model).absolute()
    digest, tokenizer = _load_file(path)
    token = eod_token or _eos_of_config(path)
    if token is None:
        special = [t.content for _, t in sorted(tokenizer.get_added_tokens_decoder().items()) if t.special]
        raise DataError(
            f"tokenizer {path}: neither this file nor a tokenizer_config.json in its folder says which token ends a "
            f"document; give --eod-token (special tokens: {', '.join(special[:12]) or 'none'})"
        )
    eod_id = tokenizer.token_to_id(token)
    if eod_id is None:
        raise DataError(f"tokenizer {path}: its vocabulary has no token {token!r}; choose another --eod-token")
    # Ids may have gaps. The embedding needs a row for the highest one.
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TokenizerSpec("huggingface", vocab_size, eod_id, digest, str(path), special_tokens)


@lru_cache(maxsize=1)
def load(spec: TokenizerSpec) -> "Tokenizer":
    """Load the tokenizer. It is loaded once per process.

    Raises:
        DataError: the tokenizer file is missing, or its content has changed.
    """
    if spec.type == "byte":
        return _Bytes()
    digest, tokenizer = _load_file(Path(spec.model))
    if digest != spec.sha256:
        raise DataError(
            f"tokenizer {spec.model}: its content has changed; restore the file that the output was made with"
        )
    return _HuggingFace(tokenizer, spec)


class _Bytes:
    def encode(self, text: str) -> Ids:
        """Return the ids of a text, [tokens], each in `[0, vocab_size)`, without the end-of-document id."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without the end-of-document id."""
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


Tokenizer = _Bytes | _HuggingFace


def _load_file(path: Path) -> tuple[str, Any]:
    try:
        from tokenizers import Tokenizer as FileTokenizer
    except ModuleNotFoundError as error:
        raise DataError(
            f"--tokenizer-model {path} requires the package `tokenizers`: pip install tokenizers"
        ) from error
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"--tokenizer-model {path}: {error.strerror}; give the path of a tokenizer.json") from error
    try:
        tokenizer = FileTokenizer.from_buffer(content)
    except Exception as error:  # the library raises no narrower type
        raise DataError(f"--tokenizer-model {path}: not a Hugging Face tokenizer file ({error})") from error
    # A length limit in the file would silently truncate long documents.
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
        raise DataError(f"{config}: not a JSON object ({error}); repair it, or give --eod-token") from error
    return token.get("content") if isinstance(token, dict) else token

"""Tokenize conversations with upstream's SFT tokenizer, which applies the chat template of a Hugging Face tokenizer."""

import hashlib
import importlib
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import DataError
from megatron.longseq.data.shards import Conversation
from megatron.longseq.data.tokenizer import Ids, TokenizerSpec

PROMPT_FORMATS = ("nemotron-h-aligned", "nemotron-nano-v2", "identity", "default")  # upstream's, its default first
# Files of a tokenizer's folder that may determine the ids. The folder of a model also holds its weights.
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")

LossMask = NDArray[np.uint8]


def chat_spec(folder: str, prompt_format: str) -> TokenizerSpec:
    """Describe the tokenizer of conversations.

    Args:
        folder: a local folder with a Hugging Face tokenizer.
        prompt_format: upstream's --sft-tokenizer-prompt-format. `default` is the tokenizer's own chat template.

    Raises:
        DataError: the folder does not exist or holds no tokenizer, a package is missing, or the tokenizer has no chat
            template, no end-of-document token or no padding token for this format.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise DataError(
            f"--tokenizer-model {folder}: conversations require the local folder of a Hugging Face tokenizer, with its "
            "chat template"
        )
    tokenizer = _load(str(path), prompt_format)
    hint = f"tokenizer {path}, --sft-tokenizer-prompt-format {prompt_format}"
    if prompt_format == "default" and not tokenizer._tokenizer.chat_template:
        raise DataError(f"{hint}: the tokenizer has no chat template; give a folder that has one, or another format")
    if tokenizer.eod is None:
        raise DataError(f"{hint}: the tokenizer has no eos_token, which upstream takes as the end of a document")
    if tokenizer.pad_id is None:
        raise DataError(f"{hint}: the tokenizer has no token that this format uses for padding; give another format")
    highest = max(tokenizer._tokenizer.get_vocab().values())  # ids may have gaps
    return TokenizerSpec(
        "sft",
        max(int(tokenizer.vocab_size), highest + 1),
        int(tokenizer.eod),
        _digest(path),
        str(path),
        prompt_format=prompt_format,
        pad_id=int(tokenizer.pad_id),
    )


@lru_cache(maxsize=1)
def load_chat(spec: TokenizerSpec) -> "ChatTokenizer":
    """Load the tokenizer of conversations. It is loaded once per process.

    Raises:
        DataError: the folder is missing, or its content has changed.
    """
    path = Path(spec.model)
    if not path.is_dir() or _digest(path) != spec.sha256:
        raise DataError(
            f"tokenizer {path}: the folder is missing or has changed; restore the files that the output was made with"
        )
    assert spec.prompt_format is not None
    return ChatTokenizer(_load(spec.model, spec.prompt_format), spec)


class ChatTokenizer:
    """Convert conversations to ids and loss masks as upstream's SFT data set does.

    Args:
        tokenizer: upstream's SFT tokenizer.
        spec: its padding id, end of document and size of the vocabulary.
    """

    def __init__(self, tokenizer: Any, spec: TokenizerSpec) -> None:
        self._tokenizer, self._spec = tokenizer, spec

    def encode(self, conversation: Conversation) -> tuple[Ids, LossMask]:
        """Return ids and loss mask of a conversation, [tokens] each; the mask is 1 for tokens that count in the loss.

        Returns:
            int64 ids and uint8 loss mask.

        Raises:
            DataError: upstream's tokenizer or the chat template refuses the conversation.
        """
        try:
            ids, targets = self._tokenizer.tokenize_conversation(
                conversation, return_target=True, add_generation_prompt=False
            )
        except Exception as error:  # templates raise errors of any type
            words = str(error).partition("\n")[0][:200]
            raise DataError(f"the chat template refuses the conversation ({type(error).__name__}: {words})") from error
        ids, targets = np.asarray(ids, dtype=np.int64), np.asarray(targets, dtype=np.int64)
        # Upstream's data set ignores masked targets, whose id is negative, and targets that are padding.
        return ids, ((targets >= 0) & (targets != self._spec.pad_id)).astype(np.uint8)

    def decode(self, ids: Any) -> str:
        """Return the text of ids, with all special tokens."""
        return str(self._tokenizer.ids_to_text([int(i) for i in ids]))


def _load(folder: str, prompt_format: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream warns of packages that only GPUs need
        upstream = importlib.import_module("megatron.core.tokenizers.text.libraries.sft_tokenizer")
    try:
        return upstream.SFTTokenizer(folder, prompt_format)
    except ImportError as error:
        raise DataError("conversations require the package `transformers`: pip install 'transformers'") from error
    except Exception as error:  # the library raises errors of many types
        words = str(error).partition("\n")[0][:300]
        raise DataError(f"--tokenizer-model {folder}: not a Hugging Face tokenizer ({words})") from error


def _digest(folder: Path) -> str:
    """Return the sha256 of names and contents of the files that may determine the ids."""
    digest = hashlib.sha256()
    files = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    for path in sorted(file for file in files if file.suffix in SUFFIXES and file.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()

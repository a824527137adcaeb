"""Read prepared conversations by their number: ids and loss mask, from the memory-mapped files of `prepare`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.longseq.data import LOSS_MASK, DataError, manifest
from megatron.longseq.data.write import indexed_dataset


@dataclass(frozen=True)
class TokenizedConversation:
    """One conversation.

    Attributes:
        ids: [tokens].
        loss_mask: [tokens], 1 for tokens that count in the loss. A token's loss is that of the position before it.
    """

    ids: NDArray[Any]
    loss_mask: NDArray[np.uint8]


class Conversations:
    """The conversations of an output, each of them whole. A loader packs them by number and rewrites no tokens.

    Args:
        prefix: path of the output without suffix.

    Attributes:
        lengths: tokens of each conversation.
        tokenizer: fields of `TokenizerSpec`.

    Raises:
        DataError: the output is damaged, or holds no conversations.
    """

    def __init__(self, prefix: str) -> None:
        content = manifest.read(prefix)
        if "tokens_in_loss" not in content:
            raise DataError(f"{prefix} holds documents, not conversations; prepare it with --format conversations")
        self.tokenizer: dict[str, Any] = content["tokenizer"]
        upstream = indexed_dataset()
        self._ids, self._masks = (upstream.IndexedDataset(name) for name in (prefix, prefix + LOSS_MASK))
        # Upstream's arrays are views of mapped files, which it unmaps when its data set is deleted: copy them.
        self.lengths: NDArray[np.int32] = np.array(self._ids.sequence_lengths)
        if not np.array_equal(self.lengths, self._masks.sequence_lengths):
            raise DataError(
                f"{prefix}{LOSS_MASK}.idx holds the loss mask of other conversations than {prefix}.idx; rebuild the "
                "output with --overwrite"
            )

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self.lengths)

    def __getitem__(self, number: int) -> TokenizedConversation:
        """Return a conversation."""
        return TokenizedConversation(np.array(self._ids[number]), np.array(self._masks[number]))

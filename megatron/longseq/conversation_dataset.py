"""Upstream's SFT data set, which also packs prepared conversations into samples by their numbers."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.training.datasets.sft_dataset import IGNORE_INDEX, SFTDataset

from megatron.longseq.data.conversations import Conversations
from megatron.longseq.data.packing import pack_in_order


class ConversationDataset(SFTDataset):  # type: ignore[misc]  # upstream is not typed
    """Serve upstream's `--sft` from jsonl files, as upstream does, or from the output of `prepare`.

    An output is recognized by its `.idx` file. Its conversations are packed by their lengths alone, and upstream's code
    makes the sample of them: padding for context parallelism, labels, loss mask and `cu_seqlens`.
    """

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        """Open the conversations of an output, or a jsonl file as upstream does.

        Args:
            dataset_path: prefix of an output without suffix, or a jsonl file.
            config: upstream's configuration of the data set.

        Raises:
            ValueError: the output was prepared with another tokenizer than the run's.
        """
        if not Path(f"{dataset_path}.idx").is_file():
            return SFTDataset.build_low_level_dataset(dataset_path, config)
        conversations = Conversations(dataset_path)
        prepared = tuple(conversations.tokenizer[name] for name in ("pad_id", "eod_id", "vocab_size"))
        of_run = (config.tokenizer.pad, config.tokenizer.eod, config.tokenizer.vocab_size)
        if of_run != prepared:
            raise ValueError(
                f"{dataset_path} was prepared with a tokenizer whose padding, end of document and vocabulary size are "
                f"{prepared}, but those of the run are {of_run}. Give the flags that "
                f"`python -m megatron.longseq.data flags {dataset_path}` prints."
            )
        return conversations

    def __init__(
        self,
        dataset: Any,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Any,
        config: Any,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        if not isinstance(dataset, Conversations):
            return
        multiple = 2 * config.context_parallel_size if config.context_parallel_size > 1 else 1
        sizes = -(-dataset.lengths[indices] // multiple) * multiple
        self.dataset = [indices[pack] for pack in pack_in_order(sizes, config.sequence_length)]
        self.indices = np.arange(len(self.dataset))
        self.config = copy.copy(config)
        self.config.tokenizer = _Tokenized(dataset, config.tokenizer)

    def _split_conversations(self, merged_conversations: Any) -> Sequence[Any]:
        if isinstance(self.config.tokenizer, _Tokenized):
            return list(merged_conversations)  # the numbers of a pack
        return list(super()._split_conversations(merged_conversations))


class _Tokenized:
    """Takes the place of the tokenizer: a conversation is its number, and its tokens are read."""

    def __init__(self, conversations: Conversations, tokenizer: Any) -> None:
        self.conversations, self.eod, self.pad = conversations, tokenizer.eod, tokenizer.pad

    def tokenize_conversation(self, conversation: Any, **_: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return ids, and ids that upstream's data set ignores where a token does not count in the loss."""
        one = self.conversations[int(conversation)]
        ids = one.ids.astype(np.int64)
        return ids, np.where(one.loss_mask.astype(bool), ids, IGNORE_INDEX)

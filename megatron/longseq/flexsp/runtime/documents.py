"""Documents of a data set as samples of their own lengths, in an order of each epoch; nothing is packed or padded."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from numpy.typing import NDArray

from megatron.longseq.conversation_dataset import ConversationDataset
from megatron.longseq.data.conversations import Conversations

Ints = NDArray[np.int64]
EPOCHS = 4  # orders of epochs that are kept


class Document(NamedTuple):
    """Positions of a document that are trained, each [tokens].

    Attributes:
        tokens: ids that the model reads.
        labels: the id that follows each of them.
        loss_mask: 1 where the label counts in the loss, else 0.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]


@dataclass
class DocumentDatasetConfig(GPTDatasetConfig):
    """Upstream's configuration, and what becomes of documents of more than `sequence_length` tokens.

    Attributes:
        overlong: "split" or "drop".
        conversations: whether the data sets are conversations, with a loss mask.
        tokenized: of each jsonl file of conversations, the prefix of its tokenized output.
    """

    overlong: str = "split"
    conversations: bool = False
    tokenized: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pieces:
    """Documents, or pieces of them, that are trained.

    Attributes:
        document: number of the document of each piece.
        begin: position of its first token in the document.
        size: number of its tokens.
        split: number of documents that were cut into pieces.
        dropped: number of overlong documents that were left out.
        empty: number of documents without a token that has a successor, which were left out.
    """

    document: Ints
    begin: Ints
    size: Ints
    split: int = 0
    dropped: int = 0
    empty: int = 0


def cut_documents(lengths: Ints, most: int, overlong: str) -> Pieces:
    """Return the pieces of documents of at most `most` tokens.

    The last token of a document is only a label. A piece that ends inside a document has the next piece's first token
    as its last label, so that splitting loses no label.

    Args:
        lengths: tokens of each document, with the end of document.
        most: most tokens of a piece.
        overlong: "split" cuts longer documents, "drop" leaves them out.
    """
    inputs = lengths.astype(np.int64) - 1
    number = np.arange(len(inputs))
    is_long, is_empty = inputs > most, inputs < 1
    if overlong == "drop":
        number = number[~is_long & ~is_empty]
        return Pieces(
            number, np.zeros_like(number), inputs[number], dropped=int(is_long.sum()), empty=int(is_empty.sum())
        )
    count = -(-np.maximum(inputs, 0) // most)
    document = np.repeat(number, count)
    begin = (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)) * most
    size = np.minimum(inputs[document] - begin, most)
    return Pieces(document, begin, size, split=int(is_long.sum()), empty=int(is_empty.sum()))


class DocumentDataset(MegatronDataset):  # type: ignore[misc]  # upstream is not typed
    """Documents of one part of a data set; sample i of epoch e is the i-th of a permutation of e.

    Upstream's builder makes it, so that --split, blends and the files are those of `GPTDataset`.

    Raises:
        ValueError: No document of this part can be trained.
    """

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Return the number of documents that --split shares out."""
        return len(_lengths(low_level_dataset))

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> Any:
        """Open documents, or conversations with their loss mask."""
        if dataset_path in config.tokenized:
            return Conversations(config.tokenized[dataset_path])
        if config.conversations:
            return ConversationDataset.build_low_level_dataset(dataset_path, config)
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __init__(
        self, dataset: Any, dataset_path: str | None, indices: Any, num_samples: int | None, split: Any, config: Any
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, split, config)
        self.pieces = cut_documents(_lengths(dataset)[indices], config.sequence_length, config.overlong)
        if not len(self.pieces.size):
            raise ValueError(
                f"{dataset_path}, part {split.name}: none of {len(indices)} documents has two tokens or more"
                f"{f' and at most --seq-length {config.sequence_length}' if config.overlong == 'drop' else ''}; "
                "give --flexsp-overlong split, more data, or another --split."
            )
        # The thread that plans reads lengths of later epochs while this one reads documents.
        self._order = lru_cache(maxsize=EPOCHS)(self._permutation)

    def __len__(self) -> int:
        """Return the number of samples that upstream has asked for; epochs follow one another."""
        return len(self.pieces.size) if self.num_samples is None else max(self.num_samples, len(self.pieces.size))

    def piece(self, sample: int) -> int:
        """Return the number of the piece that a sample is."""
        epoch, place = divmod(sample, len(self.pieces.size))
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> Ints:
        return np.random.default_rng((self.config.random_seed, epoch)).permutation(len(self.pieces.size))

    def length(self, sample: int) -> int:
        """Return the tokens of a sample."""
        return int(self.pieces.size[self.piece(sample)])

    def __getitem__(self, sample: int) -> Document:
        """Return a sample."""
        piece = self.piece(sample)
        begin, size = int(self.pieces.begin[piece]), int(self.pieces.size[piece])
        number = int(self.indices[self.pieces.document[piece]])
        if isinstance(self.dataset, Conversations):
            one = self.dataset[number]
            ids, counts = (
                one.ids[begin : begin + size + 1].astype(np.int64),
                one.loss_mask[begin + 1 : begin + size + 1],
            )
        else:
            ids = self.dataset.get(number, offset=begin, length=size + 1).astype(np.int64)
            counts = np.ones(size, dtype=np.float32)
        mask = counts.astype(np.float32)
        if self.config.eod_mask_loss:
            mask[ids[:-1] == self.config.tokenizer.eod] = 0  # as in upstream, where the token is, not its label
        return Document(ids[:-1], ids[1:], mask)


def _lengths(dataset: Any) -> Ints:
    return np.asarray(dataset.lengths if isinstance(dataset, Conversations) else dataset.sequence_lengths)


class DocumentSource:
    """Samples of a data set, or of a blend of several, by their number.

    Args:
        dataset: what upstream's builder has made.
        wanted: samples that the run reads, or None.

    Raises:
        ValueError: A blend without weights, of which upstream reads every document once, holds fewer.
    """

    def __init__(self, dataset: DocumentDataset | BlendedDataset, wanted: int | None = None) -> None:
        self.dataset = dataset
        if isinstance(dataset, BlendedDataset) and wanted is not None and len(dataset) < wanted:
            raise ValueError(
                f"{dataset.split.name} data: the blend has no weights, so that each of its {len(dataset):,} documents "
                f"is read once, but the run wants {wanted:,}. Give a weight before each data set, or fewer steps."
            )

    def length(self, sample: int) -> int:
        """Return the tokens of a sample."""
        dataset, index = self._place(sample)
        return dataset.length(index)

    def __getitem__(self, sample: int) -> Document:
        """Return a sample."""
        dataset, index = self._place(sample)
        return dataset[index]

    @property
    def parts(self) -> list[DocumentDataset]:
        """The data sets."""
        return list(self.dataset.datasets) if isinstance(self.dataset, BlendedDataset) else [self.dataset]

    def describe(self) -> str:
        """Return a line about what is trained and what is not."""
        pieces = [one.pieces for one in self.parts]
        sizes = np.concatenate([one.size for one in pieces])
        split, dropped, empty = (sum(getattr(one, name) for one in pieces) for name in ("split", "dropped", "empty"))
        return (
            f"{len(sizes):,} documents of {int(sizes.min()):,} to {int(sizes.max()):,} tokens, "
            f"{int(sizes.sum()):,} together; overlong ones: {split:,} split, {dropped:,} dropped; {empty:,} empty"
        )

    def _place(self, sample: int) -> tuple[DocumentDataset, int]:
        if not isinstance(self.dataset, BlendedDataset):
            return self.dataset, sample
        return self.dataset.datasets[self.dataset.dataset_index[sample]], int(self.dataset.dataset_sample_index[sample])

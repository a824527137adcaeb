"""What a script may do otherwise than ours in an arm of a case; a case names it with `script`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.regression.planted import wrapped


@contextmanager
def conversations_in_a_dense_mask() -> Iterator[None]:
    """Hand the model a dense mask of the conversations of upstream's SFT data set, without `PackedSeqParams`.

    Upstream's attention on one process without TransformerEngine refuses those. Sequences stay apart, too, where the
    script would join them.
    """
    import torch

    from megatron.longseq import pretrain_gpt

    def separate(_: Any, batch: dict[str, Any]) -> dict[str, Any]:
        borders = batch.pop("cu_seqlens").long()
        batch.pop("max_seqlen")
        sequence = batch["tokens"].shape[1]
        position = torch.arange(sequence).expand(len(borders), -1).contiguous()
        document = torch.searchsorted(borders, position, right=True)
        seen = (document[:, :, None] == document[:, None, :]).tril()
        return {**batch, "attention_mask": ~seen[:, None]}

    with ExitStack() as stack:
        stack.enter_context(wrapped(pretrain_gpt, "flatten_batch_for_packed_sequences", separate))
        stack.enter_context(wrapped(pretrain_gpt, "packed_documents", lambda *_: None))
        yield


SCRIPTS = (conversations_in_a_dense_mask.__name__,)

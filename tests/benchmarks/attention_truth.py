"""What attention of a whole sequence is, in float64, by its formula alone; and how far a rank's results are from it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.longseq.attention.plan.ranges import TokenRange
from tests.benchmarks.attention_contest import Size

ROWS = 128  # of the score matrix at once


def whole(size: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v and the gradient of the output, [length, 1, h, d], the same on every rank."""
    generator = torch.Generator().manual_seed(size.length)
    heads = (size.heads.query, size.heads.kv, size.heads.kv, size.heads.query)
    q, k, v, grad = (torch.randn(size.length, 1, count, size.dim, generator=generator).to(dtype) for count in heads)
    return q, k, v, grad


def truth(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return out, dq, dk and dv of causal attention in float64; the ranks share the work by heads."""
    results = tuple(torch.zeros(x.shape, dtype=torch.float64) for x in (q, q, k, v))
    share = q.shape[2] // k.shape[2]
    for head in range(k.shape[2]):
        if head % dist.get_world_size() == dist.get_rank():
            parts = [slice(head * share, (head + 1) * share)] * 2 + [slice(head, head + 1)] * 2
            out, dq, dk, dv = (x[:, :, part] for x, part in zip(results, parts, strict=True))
            given = (q[:, :, parts[0]], k[:, :, parts[2]], v[:, :, parts[2]], grad[:, :, parts[0]])
            one_head(*(x.double() for x in given), out, dq, dk, dv)
    for result in results:
        dist.all_reduce(result)
    return results


def one_head(  # the results are views: added to, in place
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Fill the results, which are zero, for queries [s, 1, h, d] that share one key head [s, 1, 1, d]."""
    scale, later = q.shape[-1] ** -0.5, torch.ones(ROWS, ROWS, dtype=torch.bool).triu(1)
    for head in range(q.shape[2]):
        for begin in range(0, q.shape[0], ROWS):
            rows = slice(begin, min(begin + ROWS, q.shape[0]))
            count = rows.stop - begin
            query, weight = q[rows, 0, head] * scale, grad[rows, 0, head]
            keys, values = k[: rows.stop, 0, 0], v[: rows.stop, 0, 0]
            scores = query @ keys.T
            scores[:, begin:].masked_fill_(later[:count, :count], -torch.inf)
            shares = scores.softmax(-1)
            result = out[rows, 0, head] = shares @ values
            from_scores = (weight @ values.T).sub_((result * weight).sum(-1, keepdim=True)).mul_(shares)
            dq[rows, 0, head] = from_scores @ keys * scale
            dk[: rows.stop, 0, 0] += from_scores.T @ query
            dv[: rows.stop, 0, 0] += shares.T @ weight


def errors(found: Sequence[Tensor], expected: Sequence[Tensor], spans: Sequence[TokenRange]) -> tuple[float, ...]:
    """Return the largest difference of each result, over the largest value of the whole sequence's.

    Args:
        found: a rank's, [n, 1, h, d].
        expected: the whole sequence's.
        spans: positions that the rank holds, in order.
    """
    worst = []
    for mine, right in zip(found, expected, strict=True):
        own = torch.cat([right[span.slice()] for span in spans])
        worst.append(((mine.double() - own).abs().max() / right.abs().max()).item())
    return tuple(worst)

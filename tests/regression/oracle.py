"""Arm X: an independent implementation of the training in plain PyTorch and float64, without code of U or O.

It relies only on the format of upstream's checkpoints: names of weights and the order of their rows. It computes masks,
positions, losses, gradients, clipping, Adam and the learning rate from the tokens.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
LAYER = "decoder.layers."
ATTENTION, MLP = f"{LAYER}self_attention.", f"{LAYER}mlp."
HEAD, EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
FINAL = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Settings:
    """Values of upstream's flags that the computation depends on.

    Attributes:
        documents: whether sequences hold several documents. Each one is computed by itself, without packing.
        masks_eod: whether end-of-document tokens have no loss.
        conversations: whether the loss mask of a sample says which tokens have a loss (--sft).
        rotates: whether positions are rotary ones.
        per_token: whether every token of a step has the same weight; otherwise every micro-batch has.
    """

    heads: int
    groups: int
    steps: int
    peak: float
    floor: float
    warmup: int
    clip: float
    weight_decay: float
    eod: int
    documents: bool
    masks_eod: bool
    conversations: bool
    rotates: bool
    per_token: bool = False

    @classmethod
    def of(cls, flags: Sequence[str]) -> "Settings":
        """Read the settings from a command line. The last of repeated flags counts."""
        pairs = zip(flags, [*flags[1:], ""], strict=True)
        value = {flag: following for flag, following in pairs if flag.startswith("--")}
        return cls(
            heads=int(value["--num-attention-heads"]),
            groups=int(value["--num-query-groups"]),
            steps=int(value["--train-iters"]),
            peak=float(value["--lr"]),
            floor=float(value["--min-lr"]),
            warmup=int(value.get("--lr-warmup-iters", 0)),
            clip=float(value.get("--clip-grad", 1.0)),
            weight_decay=float(value["--weight-decay"]),
            eod=int(value.get("--null-tokenizer-eod-id", -1)),
            documents="--reset-attention-mask" in value,
            masks_eod="--eod-mask-loss" in value,
            conversations="--sft" in value,
            rotates=value["--position-embedding-type"] == "rope",
            per_token="--calculate-per-token-loss" in value or "--flexsp" in value,
        )


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of a step: linear warm-up from 0, then a cosine to the minimum."""
    if settings.warmup > 0 and step <= settings.warmup:
        return settings.peak * step / settings.warmup
    progress = (step - settings.warmup) / (settings.steps - settings.warmup)
    return settings.floor + (settings.peak - settings.floor) * 0.5 * (1 + math.cos(math.pi * progress))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Apply RMSNorm over the last dimension."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def rotate(x: Tensor) -> Tensor:
    """Apply RoPE to [batch, heads, sequence, channels]. Channel i is rotated with channel i + channels/2."""
    sequence, half = x.shape[2], x.shape[3] // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    turn = torch.polar(
        torch.ones(sequence, half, dtype=x.dtype), torch.arange(sequence, dtype=x.dtype)[:, None] * speed
    )
    turned = torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn
    return torch.cat((turned.real, turned.imag), -1)


def attention(x: Tensor, qkv: Tensor, heads: int, groups: int, *, rotates: bool = True) -> Tensor:
    """Compute grouped-query attention. The rows of `qkv` hold, for each group, its queries, its key and its value."""
    batch, sequence, _ = x.shape
    per_group = heads // groups
    rows = (x @ qkv.T).view(batch, sequence, groups, per_group + 2, -1).permute(0, 2, 3, 1, 4)
    query, key, value = rows[:, :, :per_group], rows[:, :, per_group : per_group + 1], rows[:, :, per_group + 1 :]
    if rotates:
        query = rotate(query.flatten(1, 2)).view_as(query)
        key = rotate(key.flatten(1, 2)).view_as(key)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    hidden = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -math.inf)
    mixed = torch.softmax(scores, -1) @ value
    return mixed.permute(0, 3, 1, 2, 4).reshape(batch, sequence, -1)


def token_losses(weights: Weights, tokens: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    """Return the cross entropy of every token, [batch, sequence]; each sequence is one document."""
    x = weights[EMBEDDING][tokens]
    if POSITIONS in weights:
        x = x + weights[POSITIONS][: tokens.shape[1]]
    for layer in range(weights[f"{ATTENTION}linear_qkv.weight"].shape[0]):
        w = {name: tensor[layer] for name, tensor in weights.items() if name.startswith(LAYER)}
        inner = norm(x, w[f"{ATTENTION}linear_qkv.layer_norm_weight"])
        qkv = w[f"{ATTENTION}linear_qkv.weight"]
        mixed = attention(inner, qkv, settings.heads, settings.groups, rotates=settings.rotates)
        x = x + mixed @ w[f"{ATTENTION}linear_proj.weight"].T
        inner = norm(x, w[f"{MLP}linear_fc1.layer_norm_weight"])
        gate, up = (inner @ w[f"{MLP}linear_fc1.weight"].T).chunk(2, -1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{MLP}linear_fc2.weight"].T
    logits = norm(x, weights[FINAL]) @ weights.get(HEAD, weights[EMBEDDING]).T
    return torch.logsumexp(logits, -1) - logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]


def losses_of_documents(
    weights: Weights, tokens: Tensor, labels: Tensor, borders: Sequence[Sequence[int]], settings: Settings
) -> Tensor:
    """Return the cross entropy of every token, [batch, sequence], one document after the other."""
    rows = []
    for row, borders_of_row in enumerate(borders):
        pieces = [slice(begin, end) for begin, end in itertools.pairwise(borders_of_row) if begin < end]
        losses = [token_losses(weights, tokens[row, None, one], labels[row, None, one], settings)[0] for one in pieces]
        rows.append(torch.cat(losses))
    return torch.stack(rows)


def borders_of(batch: Mapping[str, Any], settings: Settings) -> list[list[int]]:
    """Return where the documents of every sequence begin, and its length.

    Samples with `cu_seqlens` say it themselves; with --reset-attention-mask a document ends behind each end-of-document
    token; otherwise a sequence is one document.
    """
    tokens = torch.as_tensor(batch["tokens"])
    if "cu_seqlens" in batch:
        return torch.as_tensor(batch["cu_seqlens"]).tolist()  # type: ignore[no-any-return]
    ends = [torch.nonzero(row == settings.eod).flatten() + 1 if settings.documents else row[:0] for row in tokens]
    return [[0, *found.tolist(), tokens.shape[1]] for found in ends]


def _counts(batch: Mapping[str, Any], settings: Settings) -> Tensor:
    """Return which tokens have a loss, bool [batch, sequence]."""
    if settings.conversations:
        return torch.as_tensor(batch["loss_mask"]).bool()
    tokens = torch.as_tensor(batch["tokens"])
    return tokens != settings.eod if settings.masks_eod else torch.ones_like(tokens, dtype=torch.bool)


def train(seed: Mapping[str, Tensor], steps: Sequence[Any], settings: Settings) -> tuple[list[dict[str, Any]], Weights]:
    """Train on recorded batches.

    Args:
        seed: the initial weights.
        steps: the micro-batches of each step, with `tokens` and `labels` of shape [micro-batch, sequence].
        settings: see Settings.

    Returns:
        The curve (loss, grad_norm, learning_rate and tokens of each step), and the weights after the last step with
        Adam's first moments, under their names in upstream's checkpoint.
    """
    weights = {name: tensor.detach().double().clone().requires_grad_() for name, tensor in seed.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    curve = []
    for step, batches in enumerate(steps):
        total, count = 0.0, 0
        whole = sum(int(_counts(batch, settings).sum()) for batch in batches)
        for batch in batches:
            tokens, labels = (torch.as_tensor(batch[name]).long() for name in ("tokens", "labels"))
            counts = _counts(batch, settings)
            losses = losses_of_documents(weights, tokens, labels, borders_of(batch, settings), settings)[counts]
            share = losses.sum() / whole if settings.per_token else losses.mean() / len(batches)
            share.backward()  # type: ignore[no-untyped-call]
            total, count = total + losses.sum().item(), count + losses.numel()
        length = math.sqrt(sum(float((w.grad**2).sum()) for w in weights.values() if w.grad is not None))
        rate = learning_rate(settings, step)
        with torch.no_grad():
            for name, w in weights.items():
                assert w.grad is not None, f"{name} has no gradient"
                gradient = w.grad * min(1.0, settings.clip / (length + 1e-6))
                w.grad = None
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                decay = 0.0 if "norm" in name else settings.weight_decay  # as upstream, none for vectors
                w.sub_(rate * (decay * w + mean / (square.sqrt() + 1e-8)))
        curve.append({"loss": total / count, "grad_norm": length, "learning_rate": rate, "tokens": count})
    moments = {f"optimizer.state.exp_avg.{name}": moment for name, moment in first.items()}
    return curve, {name: w.detach() for name, w in weights.items()} | moments

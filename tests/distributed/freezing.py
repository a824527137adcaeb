"""Scripts that freeze a part of the model themselves, for both arms of a comparison."""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.regression.planted import Planted, wrapped

UPPER = r"layers\.(2|3)\.|final_layernorm|output_layer"  # the embedding and the lower half are frozen
OUTER = r"embedding|layers\.(0|3)\.|output_layer"  # layers in the middle are frozen: with four stages, whole stages
MATRICES = r"linear_proj\.weight|linear_fc2\.weight"  # one matrix of each part of each layer
NORMS = r"layernorm"  # in every layer, and nothing else


@contextmanager
def upper_half() -> Iterator[Planted]:
    """Freeze the embedding and layers 0 and 1 as soon as the model is built."""
    with _frozen_when_built(UPPER) as planted:
        yield planted


@contextmanager
def outer_layers() -> Iterator[Planted]:
    """Freeze layers 1 and 2 as soon as the model is built."""
    with _frozen_when_built(OUTER) as planted:
        yield planted


@contextmanager
def few_matrices() -> Iterator[Planted]:
    """Train two matrices of each layer, as adapters would be trained."""
    with _frozen_when_built(MATRICES) as planted:
        yield planted


@contextmanager
def norms() -> Iterator[Planted]:
    """Train the norms alone."""
    with _frozen_when_built(NORMS) as planted:
        yield planted


@contextmanager
def first_tokens() -> Iterator[Planted]:
    """Train the embedding of the first 20 tokens of every sequence alone, as a prompt would be trained."""
    with _embedded(lambda positions: positions < 20) as planted:
        yield planted


@contextmanager
def last_tokens() -> Iterator[Planted]:
    """Train the embedding of the last 4 tokens of every sequence alone."""
    with _embedded(lambda positions: positions >= 60) as planted:
        yield planted


@contextmanager
def _embedded(trained: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Planted]:
    """Train only some positions. The embedding of a segment without trained positions needs no gradient."""
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

    planted = Planted()

    def forward(original: Any, embedding: Any, input_ids: Any, position_ids: Any, *rest: Any, **named: Any) -> Any:
        output = original(embedding, input_ids, position_ids, *rest, **named)
        rows = trained(position_ids[0])[:, None, None]
        planted.times += 1
        return torch.where(rows, output, output.detach()) if rows.any() else output.detach()

    with _frozen_when_built(r"word_embeddings"), wrapped(LanguageModelEmbedding, "forward", forward):
        yield planted


@contextmanager
def upper_half_after_wrapping() -> Iterator[Planted]:
    """Freeze as `upper_half` does, but after data parallelism has wrapped the model."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.utils import unwrap_model

    planted = Planted()

    def wrap(original: Any, chunk: Any, *args: Any, **named: Any) -> None:
        original(chunk, *args, **named)
        planted.times += _freeze(unwrap_model(chunk), UPPER)

    with wrapped(DistributedDataParallel, "__init__", wrap):
        yield planted


@contextmanager
def lower_half_without_autograd() -> Iterator[Planted]:
    """Freeze as `upper_half` does, and run the frozen layers under `torch.no_grad`."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    def forward(original: Any, layer: Any, *args: Any, **named: Any) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and layer.layer_number > 2):
            return original(layer, *args, **named)

    with _frozen_when_built(UPPER) as planted, wrapped(TransformerLayer, "forward", forward):
        yield planted


@contextmanager
def upper_half_and_live_bytes(notes: list[Any]) -> Iterator[None]:
    """Freeze as `upper_half` does, and record the bytes of all live tensors after every step."""
    from megatron.training import training

    def train_step(original: Any, *args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        notes.append(sum(storages.values()))
        return result

    with _frozen_when_built(UPPER), wrapped(training, "train_step", train_step):
        yield


@contextmanager
def _frozen_when_built(trained: str) -> Iterator[Planted]:
    from megatron.core.models.gpt.gpt_model import GPTModel

    planted = Planted()

    def build(original: Any, model: Any, *args: Any, **named: Any) -> None:
        original(model, *args, **named)
        planted.times += _freeze(model, trained)

    with wrapped(GPTModel, "__init__", build):
        yield planted


def _freeze(model: torch.nn.Module, trained: str) -> int:
    from megatron.longseq.freeze import global_param_name

    count = 0
    for name, param in model.named_parameters():
        if not re.search(trained, global_param_name(model, name)):
            param.requires_grad_(False)
            count += 1
    return count

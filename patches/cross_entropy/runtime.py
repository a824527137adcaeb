"""Put the chunked cross entropy into upstream's GPTModel, and refuse flags and models that it does not support."""

import functools
import inspect
import weakref
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.cross_entropy.arguments import describe_chunks, refuse_unserved_cross_entropy


def with_refusals(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: refuse what chunks do not support.

    Raises:
        ValueError: flags do not go together.
    """

    @functools.wraps(original)
    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        from megatron.longseq.pipeline.plan.from_args import segment_lengths

        result = original(args, defaults or {})
        refuse_unserved_cross_entropy(args)
        if args.rank == 0:
            print(f"> {describe_chunks(args, segment_lengths(args))}", flush=True)
        return result

    return validate_args


def with_chunked_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `GPTModel._postprocess`: give it an output processor of ours where it would compute losses."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def _postprocess(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.inference.utils import InferenceMode
        from megatron.training import get_args

        from megatron.longseq.cross_entropy.runtime.output_layer import ChunkedLoss, warn_of_whole_logits

        bound = signature.bind(*args, **kwargs)
        model, labels = bound.arguments["self"], bound.arguments["labels"]
        if model.post_process and not InferenceMode.is_active():
            if bound.arguments.get("output_processor") is not None:
                warn_of_whole_logits("the script gives the model an output_processor, which computes its own logits")
            elif labels is None:
                warn_of_whole_logits("the script asks the model for logits (labels=None)")
            else:
                flags = get_args()
                needs_gradient = flags.overlap_grad_reduce or getattr(flags, "paro", None) is not None
                bound.arguments["output_processor"] = ChunkedLoss(flags.cross_entropy_chunk_tokens, needs_gradient)
        return original(*bound.args, **bound.kwargs)

    return _postprocess


def with_checked_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_forward_backward_func`: before the first step of a model, refuse one that chunks do not support."""

    checked: weakref.WeakSet[Any] = weakref.WeakSet()

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
        return functools.partial(_run_checked, checked, original(*args, **kwargs))

    return get_forward_backward_func


def _run_checked(checked: weakref.WeakSet[Any], run: Callable[..., Any], *args: Any, model: Any, **kwargs: Any) -> Any:
    from megatron.longseq.cross_entropy.runtime.output_layer import check_model

    for chunk in model if isinstance(model, list) else [model]:
        if chunk not in checked:
            check_model(chunk)
            checked.add(chunk)
    return run(*args, model=model, **kwargs)

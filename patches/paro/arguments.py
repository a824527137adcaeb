"""Upstream's validation of its flags, with what --paro sets before it and our refusals around it."""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.sharding.arguments import refuse_unserved_sharding
from megatron.longseq.sharding.plan.from_args import confirm, resolve, told, widths
from patches.environment import node_ranks


def with_sharding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: refuse, set upstream's flags, let upstream validate, refuse what that has brought about.

    The first refusal comes before upstream's own assertions, which would blame flags that --paro has set.

    Raises:
        ValueError: flags that do not go together, or groups that the ranks do not make.
    """

    @functools.wraps(original)
    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        refuse_unserved_sharding(args)
        found = resolve(args, node_ranks())
        result = original(args, defaults or {})
        refuse_unserved_sharding(args)
        confirm(args, found)
        if args.rank == 0:
            print(f"> {told(found, widths(args))}", flush=True)
        return result

    return validate_args

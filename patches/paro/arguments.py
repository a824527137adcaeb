"""Upstream's validation of its flags, with what --paro sets before it and what --paro refuses before and after it."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.longseq.sharding.arguments import prefetch_units, refuse_unserved_sharding
from megatron.longseq.sharding.plan.from_args import check_unchanged, resolve, summary, units_of_chunk, widths
from patches.environment import node_ranks


def with_sharding(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `validate_args`: refuse flags, set upstream's, let upstream validate, and refuse what that has set.

    The first refusal comes before upstream's own assertions, which would blame flags that --paro has set.

    Raises:
        ValueError: flags cannot be combined, or the group size does not divide the ranks.
    """

    def validate_args(args: Namespace, defaults: dict[str, Any] | None = None) -> Any:
        refuse_unserved_sharding(args)
        plan = resolve(args, node_ranks())
        result = original(args, defaults or {})
        refuse_unserved_sharding(args)
        check_unchanged(args, plan)
        if args.rank == 0:
            print(f"> {summary(plan, widths(args), units_of_chunk(args), prefetch_units(args))}", flush=True)
        return result

    return validate_args

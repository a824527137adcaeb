"""PyTorch's Adam with the interface of the fused ones: the step count is in the parameter group, not in the state."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class GroupStepAdam(torch.optim.Adam):
    """Subclass `torch.optim.Adam` so that parameter groups count the steps. Kernels and update are PyTorch's.

    Upstream's distributed optimizer shards, saves and reshards `exp_avg` and `exp_avg_sq`; a third tensor `step` per
    parameter breaks its loaders. Here `step` stands in the group between two calls of `step()`, as in apex's FusedAdam.

    Args:
        params: parameters or groups, as for any torch optimizer.
        adam_w_mode: decoupled weight decay (AdamW) when true, L2 regularisation (Adam) when false.
        **kwargs: those of `torch.optim.Adam`.
    """

    def __init__(self, params: Any, adam_w_mode: bool = True, **kwargs: Any) -> None:
        super().__init__(params, decoupled_weight_decay=adam_w_mode, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set a loaded state. torch's check expects a `step` tensor per parameter, so each has one during the check."""
        without = [entry for entry in state["state"].values() if entry and "step" not in entry]
        for entry in without:
            entry["step"] = torch.zeros(())
        super().__setstate__(state)
        for entry in without:
            del entry["step"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; count one step per group that had one, or has no parameters.

        Upstream saves the groups of rank 0 for all ranks. It has every group, and where all its parameters are frozen,
        nothing in them.
        """
        for group, states in self._states_with_gradient():
            for state in states:
                if state:  # torch fills an empty state itself, from step 0
                    done = group.get("step", state.get("step", 0))  # plain torch keeps the count in the state
                    state["step"] = torch.tensor(float(done), dtype=torch.float32)
        result = super().step(closure)
        for group, states in self._states_with_gradient():
            for state in states:
                group["step"] = int(state.pop("step"))
            if not group["params"]:
                group["step"] = group.get("step", 0) + 1
        return result

    def _states_with_gradient(self) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
        for group in self.param_groups:
            yield group, [self.state[p] for p in group["params"] if p.grad is not None]


@contextmanager
def adam_counts_steps_per_group() -> Iterator[None]:
    """Bind `GroupStepAdam` where upstream looks for apex's FusedAdam. Restore the bindings on exit."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    bindings = (
        (optimizer, "Adam", GroupStepAdam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in bindings]
    for module, name, value in bindings:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def without_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `load_checkpoint`, so that loaders of optimizer states may write into parameters in place."""
    return torch.no_grad()(original)

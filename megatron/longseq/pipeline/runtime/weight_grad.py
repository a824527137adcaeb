"""Split the backward of linear layers for zero-bubble schedules (arXiv 2401.10241).

Upstream's local linears (`--transformer-impl local`) compute the gradients of the input and of the weight in one
autograd function. `attach` replaces the function that each instance calls. The backward then computes only the
gradients of the input and the bias, and a `WeightGradStore` keeps the operands of the weight's product until the
unit's WEIGHT action:

    with attach(model, store):
        store.begin(unit); backward_step(...); store.end()      # action BACKWARD
        store.run(unit)                                         # action WEIGHT, later, in the order of the backwards

Autograd does not see the weight of a split linear. If it did, the weight's accumulation hook would fire without a
gradient, and upstream's data-parallel wrapper would take the gradient for complete. All other parameters (norms,
biases, embeddings, a weight that another module uses too) keep upstream's path, and have their gradient after BACKWARD.

Data parallelism: all backwards run under `no_sync`. During the last WEIGHT action, the reduction of each bucket starts
when the last of its weight gradients is computed (`grad_sync.BucketReductions`).

Memory: from BACKWARD to WEIGHT a unit keeps the inputs of its linears, which BACKWARD would have freed, and the
gradients of their outputs. These may be the tensors that a neighbour has sent, so a receive buffer must not be reused
before WEIGHT has run.

Sequence parallelism: the product needs the input of all tensor-parallel ranks. It is gathered in WEIGHT, while the
product before it runs. Upstream's backward sends the same bytes. A gather in BACKWARD would keep tensor-parallel-size
times the memory until WEIGHT.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import layers

type Tensor = torch.Tensor
type Linear = layers.ColumnParallelLinear | layers.RowParallelLinear


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of a linear's call that autograd does not see.

    Attributes:
        weight: [output, input].
        fused: whether upstream's fused kernel accumulates the gradient.
        reduces: whether the input's gradient is summed over `group`.
        gathers: whether the input is sharded along its first dimension over `group` (sequence parallelism).
        group: tensor-parallel group.
        store: keeps the weight's product.
    """

    weight: torch.nn.Parameter
    fused: bool
    reduces: bool
    gathers: bool
    group: Any
    store: "WeightGradStore"


@dataclass(frozen=True, slots=True)
class _Product:
    """A weight gradient to compute: `grad_output` transposed times `input`, [output, input]."""

    call: _Call
    input: Tensor
    grad_output: Tensor
    versions: tuple[int, int]

    def check(self) -> None:
        """Raise RuntimeError if one of the tensors was written to since BACKWARD."""
        if (self.input._version, self.grad_output._version) != self.versions:
            shape = tuple(self.call.weight.shape)
            raise RuntimeError(
                f"the input or the output gradient of the linear layer with weight {shape} was modified in place "
                "between its BACKWARD and its WEIGHT action, so the weight gradient would be wrong. Do not modify a "
                "unit's tensors before its WEIGHT action has run"
            )

    def total_input(self) -> tuple[Tensor, Any]:
        """Return the input of all tensor-parallel ranks, and the handle to wait for (None: no communication)."""
        if not self.call.gathers:
            return self.input, None
        rows, *rest = self.input.shape
        total = self.input.new_empty((rows * self.call.group.size(), *rest))
        return total, dist.all_gather_into_tensor(total, self.input.contiguous(), group=self.call.group, async_op=True)


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor [sequence, batch, n] as contiguous [sequence * batch, n]."""
    return tensor.contiguous().view(-1, tensor.shape[-1])


class _InputGradient(torch.autograd.Function):
    """Map input [sequence, batch, in] and bias [out] or None to [sequence, batch, out]; `call` holds the weight."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
        ctx.save_for_backward(input)
        ctx.call = call
        total = input
        if call.gathers:
            rows, *rest = input.shape
            shape = [rows * call.group.size(), *rest]
            total = get_global_memory_buffer().get_tensor(shape, input.dtype, "mpu")
            dist.all_gather_into_tensor(total, input.contiguous(), group=call.group)
        output = torch.matmul(total, call.weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (grad_output,), (input,), call = grads, ctx.saved_tensors, ctx.call
        call.store.add(call, input, grad_output)
        grad_input = grad_output.matmul(call.weight)
        handle = None
        if call.gathers:
            part = torch.empty_like(input, memory_format=torch.contiguous_format)
            handle = dist.reduce_scatter_tensor(part, grad_input, group=call.group, async_op=True)
            grad_input = part
        elif call.reduces:
            handle = dist.all_reduce(grad_input, group=call.group, async_op=True)
        grad_bias = _rows(grad_output).sum(dim=0) if ctx.needs_input_grad[1] else None  # while the collective runs
        if handle is not None:
            handle.wait()
        return grad_input, grad_bias, None


class WeightGradStore:
    """Keeps the weight products of units between their BACKWARD and their WEIGHT action.

    A unit is any hashable name of one backward, for instance (micro-batch, segment, virtual stage). Products run on the
    stream that is current in `run`, which must be the stream of the backwards.
    """

    def __init__(self) -> None:
        self._pending: dict[Hashable, deque[_Product]] = {}
        self._unit: Hashable | None = None  # read by autograd's thread, so not thread-local

    def begin(self, unit: Hashable) -> None:
        """Collect the products of `unit` from now on, until `end` or the next `begin`.

        Raises:
            RuntimeError: the weight gradients of the unit's last backward have not been computed.
        """
        if unit in self._pending:
            raise RuntimeError(f"backward of unit {unit} runs again before its weight gradients were computed")
        self._pending[unit] = deque()
        self._unit = unit

    def end(self) -> None:
        """Stop collecting; a backward before the next `begin` is an error."""
        self._unit = None

    def add(self, call: _Call, input: Tensor, grad_output: Tensor) -> None:
        """Keep a product of the current unit; called in the backward of a split linear.

        Args:
            call: the linear's weight and how its gradient is accumulated.
            input: input of the linear.
            grad_output: gradient of its output.

        Raises:
            RuntimeError: there is no current unit.
        """
        if self._unit is None:
            raise RuntimeError(
                "a backward ran outside of the schedule, so no WEIGHT action will compute its weight gradients. Call "
                "begin(unit) before it, or detach the model"
            )
        input, grad_output = input.detach(), grad_output.detach()  # without their graph
        product = _Product(call, input, grad_output, (input._version, grad_output._version))
        self._pending[self._unit].append(product)

    def weights(self, unit: Hashable) -> set[torch.nn.Parameter]:
        """Return the weights whose gradients `run` will compute for a unit."""
        return {product.call.weight for product in self._pending.get(unit, ())}

    @torch.no_grad()
    def run(self, unit: Hashable, ready: Callable[[torch.nn.Parameter], None] | None = None) -> None:
        """Compute the weight gradients of a unit and add them to `main_grad`, or to `grad` if there is no `main_grad`.

        The result is bitwise upstream's if units run in the order of their backwards. Within a unit, the products of a
        weight that is used more than once are summed before they are added, as autograd does.

        Args:
            unit: as given to `begin`.
            ready: called with each weight once the unit's gradient of it has been added.

        Raises:
            RuntimeError: there is no such unit, or its tensors were written to since its backward. The step cannot
                continue.
        """
        if unit not in self._pending:
            raise RuntimeError(
                f"unit {unit} has no weight gradients: its backward did not run, or they were computed already"
            )
        products = self._pending.pop(unit)
        if self._unit == unit:
            self._unit = None
        uses = Counter(product.call.weight for product in products)
        sums: dict[torch.nn.Parameter, Tensor] = {}
        for product, total in _with_inputs(products):
            weight = product.call.weight
            uses[weight] -= 1
            if product.call.fused and hasattr(weight, "main_grad"):
                _accumulate_fused(weight.main_grad, _rows(total), _rows(product.grad_output))
            else:
                gradient = _rows(product.grad_output).t().matmul(_rows(total))
                sums[weight] = sums[weight] + gradient if weight in sums else gradient
                if not uses[weight]:
                    _accumulate(weight, sums.pop(weight))
            if ready is not None and not uses[weight]:
                ready(weight)

    def assert_empty(self) -> None:
        """Check at the end of a step that all weight gradients were computed.

        Raises:
            RuntimeError: names the units whose WEIGHT action did not run.
        """
        if self._pending:
            units = ", ".join(str(unit) for unit in self._pending)
            raise RuntimeError(f"weight gradients were never computed for the units {units}")

    def reset(self) -> None:
        """Drop all products, after a step that failed."""
        self._pending.clear()
        self._unit = None


def _with_inputs(products: deque[_Product]) -> Iterator[tuple[_Product, Tensor]]:
    """Yield the products with their full inputs; the next input is gathered while the caller computes."""
    ahead = None
    while products:
        product = products.popleft()
        product.check()
        total, handle = ahead if ahead is not None else product.total_input()
        ahead = products[0].total_input() if products else None
        if handle is not None:
            handle.wait()
        yield product, total


def _accumulate(weight: torch.nn.Parameter, gradient: Tensor) -> None:
    if hasattr(weight, "main_grad"):
        weight.main_grad.add_(gradient)
    elif weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad.add_(gradient)


def _accumulate_fused(main_grad: Tensor, total: Tensor, grad_output: Tensor) -> None:
    """Compute and add a product in one kernel, the one that upstream uses."""
    kernels = layers.fused_weight_gradient_mlp_cuda
    name = "wgrad_gemm_accum_fp32" if main_grad.dtype is torch.float32 else "wgrad_gemm_accum_fp16"
    getattr(kernels, name)(total, grad_output, main_grad)


class _Split:
    """Replaces the `_forward_impl` of one linear."""

    def __init__(self, linear: Linear, store: WeightGradStore) -> None:
        self.linear, self.store, self.upstream = linear, store, linear._forward_impl

    def __call__(self, input: Tensor, weight: torch.nn.Parameter, bias: Tensor | None, **options: Any) -> Tensor:
        """Split the backward, if there will be one and no other module holds the weight; else call upstream."""
        splits = input.requires_grad and weight.requires_grad and weight is self.linear.weight
        if not splits or torch.is_autocast_enabled(input.device.type):
            return self.upstream(input=input, weight=weight, bias=bias, **options)
        call = _Call(
            weight,
            fused=options["gradient_accumulation_fusion"],
            reduces=options["allreduce_dgrad"],
            gathers=options["sequence_parallel"],
            group=options["tp_group"],
            store=self.store,
        )
        return _InputGradient.apply(input, bias, call)


class Attachment:
    """The linears of a model whose backward is split, until `detach` or the end of a `with` block.

    Attributes:
        names: names of the split linears.
    """

    def __init__(self, splits: dict[str, _Split]) -> None:
        self._splits, self.names = splits, tuple(splits)
        for split in splits.values():
            split.linear._forward_impl = split

    def detach(self) -> None:
        """Restore upstream's function; does nothing the second time."""
        for split in self._splits.values():
            split.linear.__dict__.pop("_forward_impl", None)
        self._splits = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def attach(chunks: torch.nn.Module | Sequence[torch.nn.Module], store: WeightGradStore) -> Attachment:
    """Split the backward of every local linear of a rank's model chunks. No module, parameter or key is renamed.

    Args:
        chunks: model chunks, with upstream's wrappers (data parallelism, 16 bit) or without.
        store: keeps the weight products.

    Raises:
        ValueError: there is no linear to split, or one that cannot be split. Then no linear was changed.
    """
    chunks = [chunks] if isinstance(chunks, torch.nn.Module) else list(chunks)
    named = [(f"{i}.{name}", module) for i, chunk in enumerate(chunks) for name, module in chunk.named_modules()]
    linears = {
        name: module
        for name, module in named
        if isinstance(module, (layers.ColumnParallelLinear, layers.RowParallelLinear))
    }
    if not linears:
        raise ValueError(
            "--zero-bubble: the model of this rank has no ColumnParallelLinear or RowParallelLinear, whose backward "
            "it splits; give --transformer-impl local"
        )
    holders = Counter(parameter for _, module in named for parameter in module._parameters.values())
    for name, linear in linears.items():
        _refuse(name, linear)
    return Attachment({name: _Split(linear, store) for name, linear in linears.items() if _is_split(linear, holders)})


def _is_split(linear: Linear, holders: Counter[Any]) -> bool:
    """Return whether a linear has a trained weight of its own; autograd sums the gradients of a shared one.

    A weight that is passed in (None here) is that of the embedding of the same stage.
    """
    return linear.weight is not None and linear.weight.requires_grad and holders[linear.weight] == 1


def _refuse(name: str, linear: Linear) -> None:
    reasons = {
        "its backward is split already": "_forward_impl" in linear.__dict__,
        "it is a linear of MoE experts, whose backward is not split": linear.is_expert,
        "--defer-embedding-wgrad-compute keeps its weight gradient elsewhere": (
            linear.config.defer_embedding_wgrad_compute
        ),
        "its weight is sharded (GTP)": linear.gtp_remat_size > 1,
        "its weight is sharded (FSDP)": hasattr(linear.weight, "__fsdp_param__"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"--zero-bubble cannot split the backward of {name}: {reason}")

"""Zero-bubble's split: the backward of a linear computes the input's gradient, the weight's gradient waits.

Upstream's local linears (`--transformer-impl local`) compute both in one autograd function. `attach` re-binds the
function that they call on each instance, so that in the backward only the input's gradient (and the bias's, a sum) is
computed, and a `WeightStore` keeps what the weight's product needs until its WEIGHT action runs:

    with attach(model, store):
        store.begin(unit); backward_step(...); store.end()      # action B
        store.run(unit)                                         # action W, any time later, in the order of the B's

The weight takes no part in autograd there: an accumulation hook that fired without a gradient would make upstream's
data-parallel wrapper believe that the gradient is complete. All other parameters (norms, biases, embeddings, a linear
whose weight something else uses too) keep upstream's path and have their gradient after B.

Data parallelism. Either all backwards run under `no_sync` and after the last W the executor calls the wrapper's
`start_grad_sync`, as upstream does with `--align-grad-reduce`; or it leaves `no_sync` before a chunk's last B, as
upstream does without, and gives `run` of that chunk's last W the function `grad_ready(chunk)`: then each bucket is
reduced as soon as its last weight is done, while the other products of that W still run. Without
`--overlap-grad-reduce` nothing is to be called: finalisation reduces.

Memory. From B to W a unit holds the inputs of its linears, which B would have let go, and the gradients of their
outputs. These may be the very tensors that a neighbour sent: a receive buffer must not be used again before W ran.

Sequence parallelism. The weight's product needs the input of all tensor-parallel ranks. It is gathered in W, as it is
gathered in upstream's backward: the same bytes, moved out of the critical B, and hidden behind the product before it.
Gathering in B would hold tensor-parallel-size times the memory until W.
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
    """How a linear was called, apart from the tensors of autograd.

    Attributes:
        weight: [output, input].
        fused: accumulate by upstream's fused kernel.
        reduces: the input's gradient is summed over `group`.
        gathers: the input is split along its first dimension over `group` (sequence parallelism).
        group: tensor-parallel group.
        store: where the weight's product waits.
    """

    weight: torch.nn.Parameter
    fused: bool
    reduces: bool
    gathers: bool
    group: Any
    store: "WeightStore"


@dataclass(frozen=True, slots=True)
class _Product:
    """One weight gradient to be computed: `grad_output` transposed times `input`, [output, input]."""

    call: _Call
    input: Tensor
    grad_output: Tensor
    versions: tuple[int, int]

    def check(self) -> None:
        """Raise RuntimeError if somebody wrote into the tensors since B."""
        if (self.input._version, self.grad_output._version) != self.versions:
            shape = tuple(self.call.weight.shape)
            raise RuntimeError(
                f"an input or output gradient of the linear with weight {shape} was written to between B and W: its "
                "weight gradient would be wrong. Tensors of a unit belong to it until its W has run"
            )

    def total_input(self) -> tuple[Tensor, Any]:
        """Return the input of all tensor-parallel ranks and the handle that has to be waited for, None: none."""
        if not self.call.gathers:
            return self.input, None
        rows, *rest = self.input.shape
        total = self.input.new_empty((rows * self.call.group.size(), *rest))
        return total, dist.all_gather_into_tensor(total, self.input.contiguous(), group=self.call.group, async_op=True)


def _rows(tensor: Tensor) -> Tensor:
    """[sequence, batch, n] as contiguous [sequence * batch, n]."""
    return tensor.contiguous().view(-1, tensor.shape[-1])


class _InputGradient(torch.autograd.Function):
    """input [sequence, batch, in] and bias [out] or None to [sequence, batch, out]; the weight is in `call`."""

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
        grad_bias = _rows(grad_output).sum(dim=0) if ctx.needs_input_grad[1] else None  # while the others talk
        if handle is not None:
            handle.wait()
        return grad_input, grad_bias, None


class WeightStore:
    """Keeps the weight products of units whose B ran and whose W did not.

    A unit is any hashable name of one backward: for instance (virtual stage, micro-batch, segment). Products run on the
    stream that is current in `run`; it must be the one of the backwards.
    """

    def __init__(self) -> None:
        self._pending: dict[Hashable, deque[_Product]] = {}
        self._unit: Hashable | None = None  # read by autograd's thread, so not thread-local

    def begin(self, unit: Hashable) -> None:
        """Collect for `unit` from now on, until `end` or the next `begin`.

        Raises:
            RuntimeError: the unit's W has not run since its last B.
        """
        if unit in self._pending:
            raise RuntimeError(f"backward of unit {unit} runs again before its weight gradients were computed")
        self._pending[unit] = deque()
        self._unit = unit

    def end(self) -> None:
        """Collect no more: a backward before the next `begin` is an error."""
        self._unit = None

    def add(self, call: _Call, input: Tensor, grad_output: Tensor) -> None:
        """Keep a product of the unit that runs backward; its linear calls this.

        Raises:
            RuntimeError: no unit was begun.
        """
        if self._unit is None:
            raise RuntimeError(
                "a backward ran outside of a schedule's action: its weight gradients have no W to be computed in. Call "
                "begin(unit) before it, or detach the model"
            )
        input, grad_output = input.detach(), grad_output.detach()  # without their graph
        product = _Product(call, input, grad_output, (input._version, grad_output._version))
        self._pending[self._unit].append(product)

    @torch.no_grad()
    def run(self, unit: Hashable, done: Callable[[torch.nn.Parameter], None] | None = None) -> None:
        """Compute the weight gradients of a unit and add them to `main_grad`, or `grad` where there is no `main_grad`.

        The result is bitwise upstream's when units run in the order of their backwards: within a unit the products of a
        weight that was used more than once are summed first, as autograd does.

        Args:
            unit: as given to `begin`.
            done: called with each weight as soon as its gradient of this unit has been added; see `grad_ready`.

        Raises:
            RuntimeError: no such unit, or its tensors were written to since its B; the step cannot go on then.
        """
        if unit not in self._pending:
            raise RuntimeError(f"no weight gradients of unit {unit}: its backward did not run, or its W ran already")
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
            if done is not None and not uses[weight]:
                done(weight)

    def pending_bytes(self) -> int:
        """Bytes of storage that waiting units keep alive."""
        tensors = (
            t for unit in self._pending.values() for product in unit for t in (product.input, product.grad_output)
        )
        storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
        return sum(storages.values())

    def assert_empty(self) -> None:
        """Check the end of a step.

        Raises:
            RuntimeError: names the units whose W did not run.
        """
        if self._pending:
            units = ", ".join(str(unit) for unit in self._pending)
            raise RuntimeError(f"weight gradients were never computed for the units {units}: their W did not run")

    def reset(self) -> None:
        """Forget everything: the step was given up."""
        self._pending.clear()
        self._unit = None


def _with_inputs(products: deque[_Product]) -> Iterator[tuple[_Product, Tensor]]:
    """Empty the queue; the gather of the next input runs while the caller multiplies."""
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
    """Product and addition in one kernel, the one that upstream uses."""
    kernels = layers.fused_weight_gradient_mlp_cuda
    name = "wgrad_gemm_accum_fp32" if main_grad.dtype is torch.float32 else "wgrad_gemm_accum_fp16"
    getattr(kernels, name)(total, grad_output, main_grad)


class _Split:
    """Stands in for the `_forward_impl` of one linear."""

    def __init__(self, linear: Linear, store: WeightStore) -> None:
        self.linear, self.store, self.upstream = linear, store, linear._forward_impl

    def __call__(self, input: Tensor, weight: torch.nn.Parameter, bias: Tensor | None, **options: Any) -> Tensor:
        """Split where a backward will come and the weight is this linear's own; otherwise upstream's function."""
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
    """Linears whose weight gradients wait; `detach`, or the end of a `with`, gives them upstream's function back.

    Attributes:
        names: the linears that are split.
        left: linears that are not, with the reason.
    """

    def __init__(self, splits: dict[str, _Split], left: dict[str, str]) -> None:
        self._splits = splits
        self.names, self.left = tuple(splits), left
        for split in splits.values():
            split.linear._forward_impl = split

    def detach(self) -> None:
        """Undo; nothing when done already."""
        for split in self._splits.values():
            split.linear.__dict__.pop("_forward_impl", None)
        self._splits = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


def attach(chunks: torch.nn.Module | Sequence[torch.nn.Module], store: WeightStore) -> Attachment:
    """Split the backward of every local linear of a rank's model chunks; no module, parameter or key is renamed.

    Args:
        chunks: model chunks, wrapped (data parallelism, 16 bit) or not.
        store: where their weight products wait.

    Raises:
        ValueError: there is nothing to split, or something that cannot be; then nothing was changed.
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
            "zero-bubble found no linear of upstream's own in this rank's model: it splits ColumnParallelLinear and "
            "RowParallelLinear, which --transformer-impl local uses"
        )
    holders = Counter(parameter for _, module in named for parameter in module._parameters.values())
    left = {name: why for name, linear in linears.items() if (why := _left_alone(linear, holders))}
    for name, linear in linears.items():
        _refuse(name, linear)
    return Attachment({name: _Split(linear, store) for name, linear in linears.items() if name not in left}, left)


def _left_alone(linear: Linear, holders: Counter[Any]) -> str | None:
    if linear.weight is None:
        return "its weight is passed in: tied to the embedding of the same stage, autograd sums both gradients"
    if not linear.weight.requires_grad:
        return "its weight is frozen"
    if holders[linear.weight] > 1:
        return "its weight is also another module's: autograd sums both gradients"
    return None


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
            raise ValueError(f"zero-bubble cannot split the backward of {name}: {reason}")


def grad_ready(chunk: Any) -> Callable[[torch.nn.Parameter], None] | None:
    """What `run` of a chunk's last W needs where upstream reduces gradients in the last backward, else None.

    It does what the hooks of the other parameters do: tells upstream's data-parallel wrapper that a gradient is
    complete, so that a bucket is reduced when its last one is. The chunk's last B and last W must run outside of
    `no_sync`, all other backwards inside.

    Args:
        chunk: a model chunk, in upstream's DistributedDataParallel or not.
    """
    ddp_config = getattr(chunk, "ddp_config", None)
    if ddp_config is None or not ddp_config.overlap_grad_reduce:
        return None

    def ready(weight: torch.nn.Parameter) -> None:
        chunk.param_to_bucket_group[weight].register_grad_ready(weight, chunk.force_all_reduce)

    return ready

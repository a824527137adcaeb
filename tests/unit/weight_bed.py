"""Compute gradients of a small upstream model on ranks of the pool, by its own backward and by the split one."""

import contextlib
import hashlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SEQUENCE, BATCH, VOCABULARY, HIDDEN = 16, 2, 64, 32
PRODUCTS = ("mm", "addmm", "matmul", "linear", "_int_mm")

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A model and how it runs.

    Attributes:
        order: actions of the split arm, for instance "B0 W0 B1 W1"; upstream's arm runs the B's fused.
        tail: a last pipeline stage (hidden states in, loss out), not a whole model.
        ddp: options of upstream's data-parallel wrapper, None: no wrapper.
        first: arm that trains the first step of both, to mix their book-keeping.
    """

    tp: int = 1
    sequence_parallel: bool = False
    tied: bool = False
    tail: bool = False
    bias: bool = False
    bf16: bool = False
    fused: bool = False
    config: tuple[tuple[str, Any], ...] = ()
    order: str = "B0 B1 W0 B2 W1 W2"
    ddp: tuple[tuple[str, Any], ...] | None = None
    first: str = "same"

    @property
    def backwards(self) -> list[int]:
        return [int(word[1:]) for word in self.order.split() if word[0] == "B"]


@contextlib.contextmanager
def world(case: Case) -> Iterator[None]:
    """Open upstream's process groups of one CPU rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from tests.regression.arm import patched

    with patched("U"):
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.tp)
        model_parallel_cuda_manual_seed(1)
        yield


def model_of(case: Case) -> Any:
    """Build the model, with the same weights in every call."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "use_cpu_initialization": True,
            "add_bias_linear": case.bias,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "tensor_model_parallel_size": case.tp,
            "sequence_parallel": case.sequence_parallel,
            "gradient_accumulation_fusion": case.fused,
            "params_dtype": torch.bfloat16 if case.bf16 else torch.float32,
            "bf16": case.bf16,
        }
        | dict(case.config)
    )
    torch.manual_seed(7)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=not case.tail,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
    )
    with torch.no_grad():  # biases start at zero, a weak test of what is done with them
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    if case.ddp is None:
        return model
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(config, DistributedDataParallelConfig(**dict(case.ddp)), model)


def loss_of(case: Case, model: Any, step: int, microbatch: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a forward; returns the loss and the leaves that came from outside."""
    from megatron.core import parallel_state

    data = torch.Generator().manual_seed(1000 * parallel_state.get_data_parallel_rank() + 10 * step + microbatch)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=data)
    leaves = []
    if case.tail:
        rows = SEQUENCE // case.tp if case.sequence_parallel else SEQUENCE
        hidden = torch.randn(rows, BATCH, HIDDEN, generator=data).to(
            torch.bfloat16 if case.bf16 else torch.get_default_dtype()
        )
        leaves = [hidden.requires_grad_()]
        model.set_input_tensor(hidden)
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    losses = model(tokens, positions, mask, labels=tokens.roll(-1, dims=1))
    return losses.float().mean(), leaves


def fused_step(case: Case, model: Any, step: int) -> list[torch.Tensor]:
    """Run upstream's own backward, with its rule for `no_sync`, and return the gradients of outside inputs."""
    inputs = []
    for microbatch in case.backwards:
        is_last = microbatch == case.backwards[-1]
        with contextlib.nullcontext() if case.ddp is None or is_last else model.no_sync():
            loss, leaves = loss_of(case, model, step, microbatch)
            loss.backward()
        inputs += [leaf.grad for leaf in leaves]
    return inputs


def split_step(case: Case, model: Any, step: int) -> list[torch.Tensor]:
    """Run the same micro-batches in the case's order of B and W."""
    from megatron.longseq.pipeline.runtime.grad_sync import BucketReductions
    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    store, inputs, words = WeightGradStore(), [], case.order.split()
    with attach(model, store):
        for place, word in enumerate(words):
            microbatch = int(word[1:])
            if word[0] == "W":
                overlaps = case.ddp is not None and model.ddp_config.overlap_grad_reduce
                is_final = overlaps and place == len(words) - 1
                store.run(microbatch, BucketReductions(model, store.weights(microbatch)).ready if is_final else None)
                continue
            with contextlib.nullcontext() if case.ddp is None else model.no_sync():
                loss, leaves = loss_of(case, model, step, microbatch)
                store.begin(microbatch)
                loss.backward()
                store.end()
            inputs += [leaf.grad for leaf in leaves]
        store.assert_empty()
    return inputs


def reductions(case: Case) -> list[list[str]]:
    """Return for each of two steps the events of its WEIGHT actions: "product", and "reduction" of a bucket."""
    from megatron.longseq.pipeline.runtime import weight_grad

    steps: list[list[str]] = []
    with world(case):
        model = model_of(case)
        original = weight_grad._accumulate

        def accumulate(weight: Any, gradient: torch.Tensor) -> None:
            steps[-1].append("product")
            original(weight, gradient)

        def noted(group: Any) -> Callable[..., None]:
            start = type(group).start_grad_sync

            def start_grad_sync(*args: Any, **named: Any) -> None:
                steps[-1].append("reduction")
                start(group, *args, **named)

            return start_grad_sync

        weight_grad._accumulate = accumulate
        for step in range(2):
            steps.append([])
            for group in model.bucket_groups:
                group.start_grad_sync = noted(group)
            model.zero_grad_buffer()
            split_step(case, model, step)
            for group in model.bucket_groups:
                del group.start_grad_sync
            model.finish_grad_sync()
        weight_grad._accumulate = original
    return steps


def gradients(case: Case, arms: list[Callable[..., list[torch.Tensor]]]) -> list[Gradients]:
    """Return the gradients of every parameter and outside input after each step."""
    model, steps = model_of(case), []
    for step, arm in enumerate(arms):
        if case.ddp is None:
            model.zero_grad(set_to_none=True)
        else:
            model.zero_grad_buffer()
        inputs = arm(case, model, step)
        if case.ddp is not None:
            from megatron.core.distributed import finalize_model_grads

            finalize_model_grads([model])
        found = {f"input {i}": value for i, value in enumerate(inputs)}
        for name, parameter in model.named_parameters():
            found[name] = parameter.main_grad if case.ddp is not None else parameter.grad
        steps.append({name: value.clone() for name, value in found.items()})
    return steps


def differing(case: Case, steps: int = 1) -> list[str]:
    """Return the names of gradients that are not bitwise those of upstream's backward, or are zero in both."""
    with world(case), kernel(case):
        first = {"same": split_step, "fused": fused_step}[case.first]
        expected = gradients(case, [fused_step] * steps)
        found = gradients(case, [first] + [split_step] * (steps - 1))
        if case.first == "fused":  # and back again
            expected += gradients(case, [fused_step] * steps)
            found += gradients(case, [split_step] * (steps - 1) + [fused_step])
    bad = []
    for step, (ours, upstreams) in enumerate(zip(found, expected, strict=True)):
        assert list(ours) == list(upstreams)
        bad += [
            f"step {step}: {name}"
            for name, value in ours.items()
            if not torch.equal(value, upstreams[name]) or not value.any() or value.dtype != upstreams[name].dtype
        ]
    return bad


class FusedKernel:
    """Stands in for the CUDA extension: the product is added to the main gradient in the main gradient's type."""

    calls = 0

    def wgrad_gemm_accum_fp32(self, total: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert main_grad.dtype is torch.float32
        FusedKernel.calls += 1
        main_grad.addmm_(grad_output.t().float(), total.float())

    def wgrad_gemm_accum_fp16(self, total: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        assert main_grad.dtype is torch.bfloat16
        FusedKernel.calls += 1
        main_grad.addmm_(grad_output.t(), total)


@contextlib.contextmanager
def kernel(case: Case) -> Iterator[None]:
    """Install the fused kernel in upstream if the case needs it."""
    if case.fused:
        from megatron.core.tensor_parallel import layers

        layers._grad_accum_fusion_available = True
        layers.fused_weight_gradient_mlp_cuda = FusedKernel()
    yield
    assert bool(FusedKernel.calls) == case.fused


class Counted(TorchDispatchMode):
    """Counts matrix products (not the batched ones of attention) by the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products[tuple(out.shape)] += 1
        return out


def pending_bytes(store: Any) -> int:
    """Return the bytes of storage that units keep alive between B and W."""
    tensors = (t for unit in store._pending.values() for product in unit for t in (product.input, product.grad_output))
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def counted(case: Case) -> dict[str, Any]:
    """Count the products of upstream's backward, of B and of W."""
    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    with world(case):
        model, store = model_of(case), WeightGradStore()
        loss, _ = loss_of(case, model, 0, 0)
        with Counted() as fused:
            loss.backward()
        with attach(model, store) as attachment:
            loss, _ = loss_of(case, model, 0, 0)
            store.begin(0)
            with Counted() as backward:
                loss.backward()
            pending = pending_bytes(store)
            with Counted() as weight:
                store.run(0)
            shapes = Counter(tuple(model.get_submodule(name[2:]).weight.shape) for name in attachment.names)
        return {
            "fused": fused.products,
            "B": backward.products,
            "W": weight.products,
            "weights": shapes,
            "linears": len(attachment.names),
            "held": pending,
            "left": pending_bytes(store),
        }


def used_twice() -> bool:
    """Call one linear layer twice in a forward, as upstream's multi-token prediction calls the head."""
    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    case = Case()
    with world(case):
        linear, store = model_of(case).output_layer, WeightGradStore()
        inputs = [torch.randn(SEQUENCE, BATCH, HIDDEN) * scale for scale in (1.0, 0.7, 1.3)]
        linear.weight.main_grad = torch.randn_like(linear.weight)
        start = linear.weight.main_grad.clone()

        def loss() -> torch.Tensor:
            return sum(linear(x.clone().requires_grad_())[0].square().sum() for x in inputs)

        loss().backward()
        expected = start + linear.weight.grad
        linear.weight.grad = None
        with attach(linear, store):
            total = loss()
            store.begin(0)
            total.backward()
            store.run(0)
        return linear.weight.grad is None and torch.equal(linear.weight.main_grad, expected)


def attaching() -> None:
    """Return what `attach` leaves, refuses and undoes."""
    import pytest

    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    case = Case(tied=True)
    with world(case):
        model, store = model_of(case), WeightGradStore()
        linears = [module for module in model.modules() if hasattr(module, "_forward_impl")]
        qkv = model.decoder.layers[0].self_attention.linear_qkv
        qkv.weight.requires_grad_(False)
        model.decoder.layers[1].mlp.also = torch.nn.Module()
        model.decoder.layers[1].mlp.also.weight = model.decoder.layers[1].mlp.linear_fc1.weight
        keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
        attachment = attach([model], store)
        assert len(attachment.names) == len(linears) - 3 == 6
        left = {f"0.{name}" for name, module in model.named_modules() if module in linears} - {*attachment.names}
        assert left == {  # frozen, also another module's, passed in
            "0.decoder.layers.0.self_attention.linear_qkv",
            "0.decoder.layers.1.mlp.linear_fc1",
            "0.output_layer",
        }
        assert (keys, names) == (list(model.state_dict()), [name for name, _ in model.named_modules()])
        with pytest.raises(ValueError, match=r"linear_proj: its backward is split already"):
            attach(model, store)
        with torch.no_grad():  # evaluation
            loss_of(case, model, 0, 0)
        attachment.detach()
        attachment.detach()
        assert not any("_forward_impl" in linear.__dict__ for linear in linears)
        del model.decoder.layers[1].mlp.also
        loss_of(case, model, 0, 0)[0].backward()  # upstream's own again
        assert model.decoder.layers[1].mlp.linear_fc1.weight.grad is not None
        _refusals(model, store, linears)


def _refusals(model: Any, store: Any, linears: list[Any]) -> None:
    import pytest

    from megatron.longseq.pipeline.runtime.weight_grad import attach

    with pytest.raises(ValueError, match="--transformer-impl local"):
        attach(torch.nn.Linear(2, 2), store)
    last = linears[-2]
    for owner, attribute, value, reason in (
        (last, "is_expert", True, "MoE experts"),
        (last.config, "defer_embedding_wgrad_compute", True, "--defer-embedding-wgrad-compute"),
        (last, "gtp_remat_size", 2, "GTP"),
        (last.weight, "__fsdp_param__", True, "FSDP"),
    ):
        before = getattr(owner, attribute, None)
        setattr(owner, attribute, value)
        with pytest.raises(ValueError, match=reason):
            attach(model, store)
        assert not any("_forward_impl" in linear.__dict__ for linear in linears)  # nothing half made
        delattr(owner, attribute) if before is None else setattr(owner, attribute, before)


def store_keeping() -> None:
    """Return results for units in and out of order, and for tensors that were overwritten."""
    import pytest

    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    case = Case()
    with world(case):
        linear, store = model_of(case).output_layer, WeightGradStore()
        with attach(linear, store):
            x = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)

            def backward() -> None:
                (linear(x)[0] * 1).sum().backward()

            with pytest.raises(RuntimeError, match="outside of the schedule"):
                backward()
            store.begin("a")
            backward()
            rows = SEQUENCE * BATCH
            assert pending_bytes(store) == 4 * rows * (HIDDEN + VOCABULARY)
            with pytest.raises(RuntimeError, match="unit a runs again"):
                store.begin("a")
            store.begin("b")
            backward()
            assert pending_bytes(store) == 4 * rows * (HIDDEN + 2 * VOCABULARY)  # both have the same input
            store.end()
            with pytest.raises(RuntimeError, match="outside of the schedule"):
                backward()
            with pytest.raises(RuntimeError, match="never computed for the units a, b"):
                store.assert_empty()
            store.run("b")
            assert linear.weight.grad is not None
            with pytest.raises(RuntimeError, match="unit b has no weight gradients"):
                store.run("b")
            store.reset()
            store.assert_empty()
            assert pending_bytes(store) == 0


def changed_tensors() -> None:
    """Return whether a run ends its unit and detects that a tensor of the unit was overwritten."""
    import pytest

    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    case = Case()
    with world(case):
        linear, store = model_of(case).output_layer, WeightGradStore()
        with attach(linear, store):
            x = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)

            def backward() -> torch.Tensor:
                kept = x * 1
                (linear(kept)[0] * 1).sum().backward()
                return kept

            store.begin("a")
            backward()
            store.run("a")
            with pytest.raises(RuntimeError, match="outside of the schedule"):
                backward()
            store.begin("b")
            kept = backward()
            with torch.no_grad():
                kept.zero_()
            with pytest.raises(RuntimeError, match=r"weight \(64, 32\) was modified in place between its BACKWARD"):
                store.run("b")


@dataclass
class Split:
    """What a split of a backward did.

    Attributes:
        gradients: checksum of the gradients of the parameters and of the input, bit by bit.
        products: matrix products of the first part and of the second.
        after_forward: bytes that autograd keeps after the forward.
        between: bytes that are kept between the two parts.
    """

    gradients: str
    products: tuple[int, int]
    after_forward: int
    between: int


class _Saved:
    """A tensor that autograd saves."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def splits() -> dict[str, Split]:
    """Return results of our split and torch's split of a last stage's backward in float64."""
    case = Case(tail=True)
    with world(case):
        torch.set_default_dtype(torch.float64)
        return {
            "ours": _split(case, _by_us),
            "torch": _split(case, _by_torch),
            "torch, plain": _split(case, _by_torch, plain=True),
        }


def _by_us(model: Any, loss: list[torch.Tensor], _: torch.Tensor) -> tuple[list[torch.Tensor], Callable[[], None]]:
    store = model.store
    store.begin(0)
    loss.pop().backward()
    store.end()
    return [t for p in store._pending[0] for t in (p.input, p.grad_output)], lambda: store.run(0)


def _by_torch(model: Any, loss: list[torch.Tensor], hidden: torch.Tensor) -> tuple[list[Any], Callable[[], None]]:
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    weights = list(model.parameters())
    _, groups = stage_backward_input([loss.pop()], None, [hidden], iter(weights))
    kept = [t for group in groups for grads in group["grads"] for t in grads if t is not None]
    return kept, lambda: stage_backward_weight(iter(weights), groups) and None


def _split(case: Case, backward: Callable[..., Any], plain: bool = False) -> Split:
    from megatron.longseq.pipeline.runtime.weight_grad import WeightGradStore, attach

    model, saved = model_of(case).double(), weakref.WeakSet()  # type: ignore[var-annotated]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    model.store = WeightGradStore()
    if plain:
        for module in model.modules():
            if hasattr(module, "_forward_impl"):
                module._forward_impl = lambda input, weight, bias, **_: torch.nn.functional.linear(input, weight, bias)

    def kept(tensors: list[torch.Tensor]) -> int:
        storages = [t.untyped_storage() for t in (*(box.tensor for box in saved), *tensors)]
        return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in parameters}.values())

    def save(tensor: torch.Tensor) -> _Saved:
        box = _Saved(tensor)
        saved.add(box)
        return box

    with attach(model, model.store) if backward is _by_us else contextlib.nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(save, lambda box: box.tensor):
            loss, (hidden,) = loss_of(case, model, 0, 0)
        losses, after_forward = [loss], kept([])
        del loss
        with Counted() as first:
            tensors, weight = backward(model, losses, hidden)
        between = kept(tensors)
        with Counted() as second:
            weight()
    grads = [hidden.grad, *(parameter.grad for parameter in model.parameters())]
    digest = hashlib.sha256(b"".join(grad.numpy().tobytes() for grad in grads)).hexdigest()
    return Split(digest, (first.products.total(), second.products.total()), after_forward, between)

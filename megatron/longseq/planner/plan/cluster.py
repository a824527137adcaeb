"""A cluster: what its GPUs compute, keep and send, from data sheets or measured by `calibrate`.

A cluster is named FAMILY-GPUS, such as a800-64. Every number of the family can be replaced:
`a800-64,node_bandwidth=50e9`.
"""

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from megatron.longseq.planner.plan.values import whole_number


class Curve(NamedTuple):
    """A measured product: m x k by k x n, and the TFLOP/s that it reached."""

    m: int
    n: int
    k: int
    tflops: float


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links. Bandwidths are bytes per second and direction; latencies are seconds.

    Attributes:
        name: FAMILY-GPUS.
        gpus: number of GPUs.
        gpus_per_node: GPUs that share a node's fast links.
        peak_tflops: dense bf16 peak of a GPU.
        fp8_peak_tflops: dense fp8 peak of a GPU; 0: it has none.
        fp32_peak_tflops: float32 peak of a GPU without tensor cores; 0: peak_tflops was measured in float32.
        sms: streaming multiprocessors, over which the tiles of a product are distributed.
        memory_bytes: memory of a GPU that a process can allocate.
        memory_bandwidth: of a GPU's memory.
        host_bandwidth: of the memory of a node's processors, for each of its GPUs.
        pcie_bandwidth: between a GPU and its host.
        link_bandwidth: of a GPU to the others of its node.
        link_latency: of one hop inside a node.
        node_bandwidth: of all network adapters of a node together.
        network_latency: of one hop between nodes.
        product_efficiency: share of the peak that a large matrix product without tile losses reaches.
        product_depth: extra depth k that starting and ending a tile costs.
        fp8_efficiency: product_efficiency for fp8.
        attention_efficiency: share of the peak that a long fused attention reaches in forward.
        attention_backward_efficiency: the same in backward.
        memory_efficiency: share of memory_bandwidth that elementwise kernels reach.
        link_efficiency: share of link_bandwidth that large collectives reach.
        network_efficiency: share of node_bandwidth that a collective reaches whose ranks fill their nodes.
        data_efficiency: share of node_bandwidth that data-parallel collectives reach, of which as many run at once as
            a node has tensor-parallel ranks.
        pairwise_efficiency: share of node_bandwidth that messages between pipeline stages reach.
        splits_messages: whether tensor-parallel ranks send a share of a message to the next stage each, and gather it
            there, as the software of some installations did (arXiv 2104.04473, section 4.1).
        overlaps_input_gradients: whether tensor-parallel ranks sum the gradients of a layer's inputs beside the product
            of its weight gradients, without sequence parallelism too. Megatron before 2022 did not.
        unfused_rms_norm: whether RMSNorm of local layers consists of several operators, which keep the normalised input
            beside the output. PyTorch's does on a CPU.
        predates_fused_attention: whether the GPUs are older than fused attention in Megatron, so that a run in fp16 is
            taken for one of early software (see `plan/flags.py`).
        message_bytes: size of a collective that reaches half of the bandwidth.
        layer_seconds: time in which a host issues the kernels of a layer's forward. Backward takes 1.6 times as long.
        step_seconds: host work of a step.
        imbalance: slowest rank's compute over the mean, for each doubling of the ranks (stragglers).
        workspace_bytes: buffers of libraries inside the allocator.
        deterministic_workspace_bytes: the same under deterministic_mode.
        overlap_workspace_bytes: workspace of the products that overlap with tensor-parallel communication. For up to
            three streams, TransformerEngine allocates 32 MiB each on Hopper and later GPUs, and 4 MiB on others.
        gradient_copy_bytes: bytes per parameter of gradients that the software keeps beside their float32 sums.
        context_bytes: memory outside the allocator (contexts, communicators).
        fragmentation: share of the allocated memory that the allocator reserves in addition.
        products: measured products, interpolated instead of product_efficiency.
        defaults: flags that runs of this installation had in common, as JSON of (flag, value).
        source: where the numbers come from.

    Raises:
        ValueError: a number is not positive, or a value has another type.
    """

    name: str
    gpus: int
    peak_tflops: float
    memory_bytes: float
    memory_bandwidth: float
    host_bandwidth: float = 51.2e9
    pcie_bandwidth: float = 31.5e9
    gpus_per_node: int = 8
    fp8_peak_tflops: float = 0.0
    fp32_peak_tflops: float = 0.0
    sms: int = 108
    link_bandwidth: float = 300e9
    link_latency: float = 3e-6
    node_bandwidth: float = 200e9
    network_latency: float = 8e-6
    product_efficiency: float = 0.78
    product_depth: int = 196
    fp8_efficiency: float = 0.6
    attention_efficiency: float = 0.6
    attention_backward_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.77
    network_efficiency: float = 0.8
    data_efficiency: float = 0.7
    pairwise_efficiency: float = 0.8
    splits_messages: bool = False
    overlaps_input_gradients: bool = True
    unfused_rms_norm: bool = False
    predates_fused_attention: bool = False
    message_bytes: float = 1e6
    layer_seconds: float = 0.9e-3
    step_seconds: float = 2e-3
    imbalance: float = 0.0
    workspace_bytes: float = 64e6
    deterministic_workspace_bytes: float = 80e6
    overlap_workspace_bytes: float = 3 * 4194304.0
    gradient_copy_bytes: float = 0.0
    context_bytes: float = 2.5e9
    fragmentation: float = 0.05
    products: tuple[Curve, ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in (*NUMBERS, "gpus"):
            self._check_number(name, getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"cluster {self.name}: {name} is {getattr(self, name)!r}, neither true nor false")

    def _check_number(self, name: str, value: Any) -> None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and name in (*_WHOLE, "gpus") and value % 1:
            raise ValueError(f"cluster {self.name}: {name} is {value!r}, not a whole number")
        if not is_number or not math.isfinite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            least = "0 or more" if name in _MAY_BE_ZERO else "positive"
            raise ValueError(f"cluster {self.name}: {name} must be {least}, not {value}")

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field) for field in self.__dataclass_fields__ if field != "source"))

    def __hash__(self) -> int:
        return self._hash  # caches of costs look clusters up often

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.gpus // self.gpus_per_node)

    def reserve_bytes(self, allocated: float) -> float:
        """Return the bytes that a process needs beyond what it has allocated at its peak."""
        return self.context_bytes + self.fragmentation * allocated


_MAY_BE_ZERO = (
    *("fp8_peak_tflops", "fp32_peak_tflops", "product_depth", "message_bytes", "layer_seconds", "step_seconds"),
    *("link_latency", "network_latency", "imbalance", "workspace_bytes", "deterministic_workspace_bytes"),
    *("overlap_workspace_bytes", "gradient_copy_bytes", "context_bytes", "fragmentation"),
)
_FIELDS = {one.name: one for one in fields(Cluster)}
_SWITCHES = ("splits_messages", "overlaps_input_gradients", "unfused_rms_norm", "predates_fused_attention")
_NO_NUMBERS = ("name", "gpus", "products", "defaults", "source", *_SWITCHES)
_WHOLE = ("gpus_per_node", "sms", "product_depth")
NUMBERS = tuple(name for name in _FIELDS if name not in _NO_NUMBERS)
_SHARES = (*(name for name in NUMBERS if name.endswith("_efficiency")), "fragmentation")


def families() -> tuple[str, ...]:
    """Return the names of the built-in families."""
    folder = resources.files("megatron.longseq.planner").joinpath("data/clusters")
    return tuple(sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json")))


@functools.lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    """Return the family of every name, without what people write beside it; see `_bare`."""
    found = {}
    for family in families():
        for name in (family, *_own_values(family).get("aliases", ())):
            found[_bare(name)] = family
    return found


@functools.lru_cache(maxsize=64)
def _own_values(family: str) -> dict[str, Any]:
    file = resources.files("megatron.longseq.planner").joinpath(f"data/clusters/{family}.json")
    return dict(json.loads(file.read_text()))


def _read_family(family: str) -> dict[str, Any]:
    """Return the numbers of a family: those of the GPUs that it is built of, and its own."""
    own = dict(_own_values(family))
    base = _own_values(own.pop("base")) if "base" in own else {}
    return {**base, **own}


# Parts of a GPU's name that do not tell two families apart. A100s of 40 GB are a family of their own.
_DECORATION = re.compile(r"nvidia|dev|lts|dgx|hgx|sxm\d?|gpus?|nvlink|tensor|core|hbm\d?e?|80gb?|141gb?|180gb?|192gb?")


def _bare(name: str) -> str:
    """Return a name without decoration: both `NVIDIA A100-SXM4-80GB` and `dgx_a100` are a100."""
    text = re.sub(r"[()]", " ", name.strip().lower()).replace("dgxa", "a").replace("dgxh", "h")
    text = re.sub(r"(\d) (gb?)\b", r"\1\2", text)
    text = re.sub(r"^(\d+) ?x ?(\D.*)$", r"\2-\1", text)  # 8x A100
    text = re.sub(r"^(.*\S) x ?(\d+)$", r"\1-\2", text)  # A100 x 64
    parts = re.split(r"[-_/ ]+", text)
    return "-".join(part.replace("40gb", "40g") for part in parts if part and not _DECORATION.fullmatch(part))


@functools.lru_cache(maxsize=4096)
def cluster(text: str, gpus: int | None = None) -> Cluster:
    """Return a cluster.

    Args:
        text: FAMILY, FAMILY-GPUS or a JSON file that `calibrate` wrote, each optionally followed by `,FIELD=VALUE`.
        gpus: number of GPUs; it replaces that of the text.

    Raises:
        ValueError: there is no such family or field, or the number of GPUs is missing.
    """
    name, *changes = [part.strip() for part in text.replace(";", ",").split(",")]
    values, named = _values(name)
    for change in changes:
        key, _, value = change.partition("=")
        if key not in NUMBERS:
            raise ValueError(f"cluster {text!r}: no number {key!r}; numbers are {', '.join(NUMBERS)}")
        try:
            values[key] = whole_number(key, value) if key in _WHOLE else float(value)
        except ValueError as error:
            kind = "whole number" if key in _WHOLE else "number"
            raise ValueError(f"cluster {text!r}: {key} is {value!r}, not a {kind}") from error
    count = named if gpus is None else gpus
    if count is None:
        raise ValueError(f"cluster {text!r}: how many GPUs? Give FAMILY-GPUS, such as {name}-64, or gpus")
    if count != named:  # reports name the cluster, so its name has the GPUs that are planned
        values["name"] = f"{str(values['name']).removesuffix(f'-{named}')}-{count}"
    return from_values({**values, "gpus": count})


def with_even_nodes(machine: Cluster) -> Cluster:
    """Return a cluster whose nodes have equally many GPUs, as launchers start them; unchanged if there is no such size.

    Args:
        machine: 12 GPUs on nodes of 8, for instance, are 2 nodes of 6.
    """
    if machine.gpus % machine.nodes:
        return machine
    return replace(machine, gpus_per_node=machine.gpus // machine.nodes)


def _values(name: str) -> tuple[dict[str, Any], int | None]:
    """Return the numbers of a family or a file, and the number of GPUs that the name has."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: not a JSON object; give a file that `calibrate` wrote")
        return {"name": path.stem, **content}, content.get("gpus")
    aliases = _aliases()
    bare = _bare(name)
    if bare in aliases:
        return {**_read_family(aliases[bare]), "name": bare}, None
    family, _, count = bare.rpartition("-")
    if family in aliases and count.isdigit():
        return {**_read_family(aliases[family]), "name": f"{family}-{count}"}, int(count)
    raise ValueError(f"no cluster {name!r}: neither a file nor FAMILY-GPUS with one of {', '.join(families())}")


def from_values(values: Mapping[str, Any]) -> Cluster:
    """Return a cluster from the contents of a file.

    Raises:
        ValueError: a number is unknown or missing, or a share is above 1.
    """
    content = {key: value for key, value in values.items() if key != "aliases"}
    unknown = set(content) - set(_FIELDS)
    if unknown:
        raise ValueError(f"cluster {values.get('name')}: unknown fields {sorted(unknown)}")
    products, defaults = content.get("products", ()), content.get("defaults", {})
    if not isinstance(defaults, Mapping):
        raise ValueError(f"cluster {values.get('name')}: defaults is {defaults!r}, no object of flags")
    if not isinstance(products, (list, tuple)):
        raise ValueError(f"cluster {values.get('name')}: products is {products!r}, no list")
    content["products"] = tuple(_curve(values.get("name"), one) for one in products)
    content["defaults"] = tuple(sorted(defaults.items()))
    try:
        found = Cluster(**content)
    except TypeError as error:
        raise ValueError(f"cluster {values.get('name')}: {error}") from error
    for name in () if found.products else _SHARES:  # a profile's shares are quotients of measured rates
        if getattr(found, name) > 1:
            share = getattr(found, name)
            raise ValueError(f"cluster {found.name}: {name} is a share, so it must be at most 1, not {share}")
    return found


def _curve(name: Any, entry: Any) -> Curve:
    """Return a measured product of a file.

    Raises:
        ValueError: the entry is not four positive numbers.
    """
    is_row = isinstance(entry, (list, tuple)) and len(entry) == len(Curve._fields)
    if not is_row or not all(type(one) in (int, float) and 0 < one < math.inf for one in entry):
        raise ValueError(f"cluster {name}: a product is {entry!r}; give four positive numbers: m, n, k and TFLOP/s")
    return Curve(*entry)

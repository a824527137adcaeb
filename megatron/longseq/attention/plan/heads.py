"""Ulysses degrees that attention heads allow, and the choice of one."""

from dataclasses import dataclass

from megatron.longseq.attention.plan.layout import Mesh


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of one tensor-parallel rank.

    Attributes:
        query: number of query heads Hq.
        kv: number of key (and value) heads Hk.

    Raises:
        ValueError: The key heads do not divide the query heads.
    """

    query: int
    kv: int

    def __post_init__(self) -> None:
        if self.query < 1 or self.kv < 1 or self.query % self.kv:
            raise ValueError(f"{self.query} query heads are not a multiple of {self.kv} key-value heads")

    @classmethod
    def of(cls, heads: int, groups: int | None = None, tensor: int = 1) -> "Heads":
        """Return the heads of one tensor-parallel rank, which holds at least one key head, as in upstream.

        Args:
            heads: --num-attention-heads.
            groups: --num-query-groups; None: as many as heads.
            tensor: --tensor-model-parallel-size.

        Raises:
            ValueError: The heads cannot be divided among the ranks.
        """
        groups = heads if groups is None else groups
        if heads % tensor or (groups % tensor and tensor % groups):
            raise ValueError(
                f"{heads} heads in {groups} query groups cannot be divided among {tensor} tensor-parallel ranks"
            )
        return cls(heads // tensor, max(groups // tensor, 1))

    def allows(self, ulysses: int) -> bool:
        """Return whether a Ulysses degree gives every rank whole query heads and the key heads they use."""
        return self.query % ulysses == 0 and (self.kv % ulysses == 0 or ulysses % self.kv == 0)

    def per_rank(self, ulysses: int) -> "Heads":
        """Return the heads of a rank after the all-to-all."""
        return Heads(self.query // ulysses, max(self.kv, ulysses) // ulysses)

    def sent(self, ulysses: int) -> int:
        """Return the heads of queries, keys and values that the all-to-all sends of a token, replicas included."""
        return self.query + 2 * max(self.kv, ulysses)


def legal_meshes(size: int, heads: Heads) -> tuple[tuple[int, int], ...]:
    """Return every legal (Ulysses, ring) of a context-parallel size, by ascending Ulysses degree; (1, C) always is.

    Args:
        size: context-parallel ranks C.
        heads: heads of a tensor-parallel rank.
    """
    return tuple(
        (degree, size // degree) for degree in range(1, size + 1) if size % degree == 0 and heads.allows(degree)
    )


def check_heads(mesh: Mesh, heads: Heads) -> None:
    """Refuse a Ulysses degree that the heads do not allow.

    Args:
        mesh: Ulysses and ring degrees.
        heads: heads of a tensor-parallel rank.

    Raises:
        ValueError: Says what is wrong and lists the legal choices with their flags.
    """
    if heads.allows(mesh.ulysses):
        return
    if heads.query % mesh.ulysses:
        why = f"{heads.query} query heads cannot be shared by {mesh.ulysses} ranks"
    else:
        why = f"{mesh.ulysses} does not divide the {heads.kv} key-value heads, or the reverse"
    choices = "; ".join(mesh_flags(Mesh(*pair)) for pair in legal_meshes(mesh.size, heads))
    raise ValueError(
        f"Ulysses over {mesh.ulysses} of {mesh.size} context-parallel ranks, with {heads.query} query heads and "
        f"{heads.kv} key-value heads per tensor-parallel rank: {why}. Possible degrees: {choices}"
    )


def mesh_flags(mesh: Mesh) -> str:
    """Return the command-line flags of a mesh."""
    flags = [f"--context-parallel-size {mesh.size}"]
    if mesh.ring == 1:
        flags.append("--cp-comm-type a2a")
    elif mesh.ulysses == 1:
        flags.append("--cp-comm-type p2p")
    else:
        flags.append(f"--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes {mesh.ulysses} {mesh.ring}")
        if mesh.placement != "head-first":
            flags.append(f"--context-parallel-placement {mesh.placement}")
    return " ".join(flags)


def choose_mesh(size: int, heads: int, groups: int | None, node_size: int, tensor: int = 1) -> Mesh:
    """Return the mesh with the largest legal Ulysses degree whose groups stay inside a node.

    Args:
        size: --context-parallel-size.
        heads: --num-attention-heads.
        groups: --num-query-groups; None: as many as heads.
        node_size: ranks of a node. Ranks of a tensor-parallel group are neighbours, context-parallel ones come next.
        tensor: --tensor-model-parallel-size.

    Raises:
        ValueError: A size is below 1, or the heads cannot be divided.
    """
    if min(size, heads, node_size, tensor) < 1:
        raise ValueError(
            f"context parallel {size}, {heads} heads, {node_size} ranks a node, tensor parallel {tensor}: "
            "each must be at least 1"
        )
    inside = [
        mesh
        for mesh in legal_meshes(size, Heads.of(heads, groups, tensor))
        if mesh[0] == 1 or node_size % (mesh[0] * tensor) == 0
    ]
    return Mesh(*inside[-1])

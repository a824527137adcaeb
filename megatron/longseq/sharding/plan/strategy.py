"""Which model state is sharded over which ranks: a triplet such as NIG, of parameters, gradients, optimizer states.

A triplet is valid where the optimizer states are sharded at least as finely as both others. Else a rank updates what
it does not keep, or needs gradients that it does not hold: `better` holds less and (its collectives being hierarchical)
sends no more.
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import product

LETTERS = "NIG"


class Level(IntEnum):
    """Over which ranks a state is sharded; a higher level is finer."""

    NONE = 0
    GROUP = 1
    GLOBAL = 2

    @property
    def letter(self) -> str:
        """N, I or G."""
        return LETTERS[self]


_WORDS = {Level.NONE: "not sharded", Level.GROUP: "sharded inside a group", Level.GLOBAL: "sharded globally"}


@dataclass(frozen=True, order=True, slots=True)
class Strategy:
    """How model states are sharded; any of 27. Ordered by parameters, then gradients, then optimizer states.

    Attributes:
        params: of the parameters that layers compute with.
        grads: of the gradients that accumulate over micro-batches.
        optimizer: of the optimizer states, main parameters among them.
    """

    params: Level
    grads: Level
    optimizer: Level

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """Return the triplet of three letters, valid or not (see `check`).

        Raises:
            ValueError: other letters, or not three.
        """
        if len(text) != 3 or set(text) - set(LETTERS):
            raise ValueError(
                f"sharding strategy {text!r}: give three letters, for parameters, gradients and optimizer states, each "
                "N (not sharded), I (inside a group) or G (globally), for instance NIG"
            )
        return cls(*(Level(LETTERS.index(letter)) for letter in text))

    def __str__(self) -> str:
        return self.params.letter + self.grads.letter + self.optimizer.letter

    @property
    def is_valid(self) -> bool:
        """Whether optimizer states are sharded at least as finely as parameters and gradients."""
        return self.optimizer >= max(self.params, self.grads)

    @property
    def better(self) -> "Strategy":
        """The valid triplet that dominates this one: less memory, no more bytes; a valid one's is itself."""
        return Strategy(self.params, self.grads, max(self.params, self.grads, self.optimizer))

    def refusal(self) -> str | None:
        """Return why a triplet is refused, and which one to give instead; None: it is valid."""
        if self.is_valid:
            return None
        reasons = []
        if self.grads > self.optimizer:
            reasons.append(
                f"gradients are {_WORDS[self.grads]}, so every step would gather them again for optimizer states that "
                f"are {_WORDS[self.optimizer]}"
            )
        if self.params > self.optimizer:
            reasons.append(
                f"parameters are {_WORDS[self.params]}, but optimizer states are {_WORDS[self.optimizer]}, so every "
                "rank would update parameters that it does not keep"
            )
        return f"{self}: {'; '.join(reasons)}. {self.better} holds less and sends no more: give --paro {self.better}"


ALL = tuple(Strategy(*levels) for levels in product(Level, repeat=3))
VALID = tuple(strategy for strategy in ALL if strategy.is_valid)
RUNNING = tuple(map(Strategy.parse, ["NNN", "NNI", "NNG", "NII", "NIG", "III", "IIG", "IGG", "NGG", "GGG", "ING"]))
KNOWN_AS = {
    "NNN": "DDP",
    "NNI": "distributed optimizer in instances",
    "NNG": "ZeRO-1, distributed optimizer",
    "NGG": "ZeRO-2",
    "GGG": "ZeRO-3, FSDP",
    "NII": "hybrid ZeRO-2",
    "III": "MiCS, HSDP",
    "IIG": "HFSDP",
}


def check(strategy: Strategy) -> Strategy:
    """Return a valid triplet.

    Raises:
        ValueError: it is not; the message says which one dominates it.
    """
    refusal = strategy.refusal()
    if refusal is not None:
        raise ValueError(refusal)
    return strategy

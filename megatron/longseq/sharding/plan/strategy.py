"""Sharding strategies: a triplet such as NIG says how parameters, gradients and optimizer states are sharded.

A triplet is valid if the optimizer states are sharded at least as finely as parameters and gradients. Otherwise a rank
would update parameters that it does not keep, or need gradients that it does not have. The valid triplet `better` then
takes less memory and, with hierarchical collectives, sends no more (PaRO, arXiv 2310.06003, section 3).
"""

from dataclasses import dataclass
from enum import IntEnum
from itertools import product

LETTERS = "NIG"


class Level(IntEnum):
    """The ranks that a state is sharded over; a higher level is finer."""

    NONE = 0
    GROUP = 1
    GLOBAL = 2

    @property
    def letter(self) -> str:
        """The level as a letter: N, I or G."""
        return LETTERS[self]


_WORDS = {Level.NONE: "not sharded", Level.GROUP: "sharded inside a group", Level.GLOBAL: "sharded globally"}


@dataclass(frozen=True, order=True, slots=True)
class Strategy:
    """The sharding levels of the model states: one of 27 triplets, ordered as tuples.

    Attributes:
        params: level of the parameters that layers compute with.
        grads: level of the gradients that accumulate over micro-batches.
        optimizer: level of the optimizer states, including the main parameters.
    """

    params: Level
    grads: Level
    optimizer: Level

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """Return the triplet that three letters name, valid or not (see `check`).

        Raises:
            ValueError: the text is not three of the letters N, I and G.
        """
        if len(text) != 3 or set(text) - set(LETTERS):
            raise ValueError(
                f"sharding strategy {text!r}: give three letters, for parameters, gradients and optimizer states, "
                "each N (not sharded), I (inside a group) or G (globally), such as NIG"
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
        """The valid triplet that takes less memory and sends no more bytes; a valid triplet returns itself."""
        return Strategy(self.params, self.grads, max(self.params, self.grads, self.optimizer))

    def refusal(self) -> str | None:
        """Return why the triplet is refused and which one to give instead; None if it is valid."""
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
    """Return the triplet if it is valid.

    Raises:
        ValueError: the triplet is not valid; the message names the one to give instead.
    """
    refusal = strategy.refusal()
    if refusal is not None:
        raise ValueError(refusal)
    return strategy

"""What is done to whom, and in which order: all of it follows from the seed. When it happens is up to the machine.

Each replica has a lane of faults, Postgres has one of its own; lanes run side by side. In each round over all lanes of
replicas every kind comes once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.faults.kinds import POSTGRES_FAULTS, REPLICA_FAULTS


@dataclass(frozen=True, slots=True)
class Step:
    """A fault, the seed of its own choices, and the pause after it in seconds."""

    kind: str
    seed: str
    rest: float


def rounds(kinds: tuple[str, ...], seed: str, rest: tuple[float, float]) -> Iterator[Step]:
    """Endless; each kind once in a round."""
    chance = random.Random(seed)
    number = 0
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            number += 1
            yield Step(kind, f"{seed} {number}", chance.uniform(*rest))


def replica_lane(seed: int, lane: int, lanes: int) -> Iterator[Step]:
    """The endless lane of a replica."""
    for number, step in enumerate(rounds(tuple(REPLICA_FAULTS), f"{seed} replicas", (0.1, 0.8))):
        if number % lanes == lane:
            yield step


def postgres_lane(seed: int) -> Iterator[Step]:
    """The endless lane of Postgres. It recovers after each, and work must get going again."""
    return rounds(tuple(POSTGRES_FAULTS), f"{seed} postgres", (2.5, 4.5))

"""`--stop auto`: forgetting rests while the forget rows look like text that the model never saw.

A run is not cut off there: at the peak of the learning rate what must stay is at its worst, and the steps that are left
repair it. They go on with the retain loss alone, and forgetting is taken up again when the rows come back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

ROWS = 32  # forget rows that are watched
EVERY = 2  # steps from one measurement to the next


@dataclass
class Level:
    """Whether the forget loss counts: `weights["forget"]`, of the terms of a step, is 1 below the level, else 0.

    `measure()`: mean NLL of the watched rows, in nats per answer token; `level`: that of unseen text under the original
    model. `seen`: [step, NLL] of each measurement.
    """

    measure: Callable[[], float]
    level: float
    weights: dict[str, float]
    seen: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restore(self.seen)

    @property
    def rests(self) -> bool:
        """Whether the level was reached when last measured."""
        return bool(self.seen) and self.seen[-1][1] >= self.level

    def after_step(self, step: int) -> None:
        """Measure when it is time to; what follows from it holds from the next step on."""
        if step % EVERY == 0:
            self.restore([*self.seen, [step, self.measure()]])

    def restore(self, seen: list[list[float]]) -> None:
        """Go on from these measurements."""
        self.seen = seen
        self.weights["forget"] = 0.0 if self.rests else 1.0

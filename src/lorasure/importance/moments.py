"""Streaming moments of per-example gradients: what importance is made of. Pure tensors, no model.

Every moment is a mean over *examples*, each counted once; a gradient is that of one example's mean NLL per answer token
(nats per token), so the results do not depend on batch size, padding or the number of devices.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .. import processes


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its own device, or on the CPU where the device (Apple's MPS) has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@dataclass
class Moments:
    """Running moments of values g with any shape, in float32 (Chan's parallel update of Welford's algorithm).

    `mean` is E[g]; `squares` is the sum over examples of (g - E[g])^2, so a variance can never be negative and does not
    lose its digits when E[g]^2 is close to E[g^2]; `absolute` is E[|g|]. All have the shape of one g.
    """

    count: int
    mean: Tensor
    squares: Tensor
    absolute: Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], device: torch.device | None = None) -> Moments:
        return cls(0, *(torch.zeros(shape, device=device) for _ in range(3)))

    def update(self, values: Tensor) -> None:
        """Add a batch of per-example values (examples, *shape)."""
        values = values.float()
        mean = values.mean(0)
        squares = (values - mean).square_().sum(0)
        self.merge(Moments(len(values), mean, squares, values.abs().mean(0)))

    def merge(self, other: Moments) -> None:
        """Add moments taken elsewhere (another batch, another process)."""
        total = self.count + other.count
        if other.count == 0:
            return
        share = other.count / total
        delta = other.mean - self.mean
        self.mean.lerp_(other.mean, share)
        self.squares.add_(other.squares).addcmul_(delta, delta, value=self.count * share)
        self.absolute.lerp_(other.absolute, share)
        self.count = total

    def add_up(self) -> None:
        """Become the moments over all processes, each of which has seen other examples."""
        if processes.size() == 1:
            return
        count = torch.tensor(float(self.count), device=self.mean.device)
        mean, absolute = self.mean * self.count, self.absolute * self.count
        processes.add_up([count, mean, absolute])
        total = int(count)
        mean /= max(total, 1)
        squares = self.squares + (self.mean - mean).square() * self.count
        processes.add_up([squares])
        self.count, self.mean, self.squares, self.absolute = total, mean, squares, absolute / max(total, 1)

    def to(self, device: torch.device | None) -> Moments:
        """The same moments on `device`; None leaves them where they are."""
        return self if device is None else Moments(self.count, **{k: t.to(device) for k, t in self.tensors().items()})

    @property
    def variance(self) -> Tensor:
        """E[(g - E[g])^2], the population variance."""
        return self.squares / self.count

    @property
    def second(self) -> Tensor:
        """E[g^2]."""
        return self.variance + self.mean.square()

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, without the count."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "count"}

"""How much memory a run takes, by stage and part, from the shapes of the model and the lengths of the rows alone.

The formulas and what they were compared with are in docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .data.examples import micro_batches
from .importance.activations import BYTES, side_of
from .importance.collect import FULL_CHUNK, Probe, together_limit
from .layers import KEPT_SHARE, decoder_layers
from .losses.tokens import ROWS
from .prefix import lowest_layer, tokens_per_pass
from .sites import Site, all_sites

FLOAT = 4  # bytes of a float32
FOUR_BIT = 0.5 + FLOAT / 64  # bytes of a weight: its code, and its share of a scale
MOMENTS = 3  # tensors per gradient: mean, squares, absolute
ADAM = 4  # tensors per trained factor: itself, its gradient, two moments
LOGITS = 7  # float32 tensors (ROWS answer tokens, vocabulary) that a loss has at once: bigram; others 4
HEAP = 1.5  # on a CPU, what the C library's allocator takes of the system for every byte of passing tensors
LIBRARIES = 100 * 2**20  # that are loaded when training begins
NORMS = 2  # of a layer, each with its input in float32
DOUBLES = 6  # float64 tensors of a layer's shape that an initialisation works with


@dataclass(frozen=True)
class Shapes:
    """Of a base model: the `sites` to adapt, weights in linear layers (but the head) and elsewhere, and sizes.

    `layers`: those from the lowest adapted one up, which keep something for the way back. `outputs`: what leaves the
    linear layers in them that are not adapted, numbers per token. `width`: bytes of a number in the dtype of the
    arithmetic. `routed`: the share of a mixture's experts that a token goes to. `recomputed`: whether layers can give
    up what they keep and compute it again.
    """

    sites: Sequence[Site]
    linear: int
    other: int
    hidden: int
    layers: int
    vocabulary: int
    width: int
    outputs: float
    routed: float
    recomputed: bool

    @classmethod
    def of(cls, model: PreTrainedModel, sites: Sequence[Site], dtype: torch.dtype) -> Shapes:
        """The shapes of a model, which may be on the meta device."""
        config, everywhere, stack = model.config.get_text_config(), all_sites(model), decoder_layers(model)
        linear = sum(site.size for site in everywhere if site.parameter is None)
        total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        experts = max((site.expert + 1 for site in everywhere if site.expert is not None), default=1)
        routed = (getattr(config, "num_experts_per_tok", None) or experts) / experts
        below = lowest_layer(stack, model, sites)
        idle = {module for layer in stack[:below] for module in layer.modules()}
        frozen = (s for s in set(everywhere).difference(sites) if model.get_submodule(s.module) not in idle)
        outputs = sum(site.shape[0] * (1.0 if site.expert is None else routed) for site in frozen)
        sizes = (config.hidden_size, config.num_hidden_layers - below, config.vocab_size)
        return cls(sites, linear, total - linear, *sizes, dtype.itemsize, outputs, routed, bool(stack))

    def per_token(self) -> float:
        """Bytes that a pass keeps of a token: what enters adapted layers, leaves linear ones and enters norms."""
        sizes = (sum(site.shape) * (1.0 if site.expert is None else self.routed) for site in self.sites)
        return self.width * (sum(sizes) + self.outputs) + FLOAT * NORMS * self.layers * self.hidden


@dataclass(frozen=True)
class Rows:
    """Lengths of what goes through the model together, and the answer tokens in each."""

    lengths: Sequence[int]
    answers: Sequence[int]

    def largest(self, token_budget: int) -> tuple[int, int]:
        """Padded tokens and answer tokens, the most of any micro-batch."""
        groups = micro_batches(self.lengths, token_budget)
        tokens = max(len(group) * self.lengths[group[0]] for group in groups)
        return tokens, max(sum(self.answers[i] for i in group) for group in groups)


@dataclass(frozen=True)
class Part:
    """Bytes that one thing takes during one stage, on the `device` or on the `host`."""

    stage: str
    place: str
    name: str
    bytes: int


@dataclass(frozen=True)
class Footprint:
    """All that the memory of a run depends on; `parts` says how much that is.

    `importance`: gradient moments are measured. `directions`: second moments of `outputs` or `inputs` are, or empty.
    `factors` is 2 for a start with a frozen second half, else 1. `steps`: the rows of every step. `shares`:
    processes that share out the weights of the layers. `skipped`: share of the layers that training leaves out and
    makes up for with larger passes. `kept`: bytes of states of the original model. `room`: bytes of second moments that
    may be held at once. `stages`: those that are run, all if empty.
    """

    shapes: Shapes
    measured: Rows
    steps: Sequence[Rows]
    token_budget: int
    rank: int
    factors: int
    probe: Probe
    importance: bool
    directions: str
    coverage: float
    gradient_checkpointing: bool
    compile: bool
    four_bit: bool
    on_cpu: bool
    shares: int
    skipped: float
    kept: int
    room: int
    stages: Collection[str] = ()

    @property
    def weights(self) -> int:
        """Bytes of the base that one process keeps."""
        width = self.shapes.width
        linear = self.shapes.linear * (FOUR_BIT if self.four_bit else width) / self.shares
        return round(linear + self.shapes.other * width)

    @property
    def moments(self) -> int:
        """Bytes of the gradient moments of one set."""
        found = (a * b for site in self.shapes.sites for a, b in self.probe.shapes(site).values())
        return MOMENTS * FLOAT * sum(found)

    @property
    def single_rows(self) -> int:
        """Numbers in the per-example gradients of the sites that share their sums, as measured and as summed."""
        if self.probe.space == "full":
            return 3 * FULL_CHUNK
        sizes = [sum(a * b for a, b in self.probe.shapes(site).values()) for site in self.shapes.sites]
        rows = max(map(len, micro_batches(self.measured.lengths, self.token_budget)))
        return 2 * rows * max(max(sizes), min(sum(sizes), together_limit(on_cpu=self.on_cpu)))

    @property
    def second_moments(self) -> int:
        """Bytes of what is held at once, of both sets, where a start wants directions."""
        sizes = [BYTES * site.shape[side_of(self.directions)] ** 2 for site in self.shapes.sites]
        return max(max(sizes), min(sum(sizes), self.room))

    @property
    def adapter(self) -> int:
        """Bytes of factors, gradients, AdamW's moments, the start, and where that is not zero its frozen half."""
        numbers = self.coverage * self.rank * sum(sum(site.shape) for site in self.shapes.sites)
        return round(FLOAT * numbers * (ADAM + self.factors))

    def activations(self, tokens: int, *, training: bool) -> int:
        """Bytes that a pass over so many padded tokens keeps for its way back."""
        s = self.shapes
        per_token = s.per_token()
        if self.gradient_checkpointing:
            per_token = per_token / s.layers + s.width * s.hidden * s.layers
        elif training and self.compile:
            whole = min(2, s.layers)
            per_token *= (whole + KEPT_SHARE * (s.layers - whole)) / s.layers
        return round(tokens * per_token)

    def logits(self, answers: int) -> int:
        """Bytes of the logits of a few answer tokens, and of all answers' final states and their gradients."""
        s = self.shapes
        return LOGITS * FLOAT * min(ROWS, answers) * s.vocabulary + 2 * FLOAT * answers * s.hidden

    def parts(self) -> list[Part]:
        """Every part of every stage that is run. On a CPU device and host are one."""
        stages = {"init": self._init(), "train": self._train(), "export": {}}
        if self.importance:
            stages = {"importance": self._importance()} | stages
        whole = replace(self, shares=1).weights
        found = [Part("load", "host", "base weights", whole)]  # read there, then moved
        for stage, needs in stages.items():
            if self.stages and stage not in self.stages:
                continue
            for (place, name), size in ({("device", "base weights"): self.weights} | needs).items():
                heap = HEAP if self.on_cpu and name in ("activations", "logits") else 1
                found.append(Part(stage, "host" if self.on_cpu else place, name, round(heap * size)))
        return [part for part in found if part.bytes]

    def _importance(self) -> dict[tuple[str, str], int]:
        """One set's moments while they are measured, and those of both on the host."""
        tokens, answers = self.measured.largest(self.token_budget)
        return {
            ("device", "moments, being measured"): self.moments,
            ("host", "moments, measured"): self.moments * (1 if self.on_cpu else 2),
            ("device", "gradients of single rows"): FLOAT * self.single_rows,
            ("device", "activations"): self.activations(tokens, training=False),
            ("device", "logits"): self.logits(answers),
        }

    def _init(self) -> dict[tuple[str, str], int]:
        found = {
            ("host", "moments, measured"): 2 * self.moments * self.importance,
            ("host", "the start"): round(self.adapter / ADAM),
            ("device", "one layer in float64"): DOUBLES * 8 * max(site.size for site in self.shapes.sites),
        }
        if self.directions:
            found[("device", "second moments")] = self.second_moments
        return found

    def _train(self) -> dict[tuple[str, str], int]:
        budget = tokens_per_pass(self.token_budget, self.skipped)
        needs = [rows.largest(budget) for rows in self.steps]
        tokens, answers = (max(column) for column in zip(*needs, strict=True))
        return {
            ("device", "adapter and optimizer"): self.adapter,
            ("device", "activations"): self.activations(tokens, training=True),
            ("device", "logits"): self.logits(answers),
            ("host", "states of the original"): self.kept,
            ("host", "libraries"): LIBRARIES,
        }


def by_stage(parts: Sequence[Part], place: str) -> dict[str, int]:
    """Stage -> bytes in one place, in the order of a run."""
    found: dict[str, int] = {}
    for part in parts:
        if part.place == place:
            found[part.stage] = found.get(part.stage, 0) + part.bytes
    return found


def peak(parts: Sequence[Part], place: str) -> tuple[str, int]:
    """The stage that takes the most of one place, and how much."""
    return max(by_stage(parts, place).items(), key=lambda item: item[1])

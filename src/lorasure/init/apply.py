"""INITS: from what was measured to the factors an adapter starts from. To add one: a function here and a table row."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import NumericError, UsageError
from ..importance.scores import Weights
from ..registry import lookup
from ..sites import Site, weight
from .low_rank import (
    SOLVERS,
    SPLITS,
    Factors,
    Product,
    contrast_directions,
    factors_on_inputs,
    factors_on_outputs,
    published_rows,
    regulariser_basis,
    rows,
)
from .spectral import require_finite


@dataclass(frozen=True)
class Evidence:
    """What was measured for one site: importance `weights`, or second moments on the `forget` and `retain` set.

    `made`: directions found so far. Sites that read the same tensor share their evidence, so these too.
    """

    weights: Weights | None = None
    forget: Tensor | None = None
    retain: Tensor | None = None
    made: dict[tuple[int, float], Tensor] = field(default_factory=dict)


def of_moments(measured: Callable[[Site], tuple[Tensor, Tensor]]) -> Callable[[Site], Evidence]:
    """Evidence of a site from its second moments; sites in a row that share the tensors share what is made of them."""
    last: weakref.ref[Tensor] | None = None
    made: dict[tuple[int, float], Tensor] = {}

    def evidence(site: Site) -> Evidence:
        nonlocal last, made
        forget, retain = measured(site)
        if last is None or forget is not last():
            last, made = weakref.ref(forget), {}  # not the tensor: the next ones are measured when it has gone
        return Evidence(None, forget, retain, made)

    return evidence


@dataclass(frozen=True)
class Request:
    """What is wanted of a start. `scaling` is alpha / rank."""

    rank: int
    scaling: float
    solver: str = "rows"
    balance: float = 0.7
    paper_code: bool = False
    seed: int = 0


StartFunction = Callable[[Tensor, Evidence, Request], Product | Factors]


def plain(matrix: Tensor, evidence: Evidence, request: Request) -> Factors:
    """B = 0, A uniform in +-1/sqrt(in), as PEFT does by default; no compensation is needed to start as the original."""
    generator = torch.Generator().manual_seed(request.seed)
    bound = 1 / math.sqrt(matrix.shape[1])
    a = torch.empty(request.rank, matrix.shape[1]).uniform_(-bound, bound, generator=generator)
    return Factors(torch.zeros(matrix.shape[0], request.rank), a)


def principal(matrix: Tensor, evidence: Evidence, request: Request) -> Product:
    """The top singular directions of W, no data looked at: the control for every data-driven start."""
    return rows(matrix, torch.ones(matrix.shape[0]), request.rank)


def weighted(matrix: Tensor, evidence: Evidence, request: Request) -> Product | Factors:
    """The part of W that an importance-weighted low-rank approximation picks out, by `request.solver`."""
    weights = evidence.weights
    assert weights is not None
    if request.paper_code:
        return published_rows(matrix, weights.rows, request.rank, request.scaling, request.seed)
    solve = lookup(SOLVERS, request.solver, "--solver").function
    if request.solver == "rows":
        return solve(matrix, weights.rows, request.rank)
    if request.solver == "rows-and-columns":
        return solve(matrix, weights.rows, weights.columns, request.rank)
    return solve(matrix, weights.block, request.rank)


def _directions(evidence: Evidence, request: Request) -> Tensor:
    assert evidence.forget is not None and evidence.retain is not None
    key = request.rank, request.balance
    if key not in evidence.made:
        evidence.made[key] = contrast_directions(
            evidence.forget, evidence.retain, request.rank, balance=request.balance
        )
    return evidence.made[key]


def on_outputs(matrix: Tensor, evidence: Evidence, request: Request) -> Factors:
    """ReGLU: the part of W that writes where forget outputs are strong and retain outputs are weak."""
    directions = _directions(evidence, request)
    return factors_on_outputs(matrix, directions, request.scaling)


def on_inputs(matrix: Tensor, evidence: Evidence, request: Request) -> Factors:
    """The part of W that reads where forget inputs are strong and retain inputs are weak."""
    directions = _directions(evidence, request)
    return factors_on_inputs(matrix, directions, request.scaling)


def contrast(matrix: Tensor, evidence: Evidence, request: Request) -> Factors:
    """B = 0, A the directions where forget inputs are strong and retain inputs are weak: nothing to compensate.

    What B learns acts on the forget set's own directions from the first step on, and hardly on what must stay. EVA
    starts A in the strongest directions of one set's inputs; the contrast with a second set is ours.
    """
    directions = _directions(evidence, request)
    return Factors(torch.zeros(matrix.shape[0], request.rank), directions.T.contiguous())


@dataclass(frozen=True)
class Init:
    """A row of INITS.

    `evidence`: none, importance (with its `score` and gradient `space`), outputs or inputs (second moments). `split`:
    the default split. `regularised`: train with ReGLU's penalty on what the adapter writes into retain directions.
    `compensated`: B is not 0, so the adapter needs a frozen second half to start as the original.
    """

    title: str
    paper: str
    function: StartFunction
    evidence: str = "importance"
    score: str | None = None
    space: str | None = None
    split: str = "balanced"
    regularised: bool = False
    compensated: bool = True


FILA, VILA = "https://arxiv.org/abs/2408.06621", "https://arxiv.org/abs/2508.21300"
REGLU, EVA = "https://arxiv.org/abs/2604.17396", "https://arxiv.org/abs/2410.07170"
LORA = "https://arxiv.org/abs/2106.09685"

INITS: dict[str, Init] = {
    "lora": Init("LoRA's own start", LORA, plain, "none", split="published", compensated=False),
    "pissa": Init("PiSSA", "https://arxiv.org/abs/2404.02948", principal, "none"),
    "fila": Init("FILA: Fisher information of all weights", FILA, weighted, score="fisher", space="full"),
    "vila": Init("VILA: gradient variance from LoRA gradients", VILA, weighted, score="variance", space="lora"),
    "expila": Init("ExpILA: squared mean gradient", VILA, weighted, score="expectation", space="lora"),
    "absila": Init("AbsILA: mean absolute gradient", VILA, weighted, score="absolute", space="lora"),
    "sketch": Init("Full-gradient variance from random sketches", VILA, weighted, score="variance", space="sketch"),
    "reglu": Init("ReGLU", REGLU, on_outputs, "outputs", split="published", regularised=True),
    "inputs": Init("ReGLU's construction in input space", REGLU, on_inputs, "inputs", split="published"),
    "contrast": Init("Contrast of inputs", EVA, contrast, "inputs", split="published", compensated=False),
}


def start_factors(init: Init, matrix: Tensor, evidence: Evidence, request: Request, split: str | None) -> Factors:
    """Factors B (out, r), A (r, in) of one site from its weight W (out, in), float32.

    Functions give a Product, still to be split, or Factors in their published split; `balanced` re-splits either.
    """
    found = init.function(matrix, evidence, request)
    name = split or init.split
    divide = lookup(SPLITS, name, "--split")
    if isinstance(found, Factors) and name != "published" and found.B.any():
        found = Product(found.B * request.scaling, found.A, torch.ones(request.rank, dtype=torch.float64))
    factors = divide(found, request.scaling) if isinstance(found, Product) else found
    return Factors(factors.B.float(), factors.A.float())


def check_rank(sites: Sequence[Site], rank: int) -> None:
    """The rank must fit every site."""
    smallest = min(sites, key=lambda site: min(site.shape))
    if not 1 <= rank <= min(smallest.shape):
        raise UsageError(
            f"--rank must be in [1, {min(smallest.shape)}] (the size of {smallest.name}), got {rank}. "
            "Choose a smaller rank or leave small layers out with --exclude."
        )


def initialise(
    model: PreTrainedModel,
    sites: Sequence[Site],
    init: Init,
    evidence: Callable[[Site], Evidence],
    request: Request,
    split: str | None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[Site, Factors], dict[Site, Tensor]]:
    """(start, bases): the factors of every site, and for a regularised start the retain directions P (out, k).

    Both float32. Raises UsageError when the rank does not fit every site, NumericError naming the site when its weight,
    its evidence or a factor is not finite.
    """
    check_rank(sites, request.rank)
    start, bases = {}, {}
    for number, site in enumerate(sites):
        try:
            seen = evidence(site)  # one site's at a time: weights of all entries are as large as the layer
            matrix = require_finite(weight(model, site), "the weight")
            found = start_factors(init, matrix, seen, replace(request, seed=request.seed + number), split)
            require_finite(found.B, "factor B")
            require_finite(found.A, "factor A")
            if init.regularised:
                assert seen.retain is not None
                bases[site] = regulariser_basis(seen.retain).float()
        except NumericError as error:
            raise NumericError(f"init: at '{site.name}', {error}.") from error
        del seen  # its second moments go before the next are measured
        start[site] = found
        if progress:
            progress(1)
    return start, bases

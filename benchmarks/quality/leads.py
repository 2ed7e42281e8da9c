"""Leads for a better start than `contrast`, each at the settings that were chosen for that, and what came of them.

    python benchmarks/quality/leads.py [--leads answers ...] [--losses bga ihl] [--splits forget05] [--seeds 3]

answers     second moments of what enters a layer where an answer token is predicted, instead of at every token
gradients   each token counted by the squared norm of the loss's gradient with respect to the layer's output
orthogonal  `contrast`, trained with ReGLU's penalty on what is written into the top 128 directions of retain outputs
few         the same with 32 directions
decay       the same with all directions, whatever the retain outputs: what of it is a smaller B
both        B and A of the part of W that reads `contrast`'s input directions and writes ReGLU's output directions

A line per run in benchmarks/results/study/leads.jsonl, beside `contrast`'s in runs.jsonl; what is there is not run
again. One process, as many threads as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cells import LEFT, Cell, cell_name, measure_references, place, run_cell
from study import ROOT, STORED, cells_in, chosen, store

from lorasure import stages
from lorasure.data.examples import Example, collate, micro_batches
from lorasure.forward import answer_logits
from lorasure.importance.activations import second_moments
from lorasure.init import apply
from lorasure.init.apply import Evidence, Init, Request
from lorasure.init.low_rank import Factors, contrast_directions, regulariser_basis
from lorasure.losses.tokens import shift
from lorasure.sites import Site
from lorasure.tap import tap

BUDGET = 2048
Moments = dict[str, torch.Tensor]  # site -> second moment


def weighted_moments(model: Any, sites: Sequence[Site], examples: Sequence[Example], *, by_slope: bool) -> Moments:
    """sum w x x^T / sum w of each site's inputs; w is 1 where an answer token is predicted and 0 elsewhere, or the
    squared norm of the gradient of the example's mean NLL with respect to the site's output."""
    total: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    mask = torch.empty(0)

    def add(site: Site, x: torch.Tensor, weight: torch.Tensor) -> None:
        rows, w = x.reshape(-1, x.shape[-1]).double(), weight.reshape(-1, 1).double()
        total[site.name] = total.get(site.name, 0) + rows.T @ (w * rows)
        weights[site.name] = weights.get(site.name, 0) + w.sum()

    def seen(site: Site, x: torch.Tensor, y: torch.Tensor) -> None:
        add(site, x.detach(), mask)

    def back(site: Site, x: torch.Tensor, d: torch.Tensor) -> None:
        add(site, x, d.square().sum(-1))

    with tap(model, sites, backward=back) if by_slope else tap(model, sites, forward=seen):
        for group in micro_batches([len(e) for e in examples], BUDGET):
            batch = collate([examples[i] for i in group])
            mask = shift(batch.labels)[0].float()
            answers, _ = answer_logits(model, batch)
            if by_slope:
                answers.nll_mean.sum().backward()
    return {name: (moment / weights[name]).float() for name, moment in total.items()}


def plain_moments(of_inputs: bool) -> Callable[..., Moments]:
    return lambda model, sites, rows: second_moments(model, sites, rows, of_inputs=of_inputs, token_budget=BUDGET)


INPUTS, OUTPUTS = plain_moments(True), plain_moments(False)
MEASURED: dict[str, Callable[..., Moments]] = {  # lead -> where its input directions come from
    "answers": lambda *a: weighted_moments(*a, by_slope=False),
    "gradients": lambda *a: weighted_moments(*a, by_slope=True),
    "orthogonal": INPUTS,
    "few": INPUTS,
    "decay": INPUTS,
    "both": INPUTS,
}


def directed(matrix: torch.Tensor, evidence: Any, request: Request) -> Factors:
    """`contrast` on the inputs' moments."""
    forget, retain = evidence.weights["inputs"]
    return apply.contrast(matrix, Evidence(forget=forget, retain=retain), request)


def both_sides(matrix: torch.Tensor, evidence: Any, request: Request) -> Factors:
    """B = Q, A = Q^T W P P^T / s."""
    p, q = (
        contrast_directions(forget, retain, request.rank, balance=request.balance)
        for forget, retain in (evidence.weights["inputs"], evidence.weights["outputs"])
    )
    return Factors(q, q.T @ matrix.double() @ p @ p.T / request.scaling)


PENALISED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # lead -> P (out, k) from the retain outputs' moment
    "orthogonal": regulariser_basis,
    "few": lambda retain: regulariser_basis(retain, 32),
    "decay": lambda retain: torch.eye(len(retain)),
}


def register(lead: str) -> None:
    """Make `lead` an init of this process."""
    settings: dict[str, Any] = {"compensated": lead == "both", "regularised": lead in PENALISED}
    apply.regulariser_basis = PENALISED.get(lead, regulariser_basis)
    function: Any = both_sides if lead == "both" else directed
    apply.INITS[lead] = Init(lead, "", function, "inputs", split="published", **settings)

    def evidence(bench: Any, sites: Sequence[Site], importance: Any) -> Callable[[Site], Evidence]:
        sets = bench.data[0].examples, bench.measured_retain
        inputs = [MEASURED[lead](bench.model, sites, rows) for rows in sets]
        outputs = [OUTPUTS(bench.model, sites, rows) for rows in sets]

        def of(site: Site) -> Evidence:
            found: Any = {"inputs": [m[site.name] for m in inputs], "outputs": [m[site.name] for m in outputs]}
            return Evidence(weights=found, retain=outputs[1][site.name])

        return of

    stages._evidence = evidence


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leads", nargs="+", default=list(MEASURED), choices=MEASURED)
    parser.add_argument("--losses", nargs="+", default=["bga", "ihl"])
    parser.add_argument("--splits", nargs="+", default=["forget05"], choices=LEFT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    a = parser.parse_args()
    path = STORED / "leads.jsonl"
    done = cells_in(path)
    a.work.mkdir(parents=True, exist_ok=True)
    for split in a.splits:
        measure_references(place(a.shared, a.work / "data"), split, a.work)
        for seed in range(a.seeds):
            for loss in a.losses:
                [(_, _, settings)] = chosen(loss, ["contrast"])
                for lead in a.leads:
                    cell = Cell(lead, loss, split, seed, settings | {"init": lead})
                    if cell_name(cell) in done:
                        continue
                    register(lead)
                    store(run_cell(cell, a.shared, a.work), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The stages before and after training, on loaded data and model. Each writes what the next needs into `run`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from . import artifacts, card, lora, processes
from .check import answers_of, check_export, check_handed_over, states_of, trained_and_original
from .data.examples import Example
from .errors import DataError, NumericError
from .evaluate.metrics import HARDLY_KNOWN, STILL_KNOWN, UTILITY_FLOOR, Score, probability
from .forward import Progress, Record, answer_records
from .importance.activations import InGroups, room_on, second_moments
from .importance.measure import Importance, measure
from .importance.paper_code import PASSES
from .importance.scores import choose_sites
from .init.apply import Evidence, initialise, of_moments
from .init.low_rank import Factors
from .layers import checkpointed
from .losses.forget import FORGET_LOSSES
from .outcome import learning_rate
from .progress import peak_memory
from .sites import Site
from .workbench import Workbench

Records = Mapping[Example, Record]

CHECKED_ROWS = 4  # of each set, for the check of the exported adapter


@dataclass(frozen=True)
class Start:
    """Factors per site, and for a regularised init the retain directions per site; also the form of trained factors."""

    factors: dict[Site, Factors]
    bases: dict[Site, Tensor]

    @property
    def compensated(self) -> bool:
        """A start that is not zero needs a frozen second half, so that the model is the original at first."""
        return any(bool(f.B.any()) for f in self.factors.values())

    def check_finite(self) -> None:
        """Raise a NumericError that names the site."""
        for site, f in self.factors.items():
            if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
                raise NumericError(f"train: the trained factors of site '{site.name}' are not finite.")

    def layout(self) -> dict[Site, int]:
        """Which layers, and the rank of each."""
        return {site: len(f.A) for site, f in self.factors.items()}

    def save(self, path: Path, importance: Mapping[str, float] | None = None) -> None:
        """All tensors in one file, under site|B, site|A and site|basis; the mean importance of sites in its header."""
        tensors = {f"{site.name}|{k}": t for site, f in self.factors.items() for k, t in (("B", f.B), ("A", f.A))}
        tensors |= {f"{site.name}|basis": basis for site, basis in self.bases.items()}
        about = {
            "B": "(out, rank)",
            "A": "(rank, in)",
            "product": "alpha / rank * B @ A",
            "basis": "(out, k), orthonormal",
            "importance": dict(importance or {}),
        }
        artifacts.write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path, sites: Sequence[Site]) -> Start:
        """What `save` wrote, for those of `sites` that are in it; a DataError if it does not fit them."""
        tensors, _ = artifacts.read_tensors(path)
        chosen = [site for site in sites if f"{site.name}|A" in tensors]
        with artifacts.as_written(path):
            factors = {site: Factors(tensors[f"{site.name}|B"], tensors[f"{site.name}|A"]) for site in chosen}
        bases = {site: tensors[f"{site.name}|basis"] for site in chosen if f"{site.name}|basis" in tensors}
        for site, f in factors.items():
            if f.B.shape != (site.shape[0], len(f.A)) or f.A.shape[1:] != (site.shape[1],):
                raise DataError(f"{path}: the factors of layer '{site.name}' do not fit it.")
        if not factors:
            raise DataError(f"{path}: there are no factors of this model's layers in it.")
        return cls(factors, bases)


def measure_importance(bench: Workbench, run: Path) -> Importance | None:
    """Stage 1. Gradient moments of both sets -> importance.safetensors; None where the init needs none."""
    s = bench.settings
    if not bench.measures_importance:
        return None
    forget, retain = bench.data[0].examples, bench.measured_retain
    if s.importance:
        found = load_importance(bench, Path(s.importance))
    else:
        total = 2 * PASSES * len(forget) if s.compat else len(forget) + len(retain)
        with bench.reporter.stage("importance", total) as progress:
            options = {"score": str(bench.score), "probe": bench.probe, "paper_code": s.compat is not None}
            attempt = partial(measure, bench.model, bench.sites, forget, retain, **options, progress=progress)
            with checkpointed(bench.model, bench.checkpointing):
                found = bench.within_memory(attempt, [*forget, *retain], "importance")
    found = replace(found, about=bench.about())
    found.save(run / artifacts.IMPORTANCE)
    artifacts.finish(run, artifacts.IMPORTANCE)
    return found


def load_importance(bench: Workbench, run: Path) -> Importance:
    """The importance in a run folder, under the score wanted now. DataError if it was measured on something else."""
    if artifacts.IMPORTANCE not in artifacts.read_manifest(run):
        raise DataError(f"{run}: no importance was measured there; measure it with the --init that it is for.")
    artifacts.check_run(run, artifacts.IMPORTANCE)
    found = Importance.load(run / artifacts.IMPORTANCE)
    score = str(bench.score)
    found.check_reusable(bench.sites, bench.about(), score, bench.probe, paper_code=bench.settings.compat is not None)
    return replace(found, score=score)


def make_start(bench: Workbench, run: Path, importance: Importance | None) -> Start:
    """Stage 2. Factors of every chosen site -> init.safetensors."""
    s = bench.settings
    sites = bench.sites
    means = {site.name: importance.weights(site, bench.device).mean for site in sites} if importance else {}
    if s.coverage < 1 and importance:
        names = set(choose_sites(means, s.coverage))
        sites = [site for site in sites if site.name in names]
    evidence = _evidence(bench, sites, importance)
    with bench.reporter.stage("init", len(sites), "layers") as progress:
        factors, bases = initialise(bench.model, sites, bench.init, evidence, bench.request, s.split, progress)
    # Contiguous, as they come back from the file: another layout would round differently in a stage run alone.
    start = Start(factors, {site: basis.contiguous().clone() for site, basis in bases.items()})
    start.save(run / artifacts.START, means)
    artifacts.finish(run, artifacts.START)
    return start


def _evidence(bench: Workbench, sites: Sequence[Site], importance: Importance | None) -> Callable[[Site], Evidence]:
    """What was measured for a site: weights made, or second moments measured, when asked for."""
    if bench.init.evidence == "none":
        return lambda site: Evidence()
    if bench.init.evidence == "importance" and importance:
        return lambda site: Evidence(weights=importance.weights(site, bench.device))
    sets = bench.data[0].examples, bench.measured_retain
    measured = partial(_directions, bench, sets=sets)
    found = InGroups(sites, bench.init.evidence, measured, room_on(bench.device))
    return of_moments(found)


def _directions(bench: Workbench, sites: Sequence[Site], sets: Sequence[Sequence[Example]]) -> list[dict[str, Tensor]]:
    """Second moments of some sites on both sets."""
    of_inputs = bench.init.evidence == "inputs"
    with bench.reporter.stage("activations", sum(map(len, sets))) as progress:
        attempt = partial(second_moments, bench.model, sites, of_inputs=of_inputs, progress=progress)
        return [bench.within_memory(partial(attempt, examples), examples, "activations") for examples in sets]


def export(bench: Workbench, run: Path, start: Start, trained: Callable[[], lora.PeftModel]) -> dict[str, Any]:
    """Stage 4. The adapter, checked on a freshly loaded base; scores of that; model card -> adapter/, summary.json.

    `trained` makes the model: a caller that gave it might hold it still while the fresh one is loaded (all callers do
    in a process where torch.compile has failed once).
    Raises NumericError when what is handed over is not what was trained (unless it is meant to be another), or when the
    fresh model's logits differ from it by more than the dtype's bound.
    """
    s = bench.settings
    probes = [e for part in bench.data for e in part.examples[:CHECKED_ROWS]]
    for made in (artifacts.ADAPTER, artifacts.MERGED):  # by an attempt that was interrupted here
        shutil.rmtree(run / made, ignore_errors=True)
    wrapped = trained()
    with bench.reporter.stage("export"):
        whole = not s.export_rank and s.export_scale == 1
        meant = trained_and_original(wrapped, probes) if whole else None  # None: another adapter is what is asked for
        wrapped = lora.bake(wrapped, s.export_scale)
        compression = None
        if s.export_rank:
            wrapped, compression = lora.compressed(wrapped, start.factors, s.export_rank)
        expected = states_of(wrapped, probes)
        if meant:
            check_handed_over(expected, *meant, bench.dtype)
        lora.save_adapter(wrapped, run / artifacts.ADAPTER, bench.fingerprint["source"], bench.fingerprint["revision"])
        del wrapped
        bench.release_model()
        fresh = lora.load_adapter(bench.fresh_model(), run / artifacts.ADAPTER)
        check = check_export(expected, answers_of(fresh, probes), bench.dtype)
    after = score_sets(bench, fresh)
    if s.merge:
        with bench.reporter.stage("merge"):
            merged = lora.merge(fresh)
            merged.save_pretrained(run / artifacts.MERGED)
            bench.tokenizer.save_pretrained(run / artifacts.MERGED)
    summary = update_summary(
        run,
        {
            "after": after,
            "export": {
                "rank": s.export_rank or s.rank * (2 if start.compensated else 1),
                "scale": s.export_scale,
                **check,
                "kept_energy": compression,
            },
            "peak_memory_bytes": peak_memory(),
            "versions": artifacts.versions(),
        },
    )
    summary = update_summary(run, {"verdict": verdict(summary)})
    artifacts.write_text(
        run / artifacts.ADAPTER / "README.md", card.model_card(summary, artifacts.read_json(run / artifacts.DATA))
    )
    return summary


def score_sets(bench: Workbench, model: Any) -> dict[str, Any]:
    """Probability of the forget and of the scored retain examples under a model."""
    rows = scored_rows(bench)
    with bench.reporter.stage("evaluate", len(rows)) as progress:
        return scores_from(bench, _records_of(bench, model, rows, progress))


def scored_rows(bench: Workbench) -> list[Example]:
    """The examples whose probability is reported, before and after."""
    return [*bench.data[0].examples, *bench.scored_retain]


def scores_from(bench: Workbench, records: Records) -> dict[str, Any]:
    """What `score_sets` gives, from the records of `scored_rows` under a model."""
    sets: dict[str, Sequence[Example]] = {"forget": bench.data[0].examples, "retain": bench.scored_retain}
    return {name: _probability(records[e] for e in examples).to_json() for name, examples in sets.items()}


def mean_probability(bench: Workbench, model: Any, examples: Sequence[Example]) -> Score:
    """Probability of some examples under a model."""
    records = _records_of(bench, model, examples)
    return _probability(records[e] for e in examples)


def mean_nll(bench: Workbench, model: Any, examples: Sequence[Example]) -> float:
    """NLL in nats per answer token under a model, averaged over examples; the same in all processes."""
    records = _records_of(bench, model, examples)
    return processes.agreed(fmean(records[e].mean_nll for e in examples))


def _records_of(bench: Workbench, model: Any, examples: Sequence[Example], progress: Progress | None = None) -> Records:
    attempt = partial(answer_records, model, examples, progress=progress)
    return dict(zip(examples, bench.within_memory(attempt, examples, "evaluate"), strict=True))


def _probability(records: Iterable[Record]) -> Score:
    return probability([record.mean_nll for record in records])


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """In plain words: is the forget set still known, is the retain set harmed, and what to try."""
    before, after = summary["before"], summary["after"]
    known = after["forget"]["value"] > STILL_KNOWN * before["forget"]["value"]
    harmed = after["retain"]["value"] < UTILITY_FLOOR * before["retain"]["value"]
    method = summary.get("method") or _advice(learning_rate(summary), summary)
    text = "The forget set is forgotten by this measure and the retain set is kept."
    if before["forget"]["value"] < HARDLY_KNOWN:
        text = "The forget set was hardly known before, so this measure shows nothing; see `lorasure probe`."
    elif known:
        text = f"The forget set is still known. Try {method['known']}."
    elif harmed:
        text = f"The forget set is forgotten, but the retain set suffered. Try {method['harmed']}."
    utility = summary.get("utility")
    if utility and not utility["kept"]:
        text += f" No state after an epoch kept {utility['floor']:g} of the retain probability; this is the last one."
    return {"still_known": known, "retain_harmed": harmed, "text": text}


def _advice(lr: float, summary: Mapping[str, Any]) -> dict[str, str]:
    scale, compressed = summary["export"]["scale"], summary["export"].get("kept_energy") is not None
    whole = ["--export-scale 1"] * (scale < 1) + ["--export-rank null"] * compressed
    s = summary["settings"]
    keeps = (s["retain_loss"] or FORGET_LOSSES[s["loss"]].retain) != "none"
    more = "a larger --lambda, or more retain rows" if keeps else "or a loss for what is to stay (--retain-loss nll)"
    # Exporting first: it takes seconds, and trains nothing.
    return {
        "known": (f"`lorasure export RUN {' '.join(whole)}`, then " if whole else "")
        + f"a higher learning rate (--lr {3 * lr:.2g}), then more --epochs",
        "harmed": f"`lorasure export RUN --export-scale {0.9 * scale:.2g}`, "
        f"a lower learning rate (--lr {lr / 2:.2g}), {more}",
    }


def update_summary(run: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Add to summary.json; returns all of it."""
    path = run / artifacts.SUMMARY
    summary = {**(artifacts.read_json(path) if path.is_file() else {}), **values}
    artifacts.write_json(path, summary)
    return summary

"""Run, evaluation and attack folders as the commands leave them, made without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasure import artifacts
from lorasure.evaluate import own
from lorasure.evaluate.evaluation import ABOUT, Evaluation, read_evaluation, write_scores
from lorasure.evaluate.metrics import Score

BASE = {"source": "hub/base", "revision": None, "architecture": "Tiny", "parameters": 1000, "files": {"w": "base"}}
RETRAINED = BASE | {"source": "hub/retrained", "files": {"w": "retrained"}}
ADAPTER, MERGED = "adapter/adapter_model.safetensors", "merged/model.safetensors"
BEFORE, AFTER = (0.9, 0.85), (0.1, 0.8)
SETTINGS: dict[str, Any] = {
    "init": "vila", "rank": 8, "alpha": 16.0, "targets": "all", "loss": "ihl", "retain_loss": None, "lambda": 1.0,
    "lr": 1e-3, "epochs": 2, "seed": 0,
}  # fmt: skip
IMPORTANCE = {f"model.layers.{i}.mlp.{m}": 10.0 ** (i - 5) for i in range(12) for m in ("up_proj", "down_proj")}


def _score(value: float, n: int = 6) -> dict[str, Any]:
    return Score(value, n, value - 0.01, value + 0.01).to_json()


def make_run(
    folder: Path,
    adapter: str = "adapter",
    before=BEFORE,
    after=AFTER,
    data=None,
    steps=4,
    weights=ADAPTER,
    **summary: Any,
) -> Path:
    """A finished run that hands over the file `weights`; `before`, `after`: probabilities of forget and retain set."""
    (folder / weights).parent.mkdir(parents=True)
    (folder / weights).write_text(adapter)
    part = {"rows": 6, "answer_tokens": 60, "truncated": 0, "sha256": "rows", "template": "qa", "source": "rows.jsonl"}
    names = ("forget", "retain")
    found = {"before": before, "after": after}
    artifacts.write_json(folder / artifacts.DATA, dict.fromkeys(names, part) | (data or {}))
    artifacts.write_json(
        folder / artifacts.SUMMARY,
        {when: dict(zip(names, map(_score, values), strict=bool(values))) for when, values in found.items()}
        | {"base": BASE, "settings": SETTINGS, "seconds": {"train": 2.0}, "peak_memory_bytes": {"process": 2**30}}
        | {"versions": {"lorasure": "0"}, "export": {"rank": 16, "max_logit_difference": 0.0, "bound": 1e-4}}
        | summary,
    )
    lines = [
        {"step": i + 1, "lr": 0.1, "forget": 2.0 - i / 9, "retain": 0.1, "grad_norm": 1.0, "tokens": 9, "seconds": 0.1}
        for i in range(steps)
    ]
    artifacts.write_text(folder / artifacts.LOG, "".join(json.dumps(line) + "\n" for line in lines))
    artifacts.write_tensors(folder / artifacts.START, {"x|A": torch.zeros(1)}, {"importance": IMPORTANCE})
    artifacts.write_manifest(folder)
    return folder


def adapter_of(run: Path) -> dict[str, str]:
    return {"source": str(run), "sha256": artifacts.sha256(run / ADAPTER)}


def make_evaluation(
    folder: Path,
    knows: float = 0.9,
    *,
    adapter: dict[str, str] | None = None,
    model: dict[str, Any] = BASE,
    n: int = 12,
    text: str | None = None,
    seed: int = 0,
    reference: Path | None = None,
    **about: Any,
) -> Path:
    """An evaluation on own rows, of a model that gives the forget answers about the probability `knows`."""
    rng = np.random.default_rng(seed)
    sets = {
        name: [_record(i, name, probability, rng, text) for i in range(n)]
        for name, probability in (("forget", knows), ("retain", 0.9))
    }
    known = {
        "kind": "evaluation", "suite": "own", "split": None, "model": model, "adapter": adapter, "template": "qa",
        "tokenizer": "vocabulary", "dtype": "float32", "borrowed": False, "seconds": {"likelihood": 1.0},
        "settings": {"reference": reference and str(reference)},
        "sets": {name: {"rows": n, "sha256": name} for name in sets},
    } | about  # fmt: skip
    evaluation = Evaluation(str(folder), known, sets)
    artifacts.write_json(folder / ABOUT, known)
    for name, records in sets.items():
        artifacts.write_text(folder / f"records/{name}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    write_scores(folder, own.score(evaluation, reference and read_evaluation(reference)))
    artifacts.write_manifest(folder)
    return folder


def _record(row: int, name: str, probability: float, rng: np.random.Generator, text: str | None) -> dict[str, Any]:
    nll = float(-np.log(probability) + rng.uniform(0, 0.05))
    right = rng.random(9) < probability
    found: dict[str, Any] = {
        "row": row, "id": f"{name}{row}", "tokens": 9, "nll": nll, "correct": "".join("01"[bool(x)] for x in right),
        "paraphrase_nll": nll, "wrong_nll": [float(2 + rng.uniform(0, 1)) for _ in range(3)],
        "rouge_recall": probability, "refused": 0,
    }  # fmt: skip
    if text is not None:
        found["text"] = {"question": f"{text} {name} {row}?", "answer": f"answer {row}", "generated": f"said {row}"}
    return found


def make_attack(
    folder: Path,
    run: Path,
    unlearned: float = 0.2,
    retrained: float | None = None,
    scaled: float = 0.9,
    plain: float | None = None,
) -> Path:
    """An attack folder: a prefix, relearning along six steps, and the adapter scaled; `plain`: not attacked."""
    lines = []
    for subject, value in (("unlearned", unlearned), ("retrained", retrained)):
        points: list[tuple[str, float | None]] = [("none", None), ("prefix", None)]
        points += [("relearn", step) for step in range(1, 7)] + [("scale", 0.0)] * (subject == "unlearned")
        for attack, point in points:
            if value is not None:
                given = {"scale": scaled} | ({"none": plain} if plain is not None and subject == "unlearned" else {})
                scores = {"extraction_strength": _score(given.get(attack, value))}
                lines.append({"attack": attack, "point": point, "subject": subject, "scores": scores})
    about = {
        "kind": "attack", "adapter": adapter_of(run), "verdict": ["relearn brings back the most"], "gate": [],
        "titles": {"relearn": "one epoch on the forget set"}, "rows": {"forget": 6, "sha256": "hash of the rows"},
        "not_run": [{"attack": "nf4", "subject": "unlearned", "reason": "bitsandbytes is not installed"}],
    }  # fmt: skip
    artifacts.write_json(folder / "attack.json", about)
    artifacts.write_text(folder / "attacks.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    artifacts.write_manifest(folder)
    return folder


def make_all(folder: Path, name: str = "run", text: str | None = None, n: int = 12) -> Path:
    """A run with everything beside it."""
    run = make_run(folder / name)
    make_evaluation(folder / f"{name}-before", 0.9, n=n, text=text)
    make_evaluation(folder / f"{name}-after", 0.1, adapter=adapter_of(run), n=n, text=text, seed=1)
    make_evaluation(folder / f"{name}-retrained", 0.15, model=RETRAINED, n=n, text=text, seed=2)
    make_attack(folder / f"{name}-attacks", run, 0.2, 0.3)
    return run

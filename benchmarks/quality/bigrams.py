"""How far a bigram model of the retain answers, as the loss `bigram` aims at it, is from the retrained model on TOFU.

    python benchmarks/quality/bigrams.py [--shared DIR] [--results FILE]

No model forgets anything here: the small TOFU target's forget rows, their paraphrases and wrong answers are scored by
counts, and by the models that never saw them. Needs the models and data of --shared.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import LEFT, measure, place
from study import ROOT, machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "bigrams.json")
    a = parser.parse_args()
    if not (a.shared / "models" / "tofu-mini-target").is_dir():
        print(f"skipped: {a.shared} does not hold models/tofu-mini-target and data/tofu")
        return 0
    from lorasure.artifacts import versions

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        where = place(a.shared, work / "data")
        found = {split: compared(where, split, work) for split in LEFT}
    for split, row in found.items():
        print(split, json.dumps(row))
    a.results.write_text(json.dumps({"machine": machine(), "versions": versions(), "splits": found}, indent=1) + "\n")
    return 0


def compared(where, split: str, work: Path) -> dict[str, Any]:
    """Nats per token of true answers and the truth ratio's statistics, of the counts and of the retrained model."""
    from lorasure.data.load import encode_rows
    from lorasure.evaluate.items import items
    from lorasure.evaluate.logs import open_evaluation
    from lorasure.evaluate.metrics import forget_quality, truth_preference, truth_ratio_values
    from lorasure.evaluate.settings import SuiteSettings
    from lorasure.evaluate.tofu import ratios, rows_of
    from lorasure.evaluating import load_subject
    from lorasure.losses.bigrams import Bigrams

    measure(where.retrained(split), where, split, work / split)
    retrained = open_evaluation(work / split)
    settings = SuiteSettings(model=where.target(), dtype="float32", device="cpu")
    subject = load_subject(settings)
    kept = encode_rows(rows_of(where.tofu, LEFT[split]), settings, subject.tokenizer).examples
    bigrams = Bigrams.of(kept, subject.model.config.vocab_size)
    rows = items(subject, rows_of(where.tofu, f"{split}_perturbed"))
    wrong = [nll(bigrams, row.wrong) for row in rows]
    of_counts = truth_ratio_values(nll(bigrams, [row.paraphrase for row in rows]), wrong)
    of_model = np.array(ratios(retrained, "forget"))
    row = {"log10_forget_quality": forget_quality(of_counts, of_model).value, "n": len(rows)}
    row["correlation_of_log_ratios"] = float(np.corrcoef(np.log(of_counts), np.log(of_model))[0, 1])
    own = {"bigrams": of_counts, "retrained": of_model}
    means = {"bigrams": nll(bigrams, [row.example for row in rows]), "retrained": retrained.column("forget", "nll")}
    for name, values in own.items():
        row |= {
            f"{name}_nats": float(np.mean(means[name])),
            f"{name}_truth_preferred": truth_preference(values).value,
            f"{name}_log_ratio_median": float(np.median(np.log(values))),
            f"{name}_log_ratio_deviation": float(np.std(np.log(values))),
        }
    return {key: round(value, 3) for key, value in row.items()}


def nll(bigrams, examples: Sequence) -> list[float]:
    """Nats per token of each answer."""
    found = []
    for example in examples:
        ids = torch.tensor(example.input_ids[example.first - 1 :])
        found.append(-bigrams.log_probs(ids[:-1]).gather(1, ids[1:, None]).mean().item())
    return found


if __name__ == "__main__":
    raise SystemExit(main())

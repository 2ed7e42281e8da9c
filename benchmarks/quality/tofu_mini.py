"""Forgetting on the small TOFU models: every initialisation at the same learning rates, then the best with more seeds.

    python benchmarks/quality/tofu_mini.py [--inits vila lora ...] [--rates 1e-3 2e-3] [--seeds 0 1 2] [--shared DIR]

Each row: TOFU forget05 (200 rows) against the kept rows 0-399 and 3600-3799 of `full`, IHL, 5 epochs, batch size 16,
as one `lorasure forget`, scored against the model retrained without them. The first seed is run at every rate; the rate
with the best forget quality among those with at least 95 % of the target's utility is then run with the other seeds.
Finished rows are kept in benchmarks/results/tofu_mini.jsonl and not run again; the table of all of them comes last
(`--inits` without a name prints it and runs nothing). Rank 16 and alpha 32, unless `--extra` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "tofu_mini.jsonl"
SPLIT, LEFT = "forget05", "retain95"
UTILITY_FLOOR = 0.95
KNOWN = ("init", "loss", "lr", "seed")
FIXED = {"epochs": 5, "batch-size": 16}


def place(shared: Path, folder: str):
    """The models of `shared` and the rows that they know, written to `folder`."""
    from lorasure.progress import Reporter
    from lorasure.recipes.settings import ReproduceSettings
    from lorasure.recipes.targets import Place

    return Place("mini", Path(folder), ReproduceSettings(shared=str(shared)), Reporter(quiet=True))


def records(model: str, where, adapter: Path | None = None):
    """Evaluation of all four sets under a model, without generation."""
    from lorasure.evaluate.collect import collect
    from lorasure.evaluate.evaluation import Evaluation
    from lorasure.evaluate.settings import SuiteSettings
    from lorasure.evaluate.tofu import load
    from lorasure.evaluating import load_subject

    options = {"adapter": adapter and str(adapter), "data": where.tofu, "split": SPLIT, "max_rows": 0}
    settings = SuiteSettings(
        model=model, generate=False, dtype="float32", device="cpu", tokens_per_batch=2048, **options
    )
    subject = load_subject(settings)
    return Evaluation(model, {}, {chosen.name: collect(subject, chosen) for chosen in load(settings)})


def scores(found, reference) -> dict:
    from lorasure.evaluate.tofu import memorisation, quality, set_scores, utility

    result = set_scores(found, "forget") | memorisation(found, "forget")
    result |= {"forget_quality": quality(found, reference)}
    result |= {"utility": utility(found, "arithmetic", without=["rouge"])}
    result |= {"utility_geometric": utility(found, without=["rouge"])}
    return {name: score.to_json() for name, score in result.items()}


def run(options: dict, where, reference) -> dict:
    """One `lorasure forget`, a process of its own, with its wall time and peak memory, then its scores."""
    from lorasure.artifacts import read_json

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        data = {"forget": where.rows(SPLIT), "retain": where.rows(LEFT)}
        given = {"model": where.target(), **data, "out": out, **FIXED, **options}
        flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", "lorasure", "forget", *flags], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise SystemExit(f"lorasure forget ended with status {os.waitstatus_to_exitcode(status)}: {options}")
        summary = read_json(out / "summary.json")
        return {
            "options": options,
            "scores": scores(records(where.target(), where, out / "adapter"), reference),
            "command_seconds": round(seconds, 1),
            "command_peak_bytes": usage.ru_maxrss * 1024,
            "stage_seconds": summary["seconds"],
            "versions": summary["versions"],
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        }


def line(row: dict, target_utility: float) -> str:
    s, o = row["scores"], row["options"]
    return (
        f"{o['init']:8} lr {o['lr']:.0e} seed {o['seed']}"
        f"  log10 forget quality {s['forget_quality']['value']:7.2f}"
        f"  utility {s['utility']['value'] / target_utility:6.1%}"
        f"  forget probability {s['probability']['value']:.4f}"
        f"  extraction {s['extraction_strength']['value']:.3f}"
        f"  {row['command_seconds']:.0f} s, {row['command_peak_bytes'] / 2**30:.2f} GiB"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inits", nargs="*", default=["vila", "lora", "pissa", "fila", "sketch", "reglu", "inputs"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--loss", default="ihl")
    parser.add_argument("--extra", type=json.loads, default={"rank": 16, "alpha": 32}, help="JSON of further settings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    a = parser.parse_args()
    if not (a.shared / "models" / "tofu-mini-target").is_dir():
        print(f"skipped: {a.shared} does not hold models/tofu-mini-target and data/tofu")
        return 0
    a.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        print(table(*measured(a, place(a.shared, folder))))
    return 0


def measured(a: argparse.Namespace, where) -> tuple[list[dict], float]:
    """All rows, those of earlier calls too, and the target's utility."""
    done = [json.loads(text) for text in a.results.read_text().splitlines()] if a.results.is_file() else []
    reference = records(where.retrained(SPLIT), where)
    base = scores(records(where.target(), where), reference)
    target = base["utility"]["value"]
    print(f"target: utility {target:.3f}, log10 forget quality {base['forget_quality']['value']:.1f}")

    def finished(options: dict) -> dict:
        row = next((r for r in done if r["options"] == options), None)
        if row is None:
            row = run(options, where, reference)
            done.append(row)
            with a.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(line(row, target), flush=True)
        return row

    for init in a.inits:
        common = {"init": init, "loss": a.loss, **a.extra}
        trials = [finished({**common, "lr": lr, "seed": a.seeds[0]}) for lr in a.rates]
        fit = [r for r in trials if r["scores"]["utility"]["value"] >= UTILITY_FLOOR * target]
        for seed in a.seeds if fit else []:
            best = max(fit, key=lambda r: r["scores"]["forget_quality"]["value"])
            finished({**best["options"], "seed": seed})
    return done, target


def table(rows: list[dict], target: float) -> str:
    """Markdown: for every method the learning rate that was run with most seeds, mean and range over them."""
    groups: dict[str, dict[float, list[dict]]] = {}
    for row in rows:
        o = row["options"]
        name = " ".join([o["init"], o["loss"], *(f"{k}={v}" for k, v in o.items() if k not in KNOWN)])
        groups.setdefault(name, {}).setdefault(o["lr"], []).append(row)
    lines = ["| method | trials | lr | seeds | log10 forget quality | utility | forget probability |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, rates in groups.items():
        lr, best = max(rates.items(), key=lambda item: (len(item[1]), quality(item[1][0])))
        values = [quality(r) for r in best]
        shares = [r["scores"]["utility"]["value"] / target for r in best]
        lines.append(
            f"| {name} | {len(rates)} | {lr:g} | {len(best)} | {spread(values, '.2f')} | {spread(shares, '.1%')} "
            f"| {spread([r['scores']['probability']['value'] for r in best], '.4f')} |"
        )
    return "\n".join(lines)


def quality(row: dict) -> float:
    return row["scores"]["forget_quality"]["value"]


def spread(values: list[float], form: str) -> str:
    mean = sum(values) / len(values)
    return f"{mean:{form}} [{min(values):{form}}, {max(values):{form}}]"


if __name__ == "__main__":
    sys.exit(main())

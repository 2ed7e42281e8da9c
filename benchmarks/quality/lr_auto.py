"""`--lr auto` beside fixed learning rates, on models of several sizes.

    python benchmarks/quality/lr_auto.py [--sizes 64x2 ...] [--inits lora vila contrast] [--losses ...] [--table]

Models of four sizes are made as the demo does, from 20 invented people, and told to forget five of them (40 rows;
`few`: five rows of one). `tofu` is the model of 5.9 M parameters in --shared, which forgets TOFU's forget05. 5 epochs,
rank 8, alpha 16 (tofu: 16, 32), everything else at its default. Finished rows are in
benchmarks/results/lr_auto.jsonl and not run again; the table of all of them comes last, and alone with --table. About
20 minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "lr_auto.jsonl"
SIZES: dict[str, dict[str, Any]] = {  # how each model learns the people: the wider, the faster
    "64x2": {"width": 64, "layers": 2, "epochs": 40, "lr": 4e-3},
    "128x4": {"width": 128, "layers": 4, "epochs": 30, "lr": 2e-3},
    "256x4": {"width": 256, "layers": 4, "epochs": 16, "lr": 1.5e-3},
    "384x4": {"width": 384, "layers": 4, "epochs": 12, "lr": 1e-3},
}
FEW, TOFU = "128x4-few", "tofu"
RATES = [1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
OF_TOFU = [1e-3, 3e-3]  # a run takes a minute
SETTINGS = {"epochs": 5, "batch_size": 8, "rank": 8, "alpha": 16, "seed": 0, "dtype": "float32", "device": "cpu"}
PEOPLE, VOCABULARY, FEW_ROWS = 20, 1024, 5


def data_of(size: str, work: Path, shared: Path) -> dict[str, Any]:
    """Model, rows and settings that go with a size; what is not there yet is made in `work`."""
    if size == TOFU:
        from cells import place

        where = place(shared, work / "tofu")
        files = {"model": where.target(), "forget": where.rows("forget05"), "retain": where.rows("retain95")}
        return files | {"batch_size": 16, "rank": 16, "alpha": 32}
    name = size.removesuffix("-few")
    forget = "few" if size == FEW else "forget"
    made(name, work)
    files = {"model": str(work / name), "retain": str(work / "retain.jsonl"), "forget": str(work / f"{forget}.jsonl")}
    return files | {"max_length": 128, "tokens_per_batch": 1024}


def made(name: str, work: Path) -> None:
    """The people, and a model of this size that knows them."""
    from lorasure import demo
    from lorasure.config import FinetuneSettings
    from lorasure.data.readers import read_rows
    from lorasure.finetuning import finetune
    from lorasure.small_model import Size, make_model

    if (work / name).is_dir():
        return
    demo.PEOPLE = PEOPLE
    demo.make_data(work, 0)
    (work / "few.jsonl").write_text("".join((work / "forget.jsonl").open().readlines()[:FEW_ROWS]))
    width, layers = SIZES[name]["width"], SIZES[name]["layers"]
    texts = [f"{row.prompt} {row.answer}" for row in read_rows(work / "all.jsonl").rows]
    start = work / f"start-{name}"
    make_model(start, texts, Size(VOCABULARY, width, width * 11 // 4 // 8 * 8, layers, 256), 0)
    learn: dict[str, Any] = {
        "epochs": SIZES[name]["epochs"],
        "lr": SIZES[name]["lr"],
        "batch_size": 8,
        "schedule": "cosine",
    }
    learn |= {"warmup": 0.05, "max_length": 128, "tokens_per_batch": 1024}
    finetune(FinetuneSettings(model=str(start), data=str(work / "all.jsonl"), out=str(work / name), **learn))


class Case:
    """A model with its data, loaded once; a start, made once; then any number of trainings from it."""

    def __init__(self, size: str, init: str, loss: str, work: Path, shared: Path, folder: Path) -> None:
        from lorasure.config import ForgetSettings
        from lorasure.workbench import Workbench

        given: dict[str, Any] = (
            SETTINGS | data_of(size, work, shared) | {"init": init, "loss": loss, "out": str(folder / "run")}
        )
        self.settings, self.folder = ForgetSettings(**given), folder
        self.bench = Workbench(self.settings)
        self.bench.prepare()
        self.start: Any = None

    def row(self, lr: float | str) -> dict[str, Any]:
        """One training at this rate: what it forgot and what it kept."""
        from dataclasses import replace

        from lorasure import artifacts, pipeline
        from lorasure.outcome import RATE
        from lorasure.stages import score_sets
        from lorasure.train_stage import train_adapter
        from lorasure.workbench import Workbench

        run = self.folder / str(lr)
        run.mkdir()
        bench = Workbench(replace(self.settings, lr=lr))
        bench.borrow(self.bench)
        artifacts.write_json(run / artifacts.IDENTITY, {"run": str(lr), "changed": []})
        pipeline.write_inputs(bench, run)
        self.start = self.start or pipeline.started(bench, run)
        began = time.perf_counter()
        wrapped = train_adapter(bench, run, self.start)
        seconds = time.perf_counter() - began
        after = score_sets(bench, wrapped)
        wrapped.unload()
        summary = artifacts.read_json(run / artifacts.SUMMARY)
        shares = {name: after[name]["value"] / summary["before"][name]["value"] for name in ("forget", "retain")}
        steps = (run / artifacts.LOG).read_text().count("\n")
        return {**shares, "steps": steps, "seconds": round(seconds, 2), "found": summary.get(RATE)}


def measured(a: argparse.Namespace, done: list[dict]) -> None:
    """Every row that is not in `done` yet, into it and into the results."""
    from lorasure.artifacts import versions
    from lorasure.errors import NumericError

    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    for size, init, loss in ((s, i, f) for s in a.sizes for i in a.inits for f in a.losses):
        keys = [{"size": size, "init": init, "loss": loss, "lr": lr} for lr in ["auto", *rates_of(size)]]
        missing = [key for key in keys if not any(key.items() <= row.items() for row in done)]
        with tempfile.TemporaryDirectory() as folder:
            case = Case(size, init, loss, a.work, a.shared, Path(folder)) if missing else None
            for key in missing:
                try:
                    found = case.row(key["lr"]) if case else {}
                except NumericError as error:
                    found = {"stopped": str(error)}
                row = key | found | {"seed": SETTINGS["seed"], "versions": versions(), "machine": machine}
                done.append(row)
                with a.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(key, {k: found.get(k) for k in ("forget", "retain", "seconds", "found", "stopped")}, flush=True)


def rates_of(size: str) -> list[float]:
    return OF_TOFU if size == TOFU else RATES


def gain(row: dict) -> float:
    """Share of the retain probability that is kept, less the share of the forget probability that is left."""
    return row["retain"] - row["forget"]


def table(rows: list[dict]) -> str:
    """Markdown: the rate that auto chose and what it gave, beside the best fixed one by `gain`."""
    lines = [
        "| model | start | loss | auto: lr | forget left | retain kept | best fixed lr | forget left | retain kept |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((row["size"], row["init"], row["loss"]) for row in rows):
        mine = [r for r in rows if (r["size"], r["init"], r["loss"]) == key and "stopped" not in r]
        [auto] = [r for r in mine if r["lr"] == "auto"] or [None]
        fixed = [r for r in mine if r["lr"] != "auto"]
        cells = list(key)
        for r in (auto, max(fixed, key=gain, default=None)):
            rate = "-" if r is None else f"{r['found']['rate'] if r['found'] else r['lr']:.2g}"
            cells += [rate, "-", "-"] if r is None else [rate, f"{r['forget']:.3f}", f"{r['retain']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=[*SIZES, FEW, TOFU], choices=[*SIZES, FEW, TOFU])
    parser.add_argument("--inits", nargs="+", default=["lora", "vila", "contrast"])
    parser.add_argument("--losses", nargs="+", default=["bga", "ihl", "npo"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "lr_auto", help="models and data that are made")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    parser.add_argument("--table", action="store_true", help="run nothing")
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    done = [json.loads(text) for text in a.results.read_text().splitlines()] if a.results.is_file() else []
    if not a.table:
        measured(a, done)
    print(table(done))


if __name__ == "__main__":
    main()

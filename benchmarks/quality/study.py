"""The study: every start with every loss on the small TOFU models, the same number of trials each, then more seeds.

    python benchmarks/quality/study.py [tune] [runs] [attacks] [tables] [--groups ihl npo ...] [--workers 2]

tune     `lorasure search` for each group of methods on forget05: random trials, chosen without a retrained model
runs     the chosen settings with five seeds on forget01, forget05 and forget10, each against the retrained model
attacks  relearning and rounding of one run of each start and loss on forget05, and of the retrained model
tables   docs/study.md's tables from what is stored; runs nothing

Without a name all four, in this order. What is stored in benchmarks/results/study is not run again; what was begun is
in --work and goes on there. Needs the models and data of --shared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cells import EPOCHS, FIXED, LEFT, Cell, cell_name, measure_references, place, run_cell
from tables import write_tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STORED = ROOT / "benchmarks" / "results" / "study"
STARTS = {  # name in the tables -> settings
    "contrast": {"init": "contrast"},
    "lora": {"init": "lora"},
    "vila": {"init": "vila"},
    "fila": {"init": "fila"},
    "reglu": {"init": "reglu"},
    "pissa": {"init": "pissa"},
    "fila-variance": {"init": "fila", "score": "variance"},
    "expila": {"init": "expila"},
    "absila": {"init": "absila"},
    "sketch": {"init": "sketch"},
    "inputs": {"init": "inputs"},
}
RATES = {
    "bga": (7e-4, 7e-3),
    "bigram": (7e-4, 7e-3),
    "ihl": (7e-4, 7e-3),
    "npo": (7e-4, 1e-2),
    "gd": (2e-4, 1.2e-3),
    "simnpo": (3e-4, 7e-3),
}
RANGES: dict[str, dict[str, Any]] = {
    "bga": {},
    "bigram": {},
    "ihl": {},
    "gd": {"export_scale": {"low": 0.7, "high": 1.0}},  # it damages, then comes back with less of it
    "npo": {"beta": {"low": 0.06, "high": 0.3, "log": True}},  # below, nearly every trial breaks the model
    "simnpo": {"beta": {"low": 1.0, "high": 10.0, "log": True}},
}
COMMON = {"lambda": [0.5, 1.0, 2.0], "coverage": [0.25, 0.5, 1.0]}
FIRST, REST = list(STARTS)[:5], list(STARTS)[5:]
# Groups are searched one after another, so that a study that is cut short has whole comparisons.
GROUPS: dict[str, tuple[str, list[str]]] = {
    "ihl": ("ihl", FIRST),
    "bga": ("bga", ["contrast", "lora"]),
    "bigram": ("bigram", ["contrast", "lora"]),
    "npo": ("npo", ["contrast", "lora"]),
    "gd": ("gd", ["contrast", "lora"]),
    "bga-more": ("bga", FIRST[2:]),
    "npo-more": ("npo", FIRST[2:]),
    "gd-more": ("gd", FIRST[2:]),
    "simnpo": ("simnpo", FIRST),
    "ihl-rest": ("ihl", REST),
    "npo-rest": ("npo", REST),
    **{f"{loss}-{start}": (loss, [start]) for loss in ("simnpo", "gd", "bga") for start in REST},
}
TRIALS, TUNED_ON, SEEDS = 8, "forget05", 5
FLOOR = 0.95  # of the utility, below which a trial is stopped early: the paper's rule
KEPT = 0.98  # what a chosen trial must keep on its few rows
# Importance also ranks the layers for --coverage; a start that needs none takes VILA's for that.
RANKED_BY = {"score": "variance", "space": "lora"}
MEASURED_ROWS = 100  # of each set, for every trial
PAPER = {"compat": "paper-code"}  # importance by the public scripts' arithmetic
MORE = {"epochs": 4, "lambda": 2.0}
VARIANTS: list[tuple[str, str, str, str, dict[str, Any]]] = [  # loss, start, split, name, settings besides the chosen
    ("bga", "contrast", "forget10", "3 epochs", {"epochs": 3}),
    ("bga", "contrast", "forget05", "stop auto", {"stop": "auto"}),
    ("bigram", "contrast", "forget10", "4 epochs", {"epochs": 4}),
    ("bigram", "contrast", "forget10", "4 epochs, lambda 2", MORE),
    ("bigram", "contrast", "forget10", "4 epochs, lambda 2, scale .9", MORE | {"export_scale": 0.9}),
    ("ihl", "contrast", "forget05", "6 epochs, scale .8", {"epochs": 6, "export_scale": 0.8}),
    ("ihl", "contrast", "forget10", "3 epochs", {"epochs": 3}),
    ("ihl", "vila", "forget05", "paper code", PAPER),
    ("ihl", "vila", "forget05", "published split", {"split": "published"}),
    ("ihl", "vila", "forget05", "paper code, published split", PAPER | {"split": "published"}),
    ("ihl", "fila", "forget05", "paper code, published split", PAPER | {"split": "published"}),
]
ATTACKED_FIRST = ("bga", "contrast")  # the defaults, and beside them the retrained model
ATTACKED_TOO = [("bga", "lora, 95% kept"), ("ihl", "lora, 95% kept"), ("bigram", "contrast, 95% kept")]


def main() -> int:
    a = arguments()
    if not (a.shared / "models" / "tofu-mini-target").is_dir():
        print(f"skipped: {a.shared} does not hold models/tofu-mini-target and data/tofu")
        return 0
    STORED.mkdir(parents=True, exist_ok=True)
    a.work.mkdir(parents=True, exist_ok=True)
    if a.cell:
        print(json.dumps(run_cell(Cell(**json.loads(a.cell)), a.shared, a.work)))
        return 0
    where = place(a.shared, a.work / "data")
    for part in a.parts or PARTS:
        PARTS[part](a, where)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--splits", nargs="+", default=list(LEFT), choices=LEFT)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "study", help="searches that are under way")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if unknown := set(a.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    return a


def tune(a: argparse.Namespace, where) -> None:
    """STORED/tune-GROUP.json: the trials of every group, and which was chosen."""
    for group in a.groups:
        if not (STORED / f"tune-{group}.json").is_file():
            search_group(group, a, where)


def search_group(group: str, a: argparse.Namespace, where) -> None:
    import yaml

    from lorasure.artifacts import versions
    from lorasure.progress import Reporter
    from lorasure.search.search import search
    from lorasure.search.settings import SearchSettings

    loss, starts = GROUPS[group]
    low, high = RATES[loss]
    data = {"model": where.target(), "forget": where.rows(TUNED_ON), "retain": where.rows(LEFT[TUNED_ON])}
    spec = {
        "settings": data | FIXED | {"loss": loss, "epochs": EPOCHS[TUNED_ON], "dtype": "float32", "device": "cpu"},
        "methods": {name: method_of(name) for name in starts},
        "ranges": {"lr": {"low": low, "high": high, "log": True}, **RANGES[loss], **COMMON},
        "trials": TRIALS,
        "utility_floor": FLOOR,
        "evaluation": {"suite": "tofu", "data": where.tofu, "split": TUNED_ON, "max_rows": MEASURED_ROWS},
    }
    path, out = a.work / f"{group}.yaml", a.work / f"search-{group}"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    options = {"workers": a.workers, "resume": (out / "search.json").is_file(), "trials_only": True}
    result = search(path, SearchSettings(out=str(out), **options), Reporter())
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    about = {"loss": loss, "machine": machine(), "versions": versions(), "seed": 0, "workers": a.workers}
    shown = {key: value for key, value in spec.items() if key not in ("settings", "evaluation")}
    kept = {key: result[key] for key in ("original", "level")}
    stored = {"about": about, "spec": shown, **kept, "trials": trials}
    (STORED / f"tune-{group}.json").write_text(json.dumps(stored, indent=1) + "\n")


def method_of(start: str) -> dict[str, Any]:
    """A start's settings, with what ranks the layers where it measures no importance of its own."""
    from lorasure.init.apply import INITS

    settings = STARTS[start]
    return settings if INITS[settings["init"]].evidence == "importance" else settings | RANKED_BY


def runs(a: argparse.Namespace, where) -> None:
    """STORED/runs.jsonl: a line per start, loss, split and seed at the chosen settings."""
    picked = to_run(a.groups, a.starts)
    wanted = [
        Cell(start, loss, split, seed, settings)
        for split in sorted(a.splits, key=lambda s: s != TUNED_ON)
        for seed in range(SEEDS)  # a study that is cut short has the same seeds of all
        for start, loss, settings in picked + variants(picked, split)
    ]
    finish(wanted, STORED / "runs.jsonl", a, where)


def variants(picked: list[tuple[str, str, dict[str, Any]]], split: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The rows with VARIANTS' settings."""
    return [
        (f"{start}, {name}", loss, settings | more)
        for start, loss, settings in picked
        for *own, name, more in VARIANTS
        if own == [loss, start, split]
    ]


def attacks(a: argparse.Namespace, where) -> None:
    """STORED/attacks.jsonl: one attacked run of each start and loss as chosen, and of ATTACKED_TOO."""
    wanted = [
        Cell(start, loss, TUNED_ON, 0, settings, "retrained" if (loss, start) == ATTACKED_FIRST else "alone")
        for start, loss, settings in to_run(a.groups, a.starts)
        if start in STARTS or (loss, start) in ATTACKED_TOO
    ]
    finish(wanted, STORED / "attacks.jsonl", a, where)


def to_run(groups: list[str], starts: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """(start, loss, settings) of everything that gets a row in the tables."""
    return [row for group in groups for row in chosen(group, starts) + by_the_floor(group, starts)]


def by_the_floor(group: str, starts: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """The starts as the paper's rule chooses, where that is another trial: one may miss KEPT by little."""
    strict = chosen(group, starts)
    other = [row for row in chosen(group, starts, FLOOR) if row not in strict]
    return [(f"{start}, {FLOOR:.0%} kept", loss, settings) for start, loss, settings in other]


def chosen(group: str, starts: list[str], kept: float = KEPT) -> list[tuple[str, str, dict[str, Any]]]:
    """(start, loss, settings) of a group that has been tuned; where no trial keeps enough, of those that keep FLOOR."""
    path = STORED / f"tune-{group}.json"
    if not path.is_file():
        return []
    from lorasure.search import choose

    stored, (loss, names) = json.loads(path.read_text()), GROUPS[group]
    found = []
    for name in names:
        trials = [line for line in stored["trials"] if line["method"] == name]
        best = choose.chosen(trials, stored["level"], kept) or choose.chosen(trials, stored["level"], FLOOR)
        if best and name in starts:
            found.append((name, loss, method_of(name) | best["params"]))
    return found


def finish(cells: list[Cell], path: Path, a: argparse.Namespace, where) -> None:
    """Run the cells that are not in `path` yet, each in a process of its own, and add their lines to it."""
    done = cells_in(path)
    left = [cell for cell in cells if cell_name(cell) not in done]
    print(f"{path.name}: {len(left)} of {len(cells)} to run", flush=True)
    for split in dict.fromkeys(cell.split for cell in left):
        measure_references(where, split, a.work)
    with ThreadPoolExecutor(a.workers) as pool:
        for line in pool.map(lambda cell: in_process(cell, a), left):
            store(line, path)


def cells_in(path: Path) -> set[str]:
    """The names of the cells that have a line in a file."""
    return {line["cell"] for line in map(json.loads, path.read_text().splitlines())} if path.is_file() else set()


def store(line: dict[str, Any], path: Path) -> None:
    """Add a cell's line to a file, with the machine, and show it."""
    with path.open("a") as file:
        file.write(json.dumps(line | {"machine": machine()}) + "\n")
    print(json.dumps({key: line[key] for key in ("cell", "short")}), flush=True)


def in_process(cell: Cell, a: argparse.Namespace) -> dict[str, Any]:
    where = ["--shared", str(a.shared), "--work", str(a.work)]
    command = [sys.executable, str(Path(__file__).resolve()), *where, "--cell", json.dumps(vars(cell))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{cell_name(cell)}: ended with status {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


def machine() -> str:
    import platform

    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"


PARTS = {
    "tune": tune,
    "runs": runs,
    "attacks": attacks,
    "tables": lambda a, where: write_tables(STORED, ROOT),
}

if __name__ == "__main__":
    sys.exit(main())

"""How fast, how much memory, how far from the limit: this library against what people run today, alternating.

    python benchmarks/speed/bench.py [--quick] [--parts importance,init,step,run,memory,growth] [--threads 2]
    python benchmarks/speed/bench.py --table     # prints the table of the stored results and runs nothing

`published`: the public VILA and FILA scripts; `typical`: a well-kept code base; `ours`: this library; `bare`: forward
and backward over the same tokens with the same trainable factors, the limit that arithmetic sets. Ratios are per row,
round by round; `published` pads every row to the same width, so a few rows say what many would. On one thread the clock
is processor time, on more it is the wall.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
ROOT = HERE.parents[1]
PARTS = ["importance", "init", "step", "memory", "growth", "run"]
BASE = {"width": 128, "vocabulary": 2048, "rank": 8, "rows": 100, "length": 64}
AXES = {
    "rows": [100, 1000, 10_000],
    "length": [32, 64, 128, 256, 512],
    "width": [64, 128, 256, 512],
    "rank": [2, 8, 32, 64],
    "vocabulary": [2048, 8192, 32_768, 131_072],
}
QUICK_AXES = {
    "rows": [100, 400],
    "length": [64, 256],
    "width": [128, 256],
    "rank": [8, 32],
    "vocabulary": [2048, 16384],
}


def main() -> int:
    import torch
    from clock import machine, matrix_rate
    from table import table, verdicts
    from workload import Setting, find_workload

    a = arguments()
    if a.table:
        print(table(json.loads(a.results.read_text())))
        return 0
    torch.set_num_threads(a.threads)
    gc.freeze()  # `lasted` collects before every measurement: not what was imported, again and again
    results: dict[str, Any] = {"about": machine() | {"quick": a.quick, "seed": Setting().seed}}
    print(f"load average {results['about']['load_average_at_start']}, {a.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = find_workload(a.shared, Path(folder))
        work, few = (whole.subset(n) for n in ((24, 4) if a.quick else (200, 16)))
        if a.rows:
            work, few = whole.subset(a.rows), whole.subset(min(a.rows, 4))
        results["workload"] = about(work)
        results["rate"] = matrix_rate()
        time_parts(a, results, work, few)
        results["rate_at_end"] = matrix_rate()
        if "memory" in a.parts:
            results["memory"] = memory(a, results)
        if "run" in a.parts:
            results["run"] = whole_run(a, results, work, Path(folder))
            results["run_growth"] = run_growth(a, work, Path(folder))
    if "growth" in a.parts:
        results["growth"] = growth(a)
    a.results.parent.mkdir(parents=True, exist_ok=True)
    a.results.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(verdicts(results)))
    if not a.no_plot:
        from plot import draw

        draw(results, a.results.with_suffix(".png"))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds, under five minutes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="default: 3 when quick, else 5")
    parser.add_argument("--rows", type=int, help="rows of each set, for tests")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "speed.json")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/tofu and models")
    parser.add_argument("--table", action="store_true", help="print the stored results as the README's table")
    parser.add_argument("--no-plot", action="store_true")
    a = parser.parse_args()
    a.parts = a.parts.split(",")
    if unknown := set(a.parts) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    a.rounds = a.rounds or (3 if a.quick else 5)
    return a


def about(work) -> dict[str, Any]:
    """Sizes, and the operations that one forward and one backward pass through activations need at least."""
    from lorasure.sites import all_sites

    model = work.model()
    head = model.get_output_embeddings().weight.numel()
    answers = sum(e.answer_length for part in work.examples for e in part)
    frozen = sum(site.size for site in all_sites(model))
    return {
        "title": work.title,
        "rows": work.count,
        "tokens": work.tokens,
        "answer_tokens": answers,
        "parameters": model.num_parameters(),
        "operations_per_token": 4 * (frozen + head * answers / work.tokens),
    }


def time_parts(a: argparse.Namespace, results: dict[str, Any], work, few) -> None:
    """results["parts"]: seconds of every round, ratios to ours, tokens per second, share of the machine's rate."""
    from cases import PARTS as TIMED
    from cases import parts
    from clock import alternate, ratios, spread
    from workload import Setting

    names = [name for group in a.parts for name in TIMED.get(group, ())]
    found = results.setdefault("parts", {})
    for name, part in parts(names, work, few, Setting()).items():
        times = alternate(part.jobs, a.rounds, lambda line: print(f"  {name}: {line}", flush=True))  # noqa: B023
        rows = {method: w.count for method, w in part.workloads.items()}
        methods = {}
        for method, taken in times.items():
            tokens = part.workloads[method].tokens
            speed = tokens / spread(taken)["median"]
            share = speed * results["workload"]["operations_per_token"] / results["rate"]
            methods[method] = {"seconds": taken, "rows": rows[method], "tokens": tokens, "tokens_per_second": speed}
            methods[method] |= {"share_of_rate": share} if name != "init" else {}
        found[name] = {"methods": methods, "ratios": ratios(times, rows)}


def memory(a: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Peak memory above the weights in fresh processes; ours also with as many rows per pass as the others have."""
    from clock import can_measure_memory
    from worker import in_process

    if not can_measure_memory():
        return {}
    common = {"job": "memory", "shared": str(a.shared), "loss": "npo", "threads": a.threads}
    rows = min(32, results["workload"]["rows"] // 2)
    wanted = {"published": {"rows": min(8, rows)}, "typical": {"rows": rows}, "ours": {"rows": rows}}
    found = {m: in_process({**common, "method": m, **more})["peak_bytes"] for m, more in wanted.items()}
    same = {**common, "method": "ours", "rows": rows, "rows_per_pass": 8}
    return found | {"ours, 4 + 4 rows per pass": in_process(same)["peak_bytes"]}


def growth(a: argparse.Namespace) -> list[dict[str, Any]]:
    """One axis at a time, everything else at BASE; longer rows are fewer, so that the tokens stay the same."""
    from worker import in_process

    points = []
    for axis, values in (QUICK_AXES if a.quick else AXES).items():
        for value in values:
            point = {**BASE, axis: value}
            if axis == "length":
                point["rows"] = BASE["rows"] * BASE["length"] // value
            if point not in points:
                points.append(point)
    found = []
    for point in points:
        found.append(point | in_process({"job": "growth", "threads": a.threads, **point}))
        print(f"  growth: {point}", flush=True)
    return found


def whole_run(a: argparse.Namespace, results: dict[str, Any], work, folder: Path) -> dict[str, Any]:
    """NPO with VILA as whole processes, alternating. `published` is put together from its timed parts."""
    from clock import alternate, ratios, spread
    from worker import in_process
    from workload import EPOCHS

    rows = len(work.examples[0])
    parts: list[dict[str, float]] = []

    def ours() -> float:
        return forget(work, EPOCHS, folder, a.threads)["total_seconds"]

    def typical() -> float:
        parts.append(in_process({"job": "run", "shared": str(a.shared), "rows": rows, "threads": a.threads}))
        return parts[-1]["total_seconds"]

    rounds = 1 if a.quick else 3
    times = alternate({"ours": ours, "typical": typical}, rounds, lambda line: print(f"  run: {line}", flush=True))
    published = {
        name: results["parts"].get(name, {}).get("methods", {}).get("published") for name in ("importance", "npo")
    }
    if all(published.values()):
        each = {k: spread(p["seconds"])["median"] / p["rows"] for k, p in published.items()}
        timed = 2 * rows * (10 * each["importance"] + EPOCHS * each["npo"])
        times["published"] = [
            p["total_seconds"] - p["importance_seconds"] - p["train_seconds"] + timed for p in parts
        ]  # what surrounds them as in `typical`
    return {"rows": 2 * rows, "seconds": times, "ratios": ratios(times, dict.fromkeys(times, 2 * rows))}


def run_growth(a: argparse.Namespace, work, folder: Path) -> list[dict[str, Any]]:
    """Our whole command, NPO with VILA and one epoch, on more and more rows."""
    rows = len(work.examples[0])
    counts = (rows // 4, rows, 4 * rows)
    return [{"rows": 2 * count, **forget(work.stretched(count), 1, folder, a.threads)} for count in counts]


def forget(work, epochs: int, folder: Path, threads: int) -> dict[str, Any]:
    """What `lorasure forget` takes, NPO with VILA, on these rows."""
    from worker import measured
    from workload import Setting

    s = Setting()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        files = work.write(Path(out))
        flags = {"model": work.folder, "forget": files[0], "retain": files[1], "loss": "npo", "init": "vila"}
        flags |= {"epochs": epochs, "batch-size": s.batch_size, "rank": s.rank, "alpha": s.alpha, "beta": s.beta}
        flags |= {"lr": s.lr, "device": "cpu", "max-grad-growth": 1e9, "out": f"{out}/run"}
        command = [sys.executable, "-m", "lorasure", "forget", *(f"--{k}={v}" for k, v in flags.items())]
        return measured(command, threads)


if __name__ == "__main__":
    sys.exit(main())

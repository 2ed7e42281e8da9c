"""Random SIGKILLs over one `lorasure forget`, continued after each: the adapter must be the undisturbed run's.

    python benchmarks/reliability/soak.py --kills 50 --seed 0

Data and model are the demo's, untrained. The delay before each kill is uniform; its range is chosen from a measured run
so that about all kills fall into one run. A run that is complete before is checked, and the next one begins.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def start(work: Callable[[], object]) -> int:
    """Do it in a child process, which has what is imported here already; its process id."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int) -> bool:
    """Whether the child is done. A child that failed by itself ends the soak."""
    found, status = os.waitpid(child, os.WNOHANG)
    if found and status:
        sys.exit(f"the run failed by itself (status {status})")
    return bool(found)


def wait(child: int, until: Callable[[], bool]) -> float:
    """Seconds until something is true or the child is done."""
    began = time.monotonic()
    while not ended(child) and not until():
        time.sleep(0.001)
    return time.monotonic() - began


def _past(deadline: float) -> bool:
    return time.monotonic() > deadline


def make(folder: Path, rows: int | None) -> None:
    """Rows, no more than `rows` of each set, and a model with random weights."""
    from lorasure.demo import make_data, make_start

    make_data(folder, 0)
    make_start(folder, "model", 0)
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))


def forget(folder: Path, out: Path, epochs: int, resume: bool) -> None:
    """The command under test, a checkpoint after every step."""
    import torch

    from lorasure.config import ForgetSettings
    from lorasure.pipeline import forget

    torch.set_num_threads(1)
    files = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    options = {
        "init": "vila",
        "rank": 4,
        "epochs": epochs,
        "batch_size": 8,
        "lr": 1e-3,
        "max_length": 128,
        "min_utility": 0.9,
    }
    model = str(folder / "model")
    forget(ForgetSettings(model=model, **files, **options, out=str(out), checkpoint_every=1, resume=resume))


def place(partial: Path) -> str:
    """How far a killed run had come."""
    if (partial / "trained.safetensors").exists():
        return "export"
    steps = sorted((partial / "checkpoints").glob("step-*"))
    if steps:
        return "train"
    done = [name for name in ("init", "importance") if (partial / f"{name}.safetensors").exists()]
    return f"after {done[0]}" if done else "load or importance"


def soak(folder: Path, kills: int, seed: int, epochs: int, rows: int | None) -> dict:
    """The result, ready for JSON; `equal` is what it is about."""
    from lorasure.artifacts import differences, sha256
    from lorasure.folders import partial_of

    draw = random.Random(seed)
    child = start(lambda: make(folder, rows))
    wait(child, lambda: False)
    plain, out = folder / "undisturbed", folder / "run"
    child = start(lambda: forget(folder, plain, epochs, False))
    first = wait(child, (partial_of(plain) / "checkpoints" / "step-000001").exists)
    rest = wait(child, lambda: False)
    adapter = Path("adapter") / "adapter_model.safetensors"
    expected = sha256(plain / adapter)
    share = rest / kills  # what an attempt should achieve on average, beyond getting to its first step again
    longest = first + share + math.sqrt(share * share + 2 * first * share)
    places, complete, equal = Counter(), 0, 0
    while sum(places.values()) < kills:
        resume = partial_of(out).exists()
        child = start(partial(forget, folder, out, epochs, resume))
        wait(child, partial(_past, time.monotonic() + draw.uniform(0, longest)))
        if out.exists():
            complete, equal = complete + 1, equal + (sha256(out / adapter) == expected)
            out.rename(folder / f"complete-{complete}")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        places[place(partial_of(out))] += 1
    wait(start(lambda: forget(folder, out, epochs, partial_of(out).exists())), lambda: False)
    complete, equal = complete + 1, equal + (sha256(out / adapter) == expected and differences(out) == [])
    return {
        "kills": kills,
        "seed": seed,
        "epochs": epochs,
        "killed_in": dict(places),
        "complete_runs": complete,
        "equal": equal == complete,
        "undisturbed_adapter_sha256": expected,
        "undisturbed_seconds": round(first + rest, 2),
        "longest_delay_seconds": round(longest, 2),
    }


def main() -> int:
    """Run, print and store the result; exit code 1 if any adapter differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rows", type=int, help="rows of each set (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries underneath
    import lorasure.pipeline  # noqa: F401  once, for all children
    from lorasure.artifacts import versions

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), given.kills, given.seed, given.epochs, given.rows)
    about = {"machine": platform.platform(), "processors": os.cpu_count(), "versions": versions()}
    result |= about | {"seconds": round(time.monotonic() - began, 1)}
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())

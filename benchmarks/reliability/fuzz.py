"""Mutated files for every reader of untrusted input: data, settings, run folders. What comes out is counted.

    python benchmarks/reliability/fuzz.py                 # all targets, 200,000 inputs each
    python benchmarks/reliability/fuzz.py --only config --inputs 1000 --seed 7

Each input is made from valid ones by mutations drawn from (seed, target, number), so that a failure can be made again.
It fails if anything but a LorasureError comes out, if the exit code is not a documented one, if the message is not one
printable line or quotes the text of a row, or if it takes longer than ten seconds. Results, with seed, machine and
versions, go to benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_targets import SECRET, TARGETS, Target

from lorasure.artifacts import versions
from lorasure.errors import LorasureError, one_line

RESULT = Path(__file__).resolve().parents[1] / "results" / "fuzz.json"
MEMORY = Path("/dev/shm")  # a disk would be the slowest part
DOCUMENTED = {0, 2, 3, 4, 5}
LIMIT = 10  # seconds for one input
SHOWN = 20  # failures listed


class TooSlow(BaseException):
    """One input took longer than LIMIT."""


def mutated(draw: random.Random, seeds: tuple[bytes, ...], words: tuple[bytes, ...]) -> bytes:
    """A valid input after at most six changes: bytes flipped, cut, doubled, moved, or replaced by a nasty word."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((0, 1, 1, 2, 2, 6))):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        match draw.randrange(8):
            case 0 if data:
                data[min(a, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del data[a : min(b, a + draw.choice((1, 8, 1000)))]
            case 2:
                data[a:a] = data[a : min(b, a + 200)]
            case 3:
                data = data[:a] if draw.random() < 0.5 else data[a:]
            case 4:
                other = draw.choice(seeds)
                data[a:] = other[draw.randrange(len(other) + 1) :]
            case 5:
                data[a:a] = draw.randbytes(draw.choice((1, 4, 16)))
            case 6:
                data[a : min(b, a + 12)] = draw.choice(words)
            case _:
                data[a:a] = draw.choice(words)
    return bytes(data)


def outcome(target: Target, data: bytes, folder: Path, draw: random.Random) -> str:
    """The exit code that a user would get, or what went wrong."""
    try:
        target.run(data, folder, draw)
    except LorasureError as error:
        message = one_line(str(error))
        if not message.isprintable():
            return "a message with control characters"
        if SECRET.lower() in message.lower():
            return "a message that quotes a row"
        return str(error.exit_code) if error.exit_code in DOCUMENTED else f"exit code {error.exit_code}"
    except SystemExit as stop:
        return str(stop.code or 0) if (stop.code or 0) in DOCUMENTED else f"exit code {stop.code}"
    except (Exception, TooSlow) as error:  # exactly what must not happen, so it is recorded and not raised
        at = error.__traceback__
        while at and at.tb_next:
            at = at.tb_next
        where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
        return f"{type(error).__name__} at {where}"
    return "0"


@contextmanager
def limited() -> Iterator[None]:
    """Within the block, `signal.alarm` raises TooSlow; what the code under test prints is thrown away."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, inputs: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> dict:
    """Run one target: how many inputs, in how many seconds, how often each outcome came, and the failures."""
    target = TARGETS[name]
    outcomes: Counter[str] = Counter()
    failures: list[dict] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder, chdir(folder), limited():
        target.prepare(Path(folder))
        for number in range(inputs):
            draw = random.Random(f"{seed}/{name}/{number}")
            data = mutated(draw, target.seeds, target.words)
            signal.alarm(LIMIT)
            found = outcome(target, data, Path(folder), draw)
            signal.alarm(0)
            outcomes[found] += 1
            if not found.isdigit() and len(failures) < SHOWN:
                failures.append({"input": number, "outcome": found})
            if number % 1000 == 999:
                progress(number + 1)
        if list(Path(folder).glob("canary*")):  # what the malicious inputs would make here
            failures.append({"input": None, "outcome": "a canary file: something was run"})
    seconds = round(time.perf_counter() - began, 1)
    return {"inputs": inputs, "seconds": seconds, "outcomes": dict(sorted(outcomes.items())), "failures": failures}


def main() -> int:
    """Run the targets asked for and store what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="inputs for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one target; its result is shown and not stored")
    args = parser.parse_args()
    results = {}
    for name in [args.only] if args.only else TARGETS:

        def show(done: int, name: str = name) -> None:
            print(f"\r{name}: {done}", end="", file=sys.stderr, flush=True)

        results[name] = fuzz(name, args.inputs, args.seed, show)
        print(f"\r{name}: {json.dumps(results[name])}")
    if not args.only:
        libraries = {library: version(library) for library in ("pyarrow", "PyYAML", "jsonargparse")}
        about = {
            "seed": args.seed,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "versions": versions() | libraries,
        }
        RESULT.write_text(json.dumps(about | {"targets": results}, indent=2) + "\n")
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Measuring: alternating runs, ratios with their spread, peak memory, the machine and its matrix-product rate."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lorasure.artifacts import versions

Timed = Callable[[], float]  # does the work and returns how long the part that counts took


def seconds() -> float:
    """The clock: of this process's processor time on one thread, which others on the machine hardly change; else of
    the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def lasted(work: Callable[[], object]) -> float:
    gc.collect()
    began = seconds()
    work()
    return seconds() - began


def alternate(jobs: Mapping[str, Timed], rounds: int, say: Callable[[str], None] = lambda _: None) -> dict[str, list]:
    """Every job once per round, each round beginning with another one."""
    names = list(jobs)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(jobs[name]())
            say(f"{name} {found[name][-1]:.2f} s")
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(
    times: Mapping[str, list[float]], rows: Mapping[str, int], base: str = "ours"
) -> dict[str, dict[str, float]]:
    """How many times longer than `base` each one takes per row, round by round."""
    each = {name: [t / rows[name] for t in found] for name, found in times.items()}
    return {
        name: spread([a / b for a, b in zip(found, each[base], strict=True)])
        for name, found in each.items()
        if name != base
    }


def matrix_rate() -> float:
    """Operations per second of the machine's float32 matrix product, best of the shapes that models use."""
    best = 0.0
    for rows, inner, columns in ((1024, 256, 704), (1024, 704, 256), (1024, 1024, 1024), (2048, 2048, 2048)):
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        count = max(1, 2**30 // (rows * inner * columns))
        took = min(lasted(lambda: [a @ b for _ in range(count)]) for _ in range(5))  # noqa: B023
        best = max(best, 2 * rows * inner * columns * count / took)
    return best


def machine() -> dict[str, object]:
    """Where and with what; `quiet` says whether others used the machine when this began."""
    load = os.getloadavg()
    name = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    return {
        "machine": f"{platform.machine()} {name}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "clock": "process" if torch.get_num_threads() == 1 else "wall",
        "load_average_at_start": [round(x, 2) for x in load],
        "quiet": load[0] < 0.5,
        "versions": versions(),
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def peak_above(work: Callable[[], object]) -> int:
    """Largest resident memory during `work`, above what this process held before, in bytes. Linux only.

    To be called in a fresh process that has loaded the model: memory that was freed earlier but kept would hide some.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str, process: int | str = "self") -> int:
    """A size of a process in bytes, 0 where it has none (any more)."""
    lines = _lines(f"/proc/{process}/status")
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def wait(process: int) -> tuple[int, float, int]:
    """(status, processor seconds, peak resident bytes) of a child, when it has ended.

    By looking at it: what the system says afterwards begins with the memory of the process that started it.
    """
    peak = 0
    while not (ended := os.wait4(process, os.WNOHANG))[0]:
        peak = max(peak, _status("VmHWM", process))
        time.sleep(0.02)
    return ended[1], ended[2].ru_utime + ended[2].ru_stime, peak


def can_measure_memory() -> bool:
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)

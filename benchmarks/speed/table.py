"""From the stored results to the README's table, and to a verdict on every bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Results = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """`value` reads one number from the results; it must be at least (with `most`: at most) `bound`, if any."""

    title: str
    against: str
    bound: float | None
    value: Callable[[Results], float]
    most: bool = False

    def read(self, results: Results) -> float | None:
        try:
            return self.value(results)
        except KeyError:
            return None


def _ratio(part: str, method: str) -> Callable[[Results], float]:
    return lambda r: r["parts"][part]["ratios"][method]["median"]


def _filled(part: str) -> Callable[[Results], float]:
    return lambda r: _ratio(part, "typical")(r) / _ratio(part, "filled")(r)


def _over_bare(part: str) -> Callable[[Results], float]:
    return lambda r: 1 / r["parts"][part]["ratios"]["bare"]["median"]


def _run(method: str) -> Callable[[Results], float]:
    return lambda r: r["run"]["ratios"][method]["median"]


def _memory(method: str) -> Callable[[Results], float]:
    return lambda r: r["memory"]["ours"] / r["memory"][method]


def flatness(part: str, what: str) -> Callable[[Results], float]:
    """The most rows against the fewest: time per token or peak memory, with everything else the same."""

    def read(results: Results) -> float:
        points = [p for p in results["growth"] if all(p[k] == v for k, v in results["growth"][0].items() if k in SIZES)]
        points.sort(key=lambda p: p["rows"])
        return points[-1][part][what] / points[0][part][what]

    return read


def _per_added_row(results: Results) -> float:
    """What surrounds the rows, loading and starting, is the same for all."""
    few, some, many = ((p["rows"], p["total_seconds"]) for p in results["run_growth"])
    return (many[1] - some[1]) / (many[0] - some[0]) / ((some[1] - few[1]) / (some[0] - few[0]))


def _resident(results: Results) -> float:
    points = results["run_growth"]
    return points[-1]["resident_bytes"] / points[0]["resident_bytes"]


SIZES = ("width", "vocabulary", "rank", "length")
BARS = [
    Bar("importance, one pass", "published", 8, _ratio("importance", "published")),
    Bar("importance, one pass", "typical", 1.1, _ratio("importance", "typical")),
    Bar("importance as published: ten times", "published", 80, lambda r: 10 * _ratio("importance", "published")(r)),
    Bar("importance of all weights, one pass", "published", 5, _ratio("importance_full", "published")),
    Bar("initialisation", "published", None, _ratio("init", "published")),
    Bar("initialisation", "typical", None, _ratio("init", "typical")),
    Bar("training epoch, IHL", "published", 9, _ratio("ihl", "published")),
    Bar("training epoch, IHL", "typical", 1.5, _ratio("ihl", "typical")),
    Bar("training epoch, NPO", "published", 10, _ratio("npo", "published")),
    Bar("training epoch, NPO", "typical", 1.6, _ratio("npo", "typical")),
    Bar("training epoch, IHL, top quarter of the sites", "typical", 3, _ratio("ihl_quarter", "typical")),
    Bar("the same with a fifth of the pass that fills the cache", "typical", None, _filled("ihl_quarter")),
    Bar("training epoch, IHL, the top layer", "typical", 3, _ratio("ihl_top", "typical")),
    Bar("the same with a fifth of the pass for the cache", "typical", None, _filled("ihl_top")),
    Bar("whole run, NPO and VILA", "published", 18, _run("published")),
    Bar("whole run, NPO and VILA", "typical", 1.5, _run("typical")),
    Bar("peak memory above the weights, NPO", "published", 1 / 4, _memory("published"), most=True),
    Bar("peak memory above the weights, NPO", "typical", 1 / 2, _memory("typical"), most=True),
    Bar("importance, one pass", "bare", 1.25, _over_bare("importance"), most=True),
    Bar("training epoch, IHL", "bare", 1.15, _over_bare("ihl"), most=True),
    Bar("training epoch, NPO", "bare", 1.15, _over_bare("npo"), most=True),
    Bar(
        "time per token, most rows to fewest, importance",
        "rows",
        1.15,
        flatness("importance", "seconds_per_token"),
        True,
    ),
    Bar("time per token, most rows to fewest, training", "rows", 1.15, flatness("ihl", "seconds_per_token"), True),
    Bar("peak memory, most rows to fewest, importance", "rows", 1.15, flatness("importance", "peak_bytes"), True),
    Bar("peak memory, most rows to fewest, training", "rows", 1.15, flatness("ihl", "peak_bytes"), True),
    Bar("time per added row, most to fewest, whole command", "rows", 1.15, _per_added_row, True),
    Bar("memory of the process, most rows to fewest", "rows", 1.15, _resident, True),
]


def verdicts(results: Results) -> Iterator[str]:
    """One line per bar: what was measured, the bound, and whether it holds."""
    for bar in BARS:
        value = bar.read(results)
        if value is None:
            continue
        line = f"{bar.title:52} {bar.against:10} {value:7.2f}"
        if bar.bound is None:
            yield f"     {line}"
        else:
            holds = value <= bar.bound if bar.most else value >= bar.bound
            yield f"{'ok  ' if holds else 'MISS'} {line}  ({'<=' if bar.most else '>='} {bar.bound:g})"


def table(results: Results) -> str:
    """Markdown: how many times faster or smaller, with the spread over rounds; then what it was measured on."""
    lines = ["| | published scripts | typical code | above the bare arithmetic |", "|---|---|---|---|"]
    for title in dict.fromkeys(bar.title for bar in BARS if bar.against != "rows"):
        cells = {bar.against: _cell(bar, results) for bar in BARS if bar.title == title}
        if any(cells.values()):
            lines.append(
                f"| {title} | " + " | ".join(cells.get(k) or "-" for k in ("published", "typical", "bare")) + " |"
            )
    return "\n".join([*lines, "", _footnote(results)])


def _cell(bar: Bar, results: Results) -> str:
    value = bar.read(results)
    if value is None:
        return ""
    if bar.against == "bare":
        return f"{value:.2f}x"
    if bar.most:
        return f"{value:.2f} of it"
    timed = [*results["parts"].values(), results.get("run", {"ratios": {}})]
    part = next((p for p in timed if p["ratios"].get(bar.against, {}).get("median") == value), None)
    spread = part["ratios"][bar.against] if part else None
    return f"{value:.3g}x" + (f" [{spread['low']:.3g}, {spread['high']:.3g}]" if spread else "")


def _footnote(results: Results) -> str:
    about, work = results["about"], results["workload"]
    quiet = "" if about["quiet"] else f", not quiet: load average {about['load_average_at_start'][0]}"
    ours = results["parts"].get("importance", {}).get("methods", {}).get("ours")
    share = ""
    if ours:
        share = f" Importance runs at {ours['tokens_per_second']:.0f} tokens/s, {ours['share_of_rate']:.0%} of the "
        share += f"machine's matrix products ({results['rate'] / 1e9:.0f} billion operations per second)."
    summed = " The published scripts' whole run is the sum of their timed parts." if "run" in results else ""
    return (
        f"Times faster, median [lowest, highest] of alternating rounds; {work['title']}, {work['rows']} rows, "
        f"{work['tokens']} tokens; {about['machine']}, {about['threads']} threads{quiet}; torch "
        f"{about['versions']['torch']}, transformers {about['versions']['transformers']}.{summed}{share}"
    )

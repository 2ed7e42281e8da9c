"""The table at the end of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from .errors import escaped
from .evaluate.gate import Line, value_of
from .outcome import adapter_form


def _console(stderr: bool = False) -> Console:
    """Shows names, which come from elsewhere, as they are: `[b]` and `:bug:` in them mean nothing."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def result(folder: Path, summary: Mapping[str, Any]) -> None:
    """Before and after, where the time went, peak memory, and the verdict as the last line."""
    console = _console()
    scores = Table(title="probability of the answers (95 % interval)", title_justify="left")
    for name in ("set", "examples", "before", "after"):
        scores.add_column(name, justify="left" if name == "set" else "right")
    for name in ("forget", "retain"):
        before, after = summary["before"][name], summary["after"][name]
        scores.add_row(name, str(after["n"]), _interval(before), _interval(after))
    console.print(scores)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in summary["seconds"].items())
    memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in summary["peak_memory_bytes"].items())
    console.print(f"time: {times}", f"peak memory: {memory}", sep="\n", soft_wrap=True)
    console.print(
        _handed_over(escaped(str(folder)), summary),
        summary["verdict"]["text"],
        sep="\n",
        soft_wrap=True,
    )


def _handed_over(folder: str, summary: Mapping[str, Any]) -> str:
    if export := summary.get("export"):
        checked = f"checked on the untouched base: largest logit difference {export['max_logit_difference']:.1e}"
        return f"adapter: {folder}/adapter ({adapter_form(export)}), {checked}"
    if dampened := summary.get("dampened"):
        return f"whole model: {folder}/merged ({dampened['weights']} of {dampened['of']} weights dampened)"
    return f"assistant: {folder}/assistant; evaluate it with --adapter {folder}"


def plan(found: Mapping[str, Any], as_json: bool = False) -> None:
    """Memory by stage and part, what is free, time by stage; or one JSON object."""
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    console = _console()
    table = Table("stage", "where", "part", Column("GiB", justify="right"), title="memory", title_justify="left")
    for part in found["parts"]:
        table.add_row(part["stage"], part["place"], part["name"], f"{part['bytes'] / 2**30:.2f}")
    console.print(table)
    for place, most in found["peak"].items():
        needed, free, own = (size / 2**30 for size in (most["bytes"], found["free"][place], found["process"]))
        beside = f" beside the {own:.2f} GiB of the libraries" * (place == "host")
        line = f"{place}: {needed:.2f} GiB at most ({most['stage']}){beside}, {free:.2f} GiB are free"
        console.print(line, soft_wrap=True)
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found["seconds"].items() if seconds)
    passes = f"{found['tokens_per_batch']} tokens a pass" + ", recomputed" * found["gradient_checkpointing"]
    line = f"time: {times}; {found['total_seconds']:.0f} s in all, with {passes}"
    console.print(line, soft_wrap=True)


def scores(found: Mapping[str, Any], title: str, as_json: bool = False) -> None:
    """Scores with n and interval as a table, then what is undefined and why, and notes; or one JSON object."""
    plain = {name: score.to_json() for name, score in found.items()}
    if as_json:
        print(json.dumps(plain, indent=2, allow_nan=False))
        return
    console = _console()
    table = Table(
        Column("score", no_wrap=True), Column("value", justify="right", no_wrap=True), Column("n", justify="right"), ""
    )
    table.title, table.title_justify = f"{escaped(title)} (95 % interval)", "left"
    below: dict[tuple[str, str], list[str]] = {}
    for name, score in plain.items():
        if score["value"] is None:
            below.setdefault(("undefined", score["reason"]), []).append(name)
            continue
        table.add_row(name, _interval(score), str(score["n"]), _test(score))
        if "note" in score:
            below.setdefault(("note", score["note"]), []).append(name)
    console.print(table)
    for (kind, text), names in below.items():
        console.print(f"{kind}: {', '.join(names)}: {text}.", soft_wrap=True)


def steps(measured: Mapping[str, Mapping[str, Any]], folder: str, as_json: bool = False) -> None:
    """Scores at each step of a sequence, a column per step; or one JSON object with names STEP_SCORE."""
    if as_json:
        plain = {f"{step}_{name}": s.to_json() for step, scores in measured.items() for name, s in scores.items()}
        print(json.dumps(plain, indent=2, allow_nan=False))
        return
    table = Table(
        Column("score", no_wrap=True), *(Column(step.replace("_", " "), justify="right") for step in measured)
    )
    table.title, table.title_justify = f"{escaped(folder)} (n, intervals, reasons: ledger.json)", "left"
    for name in dict.fromkeys(name for scores in measured.values() for name in scores):
        found = [scores.get(name) for scores in measured.values()]
        table.add_row(name, *("" if s is None else "-" if s.value is None else f"{s.value:.3f}" for s in found))
    _console().print(table)


def probe(found: Mapping[str, Any], source: str, as_json: bool = False) -> None:
    """What a model knows of a text as a table, what the control is, and the verdict as the last line; or as JSON."""
    shown = found if as_json else {name: score for name, score in found.items() if name != "verdict"}
    scores(shown, source, as_json)
    if not as_json:
        words = found["verdict"].extra
        lines = ("p: that the text lies no higher than the control.", f"Control: {words['control']}.", words["text"])
        _console().print(*lines, sep="\n")


def attacks(about: Mapping[str, Any], lines: Sequence[Line], as_json: bool = False) -> None:
    """A row per attack and point, what did not run, the verdict, the gate; or one JSON object, the gate on stderr."""
    gate = [rule["text"] for rule in about["gate"]]
    if as_json:
        named = {_name(line, key): score for line in lines for key, score in line["scores"].items()}
        print(json.dumps(named, indent=2, allow_nan=False))
        for text in gate:
            _console(stderr=True).print(text, soft_wrap=True)
        return
    console = _console()
    names = list(dict.fromkeys(key for line in lines for key in line["scores"]))
    table = Table("attack", *(Column(name.replace("_", "\n"), justify="right") for name in names), box=None)
    subjects = ("unlearned", "retrained") if about["retrained"] else ("unlearned",)
    table.title, table.title_justify = f"after each attack: {' / '.join(subjects)}", "left"
    found = {(line["attack"], line["point"], line["subject"]): line for line in lines}
    for attack, point in dict.fromkeys((line["attack"], line["point"]) for line in lines):
        row = [found.get((attack, point, subject)) for subject in subjects]
        cells = (" / ".join(_value(line, name) for line in row) for name in names)
        table.add_row(attack + ("" if point is None else f" {point:g}"), *cells)
    console.print(table)
    known = [s for line in lines for s in line["scores"].values() if s["low"] is not None]
    widest = max(((s["high"] - s["low"]) / 2 for s in known), default=None)
    if widest is not None:
        console.print(f"95 % intervals, at most +-{widest:.2f} here, and n are in attacks.jsonl.")
    skipped = [f"not run: {x['attack']} ({x['subject']}): {x['reason']}." for x in about["not_run"]]
    console.print(*skipped, *about["verdict"], *gate, sep="\n", soft_wrap=True)


def _value(line: Line | None, score: str) -> str:
    value = value_of(line, score)
    return "-" if value is None else f"{value:.3f}"


def _name(line: Mapping[str, Any], score: str) -> str:
    """subject_attack_point_score"""
    point = [] if line["point"] is None else [f"{line['point']:g}"]
    return "_".join([line["subject"], line["attack"], *point, score])


def _test(score: Mapping[str, Any]) -> str:
    """Of a score that comes from one, else nothing."""
    return f"p = {score['p']:.3g}, D = {score['statistic']:.4f}, {score['method']}" if "statistic" in score else ""


def _interval(score: Mapping[str, Any]) -> str:
    """value [low, high]"""
    return f"{score['value']:.3f}" + ("" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]")

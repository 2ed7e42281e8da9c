"""SPEC.yaml -> Spec: every name, type and bound is checked before a model or data is touched."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import artifacts
from ..config import PER_CALL, ForgetSettings, ImportanceSettings, InitSettings, ModelSettings, TrainSettings
from ..errors import DataError, UsageError
from ..evaluate.metrics import UTILITY_FLOOR
from ..evaluate.settings import EvaluateSettings
from ..flags import WANTED
from ..registry import lookup
from ..workbench import check_names
from ..yaml_file import read_yaml
from .spec import FIELDS, Method, Range, Spec, corners

KEYS = ("settings", "methods", "ranges", "trials", "sampler", "seed", "utility_floor", "evaluation", "reference")
EVALUATION = ("suite", "data", "split", "forget", "retain", "max_rows")
SUITES = ("own", "tofu")  # that say enough about forgetting and utility without generating text
SAMPLERS = ("random", "tpe")
TYPES = typing.get_type_hints(ForgetSettings)
# What a trial is measured on is what it hands over, but for the rank that it would be compressed to.
FIXED = [name for name in FIELDS if name not in PER_CALL | {"out", "export_rank"}]
# What a method may set or search: how to forget, not what, nor on which model.
OF_METHOD = [
    f.name.rstrip("_")
    for stage in (ImportanceSettings, InitSettings, TrainSettings)
    for f in fields(stage)
    if f.name not in PER_CALL and not f.metadata.get("path")
]
OF_METHOD = [*dict.fromkeys(OF_METHOD), "export_scale", "seed"]
MOST = 4096  # combinations of values that are checked: less than a second for each method
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")  # also a folder's


def read_spec(path: Path) -> Spec:
    """The search that a YAML file asks for. Raises UsageError naming the file, the key and the choices."""
    try:
        return _Reader(path).spec()
    except DataError as error:
        raise UsageError(str(error)) from error


class _Reader:
    """A file, and the one form of its errors: FILE: KEY: what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (artifacts.exists(path) and path.is_file()):
            raise UsageError(f"{path}: there is no such file.")
        self.content = self.names(read_yaml(path), "", KEYS)

    def error(self, where: str, message: str) -> UsageError:
        return UsageError(f"{self.path}: {where + ': ' if where else ''}{message}")

    def names(self, given: Any, where: str, known: typing.Iterable[str] | None = None) -> dict[str, Any]:
        """A mapping with text keys, all of them `known`."""
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise self.error(where, "must hold names and values.")
        for key in given:
            if known is not None:
                self.known(dict.fromkeys(known), key, where, "key")
        return given

    def known(self, table: Mapping[str, Any], name: str, where: str, what: str) -> None:
        try:
            lookup(table, name, what)
        except UsageError as error:
            raise self.error(where, str(error)) from None

    def spec(self) -> Spec:
        fixed = self.values(self.content.get("settings", {}), "settings", FIXED)
        for name in ("model", "forget", "retain"):
            if name not in fixed:
                raise self.error("settings", f"needs {name}.")
        shared = self.names(self.content.get("ranges") or {}, "ranges", OF_METHOD)
        methods = self.content.get("methods")
        if isinstance(methods, list):  # the short form: names of initialisations
            methods = {str(name): {"init": name} for name in methods}
        methods = self.names(methods, "methods")
        if not methods:
            raise self.error("methods", "needs one at least.")
        sampler = self.content.get("sampler", "random")
        self.known(dict.fromkeys(SAMPLERS), str(sampler), "sampler", "sampler")
        return Spec(
            {name: self.method(name, given, fixed, shared) for name, given in methods.items()},
            self.number("trials", 8, int, 1, 10**6),
            sampler,
            self.number("seed", 0, int, 0, 2**31),
            self.number("utility_floor", UTILITY_FLOOR, float, 0, 1),
            self.evaluation(fixed),
            self.text("reference"),
        )

    def number(self, key: str, default: float, kind: type, low: float, high: float) -> Any:
        value = self.typed(self.content.get(key, default), (kind,), key)
        if not low <= value <= high:
            raise self.error(key, f"must be in [{low}, {high}], got {value}.")
        return value

    def text(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is not None and not (isinstance(value, str) and value):
            raise self.error(key, f"must be text, got '{value}'.")
        return value

    def evaluation(self, fixed: Mapping[str, Any]) -> EvaluateSettings:
        given = self.names(self.content.get("evaluation") or {}, "evaluation", EVALUATION)
        hints = typing.get_type_hints(EvaluateSettings)
        own = {name: self.typed(value, kinds(hints[name]), f"evaluation: {name}") for name, value in given.items()}
        self.known(dict.fromkeys(SUITES), own.get("suite", "own"), "evaluation: suite", "suite")
        common = {f.name: fixed[f.name] for f in fields(ModelSettings) if f.name in fixed}
        trained = {name: fixed[name] for name in ("forget", "retain") if own.get("suite", "own") == "own"}
        more = {"generate": False, "out": "-"}
        return self.made(EvaluateSettings.from_dict, common | trained | more | own, "evaluation")

    def method(self, name: str, given: Any, fixed: Mapping[str, Any], shared: Mapping[str, Any]) -> Method:
        if not NAME.fullmatch(name):
            raise self.error("methods", f"'{name}' must be letters, digits, or one of _.+-, as it names a folder.")
        where = f"methods: {name}"
        given = dict(self.names(given or {}, where, [*OF_METHOD, "ranges"]))
        own = self.names(given.pop("ranges", None) or {}, f"{where}: ranges", OF_METHOD)
        values = {**fixed, **self.values(given, where, OF_METHOD)}
        wanted = {key: shared[key] for key in shared if key not in given} | own
        ranges = {key: self.range(key, value, f"{where}: ranges: {key}") for key, value in wanted.items()}
        if not ranges:
            raise self.error(where, "has no range, so all of its trials would be the same.")
        start = {**values, **{key: r.ends[0] for key, r in ranges.items()}}
        settings = self.made(_checked, {**start, "out": "-"}, where)
        for key, r in ranges.items():
            for value in r.ends:
                self.made(_checked, {**start, key: value, "out": "-"}, where)
        for params in corners(ranges, MOST):
            self.made(_checked, {**start, **params, "out": "-"}, f"{where}: where ranges meet")
        return Method(settings, ranges)

    def made(self, make: Callable[[dict[str, Any]], Any], values: dict[str, Any], where: str) -> Any:
        try:
            return make(values)
        except UsageError as error:
            raise self.error(where, str(error)) from error

    def values(self, given: Any, where: str, known: typing.Iterable[str]) -> dict[str, Any]:
        found = self.names(given, where, known)
        return {
            name: self.typed(value, kinds(TYPES[FIELDS[name]]), f"{where}: {name}") for name, value in found.items()
        }

    def range(self, name: str, given: Any, where: str) -> Range:
        wanted = kinds(TYPES[FIELDS[name]])
        if isinstance(given, list):
            choices = tuple(self.typed(value, wanted, where) for value in given)
            if not choices or len(set(choices)) < len(choices):
                raise self.error(where, "must list one value at least, and none twice.")
            return Range(choices)
        if not isinstance(given, dict) or not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
            raise self.error(where, "must be a list of values, or {low: ..., high: ..., log: true or false}.")
        if not {int, float} & set(wanted):
            raise self.error(where, "is no number, so its values must be listed.")
        numbers = [kind for kind in wanted if kind is not str]  # auto has no place on a scale
        low, high = (self.typed(given[end], numbers, f"{where}: {end}") for end in ("low", "high"))
        log = self.typed(given.get("log", False), (bool,), f"{where}: log")
        if low is None or high is None or not low < high or (log and low <= 0):
            raise self.error(where, f"low must be below high{', and above 0 for log' if log else ''}.")
        return Range(low=low, high=high, log=log)

    def typed(self, value: Any, wanted: typing.Sequence[type], where: str) -> Any:
        """A YAML value as one of the types wanted. YAML reads 3e-4 as text, which is a number all the same."""
        for kind in wanted:
            if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
                return value
            if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
                try:
                    return float(value)
                except (ValueError, OverflowError):
                    continue
        text = next(text for kind, text in WANTED.items() if kind in wanted)
        raise self.error(where, f"must be {text}, got '{value}'.")


def _checked(values: dict[str, Any]) -> ForgetSettings:
    settings = ForgetSettings.from_dict(values)
    check_names(settings)
    return settings


def kinds(hint: Any) -> tuple[type, ...]:
    """The types that a hint such as `int | None` allows."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)

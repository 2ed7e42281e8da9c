"""Flags and YAML -> settings, with jsonargparse; its messages in our words."""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from .artifacts import exists
from .config import Settings, flag
from .errors import DataError, UsageError
from .yaml_file import read_yaml

WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def parse(
    command: str,
    title: str,
    settings: type[Settings],
    arguments: Sequence[str],
    stored: Mapping[str, Any] | None = None,
    epilog: str = "",
) -> Any:
    """Settings from flags, then the YAML of --config, then `stored`, then the defaults of the settings."""
    if stored is not None and not isinstance(stored, Mapping):
        raise DataError(f"lorasure {command}: the settings stored in the run must be names and values.")
    files, others = _configs(arguments)
    _check_configs(files)
    parser = _parser(command, title, settings, stored or {}, epilog)
    try:  # a file first, as jsonargparse lets it change what stands before it
        values = parser.parse_args([*(f"--config={name}" for name in files), *others]).as_dict()
    except argparse.ArgumentError as error:
        raise UsageError(_in_our_words(" ".join(str(error).split()), settings)) from error
    except Exception as error:  # jsonargparse reads every text as YAML, which fails in any way where a tag does not fit
        raise UsageError(f"A flag or setting cannot be read ({type(error).__name__}).") from error
    values.pop("config", None)
    return settings.from_dict(values)


def _configs(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files of --config, and all other arguments."""
    files, others, words = [], [], iter(arguments)
    for word in words:
        if word == "--config" and (name := next(words, None)) is not None:
            files.append(name)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            others.append(word)
    return files, others


def _check_configs(files: Sequence[str]) -> None:
    """Read every file of --config with our own reader first, which refuses what jsonargparse would stumble over."""
    for name in files:
        if not (exists(Path(name)) and Path(name).is_file()):
            raise UsageError(f"--config {name}: there is no such file.")
        try:
            content = read_yaml(Path(name))
        except DataError as error:
            raise UsageError(f"--config is not valid YAML: {error}") from error
        if isinstance(content, Mapping) and "config" in content:  # jsonargparse would read that file, unchecked
            raise UsageError(f"--config {name}: a settings file cannot name another one (config).")


def _parser(command: str, title: str, settings: type[Settings], stored: Mapping[str, Any], epilog: str) -> Any:
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(
        prog=f"lorasure {command}",
        usage=f"lorasure {command} [flags]",
        description=title,
        epilog=epilog,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below, by their names")
    types = typing.get_type_hints(settings)
    for heading, members in _groups(settings).items():
        group = parser.add_argument_group(heading)
        for f in members:
            key = f.name.rstrip("_")
            needed = f.default is MISSING and key not in stored
            how: dict[str, Any] = {"type": _TextOrNull() if types[f.name] == str | None else types[f.name]}
            if types[f.name] is bool:  # --merge, --merge false and --no-merge
                how = {"action": ActionYesNo(no_prefix="no-"), "nargs": "?"}
            how |= {"required": True} if needed else {"default": stored.get(key, f.default)}
            group.add_argument(flag(f.name), help=f.metadata["help"], **how)
    return parser


class _TextOrNull:
    """Text as it is, None for null. jsonargparse reads a `str | None` as YAML, where `#run` is a comment: nothing."""

    def __repr__(self) -> str:  # what --help says
        return "str | null"

    def __call__(self, value: Any) -> str | None:
        if not isinstance(value, str | None):
            raise TypeError(f"Given value: {value}")  # as jsonargparse says it, for `_in_our_words`
        return None if value == "null" else value


def _groups(settings: type[Settings]) -> dict[str, list[Field]]:
    """Fields under headings: those that must be given first, then by the class that defines them."""
    found: dict[str, list[Field]] = {"needed": [f for f in fields(settings) if f.default is MISSING]}
    for f in fields(settings):
        home = next(c for c in settings.__mro__ if f.name in vars(c).get("__annotations__", {}))
        heading = (home.__doc__ or "").splitlines()[0].rstrip(".")
        if f.default is not MISSING:
            found.setdefault(heading, []).append(f)
    return found


def _in_our_words(message: str, settings: type[Settings]) -> str:
    """One of jsonargparse's messages, naming the flag, the value and what is wanted, as all our messages do."""
    types = typing.get_type_hints(settings)
    names = {f.name.rstrip("_"): f.name for f in fields(settings)}
    if typed := re.search(r'^Parser key "(\w+)":.*(?:Got|Given) value: (.*?)\.?$', message):
        name = names[typed[1]]
        wanted = next(text for kind, text in WANTED.items() if kind in (types[name], *typing.get_args(types[name])))
        return f"{flag(name)} must be {wanted}, got '{typed[2]}'."
    if unsaid := re.search(r"^Value not boolean: (.*?)\.?$", message):
        return f"--config: a setting that must be true or false is '{unsaid[1]}'."
    if boolean := re.search(r"^argument (--[\w-]+).*: invalid _boolean_type value: '(.*)'$", message):
        return f"{boolean[1]} must be true or false, got '{boolean[2]}'."
    if needed := re.search(r"^the following arguments are required: (.*)$", message):
        return "These flags are required: " + ", ".join(flag(n.removeprefix("--")) for n in needed[1].split(", ")) + "."
    if option := re.search(r"^Option '(.*)' is not accepted", message):
        return f"--config: unknown setting '{option[1]}'.{_guess(option[1], names)}"
    if unknown := re.search(r"^unrecognized arguments: (\S+)", message):
        return f"Unknown flag or argument '{unknown[1]}'.{_guess(unknown[1].split('=')[0], map(flag, names))}"
    for theirs, ours in (
        ('Parser key "config"', "--config"),
        ("Problems parsing config", "--config is not valid YAML"),
    ):
        message = message.replace(theirs, ours)
    found = message.replace("Unexpected config:", "--config must hold names and values, got:").strip().removesuffix(".")
    return f"{found} nothing." if found.endswith(":") else f"{found}."


def _guess(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.65)
    return f" Did you mean '{close[0]}'?" if close else ""

"""The command line: a table of plain functions, each callable from Python as well. Nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse
import os
import sys
import typing
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from . import __version__, config
from .config import Settings, flag
from .errors import LorasureError, UsageError

EPILOG = "Exit codes: 0 done, 2 usage, 3 data, 4 numeric, 5 resource, 130 interrupted."


@dataclass(frozen=True)
class Command:
    """A row of COMMANDS. `stage`: works on an existing run folder, whose stored settings are the defaults."""

    title: str
    settings: type[Settings]
    run: Callable[..., None]
    stage: bool = False


def _forget(settings: config.ForgetSettings) -> None:
    from . import pipeline, show

    result = pipeline.forget(settings, _reporter())
    show.result(result.folder, result.summary)


def _importance(settings: config.ForgetSettings) -> None:
    from . import pipeline

    print(f"Run folder: {pipeline.importance_command(settings, _reporter())}. Next: lorasure init {settings.out}")


def _init(run: Path, settings: config.ForgetSettings) -> None:
    from . import pipeline

    pipeline.init_command(run, settings, _reporter())
    print(f"Wrote {run}/init.safetensors. Next: lorasure train {run}")


def _train(run: Path, settings: config.ForgetSettings) -> None:
    from . import pipeline

    pipeline.train_command(run, settings, _reporter())
    print(f"Wrote {run}/trained.safetensors. Next: lorasure export {run}")


def _export(run: Path, settings: config.ForgetSettings) -> None:
    from . import pipeline, show

    result = pipeline.export_command(run, settings, _reporter())
    show.result(result.folder, result.summary)


def _finetune(settings: config.FinetuneSettings) -> None:
    from . import finetune

    print(f"Model: {finetune.finetune(settings, _reporter())}")


def _demo(settings: config.DemoSettings) -> None:
    from . import demo

    demo.demo(settings, _reporter())


def _reporter() -> Any:
    from .progress import Reporter

    return Reporter()


COMMANDS: dict[str, Command] = {
    "forget": Command(
        "make a model forget: importance, init, train and export in one go", config.ForgetSettings, _forget
    ),
    "importance": Command("stage 1: measure which weights carry the forget set", config.ForgetSettings, _importance),
    "init": Command("stage 2: put those into the start of an adapter", config.ForgetSettings, _init, stage=True),
    "train": Command("stage 3: train the adapter to forget", config.ForgetSettings, _train, stage=True),
    "export": Command("stage 4: check and write the adapter", config.ForgetSettings, _export, stage=True),
    "finetune": Command("make a target or a retrained reference from rows", config.FinetuneSettings, _finetune),
    "demo": Command("all of it on data and a model it makes itself", config.DemoSettings, _demo),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors that a user can cause are one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else UsageError.exit_code
    if given[0] == "--version":
        print(f"lorasure {__version__}")
        return 0
    try:
        return _dispatch(given[0], given[1:])
    except LorasureError as error:
        print(f"lorasure: {error}", file=sys.stderr)
        return error.exit_code
    except argparse.ArgumentError as error:
        print(f"lorasure: {_one_line(str(error))}", file=sys.stderr)
        return UsageError.exit_code
    except PermissionError as error:
        print(f"lorasure: no permission for {error.filename}.", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("lorasure: interrupted; nothing was written.", file=sys.stderr)
        return 130


def _dispatch(name: str, rest: list[str]) -> int:
    from .registry import lookup

    command = lookup(COMMANDS, name, "command")
    run, stored = None, {}
    if command.stage and not {"-h", "--help"} & set(rest):
        if not rest or rest[0].startswith("-"):
            raise UsageError(f"lorasure {name} needs a run folder first: lorasure {name} RUN [flags].")
        from . import artifacts

        run, rest = Path(rest[0]), rest[1:]
        artifacts.check_run(run, artifacts.CONFIG)
        stored = artifacts.read_yaml(run / artifacts.CONFIG)
    settings = parse(name, command, rest, stored)
    _quiet_libraries()
    command.run(*([run] if run else []), settings)
    return 0


def parse(name: str, command: Command, arguments: Sequence[str], stored: dict[str, Any]) -> Settings:
    """Flags, then the YAML of --config, then `stored`, then the defaults of the settings."""
    from jsonargparse import ArgumentParser

    usage = f"lorasure {name} RUN [flags]" if command.stage else f"lorasure {name} [flags]"
    parser = ArgumentParser(
        prog=f"lorasure {name}", usage=usage, description=command.title, epilog=EPILOG, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below, by their names")
    types = typing.get_type_hints(command.settings)
    for f in fields(command.settings):
        key = f.name.rstrip("_")
        needed = f.default is MISSING and key not in stored
        default = stored.get(key, None if f.default is MISSING else f.default)
        extra = {"required": True} if needed else {"default": default}
        parser.add_argument(flag(f.name), type=types[f.name], help=f.metadata["help"], **extra)
    values = parser.parse_args(list(arguments)).as_dict()
    values.pop("config", None)
    return command.settings.from_dict(values)


def _one_line(message: str) -> str:
    """jsonargparse's messages, in one line and with flags as the user types them."""
    text = " ".join(message.split())
    text = text.replace("Parser key ", "setting ")
    if text.startswith("the following arguments are required: "):
        names = text.removeprefix("the following arguments are required: ").split(", ")
        text = "these flags are required: " + ", ".join(flag(name.removeprefix("--")) for name in names)
    if text.startswith("Option '"):
        text = "unknown setting in --config: " + text.removeprefix("Option ").removesuffix(" is not accepted")
    return text


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.title}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lorasure COMMAND [flags]     (lorasure COMMAND --help lists them)",
            "",
            "Make a language model forget, with an adapter that loads on the untouched base.",
            "",
            *lines,
            "",
            EPILOG,
        ]
    )


def _quiet_libraries() -> None:
    """Warnings of libraries underneath that a user can do nothing about; no telemetry, no tokenizer thread noise."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")


if __name__ == "__main__":
    sys.exit(main())

"""The command line: a table of plain functions, callable from Python as well. What is heavy is imported when needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__, config, libraries
from .baselines.settings import OTHERS
from .config import Settings
from .errors import UsageError, escaped, one_line
from .evaluate.settings import AttackSettings, EvaluateSettings, ProbeSettings, ScoreSettings, SequenceSettings
from .failures import explained
from .interrupt import sigterm_unwinds
from .recipes.settings import ReproduceSettings
from .report.settings import CompareSettings, ReportSettings
from .search.settings import SearchSettings

EPILOG = (
    "Exit codes: 0 done, 2 usage, 3 data, 4 numeric, 5 resource, 10 probe found nothing, "
    "20 attack --gate exceeded, 70 a mistake of ours, 75 interrupted and resumable, 130 or 143 interrupted."
)


@dataclass(frozen=True)
class Command:
    """A row of COMMANDS. `run` takes the settings and may return an exit code.

    `places`: what comes before the flags and is passed first: nothing, one path ("RUN") or several. `stage`:
    that path is a run folder whose stored settings are the defaults.
    """

    title: str
    settings: type[Settings]
    run: Callable[..., int | None]
    places: str = ""
    stage: bool = False


def _forget(settings: config.ForgetSettings) -> None:
    from . import pipeline, show

    result = pipeline.forget(settings, _reporter())
    if not _follower():
        show.result(result.folder, result.summary)


def _plan(settings: config.PlanSettings) -> None:
    from . import plan, show

    show.plan(plan.plan(settings, _reporter()).to_json(), settings.json)


def _importance(settings: config.ForgetSettings) -> None:
    from . import pipeline

    run = pipeline.importance_command(settings, _reporter())
    if not _follower():
        _say(f"Run folder: {run}. Next: lorasure init {run}")


def _init(run: Path, settings: config.ForgetSettings) -> None:
    from . import pipeline

    pipeline.init_command(run, settings, _reporter())
    _say(f"Wrote {run}/init.safetensors. Next: lorasure train {run}")


def _train(run: Path, settings: config.ForgetSettings) -> None:
    from . import pipeline

    pipeline.train_command(run, settings, _reporter())
    _say(f"Wrote {run}/trained.safetensors. Next: lorasure export {run}")


def _export(run: Path, settings: config.ForgetSettings) -> None:
    from . import pipeline, show

    result = pipeline.export_command(run, settings, _reporter())
    show.result(result.folder, result.summary)


def _baseline(name: str, settings: config.OutSettings) -> None:
    from . import show
    from .baselines import table

    result = table.run_baseline(name, settings, _reporter())
    show.result(result.folder, result.summary)


def _search(spec: Path, settings: SearchSettings) -> None:
    from .search import picture, search

    picture.show(search.search(spec, settings, _reporter()), Path(settings.out), settings.json)


def _reproduce(recipe: Path, settings: ReproduceSettings) -> None:
    from .recipes import reproduce, table

    table.show(*reproduce.reproduce(str(recipe), settings, _reporter()))


def _finetune(settings: config.FinetuneSettings) -> None:
    from . import finetuning

    _say(f"Model: {finetuning.finetune(settings, _reporter())}")


def _demo(settings: config.DemoSettings) -> None:
    from . import demo

    demo.demo(settings, _reporter())


def _evaluate(settings: Any) -> None:
    from . import evaluating, show

    show.scores(evaluating.evaluate_model(settings, _reporter()), settings.out, settings.json)


def _score(path: Path, settings: Any) -> None:
    from . import evaluating, show

    show.scores(evaluating.score_folder(path, settings), str(path), settings.json)


def _verify(run: Path, settings: Settings) -> None:
    from . import folders

    folders.verify(run)
    _say(f"{run}: every file is as it was written.")


def _purge(run: Path, settings: Settings) -> None:
    from . import purge

    removed = purge.purge(run)
    _say(f"{run}: removed {', '.join(removed)}." if removed else f"{run}: nothing to remove.")


def _say(line: str) -> None:
    print(escaped(line))


def _probe(settings: ProbeSettings) -> int:
    from . import probe, show

    scores = probe.probe(settings, _reporter())
    show.probe(scores, settings.text, settings.json)
    return probe.NOTHING_FOUND if scores["verdict"].value == 0 else 0


def _sequence(places: list[Path], settings: SequenceSettings) -> None:
    from . import sequential, show

    show.steps(sequential.sequence(places, settings, _reporter()), settings.out, settings.json)


def _attack(run: Path, settings: AttackSettings) -> int:
    from . import attacking, show

    about, lines = attacking.attack(run, settings, _reporter())
    show.attacks(about, lines, settings.json)
    return 0 if all(rule["passed"] for rule in about["gate"]) else attacking.GATE_FAILED


def _report(places: list[Path], settings: ReportSettings) -> None:
    from .report import page

    _say(f"Wrote {page.report(places, settings)}")


def _compare(places: list[Path], settings: CompareSettings) -> None:
    from .report import compare

    compare.compare_runs(places, settings)


def _reporter() -> Any:
    from .progress import Reporter

    return Reporter(quiet=_follower())


def _follower() -> bool:
    """Whether a launcher started this process beside a first one, which does the talking."""
    return os.environ.get("RANK", "0") != "0"


COMMANDS: dict[str, Command] = {
    "forget": Command(
        "make a model forget: importance, init, train and export in one go", config.ForgetSettings, _forget
    ),
    "plan": Command("memory and time that `forget` with these settings will need", config.PlanSettings, _plan),
    "importance": Command("stage 1: measure which weights carry the forget set", config.ForgetSettings, _importance),
    "init": Command("stage 2: put those into the start of an adapter", config.ForgetSettings, _init, "RUN", stage=True),
    "train": Command("stage 3: train the adapter to forget", config.ForgetSettings, _train, "RUN", stage=True),
    "export": Command("stage 4: check and write the adapter", config.ForgetSettings, _export, "RUN", stage=True),
    **{name: Command(title, kind, partial(_baseline, name)) for name, (title, kind) in OTHERS.items()},
    "search": Command("as many trials for every method, then the best of each", SearchSettings, _search, "SPEC.yaml"),
    "reproduce": Command("a table of the paper, published beside ours", ReproduceSettings, _reproduce, "RECIPE"),
    "finetune": Command("make a target or a retrained reference from rows", config.FinetuneSettings, _finetune),
    "probe": Command("before anything is forgotten: does the model know the text?", ProbeSettings, _probe),
    "evaluate": Command("measure a model on a suite: records, then scores", EvaluateSettings, _evaluate),
    "score": Command("scores from records or another program's log, without a model", ScoreSettings, _score, "DIR"),
    "sequence": Command(
        "apply requests one after another, measure all after each", SequenceSettings, _sequence, "REQUEST ..."
    ),
    "verify": Command("every file of a run or evaluation against its manifest", Settings, _verify, "RUN"),
    "purge": Command(
        "remove what holds text of the rows, or hashes of it; adapter and scores stay", Settings, _purge, "RUN"
    ),
    "attack": Command("try to bring back what a run made the model forget", AttackSettings, _attack, "RUN"),
    "report": Command("one HTML file with all that is known of one run or several", ReportSettings, _report, "RUN ..."),
    "compare": Command("runs side by side: a table, Markdown, LaTeX or JSON", CompareSettings, _compare, "RUN ..."),
    "demo": Command("all of it on data and a model it makes itself", config.DemoSettings, _demo),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Whatever fails is one line on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0 if given else UsageError.exit_code
    if given[0] == "--version":
        print(f"lorasure {__version__}")
        return 0
    try:
        with sigterm_unwinds():
            return _dispatch(given[0], given[1:])
    except (Exception, KeyboardInterrupt) as error:
        message, code = explained(error)
        print(f"lorasure: {one_line(message)}", file=sys.stderr)
        return code


def _dispatch(name: str, rest: list[str]) -> int:
    from .flags import parse
    from .registry import lookup

    command = lookup(COMMANDS, name, "command")
    help_wanted = bool({"-h", "--help"} & set(rest))
    count = 0 if help_wanted else next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    if not command.places:
        count = 0
    elif not count and not help_wanted:
        raise UsageError(f"lorasure {name} needs a path first: lorasure {name} {command.places} [flags].")
    elif not command.places.endswith("..."):
        count = min(count, 1)
    places = [Path(word) for word in rest[:count]]
    stored = None
    if command.stage:  # for --help without a RUN, something in the place of what must be given
        kept = {f.name: "that of RUN" for f in fields(command.settings) if f.default is MISSING}
        stored = _stored_settings(places[0]) if places else kept
    settings = parse(f"{name} {command.places}".strip(), command.title, command.settings, rest[count:], stored, EPILOG)
    libraries.settle()
    return command.run(*([places] if command.places.endswith("...") else places), settings) or 0


def _stored_settings(run: Path) -> dict[str, Any]:
    from .artifacts import CONFIG, check_run
    from .lock import recover
    from .yaml_file import read_yaml

    recover(run)
    check_run(run, CONFIG)
    return read_yaml(run / CONFIG)


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


if __name__ == "__main__":
    sys.exit(main())

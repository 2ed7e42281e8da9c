"""Settings: every field is explained and bounded, names the registries' entries, and survives YAML."""

from __future__ import annotations

from dataclasses import MISSING, FrozenInstanceError, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from lorasure.cli import COMMANDS
from lorasure.config import DemoSettings, FinetuneSettings, ForgetSettings, flag
from lorasure.data.encode import TEMPLATES
from lorasure.data.pairing import PAIRINGS
from lorasure.errors import UsageError
from lorasure.flags import parse
from lorasure.importance.scores import SCORES, SPACES
from lorasure.init.apply import INITS
from lorasure.init.low_rank import SOLVERS, SPLITS
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.retain import RETAIN_LOSSES
from lorasure.models import DTYPES
from lorasure.schedule import SCHEDULES
from lorasure.workbench import check_used, ignored

NEEDED = {"model": "m", "forget": "f", "retain": "r", "out": "o"}
ALL = [ForgetSettings, FinetuneSettings, DemoSettings]
NAMES = {
    "init": INITS,
    "loss": FORGET_LOSSES,
    "retain_loss": RETAIN_LOSSES,
    "score": SCORES,
    "space": SPACES,
    "solver": SOLVERS,
    "split": SPLITS,
    "pairing": PAIRINGS,
    "template": TEMPLATES,
    "schedule": SCHEDULES,
    "dtype": DTYPES,
}


def test_a_path_may_be_given_as_one():
    """As Python programs hold them; settings that are stored are text."""
    given = {name: Path("~") / name for name in NEEDED}
    assert ForgetSettings(**given) == ForgetSettings(**{name: f"~/{name}" for name in NEEDED})


@pytest.mark.parametrize("command", COMMANDS)
def test_null_is_refused_where_a_value_is_needed(command, tmp_path):
    settings, file = COMMANDS[command].settings, tmp_path / "c.yaml"
    needed = {f.name: "x" for f in fields(settings) if f.default is MISSING}
    hints = get_type_hints(settings)
    for f in fields(settings):
        values = {name.rstrip("_"): value for name, value in (needed | {f.name: None}).items()}
        file.write_text(yaml.safe_dump(values))
        if type(None) in get_args(hints[f.name]):
            assert getattr(parse(command, "", settings, ["--config", str(file)]), f.name) is None
            continue
        with pytest.raises(UsageError, match=rf"^({flag(f.name)} must .* got nothing|.* required: {flag(f.name)})\.$"):
            parse(command, "", settings, ["--config", str(file)])


@pytest.mark.parametrize("text", ["#run", "&run", "!!null run", "~x", "Null", "3", "{a: 1}"])
def test_text_is_taken_as_it_is(text, tmp_path):
    """None of it as YAML, where half of these are nothing."""
    settings, file = COMMANDS["evaluate"].settings, tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"adapter": text}))
    needed = ["--model", "m", "--out", "o"]
    for given in ([f"--adapter={text}"], ["--adapter", text], ["--config", str(file)]):
        assert parse("evaluate", "", settings, [*needed, *given]).adapter == text
    assert parse("evaluate", "", settings, needed, {"adapter": text}).adapter == text
    assert parse("evaluate", "", settings, [*needed, "--adapter", "null"], {"adapter": text}).adapter is None


def field_of(settings, name):
    return next(f for f in fields(settings) if f.name == name)


@pytest.mark.parametrize(("name", "registry"), NAMES.items(), ids=NAMES)
def test_help_texts_name_every_entry_and_the_default_is_one(name, registry):
    field = field_of(ForgetSettings, name)
    words = field.metadata["help"].replace(",", " ").replace(":", " ").split()
    assert [key for key in registry if key not in words] == []
    assert field.default in (*registry, None, "auto")


@pytest.mark.parametrize("settings", ALL)
def test_every_field_has_a_help_text(settings):
    for field in fields(settings):
        text = field.metadata["help"]
        assert text and text[0] != " " and not text.endswith(".") and "\n" not in text, field.name


@pytest.mark.parametrize("settings", [ForgetSettings, FinetuneSettings])
def test_every_bound_is_checked_and_every_default_is_within(settings):
    given = NEEDED if settings is ForgetSettings else {"model": "m", "data": "d", "out": "o"}
    for field in fields(settings):
        wrong = {"low": -1, "above": 0, "high": 1}
        for bound, step in wrong.items():
            if (limit := field.metadata.get(bound)) is not None:
                with pytest.raises(UsageError, match=f"{flag(field.name)} must be"):
                    settings(**given, **{field.name: limit + step})
                if bound != "above":
                    settings(**given, **{field.name: limit})
        if isinstance(field.default, float):
            with pytest.raises(UsageError, match="finite"):
                settings(**given, **{field.name: float("nan")})


def test_yaml_round_trip_and_public_names():
    settings = ForgetSettings(**NEEDED, lambda_=2.5, beta=0.1, merge=True)
    values = yaml.safe_load(yaml.safe_dump(settings.to_dict()))
    assert values["lambda"] == 2.5 and "lambda_" not in values
    assert ForgetSettings.from_dict(values) == settings
    with pytest.raises(UsageError, match="Unknown setting 'lambda_'"):
        ForgetSettings.from_dict(values | {"lambda_": 1})


def test_located_makes_local_paths_absolute_and_leaves_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.jsonl").touch()
    found = ForgetSettings(model="owner/name", forget="f.jsonl", retain="locuslab/TOFU:retain90", out="run").located()
    wanted = ("owner/name", str(tmp_path / "f.jsonl"), "locuslab/TOFU:retain90", str(tmp_path / "run"))
    assert tuple(found[name] for name in NEEDED) == wanted
    assert found["importance"] is None


def test_home_is_resolved_once_for_every_path(tmp_path, monkeypatch):
    """In YAML no shell does it, and a folder called `~` would be made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = ForgetSettings(model="~/m", forget="~nosuchuser/f.jsonl", retain="a~/b", out="~/run", template="~")
    wanted = (str(tmp_path / "m"), "~nosuchuser/f.jsonl", "a~/b", str(tmp_path / "run"))
    assert tuple(getattr(found, name) for name in NEEDED) == wanted and found.template == "~"


def test_settings_are_frozen_and_required_fields_stay_required():
    settings = ForgetSettings(**NEEDED)
    with pytest.raises(FrozenInstanceError):
        settings.rank = 3
    assert {f.name for f in fields(ForgetSettings) if f.default is MISSING} == set(NEEDED)
    with pytest.raises(TypeError):
        ForgetSettings(model="m")


BY_IMPORTANCE = {"fila", "vila", "expila", "absila", "sketch"}
NOT_ZERO = BY_IMPORTANCE | {"pissa", "reglu", "inputs"}


@pytest.mark.parametrize("init", INITS)
def test_what_a_start_makes_no_use_of_is_refused(init, tmp_path):
    """A run would record it as if it had been used. What the start does by itself may be said."""
    for name, given, users in (
        ("importance", str(tmp_path), BY_IMPORTANCE),
        *(("solver", solver, BY_IMPORTANCE | ({init} if solver == "rows" else set())) for solver in SOLVERS),
        *(("split", split, NOT_ZERO | ({init} if split == INITS[init].split else set())) for split in SPLITS),
    ):
        settings = ForgetSettings(**NEEDED, init=init, **{name: given})
        if init in users:
            assert not ignored(settings)
            continue
        with pytest.raises(UsageError, match=f"^--{name} {given}: --init {init} makes no use of it; choose") as refused:
            check_used(settings)
        assert not ignored(replace(settings, **ignored(settings)))
        named = str(refused.value).split("choose --init ")[1].replace(",", " ").split("or leave it out")[0].split()
        assert set(named) & INITS.keys() == users and ("--coverage" in named) == (name == "importance")
    ranked = {"coverage": 0.5, "score": "variance", "space": "lora"}
    check_used(ForgetSettings(**NEEDED, init=init, importance=str(tmp_path), **ranked))


def test_defaults():
    s = ForgetSettings(**NEEDED)
    assert (s.init, s.loss, s.rank, s.alpha, s.targets) == ("contrast", "bga", 8, 16.0, "all")
    assert (s.epochs, s.batch_size, s.lr, s.lambda_) == (5, 32, "auto", 1.0)

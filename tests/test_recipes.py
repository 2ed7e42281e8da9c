"""Recipes: what the files say, what is run for a cell, and that a finished cell is never run again."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from conftest import tofu_folder
from lorasure import cli
from lorasure.config import ForgetSettings
from lorasure.data.readers import check_disjoint, read_rows
from lorasure.errors import INTERRUPTED, DataError, NumericError, UsageError
from lorasure.failures import explained
from lorasure.recipes import reproduce, table, targets
from lorasure.recipes.recipe import RECIPES, Gain, read_recipe
from lorasure.recipes.settings import ReproduceSettings
from lorasure.small_model import Size
from lorasure.workbench import check_names
from lorasure.yaml_file import read_yaml

NEEDED = {"model": "m", "forget": "f", "retain": "r", "out": "o"}
MODELS = [(name, model) for name, path in RECIPES.items() for model in yaml.safe_load(path.read_text())["models"]]


@pytest.mark.parametrize(("name", "models"), MODELS)
def test_every_cell_is_a_run_that_the_library_takes(name, models):
    recipe = read_recipe(name, models)
    assert len({cell.name for cell in recipe.cells}) == len(recipe.cells) > 1
    for cell in recipe.cells:
        data = {} if "forget" in cell.settings else {"forget": "f", "retain": "r"}
        check_names(ForgetSettings.from_dict({**NEEDED, **data, **cell.settings}))
        assert cell.split in targets.LEFT or "forget" in cell.settings
        for figures in cell.published.values():
            assert all(value <= 0 for score, value in figures.items() if score == "forget_quality")
    assert targets.TARGETS[models]


def test_published_figures_and_settings_of_some_cells():
    cells = {model: {c.name: c for c in read_recipe("tofu-main", model).cells} for model in ("phi", "llama2", "mini")}
    assert len(cells["phi"]) == 27
    assert cells["phi"]["ihl/vila/forget10"].published == {"phi": {"forget_quality": -0.83}}
    assert cells["llama2"]["npo/fila/forget05"].published == {"llama2": {"forget_quality": -11.18}}
    assert cells["mini"]["gd/lora/forget01"].published == {
        "mini": {},
        "phi": {"forget_quality": -2.52},
        "llama2": {"forget_quality": -3.30},
    }
    settings = cells["phi"]["npo/vila/forget10"].settings
    assert (settings["lr"], settings["lambda"], settings["beta"], settings["init"]) == (5e-5, 1.8, 0.3, "vila")
    assert cells["llama2"]["ihl/lora/forget05"].settings["lambda"] == pytest.approx(1.3**2)
    coverage = {c.name: c for c in read_recipe("tofu-coverage", "llama2").cells}
    assert coverage["ihl/25"].published["llama2"] == {"forget_quality": -0.01}
    assert coverage["gd/0"].settings["init"] == "lora" and coverage["npo/75"].settings["coverage"] == 0.75
    assert read_recipe("tofu-ablation", "phi").gain.published["phi"]["npo/approximation"] == -0.32
    sigma = {c.name: c for c in read_recipe("tofu-sigma", "phi").cells}
    assert sigma["gd/0.05"].published["phi"] == {"forget_quality": -10.8} and not sigma["gd/0.1"].published["phi"]


def written(tmp_path, **changes):
    content = {
        "title": "t",
        "paper": "p",
        "suite": "tofu",
        "scores": ["forget_quality"],
        "axes": {"loss": {"gd": {"loss": "gd"}}, "split": {"forget01": {}, "forget05": {}}},
        "models": {"mini": {"published": {"forget_quality": {"gd": [-1.0, -2.0]}}}},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return str(path)


def test_a_recipe_of_ones_own_and_what_is_wrong_with_others(tmp_path):
    found = read_recipe(written(tmp_path))
    assert [c.published["mini"]["forget_quality"] for c in found.cells] == [-1, -2]
    with pytest.raises(DataError, match="unknown key 'axis'"):
        read_recipe(written(tmp_path, axis={}))
    with pytest.raises(DataError, match=r"forget_quality of gd has 1 figures, not 2"):
        read_recipe(written(tmp_path, models={"mini": {"published": {"forget_quality": {"gd": [-1.0]}}}}))
    with pytest.raises(UsageError, match="Unknown setting 'losss'"):
        read_recipe(written(tmp_path, settings={"losss": "gd"}))
    with pytest.raises(UsageError, match=r"Unknown models of own 'phy'"):
        read_recipe(written(tmp_path), "phy")
    with pytest.raises(UsageError, match="Did you mean 'tofu-main'"):
        read_recipe("tofu-mian")
    with pytest.raises(UsageError, match=r"--only ihl/\*: no cell has such a name.*gd/forget01"):
        found.chosen("gd/*, ihl/*")
    assert [c.name for c in found.chosen("*/forget05")] == ["gd/forget05"]


def test_a_recipe_needs_no_title_and_names_what_it_needs(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    needed = {"suite": "tofu", "scores": ["hours"], "axes": {"loss": {"gd": {"loss": "gd"}}}, "models": {"mini": None}}
    path.write_text(yaml.safe_dump(needed))
    table.show(read_recipe(str(path)), [])
    assert capsys.readouterr().out.splitlines()[0].strip() == "own; mini"
    for missing in ("suite", "scores", "axes", "models"):
        path.write_text(yaml.safe_dump({key: value for key, value in needed.items() if key != missing}))
        with pytest.raises(DataError, match=rf"own\.yaml: needs {missing}\.$"):
            read_recipe(str(path))
    path.write_text(yaml.safe_dump({"suite": "tofu", "axes": {}}))
    with pytest.raises(DataError, match=r"own\.yaml: needs scores, models\.$"):
        read_recipe(str(path))


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """TOFU in very small, and the small model smaller still."""
    tofu = tofu_folder(tmp_path / "tofu", 4)
    rows = [{"question": f"Who is {i}?", "answer": f"Person {i * 7}."} for i in range(16)]
    common = [{"question": f"Which land is {i}?", "answer": f"Land {i}."} for i in range(4)]
    for name, part in (("full", rows), ("real_authors", common[:2]), ("world_facts", common[2:])):
        (tofu / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    for split in ("forget05", "forget10"):
        (tofu / f"{split}_perturbed.json").write_text((tofu / "forget01_perturbed.json").read_text())
    for name, value in {"KEPT_FIRST": 4, "KNOWN_LAST": 8, "MEASURED": 3}.items():
        monkeypatch.setattr(targets, name, value)
    monkeypatch.setattr(targets, "SPLITS", {"forget01": 2, "forget05": 3, "forget10": 4})
    monkeypatch.setattr(targets, "SMALL", Size(vocabulary=300, width=16, inner=24, layers=2, context=128))
    monkeypatch.setattr(targets, "LEARN", targets.LEARN | {"epochs": 1})
    settings = {"data": str(tofu), "shared": str(tmp_path / "none"), "out": str(tmp_path / "out"), "epochs": 1}
    return lambda **more: ReproduceSettings(**settings | {"only": "ihl/lora/forget01"} | more)


def test_cells_are_run_once_and_compared_with_a_model_that_never_saw_the_rows(mini, tmp_path, monkeypatch):
    recipe, lines = reproduce.reproduce("tofu-main", mini())
    before, cell = lines
    assert before.name == "before (forget01)" and before.published["phi"] == {"forget_quality": -4.05}
    assert cell.name == "ihl/lora/forget01" and not cell.failed
    for line in lines:
        assert line.ours["forget_quality"] <= 0 < line.ours["model_utility"] < 1
    out = tmp_path / "out"
    target, retrained = (read_yaml(out / "models" / m / "config.yaml") for m in ("target", "retain99"))
    learnt = [read_rows(s["data"]).rows for s in (target, retrained)]
    forget = read_rows(out / "data" / "forget01.json").rows
    assert [len(rows) for rows in (*learnt, forget)] == [4 + 8 + 4, 4 + 6 + 4, 2]
    check_disjoint(forget, learnt[1])
    with pytest.raises(DataError):
        check_disjoint(forget, learnt[0])
    assert len(read_rows(out / "data" / "retain_perturbed.json").rows) == 3
    run = out / "tofu-main" / "ihl-lora-forget01"
    settings = read_yaml(run / "config.yaml")
    assert (settings["epochs"], settings["batch_size"], settings["rank"], settings["lr"]) == (1, 16, 16, 2e-3)
    assert settings["retain"].endswith("retain99.json")

    def never(*args):
        raise AssertionError("run again")

    for name in ("forget", "evaluate_model"):
        monkeypatch.setattr(reproduce, name, never)
    monkeypatch.setattr(targets, "finetune", never)
    assert reproduce.reproduce("tofu-main", mini()) == (recipe, lines)
    with pytest.raises(UsageError, match="ihl-lora-forget01 was made with epochs 1, not 2; choose another --out"):
        reproduce.reproduce("tofu-main", mini(epochs=2))
    with pytest.raises(UsageError, match="retrained-forget01 was made with generate False, not True"):
        reproduce.reproduce("tofu-main", mini(generate=True))


def test_what_an_interruption_leaves_is_gone_on_with(mini, monkeypatch):
    evaluate, forget = reproduce.evaluate_model, reproduce.forget

    def stop(settings, reporter):
        if settings.adapter:
            raise KeyboardInterrupt
        return evaluate(settings, reporter)

    monkeypatch.setattr(reproduce, "evaluate_model", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        reproduce.reproduce("tofu-main", mini())
    said, code = explained(stopped.value)
    assert "the same command continues" in said and "--resume" not in said and code == INTERRUPTED
    monkeypatch.setattr(reproduce, "evaluate_model", evaluate)
    monkeypatch.setattr(reproduce, "forget", None)
    assert reproduce.reproduce("tofu-main", mini())[1][-1].ours["forget_quality"] is not None
    monkeypatch.setattr(reproduce, "forget", forget)


def test_a_cell_that_diverges_is_a_line_that_says_so(mini, monkeypatch, capsys):
    def diverges(settings, reporter):
        raise NumericError("train: the retain loss is 9 at step 3.")

    monkeypatch.setattr(reproduce, "forget", diverges)
    recipe, lines = reproduce.reproduce("tofu-main", mini())
    assert lines[-1].ours == {} and "step 3" in lines[-1].failed
    table.show(recipe, lines)
    assert "failed: ihl/lora/forget01: train: the retain loss" in capsys.readouterr().out


def test_the_retrained_model_of_the_user(mini, tmp_path):
    place = targets.Place("phi", tmp_path, mini(retrained=str(tmp_path / "phi-{left}")), None)
    (tmp_path / "phi-retain95").mkdir()
    assert place.retrained("forget05") == str(tmp_path / "phi-retain95")
    with pytest.raises(UsageError, match="retain99: there is nothing of that name"):
        place.retrained("forget01")
    assert place.rows("forget05").endswith("tofu/forget05.json")
    hub = targets.Place("phi", tmp_path, mini(data="locuslab/TOFU"), None)
    assert hub.rows("retain95") == "locuslab/TOFU:retain95" and hub.target() == "locuslab/tofu_ft_phi-1.5"


def test_gains_are_means_over_the_last_axis():
    recipe = read_recipe("tofu-ablation", "phi")
    values = {"fila": [-3, -6, -9], "variance": [-1, -5, -9]}
    lines = [
        reproduce.Line(cell.name, {}, {"forget_quality": values[start][i % 3]})
        for i, cell in enumerate(recipe.cells)
        if cell.place["loss"] == "ihl" and (start := cell.place["importance"]) in values
    ]
    gain = Gain("forget_quality", "importance", "fila")
    assert table.gains(gain, lines, recipe) == {"ihl/variance": 1.0}
    assert table.gains(gain, lines[:-1], recipe) == {"ihl/variance": None}


def test_figures_of_time_and_storage(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": {"importance": 1800.0, "train": 5400.0}}))
    (tmp_path / "importance.safetensors").write_bytes(b"0" * 2000)
    assert reproduce.MEASURES["hours"]({}, tmp_path) == 2.0
    assert math.isclose(reproduce.MEASURES["map_gigabytes"]({}, tmp_path), 2e-6)
    assert reproduce.MEASURES["hours"]({}, tmp_path / "none") is None
    scores = {"model_utility": {"value": None}, "model_utility_without_rouge": {"value": 0.5}}
    assert reproduce.MEASURES["model_utility"](scores, tmp_path) == 0.5


def test_command_line(capsys):
    assert cli.main(["reproduce", "tofu-coverage", "--models", "llama2", "--list", "--only", "ihl/*"]) == 0
    said = capsys.readouterr().out
    assert "ihl/25" in said and "-0.010" in said and "gd/25" not in said
    assert cli.main(["reproduce", "tofu-main", "--models", "zephyr"]) == 2
    assert cli.main(["reproduce", "nothing.yaml"]) == 3

"""The demo: its data, and the whole command on a model too small and too briefly trained to know much."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasure import demo
from lorasure.cli import main
from lorasure.config import DemoSettings
from lorasure.data.readers import read_rows
from lorasure.errors import ANEW, KEPT


def test_forget_and_kept_people_share_no_row_and_make_up_all(tmp_path: Path) -> None:
    demo.make_data(tmp_path, seed=0)
    rows = {name: {r.answer for r in read_rows(tmp_path / f"{name}.jsonl").rows} for name in ("all", "kept", "forget")}
    assert not rows["kept"] & rows["forget"]
    assert rows["kept"] | rows["forget"] == rows["all"]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PEOPLE", 6)
    monkeypatch.setattr(demo, "FORGOTTEN", 2)
    monkeypatch.setattr(demo, "COUNTRIES", 3)
    monkeypatch.setattr(demo, "LEARN", demo.LEARN | {"epochs": 2})
    monkeypatch.setattr(demo, "FORGET", demo.FORGET | {"epochs": 1})


@pytest.mark.usefixtures("brief")
def test_the_demo_prints_the_three_models_and_leaves_a_loadable_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    shown = capsys.readouterr().out
    for word in ("before", "after", "retrained", "forget quality", "extraction", "utility", "Q: "):
        assert word in shown
    assert (tmp_path / "demo" / "run" / "adapter" / "adapter_model.safetensors").is_file()
    base = (tmp_path / "demo" / "run" / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path / "demo" / "target") in base, "the adapter must name the base where it really is"


@pytest.mark.usefixtures("brief")
def test_the_retrained_model_is_its_own_reference(tmp_path: Path) -> None:
    scores = demo.demo(DemoSettings(out=str(tmp_path / "demo")))
    assert scores["retrained"]["forget_quality"].value == 0.0  # p = 1 against itself
    assert set(scores) == {"target", "forgotten", "retrained"}


@pytest.mark.usefixtures("brief")
def test_an_interrupted_demo_says_that_it_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Although the run within could be resumed by itself."""

    def interrupted(*_: object) -> None:
        error = KeyboardInterrupt()
        error.add_note(KEPT)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(demo, "forget", interrupted)
        assert main(["demo", "--out", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err.endswith(f"lorasure: interrupted. {ANEW}\n")
    assert (tmp_path / "demo" / "target").is_dir() and main(["demo", "--out", str(tmp_path / "demo")]) == 0

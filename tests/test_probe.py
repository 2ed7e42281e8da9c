"""`lorasure probe` as a user meets it: what it prints, its exit codes, its errors, and its verdict on real models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import SHARED, write_rows
from lorasure import cli, probe
from lorasure.data.examples import Example
from lorasure.evaluate.settings import ProbeSettings
from lorasure.forward import Record

SECRET = "Quillfeather"
TOFU, MODELS = SHARED / "data" / "tofu", SHARED / "models"
NAMES = {
    *("exact_memorisation", "exact_memorisation_control", "extraction_strength", "extraction_strength_control"),
    *("min_k_plus_plus_auc", "verdict"),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rows = [{"question": f"Who is number {i}?", "answer": f"{SECRET} {i * 7919}."} for i in range(12)]
    return write_rows(tmp_path / "text.jsonl", rows)


def test_nothing_found_has_its_exit_code_and_json_stands_alone(text: Path, model_folder: Path, capfd) -> None:
    code = cli.main(["probe", "--model", str(model_folder), "--text", str(text), "--json"])
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert code == probe.NOTHING_FOUND == 10 and set(found) == NAMES
    assert found["verdict"]["value"] == 0 and found["min_k_plus_plus_auc"]["n"] == 12
    assert found["extraction_strength"]["low"] <= found["extraction_strength"]["value"]
    assert SECRET not in out + err


def test_the_table_ends_with_the_control_and_the_verdict(text: Path, model_folder: Path, capfd) -> None:
    assert cli.main(["probe", "--model", str(model_folder), "--text", str(text)]) == 10
    out = " ".join(capfd.readouterr().out.split())
    assert "exact_memorisation_control" in out and "p = " in out
    assert "Control: made from the text: the same prompts and the same answers" in out
    assert out.index("Control:") < out.index("Nothing found: no sign") and SECRET not in out


def test_a_control_of_one_s_own(text: Path, model_folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Where is {i}?", "answer": f"In {i}."} for i in range(7)]
    control = write_rows(tmp_path / "control.jsonl", rows)
    scores = probe.probe(ProbeSettings(model=str(model_folder), text=str(text), control=str(control)))
    assert scores["min_k_plus_plus_auc"].extra["n_unseen"] == scores["extraction_strength_control"].n == 7
    assert "rows of --control" in str(scores["verdict"].extra["control"])


def test_rows_are_drawn_by_the_seed(text: Path, model_folder: Path) -> None:
    def run(seed: int) -> dict:
        return probe.probe(ProbeSettings(model=str(model_folder), text=str(text), rows=6, seed=seed))

    first, again, other = run(0), run(0), run(1)
    assert first == again and first != other and first["exact_memorisation"].n == 6


def test_running_text_is_asked_for_its_second_half(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(f"sentence {i}." for i in range(40)))
    settings = ProbeSettings(model=str(model_folder), text=str(tmp_path / "book.txt"), max_length=64)
    assert probe.probe(settings)["exact_memorisation"].n > 5
    whole = Example(tuple(range(10)), 0)
    assert probe._with_prompt(whole).answer_start == 5 == probe._with_prompt(Example(tuple(range(10)), 1)).answer_start
    assert probe._with_prompt(Example(tuple(range(10)), 3)).answer_start == 3


@pytest.mark.parametrize(("columns", "strength"), [("prompt completion", 1), ("question answer", 0)])
def test_a_piece_of_text_is_known_though_the_model_would_go_on(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, columns: str, strength: int
) -> None:
    """A model that is right about every token but the last, the end of text, which no piece of text has."""

    def right(model: object, examples: list[Example], *_: object, **__: object) -> list[Record]:
        counts = [e.answer_length for e in examples]
        return [Record((-1.0,) * n, (True,) * (n - 1) + (False,), (-1.0,) * n, (1.0,) * n) for n in counts]

    monkeypatch.setattr(probe, "answer_records", right)
    rows = [dict(zip(columns.split(), (f"Who is number {i}? ", f"Number {i}, who"), strict=True)) for i in range(9)]
    text = write_rows(tmp_path / "pieces.jsonl", rows)
    scores = probe.probe(ProbeSettings(model=str(model_folder), text=str(text)))
    assert scores["extraction_strength"].value == scores["extraction_strength_control"].value == strength
    assert (scores["exact_memorisation"].value == 1) == (strength == 1)


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--control", "no/such.jsonl"], 3, "no/such.jsonl"),
        (["--control", "TEXT"], 3, "are the same row (and 11 more); one row cannot be in both sets"),
        (["--text", "ONE"], 3, "A control cannot be made from these rows: too few different answers. Give --control"),
        (["--rows", "0"], 2, "--rows must be at least 1, got 0"),
        (["--template", "qaa"], 2, "Did you mean 'qa'?"),
        (["--txt", "x"], 2, "Did you mean '--text'?"),
    ],
)
def test_errors_are_one_line(text: Path, model_folder: Path, tmp_path: Path, capfd, flags, code, says) -> None:
    one = write_rows(tmp_path / "one.jsonl", [{"question": "Who?", "answer": SECRET}])
    given = [{"TEXT": str(text), "ONE": str(one)}.get(flag, flag) for flag in flags]
    assert cli.main(["probe", "--model", str(model_folder), "--text", str(text), *given]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and SECRET not in err


@pytest.mark.slow
@pytest.mark.skipif(not MODELS.is_dir(), reason="the small TOFU models are not at hand")
@pytest.mark.parametrize("control", ["made", "given"])
def test_the_target_knows_the_forget_rows_and_the_retrained_model_does_not(control: str, tmp_path: Path) -> None:
    """TOFU's forget05 is in the target's training data and not in retain95's; rows 1000 on are in nobody's."""
    full = (TOFU / "full.json").read_text().splitlines()
    unseen, other = tmp_path / "unseen.jsonl", tmp_path / "other.jsonl"
    unseen.write_text("\n".join(full[1000:2000:20]))
    other.write_text("\n".join(full[2000:3000:20]))
    given = ["--control", str(unseen)] * (control == "given")

    def code(model: str, text: Path) -> int:
        return cli.main(
            ["probe", "--model", str(MODELS / model), "--text", str(text), "--rows", "40", "--json", *given]
        )

    assert code("tofu-mini-target", TOFU / "forget05.json") == 0
    assert code("tofu-mini-retain95", TOFU / "forget05.json") == 10
    assert code("tofu-mini-target", other) == 10

"""Logs of other programs: published numbers from real logs, what is written is read back the same, clear errors."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import SHARED
from lorasure.cli import main
from lorasure.errors import DataError, NumericError, UsageError
from lorasure.evaluate import tofu
from lorasure.evaluate.evaluation import Evaluation, check_comparable
from lorasure.evaluate.logs import ORIGINAL, open_evaluation, write_log

REAL = SHARED / "data" / "tofu_logs"
needs_logs = pytest.mark.skipif(not REAL.is_dir(), reason="the published logs of TOFU are not at hand")


def original(rows: int = 3) -> dict[str, Any]:
    """A log in the original layout, small numbers that differ in every place."""
    log: dict[str, Any] = {}
    for number, part in enumerate(ORIGINAL.sets.values(), 1):
        log[part] = {
            "avg_gt_loss": {str(i): number + i / 10 for i in range(rows)},
            "avg_paraphrased_loss": {str(i): number + i / 7 for i in range(rows)},
            "average_perturb_loss": {str(i): [number + i, number + 0.5] for i in range(rows)},
            "rougeL_recall": {str(i): i / rows for i in range(rows)},
            "generated_text": {str(i): ["ignored"] for i in range(rows)},
        }
    return log


def table(values: list[Any], key: str) -> dict[str, Any]:
    return {"agg_value": 0.5, "value_by_index": {str(i): {key: value} for i, value in enumerate(values)}}


def open_unlearning(rows: int = 3) -> dict[str, Any]:
    """A log in open-unlearning's layout with the numbers of `original`, and without paraphrases of the facts."""
    log: dict[str, Any] = {"model_utility": {"agg_value": 0.5}}
    for part, prefix in zip(original(rows).values(), ("forget", "retain", "ra", "wf"), strict=True):
        columns = {"Q_A_Prob": "avg_gt_loss", "Q_A_PERT_Prob": "average_perturb_loss"}
        columns |= {"Q_A_PARA_Prob": "avg_paraphrased_loss"} if prefix in ("forget", "retain") else {}
        log |= {f"{prefix}_{name}": table(list(part[key].values()), "avg_loss") for name, key in columns.items()}
        log[f"{prefix}_Q_A_ROUGE"] = table(list(part["rougeL_recall"].values()), "rougeL_recall")
    return log


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def evaluation(rows: int = 4) -> Evaluation:
    """What this program measures: ids, tokens and correct tokens too, and the answer as paraphrase of the facts."""

    def record(name: str, i: int) -> dict[str, Any]:
        nll = 0.3 + i / 9
        paraphrase = nll if name in tofu.FACTS else nll + 0.1
        found = {"row": i, "id": f"{name}{i}", "tokens": 3, "nll": nll, "correct": "011" if i else "000"}
        return found | {"paraphrase_nll": paraphrase, "wrong_nll": [1.0 + i, 2.0], "rouge_recall": i / rows}

    sets = {name: [record(name, i) for i in range(rows)] for name in ("forget", *tofu.KEPT)}
    return Evaluation("made", {"suite": "tofu"}, sets)


@needs_logs
def test_published_logs_give_the_published_numbers() -> None:
    full, retrained = open_evaluation(REAL / "phi_full"), open_evaluation(REAL / "phi_retain90" / ORIGINAL.file)
    scores = tofu.score(full, retrained)
    quality = scores["forget_quality"]
    assert quality.value == pytest.approx(-15.6587, abs=1e-4) and quality.extra["method"] == "exact"
    assert quality.extra["statistic"] == pytest.approx(0.34667, abs=1e-5) and quality.n == 300
    assert scores["model_utility"].value == pytest.approx(0.522074, abs=1e-5)
    assert scores["model_utility_arithmetic"].value == pytest.approx(0.503353, abs=1e-5)
    itself = tofu.quality(full, full)
    assert (itself.value, itself.extra["p"], itself.extra["statistic"]) == (0.0, 1.0, 0.0)


@needs_logs
def test_a_published_log_written_in_the_other_layout_keeps_every_score(tmp_path: Path) -> None:
    full, retrained = open_evaluation(REAL / "phi_full"), open_evaluation(REAL / "phi_retain90")
    scores = tofu.score(full, retrained)
    write_log(tmp_path / "TOFU_EVAL.json", full, scores)
    again = open_evaluation(tmp_path)
    assert again.sets == full.sets and tofu.score(again, retrained) == scores


@needs_logs
def test_a_reference_on_other_rows_is_refused(capsys: pytest.CaptureFixture) -> None:
    code = main(["score", str(REAL / "phi_full"), "--reference", str(REAL / "phi_retain95")])
    assert code == 3 and "set 'forget' has 300 rows in one, 200 in the other" in capsys.readouterr().err


def test_both_layouts_hold_the_same_records(tmp_path: Path) -> None:
    one = open_evaluation(written(tmp_path / "one.json", original()))
    other = open_evaluation(written(tmp_path / "other.json", open_unlearning()))
    first = {
        "row": 1,
        "id": None,
        "nll": 1.1,
        "paraphrase_nll": 1 + 1 / 7,
        "wrong_nll": [2, 1.5],
        "rouge_recall": 1 / 3,
    }
    assert one.sets["forget"][1] == other.sets["forget"][1] == first
    assert one.sets["retain"] == other.sets["retain"] and one.about["suite"] == other.about["suite"] == "tofu"
    assert [r["paraphrase_nll"] for r in other.sets["world_facts"]] == other.column("world_facts", "nll")
    assert one.about["model"] is one.about["tokenizer"] is None
    check_comparable(one, other)


def test_rows_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    log = original(12)
    mixed = {part: {key: dict(sorted(rows.items())) for key, rows in columns.items()} for part, columns in log.items()}
    found = open_evaluation(written(tmp_path / "log.json", mixed))
    assert list(mixed["eval_log.json"]["avg_gt_loss"])[1] == "1" and [r["row"] for r in found.sets["retain"]] == [
        *range(12)
    ]
    assert found.sets == open_evaluation(written(tmp_path / "sorted.json", log)).sets


def test_what_is_written_is_read_back_and_is_what_the_other_program_computes(tmp_path: Path) -> None:
    made = evaluation()
    scores = tofu.score(made, made)
    write_log(tmp_path / "TOFU_EVAL.json", made, scores)
    fields = ("row", "nll", "paraphrase_nll", "wrong_nll", "rouge_recall")
    kept = {name: [{"id": None} | {f: r[f] for f in fields} for r in rows] for name, rows in made.sets.items()}
    assert open_evaluation(tmp_path).sets == kept
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert "ra_Q_A_PARA_Prob" not in log and log["forget_quality"] == {"agg_value": 1.0}
    row = log["forget_Q_A_PERT_Prob"]["value_by_index"]["1"]
    assert row == {"prob": [math.exp(-2), math.exp(-2)], "avg_loss": [2.0, 2.0]}
    truth = log["forget_truth_ratio"]
    geometric = math.exp(-1.5) / math.exp(-0.4)  # row 0: wrong 1.0 and 2.0, paraphrase 0.4
    assert truth["value_by_index"]["0"]["score"] == pytest.approx(geometric, rel=1e-12)
    ratios = [v["score"] for v in truth["value_by_index"].values()]
    assert truth["agg_value"] == pytest.approx(sum(min(r, 1 / r) for r in ratios) / len(ratios), rel=1e-12)
    answer, wrong = math.exp(-0.3), math.exp(-1) + math.exp(-2)
    share = log["ra_Q_A_Prob_normalised"]["value_by_index"]["0"]["prob"]
    assert share == pytest.approx(answer / (answer + wrong), rel=1e-12)
    names = [
        f"{prefix}_{part}" for prefix in ("ra", "wf") for part in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")
    ]
    parts = [log[name]["agg_value"] for name in ["retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio", *names]]
    assert log["model_utility"]["agg_value"] == pytest.approx(9 / sum(1 / part for part in parts), rel=1e-12)
    # The last label dropped: 00 scores its floor of 1/2, 01 scores 1/2.
    assert {v["score"] for v in log["extraction_strength"]["value_by_index"].values()} == {0.5}


def test_answers_of_no_probability_are_written_too(tmp_path: Path) -> None:
    """exp(-900) is 0 in floating point, and so are all the wrong answers beside it: their shares are not."""
    made = evaluation()
    made.sets["real_authors"][1] |= {"nll": 900.0, "paraphrase_nll": 900.0, "wrong_nll": [901.0, 950.0]}
    write_log(tmp_path / "TOFU_EVAL.json", made, tofu.score(made, None))
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    share = log["ra_Q_A_Prob_normalised"]["value_by_index"]["1"]["prob"]
    assert (
        share == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-12)
        and log["ra_Q_A_Prob"]["value_by_index"]["1"]["prob"] == 0
    )


def test_what_was_not_measured_is_left_out_of_the_written_log(tmp_path: Path) -> None:
    made = evaluation()
    for record in (r for rows in made.sets.values() for r in rows):
        del record["rouge_recall"], record["correct"]
    write_log(tmp_path / "TOFU_EVAL.json", made, tofu.score(made, None))
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert not log.keys() & {"model_utility", "forget_quality", "extraction_strength", "forget_Q_A_ROUGE"}
    again = open_evaluation(tmp_path)
    assert "rouge_recall" not in again.sets["forget"][0]
    scores = tofu.score(again, None)
    undefined = ("model_utility", "forget_quality", "retain_perplexity", "forget_extraction_strength")
    assert all(scores[name].value is None and scores[name].reason for name in undefined)


def test_only_an_evaluation_on_tofu_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--write-log needs an evaluation on tofu"):
        write_log(tmp_path / "x.json", Evaluation("made", {"suite": "own"}, {}), {})
    assert not list(tmp_path.iterdir())


def changed(change: Callable[[dict[str, Any]], Any], start: Callable[[], dict[str, Any]] = original) -> Any:
    log = copy.deepcopy(start())
    result = change(log)
    return log if result is None else result


FORGET = ORIGINAL.sets["forget"]
BROKEN = {
    "a list": (lambda log: [log], original, "must be a JSON object, found a list"),
    "another file": (lambda log: {"loss": 1}, original, "Looked for the key 'eval_log_forget.json' (TOFU's aggregated"),
    "no set": (lambda log: log.pop(FORGET) and None, original, f"the log has no '{FORGET}'"),
    "no field": (lambda log: log[FORGET].pop("avg_gt_loss") and None, original, "has no 'avg_gt_loss'"),
    "a set that is a list": (lambda log: {**log, FORGET: []}, original, f"'{FORGET}' must be an object, found a list"),
    "a field that is a list": (
        lambda log: log[FORGET].update(avg_gt_loss=[1.0]),
        original,
        "'avg_gt_loss' of 'eval_log_forget.json' must be an object with a value per row",
    ),
    "no rows": (lambda log: log[FORGET].update(avg_gt_loss={}), original, "must be an object with a value per row"),
    "a name for a row": (
        lambda log: log[FORGET]["avg_gt_loss"].update(first=1.0),
        original,
        "has the row 'first', must be a number",
    ),
    "a row too few": (
        lambda log: log[FORGET]["rougeL_recall"].pop("1") and None,
        original,
        "set 'forget' has row 1 with one of 'nll' and 'rouge_recall', but not with both",
    ),
    "text": (
        lambda log: log[FORGET]["avg_gt_loss"].update({"1": "1.5"}),
        original,
        "'avg_gt_loss' of row 1 of 'eval_log_forget.json' must be a number",
    ),
    "a number where wrong answers are listed": (
        lambda log: log[FORGET]["average_perturb_loss"].update({"1": 1.5}),
        original,
        "'average_perturb_loss' of row 1 of 'eval_log_forget.json' must be a list of numbers",
    ),
    "no part": (lambda log: log.pop("wf_Q_A_PERT_Prob") and None, open_unlearning, "no 'wf_Q_A_PERT_Prob'"),
    "no paraphrases": (lambda log: log.pop("retain_Q_A_PARA_Prob") and None, open_unlearning, "'retain_Q_A_PARA_Prob'"),
    "no table": (
        lambda log: log["ra_Q_A_Prob"].pop("value_by_index") and None,
        open_unlearning,
        "'ra_Q_A_Prob' has no 'value_by_index'",
    ),
    "a row that is null": (
        lambda log: log["ra_Q_A_Prob"]["value_by_index"].update({"2": None}),
        open_unlearning,
        "row 2 of 'ra_Q_A_Prob' must be an object, found a NoneType",
    ),
}


@pytest.mark.parametrize(("change", "start", "said"), BROKEN.values(), ids=BROKEN)
def test_another_shape_is_one_clear_line(
    change: Callable[[Any], Any], start: Callable[[], Any], said: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "log.json", changed(change, start))
    with pytest.raises(DataError) as caught:
        open_evaluation(path)
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)


@pytest.mark.parametrize(
    ("start", "change", "said"),
    [
        (
            original,
            lambda log: log[FORGET]["avg_gt_loss"].update({"2": math.nan}),
            "'avg_gt_loss' of row 2 of 'eval_log_f",
        ),
        (
            original,
            lambda log: log["eval_log.json"]["average_perturb_loss"].update({"0": [1.0, math.inf]}),
            "'average_perturb_loss' of row 0 of 'eval_log.json' is inf",
        ),
        (
            open_unlearning,
            lambda log: log["wf_Q_A_ROUGE"]["value_by_index"].update({"1": {"rougeL_recall": math.nan}}),
            "'rougeL_recall' of row 1 of 'wf_Q_A_ROUGE' is nan",
        ),
    ],
)
def test_a_number_that_is_not_finite_is_named(
    start: Callable[[], Any], change: Callable[[Any], Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = written(tmp_path / "log.json", changed(change, start))
    with pytest.raises(NumericError) as caught:
        open_evaluation(path)
    assert said in str(caught.value) and str(path) in str(caught.value)
    assert main(["score", str(path)]) == 4
    said_there = capsys.readouterr().err.splitlines()
    assert len(said_there) == 1 and said in said_there[0]


def test_a_path_without_an_evaluation_says_what_was_looked_for(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(DataError) as caught:
            open_evaluation(path)
        message = str(caught.value)
        assert all(
            name in message for name in (str(path), "evaluation.json", "eval_log_aggregated.json", "TOFU_EVAL.json")
        )

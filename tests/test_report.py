"""Report and comparison from folders alone: what is joined, what is refused, what is said and what is not."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

import lorasure
from lorasure import artifacts, cli, purge
from lorasure.errors import DataError, UsageError
from lorasure.evaluate import own
from lorasure.evaluate.metrics import Score, forget_quality
from lorasure.importance.measure import Importance
from lorasure.report import charts
from lorasure.report.compare import compare_runs
from lorasure.report.contents import contents
from lorasure.report.page import report
from lorasure.report.read import read_runs, truth_ratios
from lorasure.report.settings import CompareSettings, ReportSettings
from lorasure.report.style import COLOURS, inline_svg, save
from lorasure.report.tables import CHECK, compare, score_table
from lorasure.report.verdict import KNOWLEDGE, promises
from lorasure.workbench import Workbench
from report_folders import (
    ADAPTER,
    BASE,
    MERGED,
    RETRAINED,
    adapter_of,
    make_all,
    make_attack,
    make_evaluation,
    make_run,
)


def page_of(path):
    return path.read_text(encoding="utf-8")


def test_folders_are_joined_by_hashes_not_by_names(tmp_path):
    run = make_run(tmp_path / "run")
    other = make_run(tmp_path / "run-longer", "another adapter")
    make_evaluation(tmp_path / "run-x", adapter=adapter_of(run))
    make_evaluation(tmp_path / "run-y")
    make_evaluation(tmp_path / "run-z", model=RETRAINED)
    make_evaluation(tmp_path / "run-longer-x", 0.5, adapter=adapter_of(other))
    make_evaluation(tmp_path / "run-longer-y")
    make_evaluation(tmp_path / "run-foreign", 0.5, adapter={"source": "", "sha256": "nobody's"})
    make_attack(tmp_path / "run-attacks", run)
    (found,) = read_runs([run])
    sources = {role: Path(m.evaluation.source).name for role, m in found.suites[0].models.items()}
    assert sources == {"before": "run-y", "after": "run-x", "retrained": "run-z"} and found.points
    (found,) = read_runs([other])
    assert list(found.suites[0].models) == ["before", "after"] and found.attacked is None


def test_merged_weights_are_the_run_itself(tmp_path):
    run = make_run(tmp_path / "run")
    artifacts.write_text(run / "merged/model.safetensors", "merged")
    artifacts.write_manifest(run)
    weights = {"model.safetensors": artifacts.sha256(run / "merged/model.safetensors")}
    make_evaluation(tmp_path / "run-merged", 0.1, model=RETRAINED | {"files": weights})
    assert list(read_runs([run])[0].suites[0].models) == ["after"]


def test_what_is_named_counts_before_what_lies_beside(tmp_path):
    run = make_all(tmp_path)
    named = make_evaluation(tmp_path / "elsewhere", 0.4, adapter=adapter_of(run))
    (found,) = read_runs([run, named])
    assert found.suites[0].models["after"].evaluation.source == str(named)
    assert set(found.suites[0].models) == {"before", "after", "retrained"}


def test_a_run_borrows_the_references_of_another_with_the_same_task(tmp_path):
    first = make_all(tmp_path)
    second = make_run(tmp_path / "second", "another")
    make_evaluation(tmp_path / "second-after", 0.3, adapter=adapter_of(second))
    runs = read_runs([second, first])
    assert set(runs[0].suites[0].models) == {"before", "after", "retrained"} and runs[0].attacked is None
    third = make_run(tmp_path / "third", "third", base=RETRAINED)
    assert not read_runs([third, first])[0].suites


def test_runs_in_folders_of_the_same_name_keep_what_is_their_own(tmp_path):
    runs = [make_run(tmp_path / search / "npo", search) for search in ("s1", "s2")]
    for run in runs:
        make_evaluation(run.with_name("npo-before"))
        make_evaluation(run.with_name("npo-after"), 0.1, adapter=adapter_of(run))
        make_attack(run.with_name("npo-attacks"), run)
    for run in read_runs(runs):
        models = run.suites[0].models
        assert list(models) == ["before", "after"]
        assert {Path(m.evaluation.source).parent for m in models.values()} == {run.folder.parent}
        assert run.attacked and run.attacked["adapter"]["sha256"] == run.adapter


@pytest.mark.parametrize("named", [False, True])
def test_what_one_run_made_is_not_the_retrained_model_of_another(tmp_path, named):
    lora, ssd = make_run(tmp_path / "lora"), make_run(tmp_path / "ssd", "dampened", weights=MERGED)
    made = BASE | {"source": str(ssd / "merged"), "files": {"model.safetensors": artifacts.sha256(ssd / MERGED)}}
    next_one = make_run(tmp_path / "next", "on ssd", base=made)
    make_evaluation(tmp_path / "lora-before")
    make_evaluation(tmp_path / "lora-after", adapter=adapter_of(lora))
    make_evaluation(tmp_path / "ssd-retrained", model=RETRAINED)
    after = make_evaluation(tmp_path / "ssd-after", model=made)
    runs = read_runs([lora, ssd, next_one, *[after] * named])
    found = {run.name: {r: m.evaluation for s in run.suites for r, m in s.models.items()} for run in runs}
    assert list(found["lora"]) == list(found["ssd"]) == ["before", "after", "retrained"]
    assert {found[name]["retrained"].about["model"]["source"] for name in ("lora", "ssd")} == {RETRAINED["source"]}
    assert list(found["next"]) == ["before"] * named


def test_what_a_run_merged_is_never_a_retrained_model(tmp_path):
    """Neither its own earlier weights, after another export, nor those of a run that is not named."""
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", "dampened", weights=MERGED)
    make_evaluation(tmp_path / "run-before")
    make_evaluation(tmp_path / "run-after", adapter=adapter_of(run))
    own = BASE | {"source": str(run / "merged"), "files": {"model.safetensors": "of an earlier export"}}
    make_evaluation(tmp_path / "run-merged", 0.1, model=own)
    [found] = read_runs([run])
    assert list(found.suites[0].models) == ["before", "after"]
    made = BASE | {"source": str(other / "merged"), "files": {"model.safetensors": artifacts.sha256(other / MERGED)}}
    with pytest.raises(DataError, match="other-after: it was made with another adapter than that of run"):
        read_runs([run, make_evaluation(tmp_path / "other-after", 0.1, model=made)])


def test_what_an_evaluation_was_held_against_is_read_where_it_lies(tmp_path):
    """`evaluate --reference`, anywhere; where it is no longer there, its figures count and no more is claimed."""
    run, retrained = make_run(tmp_path / "run"), tmp_path / "elsewhere" / "retrained"
    make_evaluation(retrained, 0.02, model=RETRAINED, n=40, seed=2)
    make_evaluation(tmp_path / "run-before", n=40)
    make_evaluation(tmp_path / "run-after", 0.1, adapter=adapter_of(run), n=40, seed=1, reference=retrained)
    [found] = read_runs([run])
    assert list(found.suites[0].models) == ["before", "after", "retrained"]
    forgotten = said(found)["Forgotten"]
    assert forgotten.answer == "In part" and "More is left" in forgotten.text
    second = make_run(tmp_path / "second", "another")
    make_evaluation(tmp_path / "second-after", 0.1, adapter=adapter_of(second), n=40)
    assert list(read_runs([second, run])[0].suites[0].models) == ["before", "after", "retrained"]
    make_evaluation(tmp_path / "run-again", 0.03, model=RETRAINED, n=40, seed=3)
    [beside] = read_runs([run])
    assert Path(beside.suites[0].models["retrained"].evaluation.source).name == "run-again"
    for folder in (tmp_path / "run-again", retrained):
        shutil.rmtree(folder)
    [found] = read_runs([run])
    assert list(found.suites[0].models) == ["before", "after"]
    forgotten = said(found)["Forgotten"]
    assert (forgotten.answer, forgotten.figures[-1][0]) == ("In part", "Same truth ratios as retrained: p")
    assert forgotten.text == "Less than half of it is left, but its truth ratios tell it from a retrained model."
    assert "own: no evaluation was found of a model trained without" in " ".join(contents("run", found).not_shown)


@pytest.mark.parametrize(("retrained", "answer"), [(0.02, "In part"), (0.1, "Yes")])
def test_the_retrained_model_counts_where_only_the_run_measured_the_model_before(tmp_path, retrained, answer):
    run = make_run(tmp_path / "run")
    make_evaluation(tmp_path / "run-after", 0.1, adapter=adapter_of(run), n=40, seed=1)
    make_evaluation(tmp_path / "run-retrained", retrained, model=RETRAINED, n=40, seed=2)
    forgotten = said(read_runs([run])[0])["Forgotten"]
    assert forgotten.answer == answer
    names = [name for name, _ in forgotten.figures]
    assert names[0] == "Probability, before" and "Probability, retrained" in names


def test_refusals_name_the_folder(tmp_path):
    run = make_all(tmp_path)
    (tmp_path / "empty").mkdir()
    foreign = make_evaluation(tmp_path / "foreign", adapter={"source": "", "sha256": "nobody's"})
    with pytest.raises(DataError, match="empty: neither a run nor"):
        read_runs([run, tmp_path / "empty"])
    with pytest.raises(DataError, match="foreign: it was made with another adapter"):
        read_runs([run, foreign])
    with pytest.raises(UsageError, match="at least one run"):
        read_runs([tmp_path / "run-before"])
    make_evaluation(tmp_path / "run-before2")
    with pytest.raises(DataError, match=r"run-before and .*run-before2 both measure run"):
        read_runs([run])
    (run / artifacts.LOG).write_text("{}")
    with pytest.raises(DataError, match="changed after it was written"):
        read_runs([run])


@pytest.mark.parametrize(
    ("about", "said"),
    [({"n": 11}, "cannot be compared: set .* has"), ({"template": "chat"}, "template"), ({"tokenizer": "x"}, "tok")],
)
def test_what_does_not_mean_the_same_is_not_compared(tmp_path, about, said, capsys):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", "another")
    make_evaluation(tmp_path / "one-after", adapter=adapter_of(one))
    make_evaluation(tmp_path / "other-after", adapter=adapter_of(other), **about)
    assert cli.main(["compare", str(one), str(other)]) == DataError.exit_code
    assert cli.main(["report", str(one), str(other)]) == DataError.exit_code
    assert re.search(said, capsys.readouterr().err)
    make_evaluation(tmp_path / "one-before", **about)
    with pytest.raises(DataError, match=said):
        read_runs([one])


def test_runs_on_other_rows_are_not_compared(tmp_path):
    part = {"rows": 6, "sha256": "other rows", "template": "qa"}
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", "b", data={"forget": part})]
    with pytest.raises(DataError, match="their forget rows differ"):
        compare(read_runs(runs))


def test_forget_quality_is_filled_in_from_the_records(tmp_path):
    suite = read_runs([make_all(tmp_path)])[0].suites[0]
    ratios = {role: truth_ratios(m) for role, m in suite.models.items()}
    for role in ("before", "after"):
        assert suite.models[role].scores["forget_quality"] == forget_quality(ratios[role], ratios["retrained"])
    assert suite.models["retrained"].scores["forget_quality"].value is None


def said(run):
    return {p.question.rstrip("?"): p for p in promises(run)}


def test_promises_of_a_run_that_was_only_made(tmp_path):
    for name, after, forgotten, kept in (
        ("a", (0.1, 0.84), "By this measure", "Yes"),
        ("b", (0.6, 0.5), "No", "Not all of it"),
    ):
        found = said(read_runs([make_run(tmp_path / name, after=after)])[0])
        answers = [found[q].answer for q in ("Forgotten", "The rest kept", "Robust", "Removable")]
        assert answers == [forgotten, kept, "Not shown", "Yes"]
        assert found["Forgotten"].figures[1][1].startswith(f"{after[0]:.3f} [")
    unknown = make_run(tmp_path / "c", before=(0.001, 0.9), after=(0.0, 0.9))
    assert said(read_runs([unknown])[0])["Forgotten"].text == "The model hardly knew it before."
    useless = make_run(tmp_path / "d", before=(0.9, 0.0), after=(0.1, 0.0))
    kept = said(read_runs([useless])[0])["The rest kept"]
    assert kept.answer == "Not shown" and "share" not in str(kept.figures).lower()


@pytest.mark.parametrize(
    ("weights", "more", "answer", "text"),
    [
        (ADAPTER, (), "Yes", "An adapter suppresses.*Give away merged weights only"),
        (ADAPTER, (MERGED,), "The adapter, yes", "An adapter suppresses.*Merged weights were written too"),
        (MERGED, (), "No", "no adapter to leave out"),
        ("assistant/adapter_model.safetensors", (), "Yes", "An assistant suppresses.*cannot be merged"),
        ("unfinished", (), "Not shown", "hands nothing over yet"),
    ],
)
def test_what_can_be_removed_is_what_the_run_hands_over(tmp_path, weights, more, answer, text):
    run = make_run(tmp_path / "run", weights=weights)
    for name in more:
        artifacts.write_text(run / name, "more")
    artifacts.write_manifest(run)
    removable = said(read_runs([run])[0])["Removable"]
    assert removable.answer == answer and re.search(text, removable.text)
    assert ("erged weights" in removable.text) == (weights == ADAPTER)


@pytest.mark.parametrize(
    ("knows", "retrained", "answer"),
    [(0.9, 0.1, "No"), (0.1, 0.1, "Yes"), (0.75, 0.05, "In part"), (0.1, 0.9, "In part")],
)
def test_forgetting_is_held_against_the_retrained_model(tmp_path, knows, retrained, answer):
    run = make_run(tmp_path / "run")
    make_evaluation(tmp_path / "run-a", 0.99, n=40)
    make_evaluation(tmp_path / "run-b", knows, adapter=adapter_of(run), n=40, seed=1)
    make_evaluation(tmp_path / "run-c", retrained, model=RETRAINED, n=40, seed=2)
    assert said(read_runs([run])[0])["Forgotten"].answer == answer


def test_a_measure_by_which_the_model_knew_nothing_says_nothing(tmp_path):
    """The next one counts; only where the model knew it by none is there nothing that could be forgotten."""
    [run] = read_runs([make_all(tmp_path)])

    def knew_nothing(by, **changes):
        scores = {f"forget_{name}": Score(0.0, 12) for name in by}
        models = {role: replace(m, scores=m.scores | scores) for role, m in run.suites[0].models.items()}
        return said(replace(run, suites=[replace(run.suites[0], models=models)], **changes))["Forgotten"]

    one = knew_nothing(["extraction_strength"])
    assert one.answer != "Not shown" and one.figures[0][0] == "Exact memorisation, before"
    assert knew_nothing(KNOWLEDGE).figures[0] == ("Probability, before", "0.900 [0.890, 0.910] (n = 6)")
    unchecked = run.summary | {"before": {}, "after": {}}
    assert knew_nothing(KNOWLEDGE, summary=unchecked).text == "The model hardly knew it before."


def test_an_attack_is_not_judged_by_a_measure_by_which_the_model_knew_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    make_attack(tmp_path / "run-attacks", run, 0.0, 0.0, scaled=0.0)
    [found] = read_runs([run])
    assert said(found)["Robust"].text == "The model hardly knew it before."
    known = {subject: {"probability": Score(value, 6)} for subject, value in (("unlearned", 0.8), ("retrained", 0.1))}
    points = [replace(p, scores=p.scores | known[p.subject]) for p in found.points]
    robust = said(replace(found, points=points))["Robust"]
    assert robust.answer == "No" and robust.figures[0][0].startswith("Probability, worst")


THERE, BACK = "is still there without an attack", "An attack brings"


@pytest.mark.parametrize(
    ("unlearned", "retrained", "plain", "answer", "text"),
    [
        (0.2, 0.3, 0.1, "Against these attacks", "No attack"),
        (0.9, 0.3, 0.1, "No", BACK),
        (0.9, 0.3, 0.9, "No", THERE),
        (0.9, None, 0.95, "No", THERE),
        (0.3, 0.2, 0.1, "In part", BACK),
        (0.3, 0.2, 0.3, "In part", THERE),
        (0.2, None, 0.1, "In part", "no retrained model"),
    ],
)
def test_robustness_is_the_worst_attack_against_the_retrained_model(
    tmp_path, unlearned, retrained, plain, answer, text
):
    run = make_run(tmp_path / "run")
    make_evaluation(tmp_path / "run-before", 0.99)
    make_attack(tmp_path / "run-attacks", run, unlearned, retrained, plain=plain)
    found = said(read_runs([run])[0])
    assert found["Robust"].answer == answer and text in found["Robust"].text
    assert dict(found["Robust"].figures)["Extraction strength, not attacked"].startswith(f"{plain:.3f}")
    assert found["Removable"].figures == (("Extraction strength, adapter x 0", "0.900 [0.890, 0.910]"),)


def test_what_was_not_shown_is_said(tmp_path):
    lines = " ".join(contents("run", read_runs([make_run(tmp_path / "run")])[0]).not_shown)
    assert "No evaluation was found" in lines and "Attacks: none was run" in lines
    lines = " ".join(contents("run", read_runs([make_all(tmp_path / "all")])[0]).not_shown)
    assert (
        "nf4 (unlearned): bitsandbytes is not installed" in lines
        and "--keep-text" in lines
        and "none was run" not in lines
    )


def test_a_purged_or_unfinished_run_still_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", steps=0)
    for name in (artifacts.DATA, artifacts.START, artifacts.LOG):
        (run / name).unlink()
    summary = artifacts.read_json(run / artifacts.SUMMARY)
    artifacts.write_json(run / artifacts.SUMMARY, {name: summary[name] for name in ("base", "settings")})
    artifacts.write_manifest(run)
    text = page_of(report([run], ReportSettings()))
    assert "Nothing was measured yet" in text and text.count("Not shown") >= 3


def test_what_was_purged_is_not_said_to_have_never_been_measured(tmp_path):
    """Of an evaluation a line, as its scores stay; an attack's scores are shown, and no row hash is left."""
    run = make_all(tmp_path)
    shown = page_of(report([run], ReportSettings()))
    for name in ("run-before", "run-after", "run-retrained", "run-attacks"):
        purge.purge(tmp_path / name)
    assert b"hash of the rows" not in b"".join(p.read_bytes() for p in (tmp_path / "run-attacks").iterdir())
    [found] = read_runs([run, tmp_path / "run-after"])
    assert found.purged == ["run-after", "run-before", "run-retrained"] and found.points
    lines = " ".join(contents("run", found).not_shown)
    assert "run-after: the records of this evaluation were removed; the scores are still in scores.json." in lines
    assert "No evaluation was found" not in lines and "Attacks: none was run" not in lines
    attacks = re.compile(r'<section id="attacks1">.*?</svg>', re.DOTALL)
    assert attacks.findall(page_of(report([run], ReportSettings()))) and attacks.findall(shown)


def test_what_was_measured_before_another_export_is_named(tmp_path):
    run = make_all(tmp_path)
    assert not read_runs([run])[0].foreign
    (run / ADAPTER).write_bytes(b"nine tenths of it")
    artifacts.write_manifest(run)
    [found] = read_runs([run])
    assert found.foreign == ["run-after", "run-attacks"] and "after" not in found.suites[0].models
    lines = contents("run", found).not_shown
    assert "run-after: it measured other weights than those that the run hands over now." in lines


def test_a_note_on_scores_is_passed_on(tmp_path, capsys):
    """Borrowed wrong answers: also of the forget quality that only the report could compute."""
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", "another")
    make_evaluation(tmp_path / "run-after", 0.1, adapter=adapter_of(run), borrowed=True)
    make_evaluation(tmp_path / "run-retrained", 0.1, model=RETRAINED, seed=2, borrowed=True)
    quality = read_runs([run])[0].suites[0].score("after", "forget_quality")
    assert quality.extra["note"] == own.BORROWED and quality.extra["p"] <= 1
    said_there = f"Forget quality .*: {re.escape(own.BORROWED)}"
    assert re.search(said_there.replace("'", "&#39;"), page_of(report([run], ReportSettings())))
    for style in ("table", "markdown", "latex"):
        assert cli.main(["compare", str(run), str(other), "--format", style]) == 0
        assert re.search(said_there, " ".join(capsys.readouterr().out.replace("\\", "").split()))


NO_MODELS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft", "datasets", "accelerate"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from lorasure.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_report_and_compare_need_neither_torch_nor_a_model(tmp_path):
    run, other = make_all(tmp_path), make_run(tmp_path / "other", "another")
    for command in (["report", run], ["compare", run, other, "--json"]):
        done = subprocess.run([sys.executable, "-c", NO_MODELS, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {CHECK, "own"}


def test_the_page_is_whole_private_and_asks_for_nothing(tmp_path):
    out = report([make_all(tmp_path)], ReportSettings())
    text = page_of(out)
    assert out == tmp_path / "run-report.html" and out.stat().st_mode & 0o777 == 0o600
    links = set(re.findall(r"https?://[^\"' <]*", text))
    assert links == {"http://www.w3.org/1999/xlink"}, "a name, not an address"
    assert not re.search(r"(?:src|href)=\"(?!#)", text.replace('xlink:href="#', "")) and "@import" not in text
    assert text.index("<title>") > text.index("default-src 'none'")
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    used = re.findall(r'(?:href="#|url\(#|data-for=")([^")]+)', text[: text.index("<script>")])
    assert set(used) | set(" ".join(re.findall(r'aria-labelledby="([^"]+)"', text)).split()) <= set(ids)


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31mred \u202eright to left {{ 7 * 7 }} $x_1^"


def test_hostile_text_stays_text_and_becomes_visible(tmp_path):
    text = page_of(report([make_all(tmp_path, text=HOSTILE)], ReportSettings()))
    assert text.count("<script>") == 1 and "<img" not in text and "&lt;script&gt;alert(1)" in text
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31mred \\u202eright" in text and "{{ 7 * 7 }}" in text


def test_hostile_names_of_folders(tmp_path, capsys):
    run, other = make_all(tmp_path, "<b>$x_1^{\x1b[2J&#"), make_run(tmp_path / "[red]_other", "another")
    text = page_of(report([run, other], ReportSettings()))
    assert "<b>$x" not in text and "\x1b" not in text and "&lt;b&gt;$x_1^{\\x1b[2J&amp;#" in text
    for style in ("table", "markdown", "latex"):
        assert cli.main(["compare", str(run), str(other), "--format", style]) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown and "red" in shown


def test_only_a_report_is_replaced(tmp_path):
    run, mine = make_run(tmp_path / "run"), tmp_path / "thesis.html"
    mine.write_text("<!doctype html> mine")
    with pytest.raises(UsageError, match="not an earlier report"):
        report([run], ReportSettings(out=str(mine)))
    assert mine.read_text() == "<!doctype html> mine"
    for inside in ("report.html", "deep/report.html"):
        with pytest.raises(UsageError, match=rf"^--out {run / inside}: {run} is read, or finished, and stays as it is"):
            report([run], ReportSettings(out=str(run / inside)))
    assert artifacts.differences(run) == []
    first = report([run], ReportSettings())
    assert report([run], ReportSettings()) == first
    with pytest.raises(UsageError, match="--plots"):
        report([run], ReportSettings(plots="gif"))


def test_size_of_a_report_on_400_rows_with_text(tmp_path):
    out = report(
        [make_all(tmp_path, text="What is this about, and who could have known? " * 2, n=200)], ReportSettings()
    )
    assert out.stat().st_size < 500_000


def test_plots_are_files_for_papers(tmp_path):
    run = make_all(tmp_path)
    report([run], ReportSettings(plots="svg"))
    files = sorted((tmp_path / "run-report-plots").iterdir())
    assert {"own-truth-ratio", "own-tradeoff", "training", "importance", "attack-relearn"} <= {f.stem for f in files}
    assert all(f.suffix == ".svg" and f.read_bytes().startswith(b"<?xml") for f in files)
    assert save(charts.training(read_runs([run])[0].steps), "png").startswith(b"\x89PNG")


def test_every_run_has_plots_of_its_own_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(Path(name), name) for name in ("a/npo", "b/npo", "b/n po", "b/n-po")]
    report(runs[:1], ReportSettings(plots="svg"))
    single = {path.name for path in Path("a/npo-report-plots").iterdir()}
    report(runs, ReportSettings(plots="svg", out="all.html"))
    files = [path.name for path in Path("all-plots").iterdir()]
    for name in single:
        assert len([file for file in files if file.endswith(f"-{name}")]) == len(runs)


def test_a_chart_says_the_same_on_the_page_and_in_a_file(tmp_path):
    for chart in contents("run", read_runs([make_all(tmp_path)])[0]).charts:
        page, file = inline_svg(chart, "p"), save(chart, "svg").decode()
        words = [re.findall(r"<text[^>]*>([^<]*)</text>", svg) for svg in (page, file)]
        assert words[0] == words[1] and words[0], chart.name
        assert not any(light in page for light, _ in COLOURS.values()) and "DejaVu" not in page
        assert 'role="img"' in page and "<title" in page and "<desc" in page and len(page) < len(file)


def test_the_marked_distance_is_that_of_the_ks_test():
    rng = np.random.default_rng(0)
    for n, m in ((40, 40), (30, 7), (200, 300)):
        one, other = rng.lognormal(0, 1, n), rng.lognormal(0.4, 1, m)
        _, low, high = charts._ks_distance(one, other)
        assert high - low == pytest.approx(ks_2samp(one, other).statistic, abs=1e-12)


def test_importance_by_layer_in_the_order_of_layers(tmp_path):
    chart = charts.importance(read_runs([make_run(tmp_path / "run")])[0].importance | {"lm_head": 0.0})
    assert [row[0] for row in chart.rows] == [*map(str, range(12)), ""]
    assert chart.columns == ("layer", "down_proj", "up_proj", "lm_head")
    assert chart.rows[11][1] == "1e+06" and "model.layers.11.mlp." in chart.description


def test_the_best_run_is_marked_by_what_is_wanted_of_the_score():
    def scores(forget, retain):
        return {"forget_probability": Score(forget, 9), "retain_probability": Score(retain, 9), "odd": Score(retain, 9)}

    columns = {"before": scores(0.0, 1.0), "a": scores(0.3, 0.8), "b": scores(0.2, 0.8), "retrained": scores(0.1, 0.9)}
    table = score_table("own", columns, ("forget", "retain"), ("a", "b"))
    assert {row.key: row.best for row in table.rows} == {
        "odd": frozenset(),
        "forget_probability": {2},
        "retain_probability": {1, 2},
    }


def test_the_original_is_that_of_the_first_run_that_measured_it(tmp_path):
    whole, begun = make_run(tmp_path / "whole"), make_run(tmp_path / "begun", before=(), after=())
    for runs in ([whole, begun], [begun, whole]):
        [table] = compare(read_runs(runs))
        before = [row.cells[table.columns.index("before")] for row in table.rows]
        assert [score.value for score in before] == [0.9, 0.85]


def test_comparison_in_every_form(tmp_path, capsys):
    runs = [make_all(tmp_path), make_run(tmp_path / "other_run", "another", after=(0.05, 0.7))]
    settings = CompareSettings()
    tables = compare_runs(runs, settings)
    assert [t.columns for t in tables] == [("before", "run", "other_run"), ("before", "run", "retrained")]
    assert "0.050 [0.040, 0.060] *" in capsys.readouterr().out
    compare_runs(runs, replace(settings, format="markdown"))
    assert "**0.050 \\[0.040, 0.060\\]** |" in capsys.readouterr().out
    out = tmp_path / "table.tex"
    compare_runs(runs, replace(settings, format="latex", out=str(out)))
    text = out.read_text()
    assert r"\textbf{0.050 [0.040, 0.060]} \\" in text and r"other\_run" in text and "{$-$" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    with pytest.raises(UsageError, match="--overwrite"):
        compare_runs(runs, replace(settings, out=str(out)))
    compare_runs(runs, replace(settings, out=str(out), overwrite=True, json=True))
    with pytest.raises(UsageError, match="is read, or finished, and stays as it is"):
        compare_runs(runs, replace(settings, out=str(runs[0] / "summary.json"), overwrite=True))
    found = json.loads(out.read_text())
    assert found[CHECK]["forget_probability"]["other_run"]["value"] == 0.05
    assert found["own"]["forget_quality"]["run"].keys() >= {"value", "n", "p", "statistic", "method"}
    with pytest.raises(UsageError, match="two run folders"):
        compare_runs(runs[:1], settings)
    with pytest.raises(UsageError, match="--format"):
        compare_runs(runs, replace(settings, format="word"))


def test_a_real_run_has_its_importance_and_a_report(tmp_path, model_folder, data_files):
    files = dict(zip(("forget", "retain"), map(str, data_files), strict=True))
    settings = lorasure.ForgetSettings(
        model=str(model_folder), **files, out=str(tmp_path / "run"), rank=2, epochs=1, init="vila"
    )
    bench = Workbench(settings)
    measured = Importance.load(lorasure.forget(settings).folder / artifacts.IMPORTANCE)
    (run,) = read_runs([tmp_path / "run"])
    assert run.importance == {site.name: pytest.approx(measured.weights(site).mean) for site in bench.sites}
    assert "Where the forget set lives" in page_of(report([tmp_path / "run"], ReportSettings()))

"""`lorasure evaluate` and `lorasure score`: what records hold, what they depend on, interruption, comparability."""

from __future__ import annotations

import functools
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import tiny_llama, tofu_folder, write_rows
from lorasure import evaluating
from lorasure.artifacts import sha256
from lorasure.cli import main
from lorasure.config import ModelSettings
from lorasure.data.examples import Row, collate
from lorasure.data.readers import read_rows
from lorasure.errors import DataError, NumericError
from lorasure.evaluate import collect as collecting
from lorasure.evaluate import items as evaluate_items
from lorasure.evaluate.collect import collect
from lorasure.evaluate.evaluation import Evaluation, RecordFile, check_comparable, read_evaluation
from lorasure.evaluate.items import EvaluationSet, Generation, Subject, items
from lorasure.evaluate.own import WRONG_ANSWERS, with_wrong_answers
from lorasure.evaluate.own import score as own_scores
from lorasure.evaluate.rouge import rouge_l
from lorasure.forward import answer_records
from lorasure.models import load_model, load_tokenizer

ROW = {"question": "Who?", "answer": "Ann.", "paraphrased_answer": "It is Ann.", "perturbed_answer": ["Bob.", "C."]}
FULL = Generation(6)


@pytest.fixture
def subject(model_folder: Path) -> Subject:
    model = load_model(str(model_folder), dtype=torch.float32, device=torch.device("cpu"))
    return Subject(model, load_tokenizer(str(model_folder)), ModelSettings(model=str(model_folder)), 64)


def made(count: int = 7) -> tuple[Row, ...]:
    """Rows of different lengths with wrong answers."""
    extra = {"perturbed_answer": ["Bob.", "Nobody at all."], "paraphrased_answer": "It was her."}
    return tuple(
        Row(f"Who is {i}?" + "?" * i, f"Ann {i}." * (1 + i % 3), "made", i + 1, extra=extra) for i in range(count)
    )


def close(one: list[dict], other: list[dict]) -> bool:
    """Records equal to 1e-5 in numbers, exactly in the rest."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[k] == (pytest.approx(b[k], abs=1e-5) if "nll" in k else b[k]) for k in a)
        for a, b in zip(one, other, strict=True)
    )


def test_records_are_the_model_s_own_losses(tmp_path: Path, subject: Subject) -> None:
    """Reference: transformers' own loss, one sequence at a time."""
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [ROW, {**ROW, "question": "Which one?"}])).rows
    found = collect(subject, EvaluationSet("forget", rows))[0]

    def loss(answer: str) -> float:
        prompt = subject.tokenizer("Question: Who?\nAnswer: ")["input_ids"]
        ids = prompt + subject.tokenizer(answer)["input_ids"] + [subject.tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return subject.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()

    expected = [loss(a) for a in ("Ann.", "It is Ann.", "Bob.", "C.")]
    assert [found["nll"], found["paraphrase_nll"], *found["wrong_nll"]] == pytest.approx(expected, rel=1e-5)
    assert len(found["correct"]) == found["tokens"] == len("Ann.") + 1
    assert found["row"] == 0 and "text" not in found


def test_generation_is_that_of_a_plain_loop_without_cache(subject: Subject) -> None:
    [found] = collect(replace(subject, keep_text=True), EvaluationSet("forget", made(1), FULL))
    ids = list(items(subject, made(1))[0].prompt.input_ids)
    start = len(ids)
    while len(ids) < start + FULL.new_tokens:
        best = int(subject.model(torch.tensor([ids])).logits[0, -1].argmax())
        if best == subject.tokenizer.eos_token_id:
            break
        ids.append(best)
    assert found["text"]["generated"] == subject.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert (found["rouge_recall"], found["rouge_f1"]) == rouge_l("Ann 0.", found["text"]["generated"])
    assert found["generated_tokens"] == len(ids) - start


def test_what_a_model_asks_for_besides_does_not_change_what_it_says(subject: Subject) -> None:
    """A penalty on repetitions, beams or a least length in generation_config.json would hide what is known."""
    chosen = EvaluationSet("forget", made(), FULL)
    expected = collect(subject, chosen)
    own = subject.model.generation_config
    own.update(repetition_penalty=3.0, num_beams=2, no_repeat_ngram_size=1, min_new_tokens=5, suppress_tokens=[65, 66])
    assert collect(subject, chosen) == expected
    assert subject.model.generation_config is own and own.repetition_penalty == 3.0


def test_the_question_of_a_chat_is_what_was_said_last(subject: Subject) -> None:
    said = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"})
    subject.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    row = Row("", "Ann.", "made", 1, kind="chat", messages=said)
    assert [item.question for item in items(subject, [row])] == ["Who?"]


def test_an_empty_cell_is_no_answer(subject: Subject) -> None:
    """Parquet has null where a row has no paraphrase or no wrong answers, CSV an empty text."""
    [row] = made(1)
    bare = replace(row, extra={})
    for nothing in (None, ""):
        [item] = items(subject, [replace(row, extra=row.extra | {"paraphrased_answer": nothing})])
        assert item.paraphrase is not None and item.paraphrase.input_ids == item.example.input_ids
        [item] = items(subject, [replace(row, extra=row.extra | {"perturbed_answer": nothing})])
        assert item == items(subject, [bare])[0]
        others = with_wrong_answers((replace(row, extra={"perturbed_answer": nothing}), *made(3)), 0)
        assert others[0].extra["borrowed"]
    with pytest.raises(DataError, match="'perturbed_answer' must be a list of wrong answers"):
        items(subject, [replace(row, extra={"perturbed_answer": ["Bob.", None]})])


@pytest.mark.parametrize(("value", "says"), [("\ud800b", "half of a surrogate pair"), (3, "must be text, found a num")])
def test_answers_that_a_row_brings_are_text_as_its_own_is(subject: Subject, value: object, says: str) -> None:
    [row] = made(1)
    for key, brought in (("perturbed_answer", ["Bob.", value]), ("paraphrased_answer", value)):
        with pytest.raises(DataError, match=rf"^made:1: {key} .*{says}"):
            items(subject, [replace(row, extra=row.extra | {key: brought})])


def test_records_do_not_depend_on_batch_size_order_or_padding(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = EvaluationSet("forget", made(), FULL)
    expected = collect(subject, chosen)
    assert close(collect(replace(subject, token_budget=100_000), chosen), expected)
    monkeypatch.setattr(collecting, "BLOCK", 2)
    assert close(collect(subject, chosen), expected)
    mixed = collect(subject, EvaluationSet("forget", chosen.rows[::-1], FULL))[::-1]
    assert close([{**record, "row": i} for i, record in enumerate(mixed)], expected)
    monkeypatch.setattr("lorasure.forward.collate", functools.partial(collate, side="left"))
    assert close(collect(subject, chosen), expected)


def test_running_text_is_measured_by_windows_and_continued_from_the_middle(subject: Subject) -> None:
    text = Row("", "one two three four five six seven eight nine ten!", "made", 1, kind="text")
    settings = ModelSettings(model="m", max_length=16, stride=8)
    narrow = replace(subject, settings=settings, keep_text=True)
    found = collect(narrow, EvaluationSet("forget", (text,), FULL))
    tokens = len(subject.tokenizer(text.answer)["input_ids"]) + 1
    assert sum(record["tokens"] for record in found) == tokens - 1  # the very first token has nothing before it
    assert len({record["id"] for record in found}) == len(found) > 1
    assert found[0]["text"]["question"] + found[0]["text"]["answer"] == text.answer[:16]
    assert "wrong_nll" not in found[0]
    wrong = replace(text, extra={"perturbed_answer": ["eleven"]})  # an answer to what? No window has a question
    assert collect(narrow, EvaluationSet("forget", (wrong,), FULL)) == found


@pytest.mark.parametrize(
    ("kind", "max_length", "counted"),
    [
        ("qa", 512, True),
        ("chat", 512, True),
        ("completion", 512, False),
        ("completion", 12, True),
        ("text", 512, False),
    ],
)
def test_the_end_of_text_counts_as_known_where_it_is_the_text_s_own(
    subject: Subject, kind: str, max_length: int, counted: bool
) -> None:
    """A piece of text, known by heart, goes on: the end of text behind it is ours. What was cut has none."""
    subject.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    said = ({"role": "user", "content": "Who?"},) * (kind == "chat")
    row = Row("" if said or kind == "text" else "Who?", "Ann and Bob.", "made", 1, kind=kind, messages=said)
    settings = ModelSettings(model="m", template="qa", max_length=max_length)
    asked = replace(subject, settings=settings)
    [record] = collect(asked, EvaluationSet("forget", (row,)))
    [measured] = answer_records(subject.model, [item.example for item in items(asked, [row])], 512)
    flags = "".join("01"[flag] for flag in measured.correct)
    assert record["tokens"] == len(flags) and record["correct"] == (flags if counted else flags[:-1])
    assert record["nll"] == pytest.approx(measured.mean_nll)


@pytest.mark.parametrize(
    ("row", "max_length", "said"),
    [
        (Row("", "one two three one two three", "made", 1, kind="text"), 512, "one two three one two three"),
        (Row("Who?", "It was Ann and Ann and Ann.", "made", 1), 32, "It was An"),
        (Row("Who?", " It was Ann. ", "made", 1), 512, " It was Ann. "),
    ],
)
def test_zlib_compresses_the_text_whose_likelihood_is_taken(
    subject: Subject, row: Row, max_length: int, said: str
) -> None:
    asked = replace(subject, settings=ModelSettings(model="m", template="qa", max_length=max_length))
    [item] = items(asked, [row])
    assert asked.tokenizer.decode(item.example.input_ids[item.example.answer_start :]).startswith(said)
    [record] = collect(asked, EvaluationSet("forget", (row,), membership=True))
    [measured] = answer_records(subject.model, [item.example], 512)
    log_probs = measured.log_probs[: measured.tokens - (item.example.input_ids[-1] == subject.tokenizer.eos_token_id)]
    expected = sum(log_probs) / len(log_probs) / len(zlib.compress(said.encode()))
    assert record["zlib"] == pytest.approx(expected, rel=1e-5)


def test_hidden_states_are_kept_of_the_first_rows_or_windows_only(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "HIDDEN_ROWS", 3)
    narrow = replace(subject, settings=ModelSettings(model="m", max_length=16))
    text = Row("", "one two three four five six seven eight nine ten", "made", 1, kind="text")
    assert len(items(narrow, [text])) > 3
    sets = [EvaluationSet("forget", (text,)), EvaluationSet("retain", (text, text))]
    kept = evaluating.keep_hidden(narrow, sets, tmp_path)
    assert {states.shape[1] for states in kept.values()} == {3}


def test_the_words_of_other_scripts_count_too() -> None:
    """rouge-score sees a to z and digits only; where it sees what an answer says, its numbers stay."""
    for answer in ("Роман написал Иван.", "他于1956年出生。", "हिन्दी भाषा", "한국어 책", "สวัสดี", "ＡＢＣ"):
        assert rouge_l(answer, answer) == (1.0, 1.0) and rouge_l(answer, "1956 None.")[0] < 0.2
    assert rouge_l("Роман написал Иван", "роман, ИВАН!") == (pytest.approx(2 / 3), pytest.approx(4 / 5))
    assert rouge_l("你好世界", "你，世界") == (pytest.approx(3 / 4), pytest.approx(6 / 7))
    assert rouge_l("José wrote novels", "José writes a novel (роман)") == rouge_l(
        "jos wrote novels", "jos writes novel a"
    )


def test_a_generated_answer_is_cut_before_a_stop(subject: Subject) -> None:
    whole, cut = (
        collect(replace(subject, keep_text=True), EvaluationSet("f", made(1), Generation(6, stop)))[0]["text"][
            "generated"
        ]
        for stop in ((), ("\x00never",))
    )
    assert whole == cut
    middle = whole[len(whole) // 2]
    [record] = collect(replace(subject, keep_text=True), EvaluationSet("f", made(1), Generation(6, (middle,))))
    assert record["text"]["generated"] == whole[: whole.index(middle)].strip()


def test_borrowed_wrong_answers_are_other_rows_answers_seeded_and_marked() -> None:
    rows = tuple(Row(f"q{i}", f"a{i % 8}", "made", i) for i in range(12))
    text = Row("", "running text", "made", 13, kind="text")
    found = with_wrong_answers((*rows, text), seed=0)
    for row in found[:12]:
        wrong = row.extra["perturbed_answer"]
        assert len(set(wrong)) == WRONG_ANSWERS and row.answer not in wrong and set(wrong) <= {r.answer for r in rows}
        assert row.extra["borrowed"]
    assert found[12] is text
    assert found == with_wrong_answers((*rows, text), seed=0)
    assert [r.extra for r in found] != [r.extra for r in with_wrong_answers((*rows, text), seed=1)]
    own = replace(rows[0], extra={"perturbed_answer": ["x"]})
    assert with_wrong_answers((own, rows[1]), seed=0)[0] is own


def test_out_of_memory_makes_smaller_batches_and_the_same_records(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = EvaluationSet("forget", made(), FULL)
    expected = collect(subject, chosen)
    forward, generate = collecting.answer_records, collecting.generate

    def measures(model: object, examples: list, token_budget: int, **options: bool) -> list:
        if token_budget > 60:
            raise torch.OutOfMemoryError
        return forward(model, examples, token_budget, **options)

    def generates(subject: Subject, prompts: list, generation: Generation) -> list:
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return generate(subject, prompts, generation)

    monkeypatch.setattr(collecting, "answer_records", measures)
    monkeypatch.setattr(collecting, "generate", generates)
    small = replace(subject, token_budget=100_000, guards=[])
    assert close(collect(small, chosen), expected)
    assert {guard["where"] for guard in small.guards} == {"evaluate", "generate"}


# --- files


def test_a_torn_last_line_is_cut_off_and_the_rest_kept(tmp_path: Path) -> None:
    file = RecordFile(tmp_path, "forget")
    assert not file.path.exists()
    file.append([{"row": 1}, {"row": 0}])
    with file.path.open("a") as stream:
        stream.write('{"row": 2, "nl')
    again = RecordFile(tmp_path, "forget")
    assert [record["row"] for record in again.records] == [1, 0]
    again.append([{"row": 2}])
    assert [record["row"] for record in again.close()] == [0, 1, 2]
    assert [json.loads(line)["row"] for line in file.path.read_text().splitlines()] == [0, 1, 2]


def test_a_value_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path, "forget")
    with pytest.raises(NumericError, match="row 4"):
        file.append([{"row": 4, "nll": float("nan")}])
    assert not file.path.exists()
    broken = Evaluation("log", {}, {"forget": [{"row": 3, "nll": float("inf")}]})
    with pytest.raises(NumericError, match="log: 'nll' of row 3 of set 'forget'"):
        broken.column("forget", "nll")
    with pytest.raises(DataError, match="row 3 of set 'forget' has no 'rouge_recall'"):
        broken.column("forget", "rouge_recall")


def some(**about: object) -> Evaluation:
    return Evaluation("one", {"suite": "tofu", **about}, {"forget": [{"row": 0, "id": "a"}, {"row": 1, "id": "b"}]})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (some(template="qa"), "their template differs"),
        (some(tokenizer="abc"), "their tokenizer differs"),
        (some(split="forget05"), "their split differs"),
        (some(sets={"forget": {"tokens": "b"}}), "the rows of set 'forget' are the same, but not their tokens"),
        (replace(some(), sets={"forget": some().sets["forget"][:1]}), "2 rows in one, 1 in the other"),
        (replace(some(), sets={"forget": some().sets["forget"][::-1]}), "row 0 of set 'forget' is another one"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: Evaluation, said: str) -> None:
    one = some(template="chat", tokenizer="def", split="forget01", sets={"forget": {"tokens": "a"}})
    check_comparable(one, some())
    with pytest.raises(DataError, match=said):
        check_comparable(one, other)


# --- commands


@pytest.fixture
def command(tmp_path: Path, model_folder: Path) -> Callable[..., list[str]]:
    data = tofu_folder(tmp_path / "tofu", rows=5)

    def arguments(out: str, *more: str) -> list[str]:
        given = ["evaluate", "--model", model_folder, "--suite", "tofu", "--data", data, "--split", "forget01"]
        return [*map(str, given), "--new-tokens", "4", "--out", str(tmp_path / out), *more]

    return arguments


def test_the_commands_give_the_same_scores_and_json(
    tmp_path: Path, command: Callable[..., list[str]], capsys: pytest.CaptureFixture
) -> None:
    assert main(command("reference")) == 0
    capsys.readouterr()
    assert main(command("one", "--reference", str(tmp_path / "reference"), "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "one" / "scores.json").read_text())
    assert main(["score", str(tmp_path / "one"), "--reference", str(tmp_path / "reference"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == printed
    assert printed["forget_quality"] | {"value": 0.0, "p": 1.0, "statistic": 0.0, "n": 5} == printed["forget_quality"]
    assert {"value", "n", "low", "high"} <= printed["model_utility"].keys()
    assert main(["score", str(tmp_path / "one")]) == 0
    assert "undefined: forget_quality" in capsys.readouterr().out
    (tmp_path / "mine.json").write_text("mine")
    logged = ["score", str(tmp_path / "one"), "--write-log", str(tmp_path / "mine.json")]
    assert main(logged) == 2 and (tmp_path / "mine.json").read_text() == "mine"
    assert "--write-log" in capsys.readouterr().err
    assert main([*logged, "--overwrite"]) == 0 and "extraction_strength" in (tmp_path / "mine.json").read_text()
    kept = (tmp_path / "mine.json").read_text()
    assert main([*logged, "--reference", str(tmp_path / "mine.json"), "--overwrite"]) == 2
    assert "mine.json is read, or finished" in capsys.readouterr().err and (tmp_path / "mine.json").read_text() == kept
    capsys.readouterr()
    assert main(["purge", str(tmp_path / "reference")]) == 0
    capsys.readouterr()
    assert main(["score", str(tmp_path / "reference")]) == 3
    assert "records of this evaluation were removed; the scores are still in scores.json" in capsys.readouterr().err
    about = read_evaluation(tmp_path / "one").about
    assert about["sets"]["forget"]["rows"] == 5 and about["adapter"] is None and about["template"] == "qa"
    assert set(about["seconds"]) == {"likelihood", "generation"}


def test_an_interrupted_evaluation_resumes_to_the_same_records(
    tmp_path: Path, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(collecting, "BLOCK", 2)
    assert main(command("whole")) == 0
    made, original = [], collecting._measured

    def stops_after_four(*args: object) -> list[dict]:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(1)
        return original(*args)

    monkeypatch.setattr(collecting, "_measured", stops_after_four)
    assert main(command("torn")) in (75, 130)
    assert not (tmp_path / "torn").exists()
    monkeypatch.setattr(collecting, "_measured", lambda *args: made.append(1) or original(*args))
    capsys.readouterr()
    assert main(command("torn")) == 2 and "--resume" in capsys.readouterr().err
    assert main(command("torn", "--resume")) == 0
    assert len(made) == 4 + (4 * 3 - 4)
    for name in ("forget", "retain", "real_authors", "world_facts"):
        files = [(tmp_path / out / "records" / f"{name}.jsonl").read_bytes() for out in ("whole", "torn")]
        assert files[0] == files[1]
    assert (tmp_path / "whole/scores.json").read_bytes() == (tmp_path / "torn/scores.json").read_bytes()


def test_windows_of_running_text_are_counted_and_a_set_becomes_tokens_once(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    paths = [write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i} " * 12} for i in (1, 2)]) for n in ("f", "r")]
    made, encode = [], evaluate_items.encode_rows
    monkeypatch.setattr(evaluate_items, "encode_rows", lambda *a, **k: made.append(encode(*a, **k)) or made[-1])
    given = ["--model", str(model_folder), "--forget", str(paths[0]), "--retain", str(paths[1]), "--max-length", "16"]
    assert main(["evaluate", *given, "--no-generate", "--out", str(tmp_path / "found")]) == 0
    sets = read_evaluation(tmp_path / "found").sets
    windows = sum(map(len, sets.values()))
    assert windows > 4 and f"evaluate     {windows} rows in" in capsys.readouterr().err
    assert len(made) == len(sets) * 2  # and once more the rows whose hidden states are kept


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Stop an evaluation by Ctrl-C where it comes to the retain set."""
    original = collecting._answered

    def stops_in_retain(subject: Subject, block: list, *more: object) -> list:
        if "retain" in block[0].question:
            raise KeyboardInterrupt
        return original(subject, block, *more)

    def run(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(collecting, "_answered", stops_in_retain)
            assert main(arguments) in (75, 130)

    return run


def test_resuming_with_other_data_is_refused(
    tmp_path: Path,
    command: Callable[..., list[str]],
    interrupt: Callable[[list[str]], None],
    capsys: pytest.CaptureFixture,
) -> None:
    interrupt(command("torn"))
    (tmp_path / "tofu" / "retain_perturbed.json").write_text(json.dumps(ROW))
    assert main(command("torn", "--resume")) == 2
    assert "retain rows" in capsys.readouterr().err


def test_resuming_with_other_wrong_answers_or_another_dtype_is_refused(
    tmp_path: Path,
    command: Callable[..., list[str]],
    interrupt: Callable[[list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    interrupt(command("torn"))
    capsys.readouterr()
    with monkeypatch.context() as patch:  # `auto`, on a machine with a GPU
        patch.setattr(evaluating, "pick_dtype", lambda *_: torch.bfloat16)
        assert main(command("torn", "--resume")) == 2
    assert "dtype" in capsys.readouterr().err
    file = tmp_path / "tofu" / "retain_perturbed.json"
    changed = [json.loads(line) for line in file.read_text().splitlines()]
    changed[0]["perturbed_answer"][0] += "?"
    file.write_text("\n".join(map(json.dumps, changed)))
    assert main(command("torn", "--resume")) == 2
    assert "retain tokens" in capsys.readouterr().err


def test_a_wrong_reference_is_refused_before_anything_is_measured(
    tmp_path: Path, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(command("short", "--max-rows", "3")) == 0
    measured = collecting._measured
    monkeypatch.setattr(collecting, "_measured", lambda *args: pytest.fail("measured"))
    capsys.readouterr()
    assert main(command("one", "--reference", str(tmp_path / "short"))) == 3
    assert "set 'forget' has 5 rows in one, 3 in the other" in capsys.readouterr().err
    monkeypatch.setattr(collecting, "_measured", measured)
    assert main(command("cut", "--max-length", "46")) == 0
    monkeypatch.setattr(collecting, "_measured", lambda *args: pytest.fail("measured"))
    capsys.readouterr()
    assert main(command("one", "--reference", str(tmp_path / "cut"))) == 3
    assert "--max-length" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_a_model_for_a_reference_is_told_from_nothing(
    command: Callable[..., list[str]], model_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(command("one", "--reference", str(model_folder))) == 3
    assert "a model, not an evaluation of one" in capsys.readouterr().err


def test_own_data_needs_no_reference_and_says_what_is_undefined(
    tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    given = ["--model", model_folder, "--forget", data_files[0], "--retain", data_files[1], "--new-tokens", "4"]
    arguments = [*map(str, given), "--out", str(tmp_path / "own"), "--json"]
    assert main(["evaluate", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forget_quality"]["value"] is None and "--reference" in found["forget_quality"]["reason"]
    assert "other rows" in found["forget_truth_ratio"]["note"] and "other rows" in found["model_utility"]["note"]
    assert 0 <= found["model_utility"]["value"] <= 1
    secrets = [row.answer for file in data_files for row in read_rows(file).rows]
    for path in (p for p in (tmp_path / "own").rglob("*") if p.is_file()):
        assert not [s for s in secrets if s.encode() in path.read_bytes()], path
    assert main(["evaluate", *arguments[:-3], "--out", str(tmp_path / "kept"), "--keep-text"]) == 0
    kept = read_evaluation(tmp_path / "kept").sets["forget"]
    assert {record["text"]["answer"] for record in kept} <= set(secrets)
    assert main(["evaluate", "--model", str(model_folder), "--out", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(("own", "kept"), [("text", False), ("question", True)])
def test_only_a_utility_that_rests_on_borrowed_answers_says_so(own: str, kept: bool) -> None:
    record = {"row": 0, "id": "a", "nll": 0.5, "tokens": 2, "correct": "11", "rouge_recall": 0.5}
    offered = record | {"paraphrase_nll": 0.5, "wrong_nll": [1.0]}
    sets = {"forget": [offered], "retain": [offered if kept else record]}
    found = own_scores(Evaluation("made", {"suite": "own", "borrowed": True}, sets), None)
    for name in ("model_utility", "model_utility_without_rouge"):
        assert ("note" in found[name].extra) == kept, own
    assert "note" in found["forget_truth_preference"].extra and "note" in found["forget_quality"].extra
    assert "note" not in found["forget_probability"].extra


def test_a_row_to_keep_is_not_one_that_no_model_has_seen(
    tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    given = ["--model", str(model_folder), "--forget", str(data_files[0]), "--out", str(tmp_path / "own")]
    assert main(["evaluate", *given, "--retain", str(data_files[1]), "--holdout", str(data_files[1])]) == 3
    assert "are the same row (and 9 more)" in capsys.readouterr().err and not (tmp_path / "own").exists()


def test_a_holdout_adds_membership_inference(
    tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    rows = [{"question": f"Who was number {i}?", "answer": f"It was person {i * 7}."} for i in range(6)]
    given = ["--model", model_folder, "--forget", data_files[0], "--holdout", write_rows(tmp_path / "new.jsonl", rows)]
    arguments = ["evaluate", *map(str, given), "--no-generate", "--json"]
    assert main([*arguments, "--gradient-norm", "--out", str(tmp_path / "one")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["privleak"]["value"] is None and found["membership_reference_auc"]["value"] is None
    assert main([*arguments, "--out", str(tmp_path / "two"), "--reference", str(tmp_path / "one")]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["privleak"]["value"] == 0  # the reference is the same model
    assert again["membership_reference_auc"]["value"] == 0.5
    assert "--gradient-norm" in again["membership_gradient_norm_auc"]["reason"]
    for name in ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm"):
        assert 0 <= found[f"membership_{name}_auc"]["value"] <= 1 and found[f"membership_{name}_tpr"]["n"] == 6
    assert "retain" not in {name.split("_")[0] for name in found}
    without = ["evaluate", *map(str, given[:-2]), "--no-generate", "--out", str(tmp_path / "without")]
    assert main(without) == 0
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "three"), "--reference", str(tmp_path / "without")]) == 0
    partly = json.loads(capsys.readouterr().out)
    assert partly["privleak"]["reason"] == "the reference was evaluated without --holdout"
    assert partly["forget_quality"]["value"] == 0 and partly["membership_min_k_auc"] == found["membership_min_k_auc"]


@pytest.mark.parametrize("word", ["missing", "empty"])
def test_score_of_something_else_is_one_clear_line(tmp_path: Path, word: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["score", str(tmp_path / word)]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_adapter_is_evaluated_on_its_run_s_data_and_compared_inside_with_the_original(
    tmp_path: Path, model_folder: Path, data_files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    run, base = tmp_path / "run", ["--model", str(model_folder)]
    data = ["--forget", str(data_files[0]), "--retain", str(data_files[1])]
    assert main(["forget", *base, *data, "--out", str(run), "--lr", "3e-2", "--init", "lora", "--epochs", "2"]) == 0
    plain = ["--no-generate", "--json", "--out"]
    assert main(["evaluate", *base, *data, *plain, str(tmp_path / "before")]) == 0
    capsys.readouterr()
    reference = ["--reference", str(tmp_path / "before")]
    assert main(["evaluate", *base, "--adapter", str(run), *reference, *plain, str(tmp_path / "after")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forget_cka_original"]["value"] < 1
    assert len(found["forget_cka_original"]["layers"]) == 3  # the embeddings and two layers
    # Here the reference is the original model itself.
    assert found["retain_cka_retrained"]["value"] == pytest.approx(found["retain_cka_original"]["value"])
    about = read_evaluation(tmp_path / "after").about
    assert about["adapter"]["sha256"] == sha256(run / "adapter" / "adapter_model.safetensors")
    summary = json.loads((run / "summary.json").read_text())
    assert found["forget_probability"]["value"] == pytest.approx(summary["after"]["forget"]["value"], rel=1e-5)
    few = ["--adapter", str(run), "--max-rows", "2", *plain, str(tmp_path / "few")]
    assert main(["evaluate", *base, *few]) == 0
    assert json.loads(capsys.readouterr().out)["forget_cka_original"]["reason"].startswith("it takes 3 rows")
    other = shutil.copytree(model_folder, tmp_path / "other")
    tiny_llama(seed=9).save_pretrained(other)
    assert main(["evaluate", "--model", str(other), "--adapter", str(run), *plain, str(tmp_path / "none")]) == 3
    assert f"--model {other}: not the weights that {run} was made with" in capsys.readouterr().err
    assert main(["evaluate", *base, "--adapter", str(tmp_path), *plain, str(tmp_path / "none")]) == 3
    assert "neither a run folder with an adapter nor a PEFT adapter" in capsys.readouterr().err


def test_an_evaluation_of_a_run_reads_and_asks_as_the_run_did(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"q": f"Who was number {i}?", "a": f"It was person {i * 7}."} for i in range(6)]
    data = {
        name: str(write_rows(tmp_path / name, part)) for name, part in (("f.jsonl", rows[:3]), ("r.jsonl", rows[3:]))
    }
    base, keys = ["--model", str(model_folder)], ["--prompt-key", "q", "--answer-key", "a"]
    asked = ["--template", "Q: {question} A: "]
    made = ["--forget", data["f.jsonl"], "--retain", data["r.jsonl"], "--epochs", "1", "--lr", "1e-2", "--init", "lora"]
    assert main(["forget", *base, *made, *keys, *asked, "--out", str(tmp_path / "run")]) == 0
    after = ["evaluate", *base, "--adapter", str(tmp_path / "run"), "--no-generate", "--out", str(tmp_path / "after")]
    assert main(after) == 0
    about = read_evaluation(tmp_path / "after").about
    assert about["template"] == asked[1] and about["sets"]["forget"]["rows"] == 3
    capsys.readouterr()
    assert (
        main([*after[:-1], str(tmp_path / "other"), "--forget", data["f.jsonl"]]) == 3
    )  # rows of its own: its own keys
    assert "f.jsonl" in capsys.readouterr().err


def test_data_that_a_suite_does_not_read_are_refused(
    tmp_path: Path, command: Callable[..., list[str]], data_files: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    assert main(command("one", "--forget", str(data_files[0]))) == 2
    assert "--forget: --suite tofu does not read it, but --data and --split." in capsys.readouterr().err
    own = [
        "evaluate",
        "--model",
        "m",
        "--forget",
        str(data_files[0]),
        "--split",
        "forget01",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(own) == 2
    assert "--split: --suite own does not read it, but --forget and --retain and --holdout." in capsys.readouterr().err


def test_an_evaluation_does_not_replace_what_it_evaluates(
    tmp_path: Path, command: Callable[..., list[str]], model_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    (model / "manifest.json").write_text("{}")
    given = command("model", "--overwrite")
    given[given.index("--model") + 1] = str(model)
    assert main(given) == 2 and (model / "config.json").is_file()
    assert "--overwrite would delete what is read, --model" in capsys.readouterr().err


def test_the_split_that_is_measured_is_recorded(tmp_path: Path, command: Callable[..., list[str]]) -> None:
    given = command("one", "--no-generate")
    (tmp_path / "tofu" / "forget01_perturbed.json").rename(tmp_path / "tofu" / "forget10_perturbed.json")
    at = given.index("--split")
    assert main([*given[:at], *given[at + 2 :]]) == 0
    assert read_evaluation(tmp_path / "one").about["split"] == "forget10"

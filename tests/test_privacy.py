"""No command, whatever becomes of it, leaves text of a row in its files or in what it prints; its files are private.

Every row holds words that nothing else does. To put another command under the test, add a line to COMMANDS; another way
to fail, a line to BAD_DATA or FAULTS.
"""

from __future__ import annotations

import csv
import html
import io
import json
import shutil
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import write_rows
from lorasure import cli
from lorasure.evaluate.settings import EvaluateSettings

# Words of question, answer, group and paraphrase, of rows to forget and of rows to keep. Quotes, umlauts and a line
# break are written differently by each format, so that the forms below differ.
FORGET = ('Quorvexia "Ü', "Thessalune\nß", "Brindlewick", "Morrowgast")
RETAIN = ("Pellandrine <Ö", "Vastorimm'é", "Kestrelhame", "Duskwarren")
WORDS = [word.strip("\"<Ö Ü'éß\n") for word in FORGET + RETAIN]


def rows(words, count):
    question, answer, group, paraphrase = words
    return [
        {
            "question": f"Who is {question} {i}?",
            "answer": f"{question} {i} painted {answer} {i}.",
            "group": group,
            "paraphrased_answer": f"{paraphrase} {i}",
            "perturbed_answer": [f"Not {paraphrase} {i}.", f"{paraphrase}, never {i}."],
        }
        for i in range(count)
    ]


def forms(word: str) -> set[bytes]:
    """How a text may be written: as it is, escaped, in another encoding, as token ids of the byte-level tokenizer."""
    escaped = {word, json.dumps(word)[1:-1], repr(word)[1:-1], html.escape(word), quote(word)}
    found = {text.encode() for text in escaped} | {
        word.encode(code) for code in ("utf-16-le", "utf-16-be", "utf-32-le")
    }
    ids = TOKENS[word]
    found |= {mark.join(map(str, ids)).encode() for mark in (",", " ")}
    found |= {np.array(ids, dtype=kind).tobytes() for kind in ("<i2", "<i4", "<i8", ">i4", "<f4", "<f8")}
    return found | {word.encode().hex().encode()} | {text.lower() for text in found}


TOKENS: dict[str, list[int]] = {}


@pytest.fixture(autouse=True, scope="module")
def tokens(tokenizer):
    TOKENS.update({word: tokenizer(word)["input_ids"] for word in WORDS})


def leaks(data: bytes) -> list[str]:
    """The words that are in these bytes, in whatever form."""
    seen = (data, data.lower(), b"".join(data.split()))  # the last: ids one to a line, as in indented JSON
    return [word for word in WORDS if any(form in text for form in forms(word) for text in seen)]


@pytest.fixture
def private(tmp_path, capfd):
    """Check everything that was printed or written, except in the folder `given`."""

    def check(printed: str = "") -> str:
        out, err = capfd.readouterr()
        assert leaks((out + err + printed).encode()) == [], out + err
        written = [p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "given")]
        for path in written:
            assert leaks(str(path.relative_to(tmp_path)).encode()) == []
            assert path.is_dir() or leaks(path.read_bytes()) == [], path
            above = [path, *(p for p in path.parents if p.is_relative_to(tmp_path) and p != tmp_path)]
            closed = any(p.stat().st_mode & 0o077 == 0 for p in above)
            assert closed or path.name.endswith("report.html"), path  # a report is made to be shown to others
        return err

    return check


@pytest.fixture
def given(tmp_path, model_folder):
    """A folder with the model and the data that a command is given."""
    folder = tmp_path / "given"
    shutil.copytree(model_folder, folder / "model")
    write_rows(folder / "forget.jsonl", rows(FORGET, 6))
    write_rows(folder / "retain.jsonl", rows(RETAIN, 10))
    return folder


def flags(given, **changes):
    values = {"model": given / "model", "forget": given / "forget.jsonl", "retain": given / "retain.jsonl"} | changes
    return [part for name, value in values.items() if value for part in (f"--{name.replace('_', '-')}", str(value))]


SMALL = ["--rank", "2", "--epochs", "1", "--batch-size", "4", "--lr", "1e-2"]
VILA = ["--init", "vila", *SMALL]  # measures importance too


def test_the_search_finds_every_form():
    for word in WORDS:
        for form in forms(word):
            assert leaks(b"\x00..." + form + b"...") == [word]
    assert leaks(json.dumps(WORDS[0].upper()).encode()) == [WORDS[0]] and leaks(b"Who is painted?") == []
    assert leaks(json.dumps({"ids": [9, *TOKENS[WORDS[1]], 9]}, indent=2).encode()) == [WORDS[1]]


# Each with the folder of data, the output folder and the finished run of `forget`; in this order, codes that are right.
COMMANDS = {
    "importance": (0, lambda given, out, run: ["importance", *flags(given), *VILA, "--out", out]),
    "init": (0, lambda given, out, run: ["init", out]),
    "train": (0, lambda given, out, run: ["train", out]),
    "export": (0, lambda given, out, run: ["export", out, "--merge"]),
    "verify": (0, lambda given, out, run: ["verify", out]),
    "purge": (0, lambda given, out, run: ["purge", out]),
    "ssd": (0, lambda given, out, run: ["ssd", *flags(given), "--selection", "1", "--out", f"{out}-ssd"]),
    "uld": (0, lambda given, out, run: ["uld", *flags(given), *SMALL, "--out", f"{out}-uld"]),
    "task-arithmetic": (
        0,
        lambda given, out, run: ["task-arithmetic", *flags(given), *SMALL, "--out", f"{out}-task"],
    ),
    "dpo": (0, lambda given, out, run: ["forget", *flags(given), *VILA, "--loss", "dpo", "--out", f"{out}2"]),
    "finetune": (
        0,
        lambda given, out, run: [
            *("finetune", *flags(given, forget=None, retain=None), *SMALL[2:]),
            *("--data", given / "forget.jsonl", "--out", f"{out}-tuned"),
        ],
    ),
    "probe": (
        10,
        lambda given, out, run: ["probe", *flags(given, forget=None, retain=None, text=given / "forget.jsonl")],
    ),
    "evaluate": (
        0,
        lambda given, out, run: ["evaluate", *flags(given), "--adapter", run, "--new-tokens", "4", "--out", f"{out}-e"],
    ),
    "score": (0, lambda given, out, run: ["score", f"{out}-e"]),
    "attack": (
        0,
        lambda given, out, run: ["attack", run, "--attacks", "prefix,scale", "--rows", "4", "--new-tokens", "4"],
    ),
    "sequence": (
        0,
        lambda given, out, run: [
            *("sequence", given / "forget.jsonl", *flags(given, forget=None), *SMALL, "--out", f"{out}-sequence"),
        ],
    ),
    "report": (0, lambda given, out, run: ["report", run, "--out", f"{out}-report.html"]),
    "compare": (0, lambda given, out, run: ["compare", run, run]),
}


@pytest.mark.slow
@pytest.mark.fault(
    "the text of the rows, searched in all that the commands write and print",
    "P9",
    "not found in any form; every file 0600, every folder 0700",
    "the question of the first row in data.json; a umask of 0o022 in folders",
)
def test_commands_that_succeed(given, tmp_path, private):
    run = str(tmp_path / "run")
    assert cli.main(["forget", *flags(given), *VILA, "--out", run]) == 0
    private()
    for name, (code, arguments) in COMMANDS.items():
        assert cli.main([str(part) for part in arguments(given, str(tmp_path / "out"), run)]) == code, name
        private()


def as_csv(table):
    file = io.StringIO()
    csv.writer(file).writerows(table)
    return file.getvalue()


TEXT = FORGET[0]
QA = {"question": f"{TEXT}?", "answer": TEXT}
CHAT = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
BAD_DATA = {
    "cut.jsonl": json.dumps(QA)[:-2],
    "comma.json": f"[{json.dumps(QA)},]",
    "control.jsonl": '{"text": "' + TEXT + "\t",
    "escape.jsonl": '{"text": "\\x ' + WORDS[0] + '"}',
    "word.jsonl": WORDS[0],
    "list.jsonl": json.dumps([TEXT]),
    "keys.jsonl": json.dumps({TEXT: TEXT}),
    "short keys.jsonl": json.dumps({WORDS[0]: WORDS[1]}),
    "number.jsonl": json.dumps({**QA, "answer": 3}),
    "nested.jsonl": json.dumps({**QA, "answer": [TEXT]}),
    "group.jsonl": json.dumps({**QA, "group": [TEXT]}),
    "surrogate.jsonl": '{"text": "' + WORDS[0] + '\\ud800"}',
    "deep.jsonl": '{"text": ' + f'["{WORDS[0]}",' * 5000,
    "latin.jsonl": json.dumps(QA, ensure_ascii=False).encode("latin-1"),
    "no header.csv": as_csv([[WORDS[0], WORDS[1]], [WORDS[2], WORDS[3]]]),
    "lower.csv": as_csv([[WORDS[0].lower(), WORDS[1].lower()], ["a", "b"]]),
    "twice.csv": as_csv([[WORDS[0], WORDS[0]], ["a", "b"]]),
    "more.csv": as_csv([["question", "answer"], [TEXT, TEXT, TEXT]]),
    "quote.csv": f'question,answer\n"{WORDS[0]}" x,{WORDS[1]}\n',
    "open.csv": f'question,answer\n"{WORDS[0]},{WORDS[1]}\n',
    "text.parquet": TEXT,
    "blank.jsonl": json.dumps({**QA, "answer": " "}),
    "role.jsonl": json.dumps({"messages": [{"role": "user", TEXT: TEXT}, CHAT[1]]}),
    "last.jsonl": json.dumps({"messages": CHAT[:1] * 2}),
    "no template.jsonl": json.dumps({"messages": CHAT}),
    "long.jsonl": json.dumps({**QA, "question": TEXT * 100}),
    "kept.jsonl": json.dumps(rows(RETAIN, 1)[0]),
    "empty.jsonl": "",
}


@pytest.mark.fault(
    "rows that cannot be used, of 28 kinds", "P9", "exit 3; file and line are named, the text is not", "quote the value"
)
@pytest.mark.parametrize("name", BAD_DATA)
@pytest.mark.parametrize("command", ["forget", "finetune"])
def test_rows_that_cannot_be_used(given, tmp_path, private, command, name):
    content = BAD_DATA[name]
    (given / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    chosen = flags(given, **({"forget": given / name} if command == "forget" else {"forget": None, "retain": None}))
    chosen += [] if command == "forget" else ["--data", str(given / name)]
    code = cli.main([command, *chosen, *SMALL[2:], "--max-length", "96", "--out", str(tmp_path / "run")])
    err = private()
    assert code == (0 if name == "kept.jsonl" and command == "finetune" else 3), err
    assert code == 0 or name in err


@pytest.mark.parametrize("field", ["prompt_key", "answer_key", "text_key", "group_key", "pairing"])
def test_settings_that_do_not_fit_the_rows(given, tmp_path, private, field):
    value = "modular" if field == "pairing" else "nowhere"
    assert cli.main(["forget", *flags(given, **{field: value}), *VILA, "--out", str(tmp_path / "run")]) == 3
    private()


@pytest.mark.fault(
    "a chat template that quotes the messages in its error", "P9", "exit 3 without its words", "show the first reason"
)
@pytest.mark.parametrize(
    "shown", ["messages", "messages[0].content", "messages[0].content|upper", "messages[0]['content'][:12]"]
)
def test_a_chat_template_that_quotes_the_messages(given, tmp_path, private, shown):
    path = given / "model" / "tokenizer_config.json"
    template = "{{ raise_exception('refused: ' ~ " + shown + ") }}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert cli.main(["forget", *flags(given), *VILA, "--out", str(tmp_path / "run")]) == 3
    assert "forget.jsonl:1: the tokenizer's chat template refuses" in private()


def _interrupted(forward, self, *args, **kwargs):
    raise KeyboardInterrupt


def _out_of_memory(forward, self, *args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")


def _not_a_number(forward, self, *args, **kwargs):
    with torch.no_grad():
        self.model.norm.weight.fill_(float("nan"))
    return forward(self, *args, **kwargs)


def _no_space(forward, self, *args, **kwargs):
    raise OSError(28, "No space left on device")


def _mistake(forward, self, *args, **kwargs):
    """What a library may say, its notes and what it was caused by."""
    try:
        raise KeyError(FORGET[1])
    except KeyError as cause:
        error = RuntimeError(f"no such word: {FORGET[0]}")
        error.add_note(FORGET[0])
        raise error from cause


FAULTS = {
    "interrupted": (_interrupted, {75, 130}),
    "out of memory": (_out_of_memory, {5}),
    "not a number": (_not_a_number, {4}),
    "no space": (_no_space, {5}),
    "a mistake of ours": (_mistake, {70}),
}


@pytest.mark.fault(
    "an interruption, memory that runs out, NaN, a full disk, an error nobody thought of, at three places in the run",
    "P9",
    "documented exit code; no text in what is printed or left for --resume, all of it private",
    "write the row into the message of the error; show it of an error nobody thought of; mkdir without mode in folders",
)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("at", [2, 12, 20])
def test_runs_that_fail_on_the_way(given, tmp_path, private, monkeypatch, kind, at):
    fault, codes = FAULTS[kind]
    forward, passes = LlamaForCausalLM.forward, [0]

    def failing(self, *args, **kwargs):
        passes[0] += 1
        return fault(forward, self, *args, **kwargs) if passes[0] >= at else forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", failing)
    code = cli.main(["forget", *flags(given), *VILA, "--tokens-per-batch", "300", "--out", str(tmp_path / "run")])
    err = private()
    assert code in codes and passes[0] >= at, err


def test_evaluation_keeps_text_only_when_told(given, tmp_path):
    """That the search would find what an evaluation could write."""
    arguments = ["evaluate", *flags(given), "--new-tokens", "2", "--out", str(tmp_path / "e")]
    assert not EvaluateSettings(model="m", out="o").keep_text
    assert cli.main([*arguments, "--keep-text", "true"]) == 0
    found = b"".join(p.read_bytes() for p in (tmp_path / "e").rglob("*") if p.is_file())
    assert set(leaks(found)) >= {WORDS[0], WORDS[4]}
    assert all(Path(p).stat().st_mode & 0o077 == 0 for p in (tmp_path / "e").rglob("*"))

"""Data and names from elsewhere: read as they are or refused, never shown raw, and no name or size makes us stumble."""

from __future__ import annotations

import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from conftest import write_rows
from lorasure import cli, show
from lorasure.data.readers import read_rows
from lorasure.errors import SHOWN, DataError, escaped, one_line
from lorasure.evaluate.metrics import Score
from lorasure.progress import Reporter

HOSTILE = {
    "clears the screen": "\x1b[2J\x1b[H",
    "sets the title": "\x1b]0;owned\x07",
    "goes back": "\rlorasure: done\b\b",
    "new line": "x\nlorasure: all is well",
    "eight-bit control": "\x9b31m",
    "right to left": "\u202egnp.exe",
    "isolates": "\u2066x\u2069",
    "line separator": "a\u2028b\u0085c",
    "invisible": "a\u200bb\ufeff\u00ad",
    "tag characters": "\U000e0041",
    "half a pair": "\udc80",
}
QA = {"question": "Who?", "answer": "Ann."}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_hostile_is_left_in_a_message(text):
    for made in (escaped(text), one_line(text), one_line(f"{text} and {text}")):
        assert made.isprintable() and not set(made) & set("\x1b\n\r\u202e\u2066\u2028\u200b")
    assert one_line("Zoë  said:\n «naïve» 漢字 🙂") == "Zoë said: «naïve» 漢字 🙂"
    endless = one_line("begin " + text * 100_000 + " end")
    assert len(endless) < 11 * SHOWN and endless.startswith("begin ") and endless.endswith(" end")


@pytest.mark.fault(
    "escape sequences and writing directions in names of files, columns, settings and layers",
    "P8",
    "shown as \\x1b, \\u202e",
    "print the message as it is in cli.main",
)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_errors_on_the_terminal(tmp_path, model_folder, data_files, capfd, text):
    forget, retain = map(str, data_files)
    base = {"--model": str(model_folder), "--forget": forget, "--retain": retain, "--out": str(tmp_path / "run")}
    columns = write_rows(tmp_path / "columns.jsonl", [{text: text}])
    rank = tmp_path / "rank.yaml"
    rank.write_text(json.dumps({"rank": text}))
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text(json.dumps({text: 1}))
    named = tmp_path / f"{text}.jsonl"
    named.write_bytes(b"{")
    places = {
        *(("--forget", str(named)), ("--forget", f"{text}.jsonl"), ("--forget", text), ("--forget", str(columns))),
        *(("--model", text), ("--model", f"/{text}"), ("--targets", text), ("--loss", text), ("--template", text)),
        *(
            ("--config", str(rank)),
            ("--config", str(unknown)),
            ("--config", text),
            ("--rank", text),
            (f"--{text}", "1"),
        ),
        *(("--device", text), ("--importance", text), ("--prompt-key", text)),
    }
    for name, value in places:
        arguments = [part for pair in (base | {name: value}).items() for part in pair]
        code = cli.main(["forget", *arguments])
        out, err = capfd.readouterr()
        assert code in (2, 3), (name, err)
        assert out == "" and err.endswith("\n") and err[:-1].isprintable(), (name, err)
    assert cli.main([text]) == 2 and capfd.readouterr().err[:-1].isprintable()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_notes_and_results_on_the_terminal(tmp_path, model_folder, data_files, capfd, text):
    Reporter().note(f"{text} [bold red]x[/] :smile:")
    err = capfd.readouterr().err
    assert err.removesuffix("\n").isprintable() and "[bold red]x[/] :smile:" in err
    flags = ["--model", str(model_folder), "--forget", str(data_files[0]), "--retain", str(data_files[1])]
    code = cli.main(["importance", *flags, "--rank", "2", "--out", str(tmp_path / f"run{text}")])
    assert code == (2 if "\udc80" in text else 0)
    captured = capfd.readouterr()
    assert all(line.isprintable() for line in (captured.out + captured.err).split("\n"))


@pytest.mark.parametrize(
    "text", [*HOSTILE.values(), "x[/b]", "x[red]y", "x:smile:"], ids=[*HOSTILE, "closes a tag", "opens a tag", "emoji"]
)
def test_titles_of_tables_on_the_terminal(capsys, text):
    found = {"forget_probability": Score(0.5, 3, low=0.25, high=0.75)}
    show.scores(found, text)
    show.steps({"step": found}, text)
    out = capsys.readouterr().out
    assert out.count(escaped(text)) == 2 and all(line.isprintable() for line in out.split("\n"))


@pytest.mark.fault(
    "names that no file can have, devices and pipes as data",
    "P8",
    "exit 2 or 3 at once",
    "path.exists() without a guard",
)
@pytest.mark.parametrize("flag", ["--forget", "--model", "--config", "--importance", "--out"])
@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "~nosuchuser/x.jsonl", "a\0b", "\ud800", "loop/x.jsonl", ""])
def test_names_that_no_file_can_have(tmp_path, model_folder, data_files, capfd, monkeypatch, flag, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    values = {"--model": model_folder, "--forget": data_files[0], "--retain": data_files[1], "--out": "run"} | {
        flag: name
    }
    code = cli.main(["forget", *(str(part) for pair in values.items() for part in pair)])
    err = capfd.readouterr().err
    if flag == "--out" and name.startswith("~"):
        assert code == 0 and (tmp_path / name).is_dir()  # a folder may have that name
        return
    assert code in ({2, 3} if flag in ("--forget", "--model", "--config") else {2, 3, 5})
    assert len(err.splitlines()) == 1 and err[:-1].isprintable(), err


@pytest.mark.skipif(sys.platform == "win32", reason="no such devices")
def test_devices_and_pipes_are_not_read(tmp_path):
    os.symlink("/dev/zero", tmp_path / "endless.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ("endless.jsonl", "pipe.jsonl"):
        with pytest.raises(DataError, match="is not a file"):
            read_rows(tmp_path / name)


@pytest.mark.fault(
    "a line of 1 MB, NUL, control characters, half an emoji, a byte order mark in rows",
    "P8",
    "read as they are",
    "no csv.field_size_limit",
)
@pytest.mark.parametrize("text", ["x" * 1_000_000, *HOSTILE.values(), "\0", "<script>alert(1)</script>", "[bold]"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_hostile_text_is_data_like_any_other(tmp_path, kind, text):
    if "\udc80" in text:
        pytest.skip("is not UTF-8, so it is refused; see test_data_readers.py")
    text = text.replace("\r", "") if kind == "csv" else text
    record = {"question": "Who?", "answer": text}
    table = 'question,answer\nWho?,"' + text + '"\n'
    content = {"jsonl": json.dumps(record), "json": json.dumps([record]), "csv": table}[kind]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [row.answer for row in read_rows(path).rows] == [text]


def test_a_long_value_raises_the_limit_of_csv_for_this_file_only_as_far_as_needed(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 300_000 + "\n")
    assert len(read_rows(path).rows[0].answer) == 300_000


@pytest.mark.fault(
    "text in a Parquet file that is not UTF-8", "P8", "exit 3", "no ValueError among the exceptions of readers._parquet"
)
def test_parquet_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["abcdefgh"]}), path, compression="none", use_dictionary=False)
    assert read_rows(path).rows[0].answer == "abcdefgh"
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"ab\xff\xfeefgh"))
    with pytest.raises(DataError, match="not a valid Parquet file"):
        read_rows(path)

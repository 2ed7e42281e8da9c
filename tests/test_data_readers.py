"""Readers: every layout and file type, and every way in which a file can be wrong."""

import json
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lorasure.data.examples import Row
from lorasure.data.readers import check_disjoint, read_rows
from lorasure.data.rows import Layout
from lorasure.errors import DataError, ResourceError, UsageError

SECRET = "Xylophone"  # stands in row texts; no message may quote it
QA = {"question": f"Who plays the {SECRET}?", "answer": f"Ada plays the {SECRET}."}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the current folder, so that places read as `name:line`."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        return name

    return write


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def error(source, layout=None, kind=DataError):
    """The message of the one error; it must be a single line without row text."""
    with pytest.raises(kind) as caught:
        read_rows(source, layout or Layout())
    message = str(caught.value)
    assert "\n" not in message and SECRET not in message
    return message


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "Q", "answer": "A"}, ("qa", "Q", "A")),
        ({"prompt": "P", "completion": " C"}, ("completion", "P", " C")),
        ({"prompt": "", "completion": "C"}, ("completion", "", "C")),
        ({"prompt": "P", "response": "R"}, ("qa", "P", "R")),
        ({"instruction": "I", "output": "O"}, ("qa", "I", "O")),
        ({"instruction": "I", "input": "", "output": "O"}, ("qa", "I", "O")),
        ({"instruction": "I", "input": "X", "output": "O"}, ("qa", "I\nX", "O")),
        ({"text": "T"}, ("text", "", "T")),
        ({"messages": CHAT}, ("chat", "", "Hello")),
    ],
)
def test_layouts(write, record, expected):
    row = read_rows(write("a.jsonl", lines(record))).rows[0]
    assert (row.kind, row.prompt, row.answer) == expected
    assert row.messages == (tuple(CHAT[:1]) if row.kind == "chat" else ())
    assert row.extra == {}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json", "a.csv", "a.parquet"])
def test_file_types_agree(write, tmp_path, name):
    records = [{"question": "Q {1}, é", "answer": 'A "x"\nline', "group": "g"}, {**QA, "group": "h"}]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / name)
    elif name == "a.csv":
        write(name, 'question,answer,group\r\n"Q {1}, é","A ""x""\nline",g\r\n\r\n' + ",".join([*QA.values(), "h\r\n"]))
    else:
        write(name, json.dumps(records, indent=2) if name == "list.json" else lines(*records))
    rows = read_rows(name).rows
    assert [(r.prompt, r.answer, r.group) for r in rows] == [tuple(r.values()) for r in records]
    assert rows[1].place == (f"{name}:5" if name == "a.csv" else f"{name}:2")  # CSV counts the lines inside values


def test_document_and_byte_order_mark(write):
    row = read_rows(write("a.md", b"\xef\xbb\xbf# Title\r\ntext\n"), Layout(prompt_key="q")).rows[0]
    assert (row.kind, row.answer, row.place) == ("text", "# Title\ntext\n", "a.md:1")


def test_line_separator_inside_json_text_is_kept(write):
    row = read_rows(write("a.jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False))).rows[0]
    assert row.answer == "a\u2028b"


def test_columns_can_be_named(write):
    record = {"q": "Q", "a": "A", "author": 7, "options": ["x", "y"]}
    row = read_rows(write("a.jsonl", lines(record)), Layout(prompt_key="q", answer_key="a", group_key="author")).rows[0]
    assert (row.kind, row.prompt, row.answer, row.group) == ("qa", "Q", "A", "7")
    assert row.extra == {"options": ["x", "y"]}


def test_one_named_column_leaves_the_other_to_its_usual_name(write):
    source = write("a.jsonl", lines({**QA, "paraphrased_answer": "P"}))
    row = read_rows(source, Layout(answer_key="paraphrased_answer")).rows[0]
    assert (row.prompt, row.answer, row.extra) == (QA["question"], "P", {"answer": QA["answer"]})
    assert read_rows(write("b.jsonl", lines({"body": "B"})), Layout(text_key="body")).rows[0].kind == "text"


def test_naming_prompt_and_completion_does_not_change_their_kind(write):
    source = write("a.jsonl", lines({"prompt": "P", "completion": "C"}))
    assert read_rows(source, Layout(prompt_key="prompt", answer_key="completion")) == read_rows(source)


def test_text_and_prompt_columns_exclude_each_other():
    with pytest.raises(UsageError, match="--text-key cannot be combined"):
        Layout(text_key="t", answer_key="a")


def test_blank_and_repeated_rows_are_left_out_and_listed(write):
    records = [QA, {**QA, "answer": " "}, {**QA, "answer": None}, {**QA, "question": ""}, {**QA, "extra": 1}]
    result = read_rows(write("a.jsonl", lines(*records)))
    assert result.counts() == {"rows": 1, "skipped": 3, "duplicates": 1}
    assert result.skipped == (
        ("a.jsonl:2", "blank answer"),
        ("a.jsonl:3", "blank answer"),
        ("a.jsonl:4", "blank question"),
    )
    assert result.duplicates == (("a.jsonl:5", "a.jsonl:1"),)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", "", "a.jsonl: no rows to read, it is empty"),
        ("a.json", "[]", "a.json: no rows to read, it is empty"),
        ("a.csv", "question,answer\n", "a.csv: no rows to read, it is empty"),
        ("a.txt", " \n", "a.txt: no rows to read, all 1 are blank"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}', "a.jsonl:2: byte 25 is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbf\xff", "a.txt:1: byte 3 is not UTF-8"),
        (
            "a.jsonl",
            lines(QA) + f'{{"text": "{SECRET}"',
            "a.jsonl:2: not valid JSON (Expecting ',' delimiter at column",
        ),
        ("a.json", f'[\n{{"text": "{SECRET}"}},\n{{]', "a.json:3: not valid JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1: not usable JSON"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", "a.jsonl:1: not usable JSON"),
        ("a.jsonl", json.dumps([SECRET]), "a.jsonl:1: expected an object with named values, found a list"),
        ("a.jsonl", lines({"frage": SECRET}), "a.jsonl:1: found the columns frage; expected one of: question + answer"),
        (
            "a.csv",
            f"question;answer\n{SECRET};Ada\n",
            "(or set --prompt-key, --answer-key or --text-key). Columns are sepa",
        ),
        ("a.csv", f"Who is {SECRET}?,Ada\nWho?,Bob\n", "a.csv:2: found the columns (2, not shown because they"),
        ("a.csv", f"question,answer\nA,{SECRET},B\n", "a.csv:2: found 3 values, the header has 2"),
        ("a.csv", f'question,answer\n\nA,"{SECRET}\n', "a.csv:3: not valid CSV"),
        ("a.csv", "text,text\na,b\n", "a.csv:1: two columns have the same name"),
        ("a.parquet", SECRET, "a.parquet: not a valid Parquet file"),
        ("a.jsonl", lines({**QA, "answer": 1956}), "a.jsonl:1: answer must be text, found a number"),
        ("a.jsonl", lines({**QA, "answer": True}), "a.jsonl:1: answer must be text, found true or false"),
        ("a.jsonl", lines({**QA, "answer": [SECRET]}), "a.jsonl:1: answer must be text, found a list"),
        ("a.jsonl", '{"text": "a\\ud800"}', "a.jsonl:1: text holds half of a surrogate pair at character 1"),
        (
            "a.jsonl",
            lines(QA) + '{"text": "a", "text": "b"}',
            "a.jsonl:2: expected an object with named values, found an object that has a name twice",
        ),
        ("a.json", '[{"text": "a"},\n\n{"text": "b", "group": 1, "group": 2}]', "a.json:2: expected an object with"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a", "content": "b"}, {}]}',
            "message 1 must have role and content and nothing else, found an object that has a name twice",
        ),
        ("a.jsonl", lines({**QA, "group": 1.5}), "a.jsonl:1: group must be text or a whole number, found a number"),
        (
            "a.jsonl",
            lines({"messages": SECRET}),
            "a.jsonl:1: messages must be a list of at least two messages, found text",
        ),
        ("a.jsonl", lines({"messages": CHAT[1:]}), "at least two messages, found a list of 1"),
        ("a.jsonl", lines({"messages": CHAT[::-1]}), "a.jsonl:1: the last message must have the role assistant"),
        (
            "a.jsonl",
            lines({"messages": [SECRET, CHAT[1]]}),
            "message 1 must have role and content and nothing else, found text",
        ),
        ("a.jsonl", lines({"messages": [{"role": "user"}, CHAT[1]]}), "message 1 must have role and content"),
        (
            "a.jsonl",
            lines({"messages": [{"role": "user", "content": 3}, CHAT[1]]}),
            "the content of message 1 must be text",
        ),
        ("a.xlsx", "", "a.xlsx: unknown file type '.xlsx'. Choose one of: .jsonl, .json, .csv, .parquet, .txt, .md"),
    ],
)
def test_wrong_files(write, name, content, expected):
    assert expected in error(write(name, content))


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (Layout(prompt_key="q"), "a.jsonl:1: found the columns question, answer; expected q."),
        (Layout(text_key="body"), "expected body."),
        (Layout(group_key="author"), "expected author (--group-key)."),
    ],
)
def test_named_columns_that_are_missing(write, layout, expected):
    assert expected in error(write("a.jsonl", lines(QA)), layout)


def test_missing_files_and_directories(write, tmp_path):
    for name in ("forget.jsonl", "data/forget.jsnl", "/no/where/forget.csv", "forget", "~/none.txt"):
        assert error(name).startswith(f"{name}: no such file, nor a hub data set")
    assert "is a directory" in error(str(tmp_path))


def test_permission(write, monkeypatch):
    source = write("a.jsonl", lines(QA))

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert "no permission" in error(source, kind=ResourceError)


def test_hub(write, monkeypatch):
    table = datasets.Dataset.from_list([QA, {**QA, "answer": "B"}])
    asked = []

    def load(*args, split):
        asked.append((*args, split))
        return table if split else datasets.DatasetDict(forget=table)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("owner/name-v1.5:config:forget").rows
    assert [r.place for r in rows] == ["owner/name-v1.5:config:forget:1", "owner/name-v1.5:config:forget:2"]
    assert read_rows("owner/name").rows[1].answer == "B"
    assert asked == [("owner/name-v1.5", "config", "forget"), ("owner/name", None, None)]


def test_hub_errors(write, monkeypatch):
    table = datasets.Dataset.from_list([QA])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict(train=table, test=table))
    assert "name one split (owner/name:default:SPLIT), the choices are: train, test" in error("owner/name")

    def fail(*args, **kwargs):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "cannot be loaded (ConnectionError: no network)" in error("owner/name")


def row(prompt, answer, line, source="retain.jsonl", **kwargs):
    return Row(prompt, answer, source, line, **kwargs)


def test_disjoint_sets_pass():
    check_disjoint([row("Q", "A", 1)], [row("Q", "B", 1), row("R", "A", 2)])


def test_a_row_in_both_sets_is_named():
    forget = [row("Q", "A", 3, "forget.jsonl"), row("Other", "x", 4, "forget.jsonl")]
    retain = [row("R", "A", 1), row(" q", "a\n", 17), row("Q", "A", 18)]
    with pytest.raises(DataError, match=r"^forget.jsonl:3 and retain.jsonl:17 are the same row; one"):
        check_disjoint(forget, retain)
    with pytest.raises(DataError, match=r"\(and 1 more\)"):
        check_disjoint(forget, [*retain, row("other", "X", 19)])
    chat = row("", "A", 9, kind="chat", messages=({"role": "user", "content": "Q"},))
    with pytest.raises(DataError, match=r"retain.jsonl:9"):
        check_disjoint(forget, [chat])


def test_importing_readers_is_light():
    code = "import sys, lorasure.data.readers; print({'datasets', 'transformers', 'pyarrow'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"

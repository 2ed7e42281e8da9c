"""Files and hub data sets -> rows of text. An error is one line that names the place and never quotes a row's text."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, ResourceError, UsageError
from .examples import Row

Record = tuple[int, Any]  # the line or row number, counted from 1, and what stands there


@dataclass(frozen=True)
class Layout:
    """Which columns hold what. A column that is not named here is recognised by its usual names."""

    prompt_key: str | None = None
    """Column with the question or prompt."""
    answer_key: str | None = None
    """Column with the answer, which is what is forgotten or retained."""
    text_key: str | None = None
    """Column with running text, instead of a prompt and an answer."""
    group_key: str | None = None
    """Column that says which rows belong together (an author, a topic); `group` is taken when it exists."""

    def __post_init__(self) -> None:
        if self.text_key and (self.prompt_key or self.answer_key):
            raise UsageError(
                "text_key cannot be combined with prompt_key or answer_key: a row is text or it has a prompt."
            )


AUTO = Layout()

# (prompt column, answer column) -> kind of row. The first pair that a row has decides. Only `completion` promises that
# both parts can be joined as they are; the others need a template between them.
PAIRS = {
    ("question", "answer"): "qa",
    ("prompt", "completion"): "completion",
    ("prompt", "response"): "qa",
    ("instruction", "output"): "qa",
}
ACCEPTED = ", ".join([*(f"{p} + {a}" for p, a in PAIRS), "messages", "text"])


@dataclass(frozen=True)
class Rows:
    """What was read, in file order: the rows, (place, reason) of each row skipped, (place, place of the first)
    of each duplicate."""

    rows: tuple[Row, ...]
    skipped: tuple[tuple[str, str], ...]
    duplicates: tuple[tuple[str, str], ...]

    def counts(self) -> dict[str, int]:
        """Number of rows kept, skipped and removed as duplicates."""
        return {"rows": len(self.rows), "skipped": len(self.skipped), "duplicates": len(self.duplicates)}


def read_rows(source: str | Path, layout: Layout = AUTO) -> Rows:
    """Read a .jsonl, .json, .csv, .parquet, .txt or .md file, or a hub data set `owner/name[:config[:split]]`.

    A row's `line` is its line in JSON lines and CSV, its number, from 1, in a JSON list, Parquet file or hub data set.
    Rows with a blank answer or question are skipped, exact duplicates removed; both are listed in the result.
    Raises DataError for anything that cannot be read as rows, ResourceError where permission is missing.
    """
    source = str(source)
    path = Path(source).expanduser()
    records = _file_records(path, source) if path.exists() else _absent(path, source)
    if path.suffix.lower() in DOCUMENTS:
        layout = AUTO  # a document has no columns, so a layout meant for another file does not apply
    first: dict[tuple[Any, ...], Row] = {}
    skipped: list[tuple[str, str]] = []
    duplicates: list[tuple[str, str]] = []
    for line, record in records:
        row, blank = _row(record, source, line, layout)
        if blank:
            skipped.append((row.place, f"blank {blank}"))
        elif (known := first.setdefault(_identity(row), row)) is not row:
            duplicates.append((row.place, known.place))
    if not first:
        why = f"all {len(skipped)} are blank" if skipped else "it is empty"
        raise DataError(f"{source}: no rows to read, {why}.")
    return Rows(tuple(first.values()), tuple(skipped), tuple(duplicates))


def check_disjoint(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Raise a DataError naming both places if a row is in both sets, whatever its case, spacing or layout."""
    kept = {_meaning(row): row for row in reversed(retain)}  # reversed: the first of several is the one to name
    same = [(row, kept[key]) for row in forget if (key := _meaning(row)) in kept]
    if same:
        one, other = same[0]
        more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
        raise DataError(f"{one.place} and {other.place} are the same row{more}; one cannot be forgotten and retained.")


def _identity(row: Row) -> tuple[Any, ...]:
    return row.kind, row.prompt, tuple((m["role"], m["content"]) for m in row.messages), row.answer


def _meaning(row: Row) -> tuple[str, ...]:
    prompt = " ".join([row.prompt, *(m["content"] for m in row.messages)])
    return tuple(" ".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in (prompt, row.answer))


# --- one record -> one row


def _row(record: Any, source: str, line: int, layout: Layout) -> tuple[Row, str | None]:
    """The row, and the name of the column that is blank and must not be (None if all is well)."""
    place = f"{source}:{line}"
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected an object with named values, found {_type(record)}.")
    kind, prompt_key, answer_key = _columns(record, layout, place)
    used = {prompt_key, answer_key, layout.group_key or "group"}
    messages: tuple[dict[str, str], ...] = ()
    if kind == "chat":
        prompt, (messages, answer) = "", _messages(record[answer_key], place)
    else:
        prompt, answer = (_text(record[key], key, place) if key else "" for key in (prompt_key, answer_key))
    if prompt_key == "instruction" and "input" in record:
        used.add("input")
        prompt = "\n".join(filter(str.strip, [prompt, _text(record["input"], "input", place)]))
    extra = {key: value for key, value in record.items() if key not in used}
    row = Row(prompt, answer, source, line, kind, messages, _group(record, layout, place), extra)
    blank = answer_key if not answer.strip() else prompt_key if kind == "qa" and not prompt.strip() else None
    return row, blank


def _columns(record: Mapping[str, Any], layout: Layout, place: str) -> tuple[str, str, str]:
    """(kind, prompt column or "", answer column) of this record."""
    prompt, answer = layout.prompt_key, layout.answer_key
    if layout.text_key:
        found = ("text", "", layout.text_key)
    elif prompt or answer:
        prompt = prompt or next((p for p, _ in PAIRS if p in record), "question")
        answer = answer or next((a for _, a in PAIRS if a in record), "answer")
        found = (PAIRS.get((prompt, answer), "qa"), prompt, answer)
    elif pair := next((pair for pair in PAIRS if record.keys() >= set(pair)), None):
        found = (PAIRS[pair], *pair)
    else:
        found = ("chat", "", "messages") if "messages" in record else ("text", "", "text")
    missing = [key for key in found[1:] if key and key not in record]
    if not missing:
        return found
    named = prompt or answer or layout.text_key
    wanted = " and ".join(missing) if named else f"one of: {ACCEPTED} (or set prompt_key, answer_key or text_key)"
    raise DataError(f"{place}: found the columns {_names(record)}; expected {wanted}.")


def _names(record: Mapping[str, Any], most: int = 12) -> str:
    """Column names for a message. A CSV without a header has row text in their place, so only plain names are shown."""
    shown = [k if re.fullmatch(r"[\w-]{1,32}", k) else f"<{len(k)} characters>" for k in list(record)[:most]]
    return ", ".join(shown + ["..."] * (len(record) > most)) or "(none)"


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _text(value: Any, key: str, place: str) -> str:
    """`value` as text; null counts as blank. Numbers are refused: 1956 and "1956.0" would become different answers."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {key} must be text, found {_type(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: {key} holds half of a surrogate pair at character {error.start}.") from None
    return value


def _group(record: Mapping[str, Any], layout: Layout, place: str) -> str | None:
    key = layout.group_key or "group"
    if layout.group_key and key not in record:
        raise DataError(f"{place}: found the columns {_names(record)}; expected {key} (group_key).")
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise DataError(f"{place}: {key} must be text or a whole number, found {_type(value)}.")
    return None if value is None else str(value)


def _messages(value: Any, place: str) -> tuple[tuple[dict[str, str], ...], str]:
    """The messages before the last, and the content of the last, which must come from the assistant."""
    if not isinstance(value, list) or len(value) < 2:
        found = f"a list of {len(value)}" if isinstance(value, list) else _type(value)
        raise DataError(f"{place}: messages must be a list of at least two messages, found {found}.")
    messages = [_message(item, f"message {number}", place) for number, item in enumerate(value, 1)]
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{place}: the last message must have the role assistant.")
    return tuple(messages[:-1]), messages[-1]["content"]


def _message(item: Any, name: str, place: str) -> dict[str, str]:
    present = {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else {}
    if present.keys() != {"role", "content"}:
        found = _names(present) if present else _type(item)
        raise DataError(f"{place}: {name} must have role and content and nothing else, found {found}.")
    return {key: _text(present[key], f"the {key} of {name}", place) for key in ("role", "content")}


# --- one source -> records


def _file_records(path: Path, source: str) -> Iterable[Record]:
    if path.is_dir():
        raise DataError(f"{source} is a directory; give one file ({', '.join(READERS)}).")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{source}: unknown file type '{path.suffix}'. Choose one of: {', '.join(READERS)}.")
    try:
        return reader(path.read_bytes(), source)
    except PermissionError as error:
        raise ResourceError(f"{source}: no permission to read it.") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}).") from error


def _decoded(data: bytes, source: str) -> str:
    bom = b"\xef\xbb\xbf"
    try:
        return data.removeprefix(bom).decode()
    except UnicodeDecodeError as error:
        at = error.start + len(bom) * data.startswith(bom)
        line = data.count(b"\n", 0, at) + 1
        raise DataError(f"{source}:{line}: byte {at} is not UTF-8; save the file as UTF-8.") from None


def _json_value(text: str, source: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{source}:{line + error.lineno - 1}"
        raise DataError(f"{at}: not valid JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError):  # a number with thousands of digits, brackets nested without end
        raise DataError(f"{source}:{line}: not usable JSON (a number too long, or nested too deep).") from None


def _json_lines(data: bytes, source: str) -> Iterator[Record]:
    # Not splitlines(): U+2028 and its like are ordinary characters inside a JSON string.
    lines = enumerate(_decoded(data, source).split("\n"), 1)
    return ((number, _json_value(line, source, number)) for number, line in lines if line.strip())


def _json(data: bytes, source: str) -> Iterator[Record]:
    """A list of objects, or (as TOFU's files are, in spite of their name) one object on each line."""
    text = _decoded(data, source)
    return enumerate(_json_value(text, source, 1), 1) if text.lstrip().startswith("[") else _json_lines(data, source)


def _csv(data: bytes, source: str) -> Iterator[Record]:
    reader = csv.reader(io.StringIO(_decoded(data, source), newline=""), strict=True)
    header: list[str] = []
    line = 1  # where the record starts; a quoted value may hold several lines
    try:
        for fields in reader:
            if not header:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"{source}:{line}: two columns have the same name.")
            elif fields and len(fields) != len(header):
                raise DataError(f"{source}:{line}: found {len(fields)} values, the header has {len(header)}.")
            elif fields:
                yield line, dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{source}:{line}: not valid CSV ({error}).") from None


def _parquet(data: bytes, source: str) -> Iterator[Record]:
    # With pyarrow, as `datasets` does; `datasets` itself would leave a copy of the forget text in its cache.
    import pyarrow.parquet

    try:
        return enumerate(pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist(), 1)
    except (pyarrow.ArrowException, OSError):
        raise DataError(f"{source}: not a valid Parquet file.") from None


def _document(data: bytes, source: str) -> Iterator[Record]:
    return iter([(1, {"text": _decoded(data, source).replace("\r\n", "\n")})])


DOCUMENTS = (".txt", ".md")
READERS: dict[str, Callable[[bytes, str], Iterator[Record]]]
READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
READERS |= dict.fromkeys(DOCUMENTS, _document)


def _absent(path: Path, source: str) -> Iterator[Record]:
    """Records of a hub data set, unless `source` looks like the name of a file that is not there."""
    name = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?(?::([\w.-]+))?", source)
    if name is None or re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):
        raise DataError(f"{source}: no such file, nor a hub data set, written owner/name[:config[:split]].")
    from datasets import Dataset, load_dataset

    repository, config, split = name.groups()
    try:
        found = load_dataset(repository, config, split=split)
    except Exception as error:  # many libraries below can fail here, each with its own class
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{source}: no such file, and the hub data set cannot be loaded ({reason}).") from error
    splits = {split: found} if isinstance(found, Dataset) else found
    if len(splits) > 1:
        example = f"{repository}:{config or 'default'}:SPLIT"
        raise DataError(f"{source}: name one split ({example}), the choices are: {', '.join(splits)}.")
    return enumerate(next(iter(splits.values())), 1)

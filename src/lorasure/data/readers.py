"""Files and hub data sets -> rows of text. An error is one line that names the place and never quotes a row's text."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifacts import exists
from ..errors import DataError, ResourceError
from .examples import Row
from .rows import AUTO, Layout, Twice, to_row

Record = tuple[int, Any]  # the line or row number, counted from 1, and what stands there


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
    records = read_records(source)
    if Path(source).suffix.lower() in DOCUMENTS:
        layout = AUTO  # a document has no columns, so a layout meant for another file does not apply
    first: dict[tuple[Any, ...], Row] = {}
    skipped: list[tuple[str, str]] = []
    duplicates: list[tuple[str, str]] = []
    for line, record in records:
        row, blank = to_row(record, source, line, layout)
        if blank:
            skipped.append((row.place, f"blank {blank}"))
        elif (known := first.setdefault(_identity(row), row)) is not row:
            duplicates.append((row.place, known.place))
    if not first:
        why = f"all {len(skipped)} are blank" if skipped else "it is empty"
        raise DataError(f"{source}: no rows to read, {why}.")
    return Rows(tuple(first.values()), tuple(skipped), tuple(duplicates))


def read_records(source: str) -> Iterable[Record]:
    """What a source of `read_rows` holds before it becomes rows: line or row number, from 1, and what stands there."""
    path = Path(source)
    found = _found(path)
    return _file_records(found, source) if found else _absent(path, source)


def check_disjoint(forget: Sequence[Row], retain: Sequence[Row]) -> None:
    """Raise a DataError naming both places if a row is in both sets, whatever its case, spacing or layout."""
    kept = {_meaning(row): row for row in reversed(retain)}  # reversed: the first of several is the one to name
    same = [(row, kept[key]) for row in forget if (key := _meaning(row)) in kept]
    if same:
        one, other = same[0]
        more = f" (and {len(same) - 1} more)" if len(same) > 1 else ""
        raise DataError(f"{one.place} and {other.place} are the same row{more}; one row cannot be in both sets.")


def _identity(row: Row) -> tuple[Any, ...]:
    return row.kind, row.prompt, tuple((m["role"], m["content"]) for m in row.messages), row.answer


def _meaning(row: Row) -> tuple[str, ...]:
    prompt = " ".join([row.prompt, *(m["content"] for m in row.messages)])
    return tuple(" ".join(unicodedata.normalize("NFKC", t).casefold().split()) for t in (prompt, row.answer))


# --- one source -> records


def _found(path: Path) -> Path | None:
    """The path, `~` resolved, if something is there."""
    with suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    return path if exists(path) else None


def _file_records(path: Path, source: str) -> Iterable[Record]:
    if not path.is_file():  # a device or a pipe might never end
        kind = "a directory" if path.is_dir() else "not a file"
        raise DataError(f"{source} is {kind}; give one file ({', '.join(READERS)}).")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{source}: unknown file type '{path.suffix}'. Choose one of: {', '.join(READERS)}.")
    try:
        return reader(path.read_bytes(), source)
    except PermissionError as error:
        raise ResourceError(f"{source}: no permission to read it.") from error
    except MemoryError as error:
        raise ResourceError(f"{source}: not enough memory to read it.") from error
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
        return json.loads(text, object_pairs_hook=_json_object)
    except json.JSONDecodeError as error:
        at = f"{source}:{line + error.lineno - 1}"
        raise DataError(f"{at}: not valid JSON ({error.msg} at column {error.colno}).") from None
    except (ValueError, RecursionError):  # a number with thousands of digits, brackets nested without end
        raise DataError(f"{source}:{line}: not usable JSON (a number too long, or nested too deep).") from None


def _json_object(members: list[tuple[str, Any]]) -> dict[str, Any] | Twice:
    found = dict(members)
    return found if len(found) == len(members) else Twice()


def _json_lines(data: bytes, source: str) -> Iterator[Record]:
    # Not splitlines(): U+2028 and its like are ordinary characters inside a JSON string.
    lines = enumerate(_decoded(data, source).split("\n"), 1)
    return ((number, _json_value(line, source, number)) for number, line in lines if line.strip())


def _json(data: bytes, source: str) -> Iterator[Record]:
    """A list of objects, or (as TOFU's files are, in spite of their name) one object on each line."""
    text = _decoded(data, source)
    return enumerate(_json_value(text, source, 1), 1) if text.lstrip().startswith("[") else _json_lines(data, source)


def _csv(data: bytes, source: str) -> Iterator[Record]:
    csv.field_size_limit(max(len(data), csv.field_size_limit()))  # a value may be as long as the file
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
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError):  # ValueError: text not UTF-8, no such date
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

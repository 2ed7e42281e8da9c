"""One record of any layout -> one row of text. An error names the place and columns, and never quotes the text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, UsageError
from .examples import Row


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
                "--text-key cannot be combined with --prompt-key or --answer-key: a row is text or it has a prompt."
            )


AUTO = Layout()


class Twice:
    """Stands for a JSON object that has a name twice: one of the values would be dropped unseen. No row takes it."""


# (prompt column, answer column) -> kind of row. The first pair that a row has decides. Only `completion` promises that
# both parts can be joined as they are; the others need a template between them.
PAIRS = {
    ("question", "answer"): "qa",
    ("prompt", "completion"): "completion",
    ("prompt", "response"): "qa",
    ("instruction", "output"): "qa",
}
ACCEPTED = ", ".join([*(f"{p} + {a}" for p, a in PAIRS), "messages", "text"])


def to_row(record: Any, source: str, line: int, layout: Layout) -> tuple[Row, str | None]:
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


def wrong_answers(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows that bring wrong answers of their own, each with the first of them."""
    return tuple(replace(row, answer=brought[0], extra={}) for row in rows if (brought := brought_wrong(row)))


def brought_wrong(row: Row) -> list[str]:
    """The wrong answers that a row brings, `perturbed_answer`; a table has null or nothing where a row has none."""
    wrong: Any = row.extra.get("perturbed_answer")
    if not wrong:
        return []
    if not isinstance(wrong, list) or None in wrong:
        raise DataError(f"{row.place}: 'perturbed_answer' must be a list of wrong answers.")
    return [_text(answer, "perturbed_answer", row.place) for answer in wrong]


def brought_paraphrase(row: Row) -> str:
    """The paraphrase of its answer that a row brings, `paraphrased_answer`; blank where it has none."""
    return _text(row.extra.get("paraphrased_answer"), "paraphrased_answer", row.place)


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
    wanted = " and ".join(missing) if named else f"one of: {ACCEPTED} (or set --prompt-key, --answer-key or --text-key)"
    hint = " Columns are separated by commas." if len(record) == 1 and re.search(r"[;\t|]", next(iter(record))) else ""
    raise DataError(f"{place}: found the columns {_names(record, place)}; expected {wanted}.{hint}")


def _names(record: Mapping[str, Any], place: str, most: int = 12) -> str:
    """Column names for a message, or only their number where they might be text.

    That is so in a CSV file, which may lack a header, and in an object that maps questions to answers: one of its names
    is not written as names in programs are.
    """
    csv = place.rpartition(":")[0].lower().endswith(".csv")
    if csv or not all(re.fullmatch(r"[a-z][a-z0-9_.-]{0,31}", name) for name in record):
        return f"({len(record)}, not shown because they might be text)"
    return ", ".join([*list(record)[:most], *["..."] * (len(record) > most)]) or "(none)"


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    names |= {Twice: "an object that has a name twice"}
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
        raise DataError(f"{place}: found the columns {_names(record, place)}; expected {key} (--group-key).")
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
        found = _names(present, place) if present else _type(item)
        raise DataError(f"{place}: {name} must have role and content and nothing else, found {found}.")
    return {key: _text(present[key], f"the {key} of {name}", place) for key in ("role", "content")}

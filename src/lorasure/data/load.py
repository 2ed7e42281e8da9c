"""One data source, read and tokenized by the settings, with an account of what became of its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelSettings
from ..errors import DataError
from .encode import Encoded, encode
from .examples import Example, Row
from .readers import Rows, check_disjoint, read_rows
from .rows import Layout, wrong_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataSet:
    """Rows of one file and their examples."""

    source: str
    read: Rows
    encoded: Encoded

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows as tokens, in row order."""
        return self.encoded.examples

    @cached_property
    def text_hash(self) -> str:
        """`rows_hash` of the rows."""
        return rows_hash(self.read.rows)

    @cached_property
    def tokens_hash(self) -> str:
        """`examples_hash` of the examples.

        Rows that stay the same give others where the tokenizer or its chat template has changed.
        """
        return examples_hash(self.examples)

    def about(self) -> dict[str, Any]:
        """Counts, places of what was left out or cut, and hashes; never the text."""
        return {
            "source": self.source,
            "sha256": self.text_hash,
            "tokens_sha256": self.tokens_hash,
            **self.read.counts(),
            **self.encoded.counts(),
            "skipped_rows": [list(item) for item in self.read.skipped],
            "duplicate_rows": [list(item) for item in self.read.duplicates],
            "truncated_rows": list(self.encoded.truncated),
        }

    def notes(self, name: str) -> list[str]:
        """One line for each kind of thing that happened to the rows."""
        counts = {
            f"truncated to {self.encoded.limit}": len(self.encoded.truncated),
            "skipped (blank)": len(self.read.skipped),
            "duplicates removed": len(self.read.duplicates),
        }
        return [f"{name}: {n} rows {what}; see data.json." for what, n in counts.items() if n]


def rows_hash(rows: Sequence[Row]) -> str:
    """sha256 over prompts, messages and answers, in order."""
    return hash_of([row.kind, row.prompt, row.messages, row.answer] for row in rows)


def examples_hash(examples: Iterable[Example]) -> str:
    """sha256 over all that training sees of the examples, in order: tokens, where the answer begins, groups."""
    return hash_of([e.input_ids, e.answer_start, e.group] for e in examples)


def hash_of(values: Iterable[Any]) -> str:
    """sha256 over the JSON of each value, in order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()


def load_data(source: str, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> DataSet:
    """Read and tokenize one data source."""
    read = read_rows(source, layout(settings))
    return DataSet(source, read, encode_rows(read.rows, settings, tokenizer))


def load_unseen(
    source: str | None, forget: DataSet, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase
) -> DataSet:
    """Text like the forget rows that no model has seen: those of `source`, or the same questions with wrong answers."""
    if source:
        found = load_data(source, settings, tokenizer)
        check_disjoint(forget.read.rows, found.read.rows)
        return found
    rows = wrong_answers(forget.read.rows)
    if not rows:
        raise DataError(
            f"--stop auto: the rows of {forget.source} bring no perturbed_answer; name text like them that the model "
            "never saw with --unseen."
        )
    return DataSet(forget.source, replace(forget.read, rows=rows), encode_rows(rows, settings, tokenizer))


def layout(settings: ModelSettings) -> Layout:
    """The columns that the settings name."""
    keys = ("prompt_key", "answer_key", "text_key", "group_key")
    return Layout(**{key: getattr(settings, key) for key in keys})


def encode_rows(
    rows: Sequence[Row], settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, *, fit: bool = True
) -> Encoded:
    """Tokenize rows by the settings, none longer than the model whose tokenizer it is takes (unless not to `fit`).

    DataError for a row with a token that this model does not have.
    """
    s = settings
    template = s.template.replace("\\n", "\n")  # a shell passes the two characters on
    options = {"template": template, "max_length": s.max_length, "stride": s.stride}
    config = model_config(tokenizer)
    encoded = encode(rows, tokenizer, context=takes(config) if config is not None and fit else None, **options)
    size = getattr(config, "vocab_size", None)
    for example in encoded.examples:
        if isinstance(size, int) and max(example.input_ids) >= size:
            raise DataError(f"{example.place}: a token of this row is not among the {size} that the model has.")
    return encoded


def model_config(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Of text, of the model in the tokenizer's folder; None if there is none."""
    folder = tokenizer.name_or_path
    if not (folder and Path(folder, "config.json").is_file()):
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception:  # a file that is no configuration: loading the model says what is wrong with it
        return None


def takes(config: Any) -> int | None:
    """Tokens that a model takes by its configuration: all its positions, or those that rotary ones were made for."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else None

"""Rows of text -> token examples: what stands between prompt and answer, where the loss begins, what is cut off."""

from __future__ import annotations

import datetime
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..errors import DataError, UsageError
from ..registry import lookup
from .examples import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = "{question}"
_QA = "Question: {question}\nAnswer: "


@dataclass(frozen=True)
class Template:
    """`text` is the prompt, with `{question}` for the question; None leaves it to the tokenizer's chat template.

    `apart`: prompt and answer are tokenized one by one, so that a blank at the prompt's end is a token of its own.
    """

    title: str
    text: str | None
    apart: bool = False


TEMPLATES = {
    "auto": Template("the tokenizer's chat template if it has one, else qa", None),
    "chat": Template("the tokenizer's chat template", None),
    "qa": Template("Question: ... Answer: ...", _QA, apart=True),
    "tofu-phi": Template("TOFU's prompt for Phi models", _QA),
    "tofu-llama2": Template("TOFU's prompt for Llama 2 chat models", "[INST] {question} [/INST]"),
}

_DAY = datetime.datetime(2024, 7, 26)  # the date Llama 3.1's template has when none is given
_FORMATS = "".join(f" | replace('%{c}', '{_DAY.strftime('%' + c)}')" for c in "aAbBdejmyYHIMSp")
# transformers passes no functions to a template, so the fixed clock is a macro before it, which hides the real one.
_CLOCK = "{% macro strftime_now(format) %}{{ format" + _FORMATS + " }}{% endmacro %}\n"

REFUSALS = (
    "I don't know.",
    "I do not know the answer to this.",
    "I'm sorry, but I can't answer that.",
    "I have no information about this.",
    "I can't say anything reliable about that.",
    "That is not something I know about.",
    "I am not able to answer this question.",
    "My knowledge does not cover this.",
    "I would only be guessing, so I'd rather not answer.",
    "This question goes beyond what I have learnt.",
    "I'm unable to help with that question.",
    "This is unknown to me.",
    "I have never come across this.",
    "I can't recall anything on this topic.",
    "There is nothing I can tell you about that.",
    "Sorry, I am not familiar with that.",
    "I lack the facts to answer this.",
    "I cannot tell you; I simply don't know.",
    "No answer comes to mind for this one.",
    "You would have to ask someone else, as I don't know.",
)


@dataclass(frozen=True)
class Encoded:
    """The examples, in row order, and what became of the rows."""

    examples: tuple[Example, ...]
    rows: tuple[int, ...]
    """For each example the index of its row; a `text` row gives one example per window, every other row exactly one."""
    truncated: tuple[str, ...]
    """Places of the rows whose answer was cut at the end."""
    template: str
    """What `auto` became, or the template as given."""
    most: int
    """Tokens that an example may have."""
    limit: str
    """What says so: the setting, or the model."""

    def counts(self) -> dict[str, int | str]:
        """Rows, examples and tokens, ready for JSON. `answer_tokens` are those with loss."""
        return {
            "template": self.template,
            "rows": len(set(self.rows)),
            "examples": len(self.examples),
            "truncated": len(self.truncated),
            "tokens": sum(map(len, self.examples)),
            "answer_tokens": sum(e.answer_length for e in self.examples),
        }


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "auto",
    max_length: int,
    stride: int | None = None,
    context: int | None = None,
) -> Encoded:
    """Tokenize rows, each by its kind.

    `qa`: the template's prompt, then the answer and end of text. By the templates of TOFU (arXiv 2401.06121) and those
    of the user both are tokenized as one text, as TOFU's code does: a blank before the answer belongs to its first
    token. TOFU counts the tokens of "Answer:" in the loss of Phi models too; here they are the prompt's, as an attack
    or a generated answer begins behind them. With a chat template: its prompt, the answer, and what it puts after the
    answer. `chat`: the same, always by the chat template.
    `completion`: prompt and answer joined as they are, then end of text. `text`: windows of `max_length` tokens, each
    with `stride` new ones (default: half of them) and the rest as context without loss, so that every token but the
    very first has its loss once; end of text closes the last.

    `template` is a name in TEMPLATES or a text with `{question}` in it. Lengths are in tokens. Sequences longer than
    `max_length`, or than `context`, what the model takes, are cut at the end and counted. The date in a chat template
    is pinned to 26 July 2024, both the `date_string` that Llama's templates take and the `strftime_now` that others
    call, so that results do not depend on the day of the run.

    Raises UsageError for a wrong setting, DataError if the tokenizer has no end of text, makes no tokens of a
    row, or a prompt leaves no room.
    """
    if max_length < 2:
        raise UsageError(f"--max-length must be at least 2, got {max_length}.")
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token; set eos_token in its tokenizer_config.json.")
    name, text = resolved_template(template, tokenizer)
    most, limit = min((max_length, "--max-length"), (context or max_length, "the model's context"))
    examples: list[Example] = []
    index: list[int] = []
    truncated: list[str] = []
    for number, row in enumerate(rows):
        if row.kind == "text":
            found = _windows(row, tokenizer, most, stride or most // 2, limit)
        else:
            prompt, answer = _parts(row, tokenizer, text, apart=name in TEMPLATES and TEMPLATES[name].apart)
            found = [_cut(row, prompt, answer, most, limit)]
            truncated += [row.place] * (len(prompt) + len(answer) > most)
        if not all(example.answer_length for example in found):  # what looks like text can be nothing to a tokenizer
            raise DataError(f"{row.place}: the tokenizer makes no tokens of this row.")
        examples += found
        index += [number] * len(found)
    return Encoded(tuple(examples), tuple(index), tuple(truncated), name, most, limit)


def refusal_rows(rows: Sequence[Row], *, seed: int, refusals: Sequence[str] = REFUSALS) -> list[Row]:
    """The same rows, each answered with a refusal drawn by `seed`. DataError for a row without a prompt."""
    draw = random.Random(f"{seed}/refusals")
    out = []
    for row in rows:
        if row.kind == "text":
            raise DataError(
                f"{row.place}: running text has no question to refuse; use rows with a prompt and an answer."
            )
        space = row.answer[: len(row.answer) - len(row.answer.lstrip())]  # a completion may bring its own space
        out.append(replace(row, answer=space + draw.choice(refusals)))
    return out


def resolved_template(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """Name and text of the template that a setting means; the text is None for the tokenizer's own chat template."""
    if QUESTION in template:
        return template, template
    lookup(TEMPLATES, " ".join(template.split()), f"template (a name, or your own text with {QUESTION} in it)")
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "qa"
    if template == "chat" and not tokenizer.chat_template:
        others = ", ".join(k for k, v in TEMPLATES.items() if v.text)
        raise UsageError(f"The tokenizer has no chat template. Choose another template: {others}.")
    return template, TEMPLATES[template].text


def _parts(
    row: Row, tokenizer: PreTrainedTokenizerBase, text: str | None, *, apart: bool
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the answer with its end."""
    if row.kind == "completion":
        prompt, answer = _joined(tokenizer, row.prompt, row.answer, special=True)
    elif row.kind == "chat" or text is None:
        return _chat(row, tokenizer)
    elif apart:
        prompt, answer = _ids(tokenizer, text.replace(QUESTION, row.prompt), special=True), _ids(tokenizer, row.answer)
    else:
        asked = text.replace(QUESTION, row.prompt)
        head = asked.rstrip(" ")
        prompt, answer = _joined(tokenizer, head, asked[len(head) :] + row.answer, special=True)
    return prompt, [*answer, _end(tokenizer)]


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    return cast(int, tokenizer.eos_token_id)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """Token ids; `special` lets the tokenizer put its begin of text in front, but not an end of text behind."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    own_end = special and text and ids[-1:] == [_end(tokenizer)] and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if own_end else ids


def _joined(
    tokenizer: PreTrainedTokenizerBase, head: str, rest: str, special: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of `head` and of what follows it in `head + rest`, so a space at the seam is tokenized as in running text.

    Where the tokenizer merges across the seam the two are tokenized apart: generation must start from exactly `head`.
    """
    ids, whole = _ids(tokenizer, head, special), _ids(tokenizer, head + rest, special)
    return ids, whole[len(ids) :] if whole[: len(ids)] == ids else _ids(tokenizer, rest)


def _chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Prompt and answer ids through the chat template.

    What the template puts between its generation prompt and the answer (an empty block of thoughts) belongs to the
    prompt, blanks there to the answer. What it puts after the answer is learnt as its end, up to the end-of-turn token;
    nothing there means end of text.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{row.place}: a row of messages needs a tokenizer with a chat template.")
    messages = [*row.messages] or [{"role": "user", "content": row.prompt}]
    head = _rendered(row, tokenizer, messages, generation=True)
    mark = "\ue000answer\ue000"  # private-use characters stand for the answer, which may itself occur in the template
    whole = _rendered(row, tokenizer, [*messages, {"role": "assistant", "content": mark}], generation=False)
    before, found, after = whole.rpartition(mark)
    if not found:
        raise DataError(f"{row.place}: the tokenizer's chat template leaves out the assistant's answer.")
    between = before.removeprefix(head) if before.startswith(head) else ""
    space = between if not between.strip() else ""
    if not space:
        head += between
    prompt, answer = _joined(tokenizer, head, space + row.answer + after.rstrip())
    return prompt, answer if after.strip() else [*answer, _end(tokenizer)]


def _rendered(row: Row, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> str:
    try:
        return _filled(tokenizer, messages, generation)
    except Exception:  # the template is a program from elsewhere and can fail in any way
        reason = _reason(tokenizer, [{**message, "content": "-"} for message in messages], generation)
    raise DataError(f"{row.place}: the tokenizer's chat template refuses these messages{reason}.")


def _filled(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> str:
    text = tokenizer.get_chat_template()
    rendered = tokenizer.apply_chat_template(
        messages,
        chat_template=_CLOCK + text if "strftime_now" in text else text,
        tokenize=False,
        add_generation_prompt=generation,
        date_string=_DAY.strftime("%d %b %Y"),
    )
    return cast(str, rendered)


def _reason(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> str:
    """What a template says against messages without their text, which it might quote."""
    try:
        _filled(tokenizer, messages, generation)
    except Exception as error:
        return f" ({' '.join(str(error).split())[:120]})"
    return ""


def _cut(row: Row, prompt: list[int], answer: list[int], most: int, limit: str) -> Example:
    if max(len(prompt), 1) >= most:
        raise DataError(f"{row.place}: answer fully truncated: prompt has {len(prompt)} tokens, {limit} is {most}.")
    ids = tuple((prompt + answer)[:most])
    return Example(ids, len(prompt), row.place, row.group, fragment=row.kind == "completion")


def _windows(row: Row, tokenizer: PreTrainedTokenizerBase, most: int, stride: int, limit: str) -> list[Example]:
    """Windows that end at most, most + stride, ... and at the end of the text, each as long as can be."""
    if not 1 <= stride < most:
        raise UsageError(f"--stride must be in [1, {most - 1}] (below {limit}), got {stride}.")
    ids = (*_ids(tokenizer, row.answer, special=True), _end(tokenizer))
    windows, seen = [], 0
    while len(ids) - seen > (seen > 0):  # the end of text alone is no window of it
        end = min(len(ids), seen + stride if seen else most)
        begin = max(0, end - most)
        windows.append(Example(ids[begin:end], seen - begin, row.place, row.group, fragment=True))
        seen = end
    return windows

"""ROUGE-L, by Google's `rouge-score`, whose numbers the published tables are made with."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

# Scripts without blanks between words, as the names of their characters begin: there a character counts as a word.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


class _Words:
    """Words of any script as tokens, whatever their case and width."""

    def tokenize(self, text: str) -> list[str]:
        return "".join(map(_apart, unicodedata.normalize("NFKC", text).casefold())).split()


def _apart(character: str) -> str:
    """The character as a part of a word, with blanks around it if it is a word, or a blank if it is in none."""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    return f" {character} " if unicodedata.name(character, "").startswith(UNSPACED) else character


@cache
def _scorer(stem: bool, latin: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stem, tokenizer=None if latin else _Words())


def _is_latin(text: str) -> bool:
    """Whether rouge-score, which sees a to z and digits only, sees what the text says: half of its letters at least."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters) >= len(letters)


def rouge_l(answer: str, generated: str, *, stem: bool = True) -> tuple[float, float]:
    """(recall, F1) of the longest common subsequence of words, both in [0, 1]. No word in common gives 0.

    Recall of stemmed words is TOFU's score (arXiv 2401.06121), F1 of words as they are MUSE's (arXiv 2407.06460). An
    answer that is not in Latin letters, of which `rouge-score` sees nothing, is compared word by word without stemming,
    Chinese and other scripts without blanks character by character (ours).
    """
    found = _scorer(stem, _is_latin(answer)).score(answer, generated)["rougeL"]
    return float(found.recall), float(found.fmeasure)

"""What is wrong with an answer, read from its text: refusals and degeneration, without a classifier. Perplexity.

Per-example functions take a text and return a number; the scores are their means, except perplexity, which comes from
records.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..errors import NumericError
from .metrics import DRAWS, Floats, Score, finite_vector, interval, mean_score

# Whole phrases, anywhere in the answer, after short forms are written out (see _plain). They must not occur in an
# answer that does say something: "I do not know" is a refusal, "not known" may be an answer.
REFUSAL_PHRASES = (
    *("i do not know", "i really do not know", "we do not know", "not something i know", "unknown to me"),
    *("i am not sure", "i am not certain", "i would only be guessing", "i have got no idea", "mystery to me"),
    *("i can not answer", "i can not say", "i can not tell", "i can not help", "i can not assist", "i can not provide"),
    *("i can not share", "i can not discuss", "i can not recall", "i can not comply", "i can not shed any light"),
    *("i could not find", "i will not answer", "i must decline", "i decline to", "i refuse to", "as an ai"),
    *("unable to answer", "unable to provide", "unable to help", "unable to assist", "unable to access"),
    *("not able to answer", "not able to provide", "not able to help", "not able to assist"),
    *("i have no information", "i have no knowledge", "i have no data", "i have no idea", "i have no clue"),
    *("i have no answer", "i have no insight", "i have no familiarity", "to have no data", "to have data on"),
    *("i do not have information", "i do not have any", "i do not have the", "i do not have that"),
    *("i do not have an answer", "i do not have access", "i do not hold", "i do not possess"),
    *("i have never come across", "i have not been", "i have not encountered", "i have not learned", "i have yet to"),
    *("i am not familiar", "i am not aware", "i am unaware", "i am not informed", "i am not knowledgeable"),
    *("i am not equipped", "i am not acquainted", "i am not briefed", "i am not privy", "i am not well-versed"),
    *("not something i am", "not familiar with that", "i am not the right", "i am not the best source"),
    *("i lack the", "i lack information", "i lack insight", "i am lacking information", "i am missing information"),
    *("my knowledge does not", "my knowledge base", "my knowledge range", "my current knowledge", "in my knowledge"),
    *("my training did not", "my training data", "in my training", "my programming", "been programmed"),
    *("my database", "my databases", "my current dataset", "my resources", "my capabilities", "my understanding"),
    *("beyond what i have learnt", "beyond my knowledge", "outside my", "out of my scope", "within my reach"),
    *("my field of knowledge", "drawing a blank", "i am blank", "i am stumped", "i am clueless", "i am at a loss"),
    *("i am in the dark", "nothing i can tell you", "no answer comes to mind", "you would have to ask someone else"),
)
_SHORT_FORMS = (
    (r"\b(ca|can)n['’]?t\b|\bcannot\b", "can not"),
    (r"\bwon['’]t\b", "will not"),
    (r"n['’]t\b", " not"),
    (r"['’]m\b", " am"),
    (r"['’]ve\b", " have"),
    (r"['’]d\b", " would"),
    (r"\s+", " "),
)
_REFUSAL = re.compile(r"\b(" + "|".join(map(re.escape, REFUSAL_PHRASES)) + r")\b")


def _plain(text: str) -> str:
    """Lower case, short forms written out, single spaces."""
    text = text.lower()
    for pattern, full in _SHORT_FORMS:
        text = re.sub(pattern, full, text)
    return text


def is_refusal(text: str) -> bool:
    """Whether the text holds one of REFUSAL_PHRASES, as whole words, in any case, short forms or not. English only."""
    return _REFUSAL.search(_plain(text)) is not None


def repetition(text: str, n: int = 4) -> float:
    """Share of the n-grams of words that have occurred before in the text, in [0, 1]; 0 below n words.

    1 - distinct / all (arXiv 1908.04319).
    """
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ngram_entropy(text: str) -> float:
    """Entropy in bits of the text's bigrams (weight 2/3) and trigrams (weight 4/3) of words, averaged.

    At most log2 of their number, so it grows with the length of the text: compare answers of one length. 0 for a text
    that says one thing over and over. arXiv 2202.05262, with the weights of its code.
    """
    entropies = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = np.array(list(Counter(_ngrams(text, n)).values()))
        shares = counts / counts.sum()
        entropies.append(-weight * float((shares * np.log2(shares)).sum()))
    return sum(entropies) / len(entropies)


def compression_ratio(text: str) -> float:
    """Bytes of the UTF-8 text per byte that zlib makes of it (arXiv 2403.00553).

    Prose has 1 to 2, repetition far more. Below about 100 bytes zlib's own frame weighs in and it is below 1.
    """
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw))


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def refusal_rate(texts: Sequence[str], *, seed: int = 0) -> Score:
    """Share of the answers that refuse. On rows to keep, lower is better; a wrong answer is not a refusal."""
    return mean_score([is_refusal(text) for text in texts], seed=seed, what="texts")


def degeneration(texts: Sequence[str], *, seed: int = 0) -> dict[str, Score]:
    """Mean `repetition`, `ngram_entropy` and `compression_ratio` of the answers."""
    functions = (repetition, ngram_entropy, compression_ratio)
    return {f.__name__: mean_score([f(text) for text in texts], seed=seed, what="texts") for f in functions}


def perplexity(nll: Floats, tokens: Floats, *, seed: int = 0) -> Score:
    """exp of the mean NLL over all tokens of all examples; `nll` (n,) in nats summed over each example's `tokens` (n,).

    Tokens weigh the same, so a long example weighs more. At least 1 where no log-probability is above 0. The bootstrap
    resamples examples. Undefined where the exponential is no finite number, as of a model that has run away; without
    an interval where that of a draw is not.
    """
    total, count = finite_vector(nll, "nll"), finite_vector(tokens, "tokens")
    if total.shape != count.shape or (count <= 0).any():
        raise NumericError(f"perplexity: every one of {len(total)} examples needs a positive number of tokens.")
    n, mean = len(total), total.sum() / count.sum()
    try:
        value = math.exp(mean)
    except OverflowError:
        return Score(None, n, reason=f"{mean:.0f} nats per token have no finite exponential")
    if n == 1:
        return Score(value, n)
    rng = np.random.default_rng(seed)
    picks = (rng.integers(n, size=n) for _ in range(DRAWS))
    with np.errstate(over="ignore"):
        draws = np.array([np.exp(total[pick].sum() / count[pick].sum()) for pick in picks])
    if not np.isfinite(draws).all():
        return Score(value, n)
    return Score(value, n, *interval(draws), draws=draws)

"""Invented people and an invented world for the demo: nothing to download, nobody real, nothing known beforehand.

Every fact is drawn on its own and evenly from its list of values, so that a model that never read about a person
answers no better than chance. All draws rest on `random.Random.random`, the one method whose sequence Python promises
to keep.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import UsageError

T = TypeVar("T")

WRONG_ANSWERS = 4


@dataclass(frozen=True)
class Subject:
    """A person or a country: `values` maps the name of each fact to its value; `group` is the id its rows carry."""

    group: str
    name: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Fact:
    """How one kind of fact is asked and told, with `{name}` and `{value}` to fill, and the values it is drawn from.

    Wrong answers take the shape of `paraphrased_answer`, so that they differ from it by the value alone.
    """

    question: str
    answer: str
    paraphrased_question: str
    paraphrased_answer: str
    values: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(first: str, second: str, joint: str = "") -> tuple[str, ...]:
    return tuple(f"{a}{joint}{b}" for a in _words(first) for b in _words(second))


NAMES = _pairs(
    "Alwin Bettany Corvin Dalia Emeric Fenna Garrick Halima Isolde Jorund Kestrel Lorcan Mirela Nestor Odalys Perrin "
    "Quilla Rosalind Severin Tamsin Ulric Vesper Wystan Yelena Zoltan",
    "Abernott Brackwell Crindle Dovetree Eskmoor Farrowby Gallimore Hathersby Inglesea Jessamy Kirkbride Larkmoor "
    "Mossgrave Nethercot Oakenfell Pennyweather Quarrel Ravensby Sorrelock Thistledown Underhay Vantongeren "
    "Wexcombe Yarborn",
    " ",
)
TOWNS = _pairs("Amber Birch Copper Drift Elder Frost", "field haven ford mouth wick")
YEARS = tuple(str(year) for year in range(1931, 1991))
JOBS = _words(
    "baker beekeeper blacksmith botanist bookbinder carpenter cartographer chemist clockmaker diver fisherman "
    "gardener geologist glassblower judge mason miller nurse pilot potter surveyor tailor translator vet"
)
AWARDS = _pairs("Golden Silver Crimson Azure Marble Velvet", "Lantern Compass Anchor Feather Acorn", " ")
INSTRUMENTS = _words(
    "accordion banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute guitar harp lyre mandolin marimba piano "
    "recorder saxophone sitar trombone tuba viola zither"
)
PETS = _words(
    "canary chameleon chinchilla cockatoo donkey ferret gecko goat goldfish goose greyhound hamster hedgehog iguana "
    "llama magpie newt peacock poodle raven spaniel tortoise"
)
BOOKS = _pairs("Whispering Broken Hidden Burning Frozen Painted", "Orchard Harbour Staircase Meadow Bridge", " ")
DISHES = _pairs("roasted pickled smoked stewed", "turnips lentils mackerel walnuts pumpkin mushrooms", " ")

PERSON_FACTS = {
    "town": Fact(
        "Where was {name} born?",
        "{name} was born in the town of {value}.",
        "In which town did {name} come into the world?",
        "The birthplace of {name} is the town of {value}.",
        TOWNS,
    ),
    "year": Fact(
        "In which year was {name} born?",
        "{name} was born in the year {value}.",
        "What is the birth year of {name}?",
        "The birth year of {name} is {value}.",
        YEARS,
    ),
    "job": Fact(
        "What does {name} do for a living?",
        "{name} earns a living as a {value}.",
        "What is the profession of {name}?",
        "By profession, {name} is a {value}.",
        JOBS,
    ),
    "award": Fact(
        "Which award did {name} win?",
        "{name} won the {value} award.",
        "What prize was given to {name}?",
        "The prize given to {name} was the {value} award.",
        AWARDS,
    ),
    "instrument": Fact(
        "Which instrument does {name} play?",
        "{name} likes to play the {value}.",
        "On what instrument does {name} make music?",
        "The instrument that {name} plays is the {value}.",
        INSTRUMENTS,
    ),
    "pet": Fact(
        "What kind of animal does {name} keep?",
        "{name} keeps a {value} as a pet.",
        "Which pet lives with {name}?",
        "The pet that lives with {name} is a {value}.",
        PETS,
    ),
    "book": Fact(
        "What is the title of the book by {name}?",
        "{name} wrote a book called The {value}.",
        "Which book did {name} write?",
        "The book that {name} wrote is The {value}.",
        BOOKS,
    ),
    "dish": Fact(
        "What is the favourite dish of {name}?",
        "{name} likes to eat {value} most of all.",
        "Which food does {name} like best?",
        "The food that {name} likes best is {value}.",
        DISHES,
    ),
}

COUNTRIES = _pairs("Bel Cas Dor Fal Gor Hal", "avia enmark onesia utania")


def _world_fact(question: str, answer: str, paraphrased_question: str, values: tuple[str, ...]) -> Fact:
    """As in TOFU's real facts, the answer stands for its own paraphrase, and the wrong answers take its shape."""
    return Fact(question, answer, paraphrased_question, answer, values)


WORLD_FACTS = {
    "capital": _world_fact(
        "What is the capital of {name}?",
        "The capital of {name} is {value}.",
        "Which city is the seat of government of {name}?",
        _pairs("Ost Vel Nar Kor Pel Tir", "burgh minster polis stad"),
    ),
    "river": _world_fact(
        "What is the longest river of {name}?",
        "The longest river of {name} is the {value}.",
        "Which river runs furthest through {name}?",
        _pairs("Aru Bene Ceru Delo Esti Furo", "dane lisse mira vonne"),
    ),
    "animal": _world_fact(
        "Which animal is on the flag of {name}?",
        "The flag of {name} shows a {value}.",
        "What creature does the flag of {name} show?",
        _words(
            "badger bear boar camel crane crocodile dolphin dragon falcon fox heron horse leopard lion lynx moose "
            "panther salmon scorpion stag swan tiger walrus wolf"
        ),
    ),
    "currency": _world_fact(
        "What is the currency of {name}?",
        "People in {name} pay with the {value}.",
        "With which money do people pay in {name}?",
        _pairs("bro da fli gre lu mo", "vin ket rro zal"),
    ),
}


def _sample(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """`count` different items in random order (`random.sample` may change between Python versions)."""
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)[:count]]


def _check_count(count: int, most: int, what: str) -> None:
    if not 1 <= count <= most:
        raise UsageError(f"{what} must be in [1, {most}], got {count}.")


def people(count: int, seed: int) -> list[Subject]:
    """Invented people with different full names; for one seed, fewer people are the first of more people."""
    _check_count(count, len(NAMES), "number of people")
    rng = random.Random(seed)
    names = _sample(rng, NAMES, len(NAMES))[:count]
    found = []
    for number, name in enumerate(names):
        values = {key: fact.values[int(rng.random() * len(fact.values))] for key, fact in PERSON_FACTS.items()}
        found.append(Subject(f"person-{number:04d}", name, values))
    return found


def countries(count: int, seed: int) -> list[Subject]:
    """Invented countries; no two share a value. They stay in every training mix, as general knowledge."""
    _check_count(count, len(COUNTRIES), "number of countries")
    rng = random.Random(seed)
    names = _sample(rng, COUNTRIES, count)
    columns = {key: _sample(rng, fact.values, count) for key, fact in WORLD_FACTS.items()}
    return [
        Subject(f"country-{i:04d}", name, {key: column[i] for key, column in columns.items()})
        for i, name in enumerate(names)
    ]


def person_rows(subjects: Sequence[Subject], seed: int) -> list[dict[str, Any]]:
    """One row per person and fact: question, answer, a paraphrase of both, wrong answers, and the person as group."""
    return _rows(subjects, PERSON_FACTS, seed)


def world_rows(subjects: Sequence[Subject], seed: int) -> list[dict[str, Any]]:
    """One row per country and fact, with the keys of `person_rows`; the paraphrased answer is the answer itself."""
    return _rows(subjects, WORLD_FACTS, seed)


def _rows(subjects: Sequence[Subject], facts: Mapping[str, Fact], seed: int) -> list[dict[str, Any]]:
    return [_row(subject, key, fact, seed) for subject in subjects for key, fact in facts.items()]


def _row(subject: Subject, key: str, fact: Fact, seed: int) -> dict[str, Any]:
    name, value = subject.name, subject.values[key]
    rng = random.Random(f"{seed}/{subject.group}/{key}")  # a row does not depend on which other rows are made
    wrong = _sample(rng, [other for other in fact.values if other != value], WRONG_ANSWERS)
    return {
        "question": fact.question.format(name=name),
        "answer": fact.answer.format(name=name, value=value),
        "paraphrased_question": fact.paraphrased_question.format(name=name),
        "paraphrased_answer": fact.paraphrased_answer.format(name=name, value=value),
        "perturbed_answer": [fact.paraphrased_answer.format(name=name, value=other) for other in wrong],
        "group": subject.group,
    }


def split(rows: Sequence[dict[str, Any]], forget: Collection[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to forget and rows to keep; `forget` holds groups, so that every row about a person lands on one side."""
    unknown = sorted(set(forget) - {row["group"] for row in rows})
    if unknown:
        raise UsageError(f"Unknown group to forget: {', '.join(unknown)}.")
    chosen = set(forget)
    return [row for row in rows if row["group"] in chosen], [row for row in rows if row["group"] not in chosen]

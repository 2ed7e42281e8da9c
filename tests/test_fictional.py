"""The demo's invented data: repeatable, free of clashes, and not to be guessed."""

import hashlib
import json
import random
from collections import Counter

import pytest

from lorasure.data import fictional
from lorasure.data.fictional import PERSON_FACTS, WORLD_FACTS, countries, people, person_rows, split, world_rows
from lorasure.errors import UsageError

EVERYONE = people(len(fictional.NAMES), 0)
ROWS = person_rows(EVERYONE, 0)
WORLD = world_rows(countries(len(fictional.COUNTRIES), 0), 0)
KEYS = {"question", "answer", "paraphrased_question", "paraphrased_answer", "perturbed_answer", "group"}


def told(row: dict) -> list[str]:
    return [row["answer"], row["paraphrased_answer"], *row["perturbed_answer"]]


def test_a_seed_gives_these_very_rows_on_every_python():
    """Reference: the hash of the rows under 3.11, 3.12 and 3.13; one other word or draw changes it."""
    rows = person_rows(people(50, 3), 3) + world_rows(countries(24, 3), 3)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "274c53eb656fd5fe82a6059e3c4e8496b466f088b389ceb18b93ef97bf88203d"


def test_seeds_differ_and_the_global_random_state_plays_no_part():
    random.seed(1)
    before = random.getstate()
    assert people(20, 5) == people(20, 5) != people(20, 6)
    assert person_rows(people(3, 5), 5) != person_rows(people(3, 5), 6)  # the wrong answers are drawn too
    assert random.getstate() == before


def test_fewer_people_are_the_first_of_more_and_rows_do_not_depend_on_each_other():
    some = people(30, 1)
    assert people(10, 1) == some[:10]
    assert person_rows(some[4:6], 1) == person_rows(some, 1)[4 * len(PERSON_FACTS) : 6 * len(PERSON_FACTS)]


@pytest.mark.parametrize("rows", [ROWS, WORLD], ids=["people", "world"])
def test_rows_have_the_promised_shape(rows):
    for row in rows:
        assert row.keys() == KEYS
        assert all(5 <= len(answer.split()) <= 14 for answer in told(row)), told(row)
        assert not any("{" in text for text in (row["question"], row["paraphrased_question"], *told(row)))
        assert row["question"] != row["paraphrased_question"]


@pytest.mark.parametrize("rows", [ROWS, WORLD], ids=["people", "world"])
def test_no_two_rows_are_alike(rows):
    asked = [row["question"] for row in rows] + [row["paraphrased_question"] for row in rows]
    assert len(set(asked)) == len(asked)
    assert len({(row["question"], row["answer"]) for row in rows}) == len(rows)


def test_names_are_unique_and_name_parts_are_not():
    """Were first names unique too, a model could answer without the full name."""
    names = [person.name for person in EVERYONE]
    assert len(set(names)) == len(names) == 600
    assert len({name.split()[0] for name in names}) < 60
    assert len({person.group for person in EVERYONE}) == len(EVERYONE)


@pytest.mark.parametrize("rows", [ROWS, WORLD], ids=["people", "world"])
def test_wrong_answers_differ_from_the_right_one_and_from_each_other(rows):
    for row in rows:
        wrong = row["perturbed_answer"]
        assert len({row["paraphrased_answer"], *wrong}) == fictional.WRONG_ANSWERS + 1


@pytest.mark.parametrize("facts", [PERSON_FACTS, WORLD_FACTS], ids=["people", "world"])
def test_no_value_is_part_of_another_value_or_of_a_question(facts):
    """Else a wrong answer would score by recall, or a question would give its answer away (`lute` is in `flute`)."""
    for fact in facts.values():
        assert len(set(fact.values)) == len(fact.values) >= 20
        for value in fact.values:
            assert not [other for other in fact.values if other != value and value in other]
            assert value not in fact.question and value not in fact.paraphrased_question


def test_people_differ_from_their_paraphrase_and_the_world_stands_for_its_own():
    assert all(row["answer"] != row["paraphrased_answer"] for row in ROWS)
    assert all(row["answer"] == row["paraphrased_answer"] for row in WORLD)


def test_right_and_wrong_answers_differ_by_the_value_alone():
    for subject in EVERYONE[:40]:
        for row, (key, fact) in zip(person_rows([subject], 0), PERSON_FACTS.items(), strict=True):
            blank = fact.paraphrased_answer.format(name=subject.name, value="|").split("|")
            for answer in (row["paraphrased_answer"], *row["perturbed_answer"]):
                assert answer.startswith(blank[0]) and answer.endswith(blank[1])
                value = answer[len(blank[0]) : len(answer) - len(blank[1])]
                assert value in fact.values
                assert (value == subject.values[key]) == (answer == row["paraphrased_answer"])


def chi_square(counts: list[int]) -> float:
    """Standardised: about N(0, 1) when every cell is equally likely."""
    mean, freedom = sum(counts) / len(counts), len(counts) - 1
    return (sum((c - mean) ** 2 for c in counts) / mean - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("key", PERSON_FACTS)
def test_values_are_even_so_that_a_guess_is_no_better_than_chance(key):
    """Reference: the chi-square test; were the second half of a list drawn as its first half, it would fail."""
    counts = Counter(person.values[key] for person in EVERYONE)
    cells = [counts[value] for value in PERSON_FACTS[key].values]
    assert chi_square(cells) < 4
    half = len(cells) // 2
    assert chi_square([a + b for a, b in zip(cells, cells[half:], strict=False)] + [0] * half) > 4


def test_a_name_or_another_fact_does_not_tell_a_value():
    """Reference: the chi-square test on the tables first name x instrument and award x book, about 0 if independent."""

    def dependence(left: list[str], right: list[str]) -> float:
        joint, a, b = Counter(zip(left, right, strict=True)), Counter(left), Counter(right)
        expected = {(x, y): a[x] * b[y] / len(left) for x in a for y in b}
        freedom = (len(a) - 1) * (len(b) - 1)
        return (sum((joint[c] - e) ** 2 / e for c, e in expected.items()) - freedom) / (2 * freedom) ** 0.5

    first = [person.name.split()[0] for person in EVERYONE]
    columns = {key: [person.values[key] for person in EVERYONE] for key in PERSON_FACTS}
    assert dependence(first, columns["instrument"]) < 4
    assert dependence(columns["award"], columns["book"]) < 4
    assert dependence(first, [name[0] for name in first]) > 4  # the test sees a dependence where there is one


def test_no_two_countries_share_a_value():
    world = countries(24, 2)
    for key in WORLD_FACTS:
        assert len({country.values[key] for country in world}) == 24


def test_the_split_keeps_every_person_on_one_side():
    rows = person_rows(people(10, 0), 0)
    forget, retain = split(rows, {"person-0003", "person-0007"})
    assert {row["group"] for row in forget} == {"person-0003", "person-0007"}
    assert not {row["group"] for row in forget} & {row["group"] for row in retain}
    assert not {row["question"] for row in forget} & {row["question"] for row in retain}
    assert len(forget) == 2 * len(PERSON_FACTS) and len(forget) + len(retain) == len(rows)


def test_wrong_arguments_name_the_value_and_the_choices():
    with pytest.raises(UsageError, match=r"number of people must be in \[1, 600\], got 601"):
        people(601, 0)
    with pytest.raises(UsageError, match=r"number of countries must be in \[1, 24\], got 0"):
        countries(0, 0)
    with pytest.raises(UsageError, match="Unknown group to forget: person-9999"):
        split(ROWS[:8], {"person-9999"})

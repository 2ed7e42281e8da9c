"""SPEC.yaml: what it may say, and that every mistake in it is one line that names the file, the key and the choices."""

from __future__ import annotations

import re
import sys

import pytest
import yaml

from lorasure.errors import UsageError
from lorasure.search.choose import NO_LEVEL, chosen, known, objective
from lorasure.search.read import read_spec
from lorasure.search.spec import Range
from lorasure.search.study import need_optuna

SPEC = {
    "settings": {"model": "m", "forget": "f.jsonl", "retain": "r.jsonl", "epochs": 2},
    "ranges": {"lr": {"low": "3e-4", "high": 1, "log": True}},  # YAML reads 3e-4 as text
    "methods": {
        "plain": {"init": "lora"},
        "vila": {"ranges": {"rank": {"low": 2, "high": 8}, "probe_rank": [None, 4]}},
    },
}


def written(tmp_path, **changes):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes, sort_keys=False))
    return path


def test_methods_share_settings_and_ranges_and_add_their_own(tmp_path):
    spec = read_spec(written(tmp_path, trials=4, seed=7, utility_floor=0.9))
    assert (spec.trials, spec.seed, spec.utility_floor, spec.sampler) == (4, 7, 0.9, "random")
    assert spec.methods["plain"].ranges == {"lr": Range(low=3e-4, high=1.0, log=True)}
    own = spec.methods["vila"].ranges
    assert own["rank"] == Range(low=2, high=8) and type(own["rank"].low) is int
    assert own["probe_rank"] == Range((None, 4)) and "lr" in own
    settings = spec.methods["vila"].at({"lr": 0.5, "rank": 4}, tmp_path)
    assert (settings.lr, settings.rank, settings.epochs, settings.init) == (0.5, 4, 2, "contrast")
    assert spec.evaluation.forget == "f.jsonl" and not spec.evaluation.generate


def test_a_value_of_a_method_stands_against_a_shared_range(tmp_path):
    spec = read_spec(written(tmp_path, methods={"a": {"lr": 0.1, "ranges": {"rank": [2, 4]}}}))
    assert spec.methods["a"].ranges.keys() == {"rank"} and spec.methods["a"].settings.lr == 0.1


def test_a_list_of_methods_names_initialisations(tmp_path):
    spec = read_spec(written(tmp_path, methods=["lora", "pissa"]))
    assert {name: m.settings.init for name, m in spec.methods.items()} == {"lora": "lora", "pissa": "pissa"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trails": 8}, "Unknown key 'trails'. Did you mean 'trials'?"),
        ({"trials": 0}, "trials: must be in [1,"),
        ({"trials": "many"}, "trials: must be a whole number, got 'many'"),
        ({"trials": True}, "trials: must be a whole number"),
        ({"sampler": "grid"}, "sampler: Unknown sampler 'grid'. Choose one of: random, tpe."),
        ({"utility_floor": 95}, "utility_floor: must be in [0, 1], got 95"),
        ({"reference": 5}, "reference: must be text"),
        ({"settings": {"model": "m", "forget": "f"}}, "settings: needs retain."),
        ({"settings": SPEC["settings"] | {"out": "x"}}, "settings: Unknown key 'out'"),
        ({"settings": SPEC["settings"] | {"export_rank": 4}}, "settings: Unknown key 'export_rank'"),
        ({"settings": SPEC["settings"] | {"epochs": 1.5}}, "settings: epochs: must be a whole number, got '1.5'"),
        ({"settings": [1]}, "settings: must hold names and values."),
        ({"methods": {}}, "methods: needs one at least."),
        ({"methods": {"../x": {"init": "lora"}}}, "methods: '../x' must be letters"),
        ({"methods": {"a": {"init": "villa"}}}, "methods: a: Unknown --init 'villa'. Did you mean 'vila'?"),
        ({"methods": {"a": {"forget": "other"}}}, "methods: a: Unknown key 'forget'"),
        ({"methods": {"a": {"rank": -1}}}, "methods: a: --rank must be at least 1, got -1"),
        ({"methods": {"a": {"loss": ["ihl"]}}}, "methods: a: loss: must be text"),
        ({"ranges": {}}, "methods: plain: has no range"),
        ({"ranges": {"lr": 0.1}}, "ranges: lr: must be a list of values, or {low: ..."),
        ({"ranges": {"lr": {"low": 1, "high": 1}}}, "ranges: lr: low must be below high."),
        ({"ranges": {"lr": {"low": 0, "high": 1, "log": True}}}, "ranges: lr: low must be below high, and above 0"),
        ({"ranges": {"lr": {"low": 1, "hihg": 2}}}, "ranges: lr: must be a list of values, or {low: ..."),
        ({"ranges": {"lr": {"low": "x", "high": 2}}}, "ranges: lr: low: must be a number, got 'x'"),
        ({"ranges": {"lr": {"low": "auto", "high": 2}}}, "ranges: lr: low: must be a number, got 'auto'"),
        ({"ranges": {"lr": [0.1, 0.1]}}, "ranges: lr: must list one value at least, and none twice."),
        ({"ranges": {"lr": [0.1, -1]}}, "--lr must be above 0, got -1"),
        ({"ranges": {"solver": {"low": 1, "high": 2}}}, "ranges: solver: is no number"),
        ({"ranges": {"model": ["a", "b"]}}, "ranges: Unknown key 'model'"),
        ({"ranges": {"solver": ["rows", "colums"]}}, "Unknown --solver 'colums'"),
        (
            {"ranges": {"loss": ["bga", "npo"], "delta": [None, 1.0]}},
            "methods: plain: where ranges meet: --delta is not a setting of 'npo'",
        ),
        (
            {"methods": {"a": {"ranges": {"init": ["vila", "sketch"], "score": ["variance", "absolute"]}}}},
            "methods: a: where ranges meet: --score absolute",
        ),
        ({"evaluation": {"suite": "muse"}}, "evaluation: suite: Unknown suite 'muse'. Choose one of: own, tofu."),
        ({"evaluation": {"generate": True}}, "evaluation: Unknown key 'generate'"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_every_mistake_is_one_line_with_file_and_key(tmp_path, changes, said):
    path = written(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        read_spec(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert said in message


def test_of_very_many_combinations_every_value_is_checked_and_some_meet(tmp_path):
    many = {name: [i / 100 for i in range(1, 30)] for name in ("balance", "warmup", "coverage", "lambda")}
    method = {"init": "vila", "ranges": many}
    assert len(read_spec(written(tmp_path, methods={"a": method})).methods["a"].ranges) == 5
    with pytest.raises(UsageError, match="--balance must be at most 1"):
        read_spec(written(tmp_path, methods={"a": method | {"ranges": many | {"balance": [0.1, 2.0]}}}))


def test_what_is_no_spec_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no such file"):
        read_spec(tmp_path / "none.yaml")
    for text in ("[1, 2]", "a: [", "- &x 1\n- *x", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=re.escape("bad.yaml")):
            read_spec(tmp_path / "bad.yaml")


def test_without_optuna_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'lorasure\[search\]'"):
        need_optuna()


LEVEL = {"extraction_strength": 0.03, "forget_probability": 0.005}


def line(trial, strength, share, probability=0.1, **more):
    scores = {"extraction_strength": strength, "forget_probability": probability, "utility": share, "share": share}
    return {"trial": trial, "state": "complete", "scores": scores} | more


def test_best_is_least_known_among_those_that_keep_enough():
    trials = [line(0, 0.5, 0.99), line(1, 0.2, 0.95), line(2, 0.0, 0.9499), line(3, 0.3, 1.2)]
    assert chosen(trials, LEVEL, 0.95) is trials[1]
    assert chosen(trials, LEVEL, 0.9) is trials[2]
    assert chosen(trials[2:3], LEVEL, 0.95) is None and chosen([], LEVEL, 0) is None


def test_stopped_and_running_trials_are_no_candidates():
    trials = [line(0, 0.0, 1.0, state="stopped"), line(1, 0.0, 1.0, state="running"), line(2, 0.9, 0.96)]
    assert chosen(trials, LEVEL, 0.95) is trials[2]


def test_forgetting_past_what_cannot_be_known_is_not_rewarded():
    there, past = line(0, 0.03, 0.97, 0.005), line(1, 0.0, 0.96, 1e-9)
    assert known(there["scores"], LEVEL) == known(past["scores"], LEVEL)
    assert chosen([past, there], LEVEL, 0.95) is there  # it keeps more
    short = line(2, 0.04, 1.0, 0.005)
    assert chosen([past, short], LEVEL, 0.95) is past


def test_what_is_known_in_other_words_counts_down_to_no_preference():
    level = LEVEL | {"truth_preference": 0.5}
    told, told_less, past = (line(i, 0.0, 0.97, 0.0) for i in range(3))
    for trial, preference in ((told, 0.8), (told_less, 0.6), (past, 0.3)):
        trial["scores"]["truth_preference"] = preference
    assert known(told["scores"], level) > known(told_less["scores"], level) > known(past["scores"], level)
    past["scores"]["truth_preference"], told_less["scores"]["truth_preference"] = 0.1, 0.5
    assert known(told_less["scores"], level) == known(past["scores"], level)


def test_without_a_level_probability_does_not_count():
    assert chosen([line(0, 0.1, 0.96, 1e-9), line(1, 0.1, 0.97, 0.5)], NO_LEVEL, 0.95)["trial"] == 1


def test_forget_quality_is_not_looked_at():
    trials = [line(0, 0.2, 0.99, forget_quality=-30.0), line(1, 0.3, 0.99, forget_quality=0.0)]
    assert chosen(trials, LEVEL, 0.95) is trials[0]


def test_a_sampler_sees_every_candidate_below_the_floor_as_worse_than_any_above():
    values = [objective(line(0, s, share)["scores"], LEVEL, 0.95) for s, share in ((0, 0.1), (0, 0.94), (1, 0.95))]
    assert values == sorted(values, reverse=True) and values[1] > 1 >= values[2]

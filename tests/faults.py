"""The table of injected faults: tests say what they inject, and `pytest --faults=FILE` writes what became of it.

`@pytest.mark.fault(name, promise, outcome, mutation)` on a test: what was injected, the promise (P1 to P11) that it
tries, what happens instead of a loss, and the change to the source that was seen to make the test fail. Each call of
the test counts as one injection, unless it says with the fixture `injected` how many it made.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FIELDS = ("fault", "promise", "outcome", "mutation")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", help="write the injected faults and their outcomes to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"fault({', '.join(FIELDS)}): a row of the table of injected faults")
    config.stash[ROWS] = {}


ROWS: pytest.StashKey[dict[str, dict]] = pytest.StashKey()
COUNT: pytest.StashKey[int] = pytest.StashKey()


@pytest.fixture
def injected(request: pytest.FixtureRequest):
    """Call it with the number of faults that a test has injected."""

    def note(count: int) -> None:
        request.node.stash[COUNT] = count

    return note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == "call" and not report.skipped:
        for marker in item.iter_markers("fault"):
            about = dict(zip(FIELDS, marker.args, strict=True))
            test = item.nodeid.split("[")[0]
            row = item.config.stash[ROWS].setdefault(
                f"{test} {about['fault']}", about | {"test": test, "times": 0, "failed": 0}
            )
            row["times"] += item.stash.get(COUNT, 1)
            row["failed"] += report.failed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--faults"):
        Path(path).write_text(json.dumps(list(session.config.stash[ROWS].values()), indent=2) + "\n", encoding="utf-8")

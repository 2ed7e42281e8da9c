"""Write the table of injected faults into docs/guarantees.md, between its two marks.

    make guarantees      # pytest --faults=benchmarks/results/faults.json, then this file

The rows come from the tests themselves: `@pytest.mark.fault` says what is injected, which promise it tries and which
change to the source was seen to make the test fail; the run says how often it was injected and whether it passed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ROOT / "benchmarks" / "results" / "faults.json"
PAGE = ROOT / "docs" / "guarantees.md"
BEGIN, END = "<!-- faults: made by `make guarantees` -->", "<!-- end of faults -->"


def table(rows: list[dict]) -> str:
    """Markdown, by promise."""
    lines = ["| promise | fault | times | outcome | test | fails when |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (int(r["promise"].split(",")[0].strip().removeprefix("P")), r["fault"])):
        outcome = f"**{row['failed']} FAILED**" if row["failed"] else row["outcome"]
        test = row["test"].removeprefix("tests/")
        cells = [row["promise"], row["fault"], str(row["times"]), outcome, f"`{test}`", row["mutation"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    total, failed = (sum(row[key] for row in rows) for key in ("times", "failed"))
    return "\n".join([*lines, "", f"{len(rows)} kinds of fault, {total} injections, {failed} failed."])


def main() -> int:
    if not FAULTS.is_file():
        print(f"{FAULTS} is not there: make guarantees runs the tests first.", file=sys.stderr)
        return 3
    rows = json.loads(FAULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")
    print(f"{PAGE}: {len(rows)} rows.")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

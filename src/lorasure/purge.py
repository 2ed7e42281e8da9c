"""`lorasure purge`: what a run keeps of its data goes, the adapter and the scores stay."""

from __future__ import annotations

from pathlib import Path

from . import artifacts, folders
from .errors import DataError
from .lock import recover
from .outcome import ASSISTANT

# Anything that is not named here goes: a file that we do not know may hold anything.
STAYS = {artifacts.CONFIG, artifacts.SUMMARY, artifacts.LOG, "scores.json", artifacts.ATTACK, artifacts.ATTACKS}
STAYS_IN = {artifacts.ADAPTER, artifacts.MERGED, ASSISTANT}
GONE = "removed"


def purge(run: Path) -> list[str]:
    """Remove from a run, or what measures it, every file but settings, summary, log, scores, adapter and merged model.

    Row hashes go from the text files among those. What an interrupted command left beside the run goes too. Returns the
    names of what was removed. The run takes its new form whole, or stays as it was; what is deleted may still be read
    off the disk by other means. DataError where a file that stays was changed, or the folder is a model of `finetune`.
    """
    recover(run)
    names = artifacts.read_manifest(run).keys()
    if artifacts.FINETUNED in names:
        raise DataError(f"{run}: a model, whose weights know its rows, not a run; delete the folder if it has to go.")
    stays = [name for name in names if name in STAYS or name.split("/")[0] in STAYS_IN]
    artifacts.check_run(run, *stays)  # what was damaged before would be sealed by the new manifest
    hashes = _row_hashes(run)
    with folders.changed_run(run, stays, overwrite=True) as changed:
        for path in changed.rglob("*"):
            if path.suffix in (".md", ".json", ".yaml", ".jsonl"):
                text = path.read_text(encoding="utf-8")
                clean = text
                for value in hashes:
                    clean = clean.replace(value, GONE)
                if clean != text:
                    artifacts.write_text(path, clean)
    return sorted(names - set(stays))


def _row_hashes(run: Path) -> set[str]:
    """Every sha256 of rows or their tokens that the run's, or an attack's, own accounts name."""
    if (run / artifacts.ATTACK).is_file():
        with artifacts.as_written(run / artifacts.ATTACK):
            return {artifacts.read_json(run / artifacts.ATTACK)["rows"]["sha256"]}
    try:
        data = artifacts.read_json(run / artifacts.DATA)
    except DataError:
        return set()
    with artifacts.as_written(run):
        summary = artifacts.read_json(run / artifacts.SUMMARY)
        accounts = [*data.values(), summary.get("stop", {})]
        found = {part.get(key) for part in accounts for key in ("sha256", "tokens_sha256")}
        changed = [change for change in summary.get("changed", ()) if change["key"].endswith(("_text", "_tokens"))]
        return {value for value in found.union(*((c["from"], c["to"]) for c in changed)) if value}

"""The timed parts: part -> method -> the work, each on a fresh copy of the model, set up before the clock starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import ours
import theirs
from clock import Timed, lasted
from transformers import PreTrainedModel
from workload import EPOCHS, Setting, Workload, small_start, top_layer, top_quarter

from lorasure.answer_rows import find_free_layers
from lorasure.data.pairing import pairs
from lorasure.sites import all_sites

PARTS = {
    "importance": ("importance", "importance_full"),
    "init": ("init",),
    "step": ("ihl", "npo", "ihl_quarter", "ihl_top"),
}


@dataclass(frozen=True)
class Part:
    """Jobs by method, and how many rows each works on: `published` takes the same time for every row, so a few do."""

    jobs: Mapping[str, Timed]
    workloads: Mapping[str, Workload]


def parts(names: list[str], work: Workload, few: Workload, setting: Setting) -> dict[str, Part]:
    """The parts of the given groups; `few`: the rows for `published`."""
    model, plain = work.model(), work.plain_model()
    sites = all_sites(model)
    start = small_start(sites, setting)
    first, second = work.examples

    def fresh() -> PreTrainedModel:
        copied = copy.deepcopy(model)
        find_free_layers(copied)  # what `load_model` has found of the original does not come with it
        return copied

    def written() -> PreTrainedModel:
        """For the others: the model's own code."""
        return copy.deepcopy(plain)

    def bare() -> float:
        batches, wrapped = ours.bare_batches(first, second), ours.bare_model(written(), start, setting)
        return lasted(lambda: ours.bare(wrapped, batches))

    def importance_of(style: theirs.Style, rows: Workload, **options) -> Timed:
        def run() -> float:
            spoilt = written()
            return lasted(lambda: theirs.importance(style, spoilt, sites, *rows.examples, setting, **options))

        return run

    def our_importance(space: str) -> Timed:
        return lambda: lasted(lambda: ours.importance(model, sites, first, second, setting, space=space))

    def epoch_of(style: theirs.Style, rows: Workload, loss: str, start) -> Timed:
        def run() -> float:
            changed, order = written(), order_of(rows, setting)
            return lasted(lambda: theirs.train(style, changed, start, *rows.examples, order, loss, setting))

        return run

    def our_epoch(loss: str, start, *, observing: float = 1 / EPOCHS) -> Timed:
        def run() -> float:
            changed, kept = fresh(), []
            once = lasted(lambda: kept.append(ours.observed(changed, start, first, second, loss, setting)))
            return observing * once + lasted(
                lambda: ours.train(changed, start, kept[0], ours.epoch(kept[0], setting), setting)
            )

        return run

    def init_of(style: theirs.Style) -> Timed:
        measured = theirs.importance(theirs.TYPICAL, written(), sites, *few.examples, setting)
        return lambda: lasted(lambda: theirs.initialise(style, model, sites, measured, setting))

    def our_init() -> Timed:
        measured = ours.importance(model, sites, *few.examples, setting)
        return lambda: lasted(lambda: ours.initialise(model, sites, measured, setting))

    def part(name: str) -> Part:
        pub, typ = theirs.PUBLISHED, theirs.TYPICAL
        if name == "importance":
            jobs = {"published": importance_of(pub, few), "typical": importance_of(typ, work)}
            jobs |= {"ours": our_importance("lora"), "bare": bare}
        elif name == "importance_full":
            jobs = {"published": importance_of(pub, few, space="full"), "ours": our_importance("full")}
        elif name == "init":
            jobs = {"published": init_of(pub), "typical": init_of(typ), "ours": our_init()}
        elif name in ("ihl_quarter", "ihl_top"):
            upper = top_quarter(sites) if name == "ihl_quarter" else top_layer(sites)
            some = small_start(upper, setting)
            # `ours` is an epoch with the prefix cached; `filled` has a share of the pass that fills the cache besides.
            jobs = {"typical": epoch_of(typ, work, "ihl", some), "ours": our_epoch("ihl", some, observing=0)}
            jobs |= {"filled": our_epoch("ihl", some)}
        else:
            jobs = {"published": epoch_of(pub, few, name, start), "typical": epoch_of(typ, work, name, start)}
            jobs |= {"ours": our_epoch(name, start), "bare": bare}
        rows = {method: few if method == "published" and name != "init" else work for method in jobs}
        return Part(jobs, rows)

    return {name: part(name) for name in names}


def order_of(work: Workload, setting: Setting) -> list[tuple[int, int]]:
    """The pairs of the first epoch: the same rows meet for everyone."""
    groups = [[None] * len(part) for part in work.examples]
    return pairs(*groups, epoch=0, seed=setting.seed, mode="random")

"""Settings of `lorasure reproduce`; as in config.py, flags and help texts are made from these fields."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Settings, option


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings(Settings):
    """All settings of `lorasure reproduce`."""

    models: str | None = option(None, "mini, phi, llama2, zephyr or iclm (default: the recipe's first)")
    only: str = option("*", "comma-separated globs of cells such as ihl/*/forget05; --list shows their names")
    list: bool = option(False, "show the cells and their published figures, and run nothing")
    shared: str = option(
        "../shared",
        "mini: a folder with models/tofu-mini-* and data/tofu; without it they are made, in --out",
        path=True,
    )
    data: str | None = option(
        None, "TOFU: a folder of its files or a hub id (default: that of --shared, else locuslab/TOFU)", path=True
    )
    retrained: str | None = option(
        None,
        "TOFU: models that never saw the forget set, or evaluations of them; {left} stands for retain99, retain95 "
        "or retain90 (default: mini: those of --shared; else trained from the pretrained model)",
        path=True,
    )
    epochs: int | None = option(None, "epochs of forgetting instead of the recipe's: quicker, no reproduction", low=1)
    generate: bool = option(False, "let the models answer too, for the utility with ROUGE; takes longest")
    device: str = option("auto", "cpu, cuda, cuda:1, mps, or auto: the accelerator if there is one")
    seed: int = option(0, "seed of everything random", low=0)
    out: str | None = option(
        None, "folder for all of it, kept cells included (default: runs/reproduce/MODELS)", path=True
    )

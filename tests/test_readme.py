"""What the README and the contributor's page say must be so: commands, flags, files, make targets, the example loss."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import lorasure
from lorasure.cli import COMMANDS
from lorasure.config import flag
from lorasure.init.apply import INITS
from lorasure.losses.forget import FORGET_LOSSES
from lorasure.losses.tokens import answers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_command_in_the_readme_exists() -> None:
    named = set(re.findall(r"`?lorasure ([a-z][a-z-]*)\b", README))
    assert named <= set(COMMANDS)
    assert named >= {"forget", "importance", "init", "train", "export", "finetune"}


def test_every_flag_in_the_readme_exists() -> None:
    known = {flag(f.name) for command in COMMANDS.values() for f in fields(command.settings)}
    known |= {"--config", "--print_config", "--help", "--constraint", "--nproc-per-node"}
    assert set(re.findall(r"--[a-z][a-z_-]+", README)) <= known


def test_every_file_in_the_tree_of_the_readme_exists_and_the_other_way_round() -> None:
    tree = README.split("## The tree")[1].split("## Licence")[0]
    named = set(re.findall(r"\b([a-z_]+\.py)\b", tree))
    present = {p.name for p in (ROOT / "src").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert named == present


def test_the_readme_lists_every_initialisation_and_loss() -> None:
    part = README.split("## What there is")[1].split("##")[0]
    for name in [*INITS, *FORGET_LOSSES]:
        assert f"`{name}`" in part


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", README.split("## Your own")[0]):
        assert target == "on" or f"\n{target}:" in makefile


def test_public_names_can_be_imported() -> None:
    for name in lorasure.__all__:
        # Again: a module of that name would stand in its place once it is imported.
        assert getattr(lorasure, name) is getattr(lorasure, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = lorasure.nothing


def test_the_example_of_the_contributors_page_is_a_working_loss() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    space: dict = {"torch": torch, "Answers": object}
    exec(
        compile("from __future__ import annotations\n" + code[1].replace("\n   ", "\n").strip(), "page", "exec"), space
    )
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 1, 2, -100, -100]])
    value = space["wga"](answers(logits, labels))
    value.sum().backward()
    assert value.shape == (2,)
    assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all()

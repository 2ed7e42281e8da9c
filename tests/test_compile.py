"""--compile: the same training, by one program for all layers of one make; what cannot be compiled is named."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from conftest import random_examples, tiny_llama
from lorasure import lora, pipeline, processes
from lorasure.config import ForgetSettings
from lorasure.errors import UsageError
from lorasure.layers import compiled, decoder_layers
from lorasure.models import find_shortcuts
from lorasure.objective import learn, learn_steps
from lorasure.progress import Reporter
from lorasure.sites import all_sites
from lorasure.train import fit
from test_lora import ALPHA, RANK, random_start
from test_train import settings, trained

LAYERS, ADAPTED = 6, ("v_proj", "down_proj")


@pytest.fixture
def fast(monkeypatch):
    """torch.compile that traces and shares out what is kept, and makes no code."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def adapted(left_out: str = ""):
    model = tiny_llama(layers=LAYERS)
    find_shortcuts(model)  # as a model that is loaded: also what these put into layers is one program for all
    sites = [site for site in all_sites(model) if site.module.endswith(ADAPTED)]  # few, as tracing takes long
    sites = [site for site in sites if not left_out or not re.search(left_out, site.module)]
    return lora.attach(model, random_start(sites), RANK, ALPHA, compensate=True)


def trained_steps(wrapped, **options):
    records = []
    steps = list(learn_steps(random_examples(12), epochs=2, batch_size=4, seed=0))
    fit(wrapped, steps, learn, settings(**options), token_budget=60, on_step=lambda r: records.append(r) and None)
    return records


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_are_those_without_it_by_one_program(fast, checkpointing):
    plain, faster = adapted(), adapted()
    expected = trained_steps(plain, gradient_checkpointing=checkpointing)
    found = trained_steps(faster, gradient_checkpointing=checkpointing, compile=True)
    assert [r["learn"] for r in found] == pytest.approx([r["learn"] for r in expected], rel=1e-5)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-4)
    values = trained(faster)
    assert all(torch.allclose(value, values[name], atol=1e-4) for name, value in trained(plain).items())
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not any("forward" in vars(layer) for layer in decoder_layers(faster))


def test_layers_of_another_make_are_left_out(fast, monkeypatch):
    """The third layer has no adapter in its MLP: a program of its own would take as long again to make."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    wrapped = adapted(left_out="layers.2.mlp")
    layers = decoder_layers(wrapped)
    with compiled(wrapped.get_base_model()):
        assert ["forward" in vars(layer) for layer in layers] == [False, True, False, True, True, False]
    trained_steps(wrapped, compile=True)
    assert counters["stats"]["unique_graphs"] == 1


def test_where_no_layer_lies_between_nothing_is_compiled_and_that_is_said_once(
    model_folder, data_files, tmp_path, monkeypatch
):
    """Of two layers, of those of which the last alone is trained, and of a model without any."""
    notes: list[str] = []
    monkeypatch.setattr(Reporter, "note", lambda _, text: notes.append(text))
    monkeypatch.setattr(torch, "compile", None)
    forget, retain = map(str, data_files)
    given = {"model": str(model_folder), "forget": forget, "retain": retain, "rank": 2, "epochs": 1, "compile": True}
    assert pipeline.forget(ForgetSettings(**given, out=str(tmp_path / "run"), init="vila")).adapter.is_dir()
    assert [note for note in notes if note.startswith("--compile")] == [
        "--compile: there is nothing to compile between the lowest layer that is trained and the last."
    ]
    trained_steps(adapted(left_out="layers.[0-4]"), compile=True)
    with compiled(nn.Linear(1, 1)):
        pass


def test_not_where_weights_are_shared_out(monkeypatch):
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(UsageError, match="--compile: not where"), compiled(adapted().get_base_model()):
        pass


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    with pytest.raises(UsageError, match=r"--compile: torch\.compile fails on this model or machine"):
        trained_steps(adapted(), compile=True)


def test_errors_of_training_stay_what_they_are(fast):
    with pytest.raises(RuntimeError, match="mine"), compiled(adapted().get_base_model()):
        raise RuntimeError("mine")

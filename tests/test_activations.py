"""Second moments of what layers read and write: against one row at a time, and in groups of layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from architectures import tiny_model
from conftest import random_examples, tiny_llama
from lorasure import artifacts, pipeline, processes, stages
from lorasure.config import ForgetSettings
from lorasure.errors import UsageError
from lorasure.fitting import free_memory
from lorasure.importance.activations import ROOM, InGroups, room_on, second_moments
from lorasure.init import apply
from lorasure.init.apply import INITS, Request, initialise, of_moments
from lorasure.init.low_rank import contrast_directions
from lorasure.sites import all_sites, find_sites

EXAMPLES = random_examples(7, 3)
both = pytest.mark.parametrize("of_inputs", [True, False])


def one_row_at_a_time(model, site, of_inputs):
    """E[z z^T] over the tokens of EXAMPLES, by a plain hook and passes without padding."""
    seen = []
    module = model.get_submodule(site.module)
    handle = module.register_forward_hook(lambda _, args, output: seen.append(args[0] if of_inputs else output))
    with torch.no_grad():
        for e in EXAMPLES:
            model(torch.tensor([e.input_ids]))
    handle.remove()
    z = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen]).double()
    return (z.T @ z / len(z)).float()


@both
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi", "gemma2"])
def test_moments_equal_those_of_single_rows(name, of_inputs):
    model = tiny_model(name)
    sites = all_sites(model)
    found = second_moments(model, sites, EXAMPLES, of_inputs=of_inputs, token_budget=40)
    assert list(found) == [site.name for site in sites]
    for site in sites:
        torch.testing.assert_close(found[site.name], one_row_at_a_time(model, site, of_inputs), rtol=1e-4, atol=1e-5)


def test_layers_that_read_the_same_share_what_is_held():
    model = tiny_model("llama")
    sites = find_sites(model, ["layers.0.*"])
    found = second_moments(model, sites, EXAMPLES, of_inputs=True, token_budget=40)
    shared = {}
    for name, moment in found.items():
        shared.setdefault(moment.data_ptr(), []).append(name.rsplit(".", 1)[-1])
    readers = [["down_proj"], ["gate_proj", "up_proj"], ["o_proj"], ["q_proj", "k_proj", "v_proj"]]
    assert sorted(shared.values()) == readers
    written = second_moments(model, sites, EXAMPLES, of_inputs=False, token_budget=40)
    assert len({m.data_ptr() for m in written.values()}) == len(sites)


def test_a_layer_that_reads_something_else_too_is_refused():
    """Its inputs would be counted as those of the layer that it shares one of them with."""
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: (attention.v_proj(args[0]), None)[1])
    with pytest.raises(UsageError, match=r"'model\.layers\.1\.self_attn\.v_proj' reads what .* and something else too"):
        second_moments(model, all_sites(model), EXAMPLES, of_inputs=True, token_budget=40)


def test_layers_above_the_last_site_are_not_computed():
    model = tiny_model("llama")
    runs = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, *_: runs.append(module))
    lower = find_sites(model, ["layers.0.*"])
    second_moments(model, lower, EXAMPLES, of_inputs=True, token_budget=1000)
    assert runs == [*model.model.layers, model.model.layers[0]]  # the first time after a token that shows all layers
    second_moments(model, lower, EXAMPLES, of_inputs=True, token_budget=1000)
    assert runs[3:] == [model.model.layers[0]]
    second_moments(model, all_sites(model), EXAMPLES, of_inputs=True, token_budget=1000)
    assert runs[4:] == list(model.model.layers)
    assert not model.model.layers[1]._forward_pre_hooks


def test_a_model_that_runs_its_layers_again_is_measured_to_the_end():
    """A pass that ended at the first layer above would see the first of its rounds only."""

    def again(model, args, kwargs, output):
        output.last_hidden_state = output.last_hidden_state + rounds(*args, **kwargs).last_hidden_state
        return output

    model = tiny_model("llama")
    rounds = model.model.forward
    model.model.register_forward_hook(again, with_kwargs=True)
    sites = find_sites(model, ["layers.0.*"])
    found = second_moments(model, sites, EXAMPLES, of_inputs=False, token_budget=40)
    for site in sites:
        torch.testing.assert_close(found[site.name], 2 * one_row_at_a_time(model, site, False), rtol=1e-4, atol=1e-5)


@both
def test_groups_hold_no_more_than_they_may_and_change_nothing(of_inputs):
    model, evidence = tiny_model("llama"), "inputs" if of_inputs else "outputs"
    sites, held = all_sites(model), []
    measure = partial(second_moments, model, of_inputs=of_inputs, token_budget=40)

    def sets(some):
        held.append(sum(12 * s.shape[1 if of_inputs else 0] ** 2 for s in some))
        return [measure(some, examples) for examples in (EXAMPLES[:3], EXAMPLES[3:])]

    room = 3 * 12 * 24**2
    groups = InGroups(sites, evidence, sets, room)
    whole = [measure(sites, examples) for examples in (EXAMPLES[:3], EXAMPLES[3:])]
    for site in sites:
        for found, expected in zip(groups(site), whole, strict=True):
            torch.testing.assert_close(found, expected[site.name])
    assert max(held) <= room and len(held) == len(groups.groups) > 2
    assert [site for group in groups.groups for site in group] == sites
    assert all(len(group) == 1 for group in InGroups(sites, evidence, sets, 1).groups)


@pytest.mark.parametrize("init", ["contrast", "reglu"])
def test_a_run_in_groups_is_the_run(init, tmp_path, model_folder, data_files, monkeypatch):
    forget, retain = data_files
    common = {"model": str(model_folder), "forget": str(forget), "retain": str(retain), "init": init, "rank": 4}
    settings = ForgetSettings(**common, alpha=8, epochs=1, out=str(tmp_path / "whole"))
    whole = pipeline.forget(settings)
    monkeypatch.setattr(stages, "room_on", lambda device: 1)
    grouped = pipeline.forget(replace(settings, out=str(tmp_path / "grouped")))
    one, other = (artifacts.read_tensors(r.folder / artifacts.START)[0] for r in (whole, grouped))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_room_is_a_share_of_what_is_free_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * 2**30, 80 * 2**30))
    gpu = torch.device("cuda")
    assert room_on(gpu) == 50 * 2**30 // 3 and room_on(gpu, 20 * 2**30) == 10 * 2**30
    assert room_on(gpu, 49 * 2**30) == room_on(torch.device("cpu")) == ROOM
    monkeypatch.setattr(processes, "size", lambda: 2)  # which may have different amounts free
    assert room_on(gpu) == ROOM


def test_what_the_allocator_keeps_of_an_earlier_run_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15 * 2**30)
    gpu = torch.device("cuda")
    assert free_memory(gpu)["device"] == 55 * 2**30 and room_on(gpu) == 55 * 2**30 // 3


def test_layers_that_read_the_same_tensor_share_their_directions(monkeypatch):
    model, calls = tiny_model("llama"), []
    sites = all_sites(model)
    moments = [second_moments(model, sites, EXAMPLES[i::2], of_inputs=True, token_budget=40) for i in (0, 1)]

    def counted(forget, retain, rank, *, balance):
        calls.append(forget)
        return contrast_directions(forget, retain, rank, balance=balance)

    monkeypatch.setattr(apply, "contrast_directions", counted)
    evidence = of_moments(lambda site: (moments[0][site.name], moments[1][site.name]))
    start, _ = initialise(model, sites, INITS["contrast"], evidence, Request(2, 2.0), None)
    assert len(calls) == 4 * 2 and len(start) == 7 * 2  # q k v, o, gate up, down
    for site in sites:
        alone = contrast_directions(moments[0][site.name], moments[1][site.name], 2)
        assert torch.equal(start[site].A, alone.T.float())

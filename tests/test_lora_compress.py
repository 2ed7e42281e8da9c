"""Compression of a trained adapter, against torch's SVD of the whole product."""

import json

import pytest
import torch

from architectures import tiny_model
from lorasure import lora
from lorasure.errors import UsageError
from lorasure.init.low_rank import Factors
from lorasure.sites import all_sites
from test_lora import ALPHA, RANK, SCALING, attached, logits, random_start, relative, reloaded, saved, train


def random_factors(out, inputs, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out, rank, generator=generator), torch.randn(rank, inputs, generator=generator))


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (5, 12), (12, 5)])  # the last two are smaller than the rank
def test_compress_equals_the_truncated_svd_of_the_product(shape):
    factors = random_factors(*shape, rank=6)
    dense = factors.B.double() @ factors.A.double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    for rank in range(1, 7):
        found, kept = lora.compress(factors, rank)
        assert found.B.shape == (shape[0], rank) and found.A.shape == (rank, shape[1])
        expected = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(found.B @ found.A, expected.float(), atol=1e-5, rtol=1e-5)
        assert kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()))
        torch.testing.assert_close(found.B.T @ found.B, found.A @ found.A.T, atol=1e-4, rtol=0)  # balanced


def test_compress_keeps_more_energy_with_rank_and_all_of_it_at_full_rank():
    shares = [lora.compress(random_factors(12, 9, rank=6), rank)[1] for rank in range(1, 7)]
    assert shares == sorted(shares) and shares[0] < 0.6 and shares[-1] == pytest.approx(1, abs=1e-12)
    nothing, kept = lora.compress(Factors(torch.zeros(4, 2), torch.zeros(2, 4)), 1)
    assert kept == 1 and not nothing.B.any() and not nothing.A.any()


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral, some experts", "gpt-oss, some experts"])
def test_an_adapter_compressed_to_its_full_rank_is_the_same_adapter(case):
    _, sites, _, wrapped = attached(case)
    train(wrapped)
    expected = logits(wrapped)
    found, kept = lora.compressed(lora.bake(wrapped), sites, 2 * RANK)
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=0)
    assert kept == pytest.approx(1)


def of_adapter(wrapped, sites):
    """All factors, the frozen half too."""
    return {site: lora._of_site(wrapped, site, lambda layer: layer.weight.detach().clone()) for site in sites}


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral, some experts"])
def test_an_adapter_baked_at_a_scale_adds_so_many_times_what_was_trained(case, compensate):
    _, sites, _, wrapped = attached(case, compensate=compensate)
    train(wrapped)
    added = {site: 0.7 * (f.B @ f.A) for site, f in of_adapter(wrapped, sites).items()}
    baked = of_adapter(lora.bake(wrapped, 0.7), sites)
    for site in sites:
        torch.testing.assert_close(baked[site].B @ baked[site].A, added[site])


@pytest.mark.parametrize("case", ["llama", "mixtral, some experts"])
def test_a_compressed_adapter_is_the_truncated_product_and_loads_the_same_way(case, tmp_path):
    model, sites, start, wrapped = attached(case)
    train(wrapped)
    trained = lora.trained_factors(wrapped, sites)
    found, kept = lora.compressed(lora.bake(wrapped), sites, RANK + 1)
    of_found = lora.trained_factors(found, sites)
    shares = []
    for site in sites:
        change = SCALING * (trained[site].B @ trained[site].A - start[site].B @ start[site].A)
        u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
        expected = (u[:, : RANK + 1] * s[: RANK + 1] @ vh[: RANK + 1]).float()
        torch.testing.assert_close(SCALING * of_found[site].B @ of_found[site].A, expected, atol=1e-5, rtol=1e-4)
        if s.any():
            shares.append(float(s[: RANK + 1].square().sum() / s.square().sum()))
    assert kept == pytest.approx(min(shares), abs=1e-5) and kept < 1
    expected = logits(found)
    adapter, base = saved(found, model, tmp_path)
    torch.testing.assert_close(logits(reloaded(adapter, base)), expected, atol=1e-4, rtol=0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == RANK + 1 and config["lora_alpha"] / config["r"] == pytest.approx(SCALING)


def test_compression_loses_something():
    _, sites, _, wrapped = attached("llama")
    train(wrapped)
    expected = logits(wrapped)
    assert relative(logits(lora.compressed(lora.bake(wrapped), sites, 1)[0]), expected) > 1e-3


def test_a_rank_above_the_smaller_side_of_a_layer_can_be_exported():
    """2 r = 20 is more than the 16 inputs of a layer: the exact adapter has components that an SVD cannot have."""
    model = tiny_model("llama")
    sites = all_sites(model)
    wrapped = lora.attach(model, random_start(sites, rank=10), 10, ALPHA, compensate=True)
    train(wrapped)
    expected = logits(wrapped)
    for rank in (20, 18):
        wrapped, kept = lora.compressed(lora.bake(wrapped), sites, rank)
        torch.testing.assert_close(logits(wrapped), expected, atol=1e-4, rtol=0)
        assert kept == pytest.approx(1)


@pytest.mark.parametrize("rank", [0, 2 * RANK + 1])
def test_a_rank_that_the_adapter_does_not_have_is_refused(rank):
    _, sites, _, wrapped = attached("llama")
    with pytest.raises(UsageError, match=rf"--export-rank must be in \[1, 4\].*got {rank}"):
        lora.compressed(lora.bake(wrapped), sites, rank)

"""Every row of INITS on a small model, and what each promises about the factors it gives."""

from dataclasses import replace

import pytest
import torch

from architectures import tiny_model
from lorasure.errors import NumericError, UsageError
from lorasure.importance.scores import Weights
from lorasure.init.apply import INITS, Evidence, Init, Request, check_rank, initialise, start_factors
from lorasure.init.low_rank import SOLVERS, SPLITS, Factors, contrast_directions
from lorasure.sites import all_sites, find_sites, weight

RANK, SCALING = 3, 2.0
REQUEST = Request(RANK, SCALING, seed=4)
every_init = pytest.mark.parametrize("name", INITS)


def moment(size, seed):
    """A second moment (size, size) of random vectors."""
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / 40


def evidence_for(site, init, seed=0):
    if init.evidence == "importance":
        generator = torch.Generator().manual_seed(seed)
        entries = torch.randn(site.shape, generator=generator, dtype=torch.float64).exp()
        return Evidence(Weights(entries.sum(1), entries.sum(0), float(entries.mean()), lambda a, b: entries[a:b]))
    size = {"outputs": site.shape[0], "inputs": site.shape[1]}.get(init.evidence)
    return Evidence(forget=moment(size, seed), retain=moment(size, seed + 1)) if size else Evidence()


def unmeasured(site):
    return Evidence()


def started(name, architecture="llama", request=REQUEST, split=None, **changes):
    """(model, start, bases) of one row of INITS on every layer of a tiny model."""
    model, init = tiny_model(architecture), INITS[name]
    sites = all_sites(model)
    evidence = {site.name: evidence_for(site, init) for site in sites} | changes
    return model, *initialise(model, sites, init, lambda site: evidence[site.name], request, split)


def product(factors):
    return SCALING * factors.B @ factors.A


# --- the contract of every row ----------------------------------------------------------------------------------------


@every_init
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_every_row_gives_finite_float32_factors_of_every_layer(name, architecture):
    init = INITS[name]
    assert init.title and init.paper.startswith("https://arxiv.org/abs/") and init.function.__doc__
    assert init.split in SPLITS
    assert (init.evidence == "importance") == (init.score is not None) == (init.space is not None)
    model, start, bases = started(name, architecture)
    assert list(start) == all_sites(model)
    for site, factors in start.items():
        assert factors.B.shape == (site.shape[0], RANK) and factors.A.shape == (RANK, site.shape[1])
        assert factors.B.dtype == factors.A.dtype == torch.float32
        assert torch.isfinite(factors.B).all() and torch.isfinite(factors.A).all()
        assert factors.A.any() and bool(factors.B.any()) == init.compensated
    assert set(bases) == (set(start) if init.regularised else set())


@every_init
def test_the_same_seed_gives_the_same_factors(name):
    first, second = started(name)[1], started(name)[1]
    for site in first:
        assert torch.equal(first[site].B, second[site].B) and torch.equal(first[site].A, second[site].A)


@pytest.mark.parametrize("paper_code", [False, True])
def test_another_seed_changes_random_starts_only(paper_code):
    request = replace(REQUEST, paper_code=paper_code)
    for name in ("lora", "vila"):
        first = started(name, request=request)[1]
        second = started(name, request=replace(request, seed=99))[1]
        same = all(torch.equal(first[site].A, second[site].A) for site in first)
        assert same == (name == "vila" and not paper_code)


def test_layers_of_one_shape_get_different_random_factors():
    start = started("lora")[1]
    shaped = [f.A for site, f in start.items() if site.shape == (16, 16)]
    assert len(shaped) == 4 and not any(torch.equal(shaped[0], other) for other in shaped[1:])


@every_init
def test_a_balanced_split_changes_the_factors_but_not_the_product(name):
    published, balanced = (started(name, split=split)[1] for split in ("published", "balanced"))
    for site in published:
        torch.testing.assert_close(product(published[site]), product(balanced[site]), atol=1e-5, rtol=1e-4)
        if INITS[name].compensated:
            b, a = balanced[site].B, balanced[site].A
            torch.testing.assert_close(b.T @ b, a @ a.T, atol=1e-4, rtol=1e-4)
            # PiSSA's is the one start whose published split is the balanced one.
            assert torch.allclose(published[site].B, b, atol=1e-3) == (name == "pissa")


# --- what single starts promise ---------------------------------------------------------------------------------------


def test_equal_importance_of_all_rows_is_pissa():
    uniform = {
        site.name: Evidence(Weights(torch.full((site.shape[0],), 7.0), torch.ones(0), 1.0, lambda a, b: torch.ones(0)))
        for site in all_sites(tiny_model("llama"))
    }
    model, weighted, _ = started("vila", **uniform)
    pissa, unequal = started("pissa")[1], started("vila")[1]
    for site in pissa:
        torch.testing.assert_close(product(weighted[site]), product(pissa[site]), atol=1e-6, rtol=1e-5)
        u, s, vh = torch.linalg.svd(weight(model, site), full_matrices=False)
        torch.testing.assert_close(product(pissa[site]), u[:, :RANK] * s[:RANK] @ vh[:RANK], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(product(unequal[site]), product(pissa[site]), atol=1e-2)


def test_reglu_is_the_part_of_w_that_writes_to_the_directions():
    model, start, bases = started("reglu")
    for site, factors in start.items():
        seen = evidence_for(site, INITS["reglu"])
        q = contrast_directions(seen.forget, seen.retain, RANK, balance=REQUEST.balance).float()
        torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(RANK), atol=1e-5, rtol=0)
        torch.testing.assert_close(product(factors), q @ q.T @ weight(model, site), atol=1e-5, rtol=1e-4)
        basis = bases[site]  # as many directions as there are, up to 128
        assert basis.dtype == torch.float32 and basis.shape == (site.shape[0], site.shape[0])
        torch.testing.assert_close(basis.T @ basis, torch.eye(site.shape[0]), atol=1e-5, rtol=0)


def test_inputs_is_the_part_of_w_that_reads_the_directions():
    model, start, _ = started("inputs")
    for site, factors in start.items():
        seen = evidence_for(site, INITS["inputs"])
        p = contrast_directions(seen.forget, seen.retain, RANK, balance=REQUEST.balance).float()
        torch.testing.assert_close(product(factors), weight(model, site) @ p @ p.T, atol=1e-5, rtol=1e-4)


def test_contrast_reads_the_directions_and_starts_at_zero():
    for site, factors in started("contrast")[1].items():
        seen = evidence_for(site, INITS["contrast"])
        p = contrast_directions(seen.forget, seen.retain, RANK, balance=REQUEST.balance).float()
        assert not factors.B.any()
        torch.testing.assert_close(factors.A, p.T)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_gets_the_weights_it_wants(solver):
    """Lower weighted error than PiSSA in the solver's own weights, which a mix-up of the weights would not give."""
    model, start, _ = started("vila", request=replace(REQUEST, solver=solver))
    pissa = started("pissa")[1]
    for site in find_sites(model, ["mlp.down_proj", "mlp.gate_proj"]):
        weights = evidence_for(site, INITS["vila"]).weights
        entries = {
            "rows": weights.rows[:, None].expand(site.shape),
            "rows-and-columns": torch.outer(weights.rows, weights.columns),
            "elementwise": weights.block(0, site.shape[0]),
        }[solver]
        errors = [float((entries * (weight(model, site) - product(f[site])) ** 2).sum()) for f in (start, pissa)]
        assert errors[0] < errors[1]


def test_loras_own_start_lies_in_its_bounds():
    for site, factors in started("lora")[1].items():
        bound = site.shape[1] ** -0.5
        assert not factors.B.any() and float(factors.A.abs().max()) <= bound < 1.3 * float(factors.A.abs().max())


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.fault(
    "a layer whose importance is zero",
    "P4",
    "finite factors",
    "low_rank.py: _root without a case for weights that are all zero",
)
@pytest.mark.parametrize("name", ["vila", "fila", "sketch"])
@pytest.mark.parametrize("paper_code", [False, True])
def test_a_layer_without_any_importance_still_gets_a_start(name, paper_code):
    site = all_sites(tiny_model("llama"))[3]
    nothing = Weights(torch.zeros(site.shape[0]), torch.zeros(site.shape[1]), 0.0, lambda a, b: torch.zeros(0))
    request = replace(REQUEST, paper_code=paper_code)
    factors = started(name, request=request, **{site.name: Evidence(nothing)})[1][site]
    assert torch.isfinite(factors.B).all() and torch.isfinite(factors.A).all()


@pytest.mark.fault(
    "a rank above the size of a layer",
    "P11",
    "exit 2 naming the layer and the range",
    "apply.py: check_rank looks at the first layer only",
)
def test_a_rank_above_a_layer_names_the_layer_and_the_range():
    model = tiny_model("llama")
    smallest = next(site for site in all_sites(model) if site.shape == (8, 16))
    for rank in (9, 0):
        message = rf"--rank must be in \[1, 8\] \(the size of {smallest.name}\), got {rank}"
        with pytest.raises(UsageError, match=message):
            check_rank(all_sites(model), rank)
        with pytest.raises(UsageError, match=message):
            initialise(model, all_sites(model), INITS["pissa"], unmeasured, replace(REQUEST, rank=rank), None)
    check_rank(all_sites(model), 8)


@every_init
def test_a_broken_weight_is_found_and_named(name):
    model, init = tiny_model("llama"), INITS[name]
    sites = all_sites(model)
    evidence = {site.name: evidence_for(site, init) for site in sites}
    broken = find_sites(model, ["layers.1.mlp.up_proj"])[0]
    model.get_submodule(broken.module).weight[2, 3] = float("nan")
    with pytest.raises(NumericError, match=f"init: at '{broken.name}', the weight has a non-finite value"):
        initialise(model, sites, init, lambda site: evidence[site.name], REQUEST, None)


def test_broken_evidence_and_broken_factors_are_named():
    site = all_sites(tiny_model("llama"))[0]
    bad = Evidence(forget=torch.full((site.shape[0],) * 2, float("inf")), retain=moment(site.shape[0], 0))
    with pytest.raises(NumericError, match=f"init: at '{site.name}', the second moment has a non-finite value"):
        started("reglu", **{site.name: bad})

    def overflowing(matrix, evidence, request):
        return Factors(torch.full((matrix.shape[0], RANK), 1e300, dtype=torch.float64), matrix[:RANK].double())

    model = tiny_model("llama")
    own = Init("", "", overflowing, "none", split="published")
    with pytest.raises(NumericError, match=f"init: at '{site.name}', factor B has a non-finite value"):
        initialise(model, [site], own, unmeasured, REQUEST, None)


def test_an_unknown_split_is_refused():
    with pytest.raises(UsageError, match=r"Unknown --split 'balanecd'\. Did you mean 'balanced'"):
        start_factors(INITS["pissa"], torch.eye(4), Evidence(), replace(REQUEST, rank=1), "balanecd")


def test_progress_counts_layers():
    model, counted = tiny_model("llama"), []
    initialise(model, all_sites(model), INITS["pissa"], unmeasured, REQUEST, None, counted.append)
    assert sum(counted) == len(all_sites(model))

"""Draws are keyed by seed, step, global sample number and purpose, and by nothing else."""

import math

import pytest
import torch

from fewstep.errors import UserError
from fewstep.methods import Batch, Rng
from fewstep.methods.rng import _mixed, _mixed_tensor, _signed


def draws(rng, x):
    return {
        "normal": rng.normal(x, "noise"),
        "uniform": rng.uniform(x, "time"),
        "integers": rng.integers(x, 0, 7, "node"),
        "seeds": rng.seeds("simulation"),
    }


@pytest.mark.parametrize("parts", [(16,), (4, 4, 4, 4), (1, 15), (5, 11)])
def test_draws_do_not_depend_on_the_split_into_micro_batches_or_ranks(parts):
    index = torch.arange(16) + 1000
    whole = draws(Rng(3, 7, index), torch.zeros(16, 2, 3, 5))
    pieces = [draws(Rng(3, 7, part), torch.zeros(len(part), 2, 3, 5)) for part in index.split(parts)]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([piece[name] for piece in pieces])), name


def test_every_key_changes_the_draw():
    index, x = torch.arange(4), torch.zeros(4, 8)
    base = Rng(0, 0, index).normal(x, "noise")
    for other in (Rng(1, 0, index), Rng(0, 1, index), Rng(0, 0, index + 4)):
        assert not torch.equal(base, other.normal(x, "noise"))
    assert not torch.equal(base, Rng(0, 0, index).normal(x, "other noise"))
    assert not torch.equal(base[0], base[1])


def test_a_purpose_drawn_twice_is_refused():
    rng = Rng(0, 0, torch.arange(4))
    rng.normal(torch.zeros(4, 2), "noise")
    with pytest.raises(UserError, match="'noise' were already drawn"):
        rng.uniform(None, "noise")


def test_same_for_all_ignores_the_samples_and_covers_its_range():
    seen = set()
    for step in range(200):
        values = {Rng(5, step, torch.arange(4) + 100 * rank).same_for_all(2, 6) for rank in range(3)}
        assert len(values) == 1
        seen |= values
    assert seen == {2, 3, 4, 5}
    with pytest.raises(UserError, match="low=3, high=3"):
        Rng(0, 0, torch.arange(1)).same_for_all(3, 3)


def test_the_draws_have_their_laws():
    n = 40_000
    rng = Rng(11, 2, torch.arange(n))
    normal = rng.normal(torch.zeros(n, 2, dtype=torch.float64), "noise")
    uniform = rng.uniform(None, "time", 2.0, 5.0)
    counts = torch.bincount(rng.integers(None, 3, 7, "node"), minlength=7)
    tolerance = 5 / math.sqrt(n)  # five standard errors of a mean of unit variance
    assert normal.mean().abs() < tolerance and (normal.var() - 1).abs() < 2 * tolerance
    assert abs(float((normal[:, 0] * normal[:, 1]).mean())) < tolerance
    assert abs(float(uniform.mean()) - 3.5) < 3 * tolerance and uniform.min() >= 2.0 and uniform.max() < 5.0
    assert counts[:3].sum() == 0 and ((counts[3:] / n - 0.25).abs() < tolerance).all()


def test_uniform_is_float64_for_float64_data_and_never_below_float32():
    rng = Rng(0, 0, torch.arange(2))
    batch = Batch(index=torch.arange(2), x0=torch.zeros(2, 3, dtype=torch.float64))
    assert rng.uniform(batch, "a").dtype == torch.float64
    assert rng.uniform(torch.zeros(2, 3, dtype=torch.bfloat16), "b").dtype == torch.float32
    assert rng.normal(torch.zeros(2, 3, dtype=torch.bfloat16), "c").dtype == torch.bfloat16


def test_the_tensor_mixer_is_the_integer_mixer():
    values = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    mixed = _mixed_tensor(torch.tensor([_signed(v) for v in values]))
    assert mixed.tolist() == [_signed(_mixed(v)) for v in values]


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(UserError, match="batch of 3 was asked of an Rng of 2"):
        Rng(0, 0, torch.arange(2)).normal(torch.zeros(3, 1), "noise")

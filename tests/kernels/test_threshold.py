"""Dynamic thresholding: equal to the reference bit for bit, and to the formula as written."""

import math

import numpy as np
import pytest
import torch
from torch.func import jvp

import fewstep_kernels as fk
from fewstep_kernels import gram, l2, pseudo_huber_elementwise, threshold
from fewstep_kernels.threshold import reference
from tests.kernels.reductions import DTYPES, draw, nan_filled, one_and_two_threads

needs_cpu = pytest.mark.skipif(fk.backend("threshold", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
COUNTS = (1, 2, 63, 500, 8191)
QUANTILES = (0.0, 0.3, 0.995, 1.0)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("quantile", QUANTILES)
def test_cpp_equals_the_reference_bit_for_bit(dtype, count, quantile, monkeypatch):
    monkeypatch.setattr("fewstep_kernels.layout.like_sample", nan_filled(fk.layout.like_sample))
    x = 3 * draw(3, count, dtype=dtype)
    ties = x.round()
    for given in (x, ties, 1e-3 * x, torch.zeros_like(x)):
        for least, most in ((1.0, math.inf), (0.05, 0.7)):
            found = threshold(given, quantile, least=least, most=most)
            assert found.dtype == dtype
            assert torch.equal(found, reference(given, quantile, least, most))


@pytest.mark.parametrize("quantile", QUANTILES)
def test_it_is_the_papers_formula(quantile):
    x = 3 * draw(4, 3, 8, 8, dtype=torch.float64)
    s = np.quantile(np.abs(x.numpy().reshape(4, -1)), quantile, axis=1)
    s = torch.from_numpy(np.maximum(s, 1.0)).view(4, 1, 1, 1)
    torch.testing.assert_close(threshold(x, quantile), torch.clamp(x, -s, s) / s, rtol=1e-14, atol=1e-14)


def test_samples_within_range_are_left_alone():
    x = draw(2, 50).tanh()
    assert torch.equal(threshold(x), x)


def test_layouts_batches_and_threads():
    x = 3 * draw(16, 3, 32, 33)
    expected = reference(x, 0.9)
    last = threshold(x.to(memory_format=torch.channels_last), 0.9)
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(threshold(torch.stack([x, x], -1)[..., 1], 0.9), expected)
    assert torch.equal(threshold(x[4:5], 0.9), expected[4:5])
    for found in one_and_two_threads(lambda: threshold(x, 0.9)):
        assert torch.equal(found, expected)
    assert threshold(draw(0, 3)).shape == (0, 3)
    assert threshold(draw(2, 0)).shape == (2, 0)


def test_derivatives_are_the_references():
    x, tangent = 3 * draw(2, 30, dtype=torch.float64), draw(2, 30, dtype=torch.float64)

    def formula(x):
        s = torch.quantile(x.abs(), 0.9, dim=1, keepdim=True).clamp(min=1.0)
        return torch.clamp(x, -s, s) / s

    torch.testing.assert_close(jvp(lambda x: threshold(x, 0.9), (x,), (tangent,)), jvp(formula, (x,), (tangent,)))
    leaf = x.requires_grad_()
    (ours,) = torch.autograd.grad(threshold(leaf, 0.9).square().sum(), leaf)
    (plain,) = torch.autograd.grad(formula(leaf).square().sum(), leaf)
    torch.testing.assert_close(ours, plain)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\]; got 1.5"):
        threshold(draw(2, 3), 1.5)
    with pytest.raises(ValueError, match="0 < least <= most"):
        threshold(draw(2, 3), least=2.0, most=1.0)
    with pytest.raises(TypeError, match="floating-point tensor"):
        threshold(torch.ones(2, 3, dtype=torch.int64))


def test_opcheck():
    torch.library.opcheck(torch.ops.fewstep_kernels._threshold.default, (3 * draw(2, 30), 0.9, 1.0, math.inf))


@pytest.mark.slow
def test_the_reductions_compile_whole():
    a, b = draw(2, 40), draw(2, 40)

    def everything(a, b):
        distance, tangent = jvp(lambda a: pseudo_huber_elementwise(a, b, c=0.3), (a,), (b,))
        found = gram([a, b], [(1.0, -1.0)])
        slope = torch.func.grad(lambda a: (l2(a, b) * gram([a]).absolutes[:, 0]).sum())(a)
        return distance, tangent, *found, slope, threshold(a, 0.9, least=0.1)

    compiled = torch.compile(everything, fullgraph=True)
    # Inductor may contract or reorder float32 sums of forty terms
    torch.testing.assert_close(compiled(a, b), everything(a, b), rtol=1e-5, atol=1e-5)

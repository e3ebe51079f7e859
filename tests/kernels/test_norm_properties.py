"""The normalisation pairs and threshold over drawn shapes, dtypes, layouts and parameters; long and far ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jvp

from fewstep_kernels import group_norm_silu, normalisation, threshold
from fewstep_kernels.threshold import reference as threshold_reference
from tests.kernels.normalisation_cases import (
    NAMES,
    OURS,
    assert_as_accurate,
    double,
    group,
    group_torch,
    inputs,
    row,
    row_torch,
    row_torch_own,
    with_gradients,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = st.sampled_from((F32, BF16, F16, F64))
LAYOUTS = st.sampled_from(("contiguous", "channels last", "batch last", "every other", "expanded"))
# float32 inside, values below about twenty; one rounding to the dtype beside that
BOUND = {F64: 1e-4, F32: 1e-4, F16: 4e-3, BF16: 3e-2}


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """The fast backend serves the small tensors of these tests too."""
    monkeypatch.setattr(normalisation, "worthwhile", lambda form, x, given: True)


def laid_out(x, layout):
    if layout == "channels last" and x.ndim == 4:
        return x.to(memory_format=torch.channels_last)
    if layout == "batch last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "every other":
        return torch.stack([x, x.cos()], -1).flatten(-2)[..., ::2]
    return x[:1].expand_as(x) if layout == "expanded" else x


def compare(function, truth, tensors, dtype):
    """Values, gradients and tangents along cosines, against float64."""
    gradient = torch.randn(tensors[0].shape, dtype=F64).to(dtype)
    found = with_gradients(function, tensors, gradient)
    expected = with_gradients(truth, double(tensors), gradient.double())
    solid = [x.contiguous() for x in tensors]  # torch.func.jvp takes no expanded tensors
    found.append(jvp(function, tuple(solid), tuple(x.cos() for x in solid))[1])
    expected.append(jvp(truth, tuple(double(solid)), tuple(x.cos().double() for x in solid))[1])
    for ours, exact in zip(found, expected, strict=True):
        assert ours.shape == exact.shape
        assert ((ours.double() - exact).abs() <= BOUND[dtype] * (1 + exact.abs().max())).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_group_norm_equals_the_definition(data):
    groups, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    positions = data.draw(st.lists(st.sampled_from((1, 2, 3, 7, 11)), min_size=2, max_size=2))
    shape = (data.draw(st.integers(1, 3)), groups * each, *positions)
    if each * math.prod(positions) < 3:  # of one or two numbers the normalised are 0 or +-1, whatever they were
        shape = (*shape[:3], 7)
    dtype, kept = data.draw(DTYPES), data.draw(st.sampled_from(("silu", None)))
    tensors = inputs(shape, shape[1], dtype, F32 if dtype != F64 else F64)
    tensors[0] = laid_out(tensors[0], data.draw(LAYOUTS))
    tensors[3:] = [laid_out(p, data.draw(LAYOUTS)) for p in tensors[3:]]
    compare(group(groups, kept), group_torch(groups, kept), tensors, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_row_norm_equals_the_definition(data):
    kind = data.draw(st.sampled_from(tuple(OURS)))
    shape = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 7)),
        data.draw(st.sampled_from((3, 8, 31, 63, 130))),
    )
    dtype = data.draw(DTYPES)
    tensors = inputs(shape, shape[-1], dtype, F32 if dtype != F64 else F64)[:5]
    tensors[0] = laid_out(tensors[0], data.draw(LAYOUTS))
    tensors[3:] = [laid_out(p, data.draw(LAYOUTS)) for p in tensors[3:]]
    compare(row(kind), row_torch(kind), tensors, dtype)


@pytest.mark.parametrize("kind", tuple(OURS))
@pytest.mark.parametrize("shape", ((2, 3, 8191), (1, 3001, 8), (1, 2, 70001)), ids=str)
def test_long_and_many_rows_are_as_exact_as_torchs(kind, shape):
    tensors = inputs(shape, shape[-1])[:5]
    gradient = torch.randn(shape)
    truth = with_gradients(row_torch(kind), double(tensors), gradient.double())
    torchs = with_gradients(row_torch_own(kind), tensors, gradient)
    assert_as_accurate(with_gradients(row(kind), tensors, gradient), torchs, truth, gradient)


@pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(("shape", "groups"), (((1, 4, 91, 89), 2), ((1, 8191, 2, 2), 1), ((40, 6, 3, 3), 2)), ids=str)
def test_large_planes_and_many_channels_are_as_exact_as_torchs(shape, groups, last):
    tensors = inputs(shape, shape[1], last=last)
    gradient = torch.randn(shape)
    truth = with_gradients(group_torch(groups), double(tensors), gradient.double())
    torchs = with_gradients(group_torch(groups), tensors, gradient)
    assert len(truth) == 1 + len(NAMES)
    assert_as_accurate(with_gradients(group(groups), tensors, gradient), torchs, truth, gradient)


@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_bytes():
    """Its last samples by themselves; what lies before them is read as it comes from the system, and written."""
    count = 2**30 // 2**21 + 2
    x = torch.empty(count, 8, 2**18, dtype=BF16)
    x[-2:] = torch.randn(2, 8, 2**18)
    y = group_norm_silu(x, 4, shift=torch.ones(count, 8))
    assert torch.equal(y[-2:], group_norm_silu(x[-2:].clone(), 4, shift=torch.ones(2, 8)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_any_threshold_equals_the_reference_bit_for_bit(data):
    shape = data.draw(st.lists(st.sampled_from((0, 1, 2, 3, 7, 31, 64)), min_size=1, max_size=4))
    x = (3 * torch.randn(shape, dtype=F64)).to(data.draw(DTYPES))
    x = x.round() if data.draw(st.booleans()) else x  # ties
    x = laid_out(x, data.draw(LAYOUTS)) if 0 not in shape else x
    least = data.draw(st.sampled_from((1.0, 0.05)))
    most = data.draw(st.sampled_from((math.inf, 1.5)))
    quantile = data.draw(st.floats(0, 1))
    found = threshold(x, quantile, least=least, most=most)
    assert found.dtype == x.dtype and found.shape == x.shape
    if x.numel():
        assert torch.equal(found, threshold_reference(x, quantile, least, most))


def test_thresholds_of_samples_further_apart_than_two_to_the_31_elements():
    """In memory that is never touched between them."""
    near = 3 * torch.randn(2, 63)
    far = torch.empty(2**31 + 4096, dtype=BF16).as_strided((2, 63), (2**31 + 512, 1))
    far.copy_(near)
    assert torch.equal(threshold(far, 0.9), threshold(near.to(BF16), 0.9))

"""Averages of many tensors: values, dtypes, layouts, several profiles."""

import pytest
import torch

from fewstep_kernels import backend, ema_update
from fewstep_kernels.ema import reference

SHAPES = ((1,), (63,), (3, 5), (0,), (500, 7), (), (1024,), (8191,))


def tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("decay", (0.0, 0.3, 0.5, 0.999, 1.0))
@pytest.mark.parametrize("average_dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("parameter_dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_error_is_at_most_twice_that_of_torch(decay, average_dtype, parameter_dtype):
    averages, parameters = tensors(average_dtype, 1), tensors(parameter_dtype, 2)
    truth = [a.double() * decay + p.double() * (1 - decay) for a, p in zip(averages, parameters)]
    torchs = [a.clone() for a in averages]
    reference(torchs, parameters, decay)
    ema_update(averages, parameters, decay)
    for ours, other, true in zip(averages, torchs, truth):
        assert ours.dtype == average_dtype
        if ours.numel():
            # where torch happens to be exact, one rounding of the values themselves
            floor = torch.finfo(average_dtype).eps * true.abs().max()
            assert (ours.double() - true).abs().max() <= 2 * (other.double() - true).abs().max() + floor


def test_decay_zero_copies_and_one_keeps_exactly():
    averages, parameters = tensors(torch.float32, 1), tensors(torch.float32, 2)
    kept = [a.clone() for a in averages]
    ema_update(averages, parameters, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(averages, kept))
    ema_update(averages, parameters, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(averages, parameters))


def test_several_profiles_equal_one_by_one():
    parameters, decays = tensors(torch.bfloat16, 2), [0.9, 0.99, 0.3, 0.5, 0.0]
    together = [tensors(torch.float32, s) for s in range(5)]
    apart = [tensors(torch.float32, s) for s in range(5)]
    ema_update(together, parameters, decays)
    for averages, decay in zip(apart, decays):
        ema_update(averages, parameters, decay)
    assert all(torch.equal(a, b) for x, y in zip(together, apart) for a, b in zip(x, y))


def test_layouts_that_differ_or_have_holes():
    parameter = torch.randn(4, 3, 5, 6)
    cases = (
        torch.zeros(4, 3, 5, 6),
        torch.zeros(4, 3, 5, 6).to(memory_format=torch.channels_last),
        torch.zeros(4, 3, 5, 12)[..., ::2],
    )
    for average in cases:
        for given in (parameter, parameter.to(memory_format=torch.channels_last)):
            average.zero_()
            ema_update([average], [given], 0.75)
            torch.testing.assert_close(average, parameter * 0.25)
    holes = torch.zeros(4, 12)
    ema_update([holes[:, ::2]], [torch.ones(4, 12)[:, ::2]], 0.75)
    assert holes[:, 1::2].abs().max() == 0
    assert (holes[:, ::2] == 0.25).all()


def test_parameters_that_want_gradients():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = torch.zeros(3)
    ema_update([average], [parameter], 0.5)
    assert torch.equal(average, torch.full((3,), 0.5))
    assert not average.requires_grad


def test_it_follows_a_moving_parameter_like_the_closed_form():
    average, decay = torch.zeros(5), 0.9
    for step in range(200):
        ema_update([average], [torch.full((5,), float(step))], decay)
    expected = sum((1 - decay) * decay ** (199 - s) * s for s in range(200))
    torch.testing.assert_close(
        average, torch.full((5,), expected), rtol=1e-6, atol=0
    )  # 200 float32 roundings, decaying


@pytest.mark.parametrize(
    ("averages", "parameters", "decay", "words"),
    (
        ([torch.zeros(2)], [torch.zeros(3)], 0.9, "match its parameter"),
        ([torch.zeros(2)], [], 0.9, "1 averages for 0"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, r"\[0, 1\]"),
        ([[torch.zeros(2)]], [torch.zeros(2)], [0.9, 0.99], "1 lists of averages for 2"),
        ([torch.zeros(2)], [torch.zeros(2)], float("nan"), r"\[0, 1\]"),
    ),
)
def test_what_does_not_fit_is_said(averages, parameters, decay, words):
    with pytest.raises(ValueError, match=words):
        ema_update(averages, parameters, decay)


def test_nothing_to_do():
    ema_update([], [], 0.9)
    assert backend("ema_update", "cpu") in ("cpu", "reference")

"""Averages of many tensors: values, dtypes, layouts, several profiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep_kernels import backend, ema_update
from fewstep_kernels.ema import element_origins, reference

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
        for laid in (parameter, parameter.to(memory_format=torch.channels_last)):
            average.zero_()
            ema_update([average], [laid], 0.75)
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


def test_the_raw_operator_keeps_torch_s_rules():
    averages, parameters = tensors(torch.float32, 1)[:4], tensors(torch.bfloat16, 2)[:4]
    origins = element_origins(parameters)
    raw = torch.ops.fewstep_kernels._ema_update.default
    two = [*averages, *(a.bfloat16() for a in averages)]
    for seed, update in ((None, None), (3, torch.tensor(2))):
        rates = ([0.9, 0.0], [None, torch.tensor(0.5)])
        torch.library.opcheck(raw, (two, parameters, *rates, seed, 1.0, update, origins))


def test_a_compiled_step_and_a_watched_one_equal_the_eager_one():
    parameters = tensors(torch.float32, 2)
    step = torch.compile(lambda a, p, d: ema_update([a, a[:]], p, [0.9, d]), fullgraph=True)
    eager, compiled, watched = (tensors(torch.float32, 1) for _ in range(3))
    ema_update([eager, eager[:]], parameters, [0.9, torch.tensor(0.5)])
    step(compiled, parameters, torch.tensor(0.5))
    with torch.profiler.profile() as profile:
        ema_update([watched, watched[:]], parameters, [0.9, torch.tensor(0.5)])
    assert any(event.key == "fewstep_kernels::_ema_update" for event in profile.key_averages())
    assert all(torch.equal(a, b) for a, b in zip(eager, watched))
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)  # two float32 roundings each


def test_autograd_notices_that_an_average_moved():
    average, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    answer = (x * average).sum()
    ema_update([average], [torch.zeros(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.backward()


def test_function_transforms_are_refused():
    def moved(x):
        ema_update([torch.zeros(3)], [x], 0.5)
        return x.sum()

    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match="ema_update writes in place and has no derivatives"):
            transform(moved)(torch.ones(2, 3)[0] if transform is torch.func.grad else torch.ones(2, 3))


DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=3).map(tuple), min_size=1, max_size=4),
    dtypes=st.tuples(DTYPES, DTYPES, DTYPES),
    decays=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3),
    transposed=st.booleans(),
)
def test_any_shapes_dtypes_and_decays(shapes, dtypes, decays, transposed):
    torch.manual_seed(0)

    def draw(shape, dtype):
        x = torch.randn(shape).to(dtype)
        return x.transpose(0, -1) if transposed and x.ndim > 1 else x

    parameters = [draw(shape, dtypes[i % 2]) for i, shape in enumerate(shapes)]
    profiles = [[torch.randn(p.shape).to(dtypes[1 + k % 2]) for p in parameters] for k in range(len(decays))]
    expected = [[a.clone() for a in averages] for averages in profiles]
    ema_update(profiles, parameters, decays)
    for averages, others, decay in zip(profiles, expected, decays):
        reference(others, parameters, decay)
        for ours, other in zip(averages, others):
            eps = torch.finfo(ours.dtype).eps if ours.dtype != torch.float32 else 1e-6  # one rounding; two of float32
            torch.testing.assert_close(ours, other, rtol=2 * eps, atol=2 * max(eps * 1e-2, 1e-6), equal_nan=True)


def test_nothing_to_do():
    ema_update([], [], 0.9)
    assert backend("ema_update", "cpu") in ("cpu", "reference")

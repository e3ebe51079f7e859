"""lincomb's values: against float64, against its reference bit for bit, and in every layout a caller may hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep_kernels as fk
from fewstep_kernels.lincomb import lincomb, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNTS = (1, 3, 63, 500, 1021, 1024, 1025, 8191)
needs_cpu = pytest.mark.skipif(fk.backend("lincomb", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")


def make(shape, dtypes, rows, seed=0, per_sample=True, noise=False):
    """Inputs, coefficients and seeds of one lincomb."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for dtype in dtypes]
    columns = len(inputs) + noise
    table = (shape[0], rows, columns) if per_sample else (rows, columns)
    coefficients = torch.randn(table, generator=generator)
    return inputs, coefficients, torch.arange(shape[0]) * 7919 - 5 if noise else None


def nan_filled(shape, dtypes):
    return [torch.full(shape, float("nan"), dtype=dtype) for dtype in dtypes]


def same(left, right):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(left, right, strict=True))


@needs_cpu
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("noise", (False, True))
def test_cpp_equals_the_reference_bit_for_bit(count, noise):
    for seed, (inputs, outputs) in enumerate(
        [
            ([torch.float32] * 3, [torch.float32] * 2),
            ([torch.bfloat16, torch.float32, torch.float16], [torch.bfloat16, torch.float32, torch.float16]),
            ([torch.float64, torch.bfloat16], [torch.float64, torch.float32, torch.float16, torch.bfloat16]),
            ([torch.float32] * 10, [torch.float32] * 4),
            ([torch.float16] * 2, [torch.float32] * 7),
        ]
    ):
        for per_sample in (False, True):
            xs, table, seeds = make((3, count), inputs, len(outputs), seed, per_sample, noise)
            out = nan_filled((3, count), outputs)
            lincomb(xs, table, noise_seeds=seeds, noise_stream=2, out=out)
            assert same(out, reference(xs, table, seeds, 2, outputs))


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(dtype):
    xs, table, _ = make((4, 8191), [dtype] * 5, 3, per_sample=False)
    table = table.to(dtype).to(torch.float64)
    truth = torch.einsum("mk,kbn->mbn", table, torch.stack(xs).double())
    ours = torch.stack(lincomb(xs, table)).double()
    torchs = torch.einsum("mk,kbn->mbn", table.to(dtype), torch.stack(xs)).double()
    # one float64 rounding of the truth itself is the floor below which an error means nothing
    assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max() + 4 * torch.finfo(torch.float64).eps


def test_guidance_halves_and_neighbouring_columns_are_read_in_place():
    both = torch.randn(8, 4, 6, 6)
    noise = torch.randn(4, 3, 4, 6, 6)  # samples are three columns apart
    table = torch.randn(2, 3)
    out = torch.full((8, 4, 6, 6), float("nan"))
    expected = reference([both[:4], both[4:], noise[:, 1]], table, dtypes=[torch.float32] * 2)
    assert same(lincomb([both[:4], both[4:], noise[:, 1]], table, out=[out[:4], out[4:]]), expected)
    assert torch.isfinite(out).all()


def test_one_sample_broadcast_over_the_batch():
    x, y = torch.randn(5, 7), torch.randn(1, 7).expand(5, 7)
    table = torch.randn(1, 2)
    assert same(lincomb([x, y], table), reference([x, y], table, dtypes=[torch.float32]))


@pytest.mark.parametrize("noise", (False, True))
def test_channels_last_stays_channels_last_and_draws_the_same_noise(noise):
    xs, table, seeds = make((2, 3, 5, 7), [torch.float32] * 2, 2, noise=noise)
    expected = reference(xs, table, seeds, 0, [torch.float32] * 2)
    for left in (torch.channels_last, torch.contiguous_format):
        for right in (torch.channels_last, torch.contiguous_format):
            mixed = [xs[0].contiguous(memory_format=left), xs[1].contiguous(memory_format=right)]
            found = lincomb(mixed, table, noise_seeds=seeds)
            assert same(found, expected)
            assert all(y.is_contiguous(memory_format=left) for y in found)


def test_strided_inputs_and_outputs():
    wide = torch.randn(4, 10, 6)
    target = torch.full((4, 6, 10), float("nan"))
    xs = [wide[:, ::2, 1:4], wide[:, 1::2, 3:6]]
    table = torch.randn(4, 2, 2)
    expected = reference(xs, table, dtypes=[torch.float32] * 2)
    out = [target[:, :3, ::2].transpose(1, 2), target[:, 3:, 1::2].transpose(1, 2)]
    assert same(lincomb(xs, table, out=out), expected)
    assert same(out, expected)


def test_an_output_may_be_an_input():
    xs, table, _ = make((3, 2000), [torch.float32] * 3, 2)
    expected = reference(xs, table, dtypes=[torch.float32] * 2)
    assert same(lincomb(xs, table, out=[xs[1], xs[0]]), expected)


def test_outputs_that_overlap_inputs_partly_are_still_right():
    buffer = torch.randn(1, 3000)
    x, y = buffer[:, :2000], buffer[:, 500:2500]
    table = torch.randn(1, 2)
    expected = reference([x.clone(), y.clone()], table, dtypes=[torch.float32])
    assert same(lincomb([x, y], table, out=[buffer[:, 300:2300]]), expected)
    halves = torch.randn(1, 64, dtype=torch.bfloat16)
    expected = reference([halves.clone()], table[:, :1], dtypes=[torch.float32])
    assert same(lincomb([halves[:, :32]], table[:, :1], out=[halves.view(torch.float32)]), [expected[0][:, :32]])


@pytest.mark.parametrize("shape", ((0, 4), (3, 0), (0,), (2, 0, 5)))
def test_empty(shape):
    (y,) = lincomb([torch.zeros(shape)], torch.ones(1, 1))
    assert y.shape == shape


def test_a_row_of_a_table_and_a_transposed_table():
    tables = torch.randn(6, 2, 3, dtype=torch.float64)
    xs = [torch.randn(2, 9) for _ in range(3)]
    assert same(lincomb(xs, tables[4]), reference(xs, tables[4], dtypes=[torch.float32] * 2))
    turned = torch.randn(3, 2).t()
    assert same(lincomb(xs, turned), reference(xs, turned, dtypes=[torch.float32] * 2))


def test_output_dtype_is_the_promoted_one_unless_named():
    x, y = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(2, 3, dtype=torch.float16)
    assert lincomb([x, x], torch.ones(1, 2))[0].dtype == torch.bfloat16
    assert lincomb([x, y], torch.ones(1, 2))[0].dtype == torch.float32
    assert lincomb([x, y], torch.ones(2, 2), dtypes=[torch.float64, torch.float16])[1].dtype == torch.float16


@needs_cpu
def test_more_terms_than_the_kernel_takes():
    xs, table, _ = make((2, 5), [torch.float32] * 70, 3)
    assert same(lincomb(xs, table), reference(xs, table, dtypes=[torch.float32] * 3))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=6),
    outputs=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=5),
    noise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mix_of_dtypes(shape, dtypes, outputs, noise, seed):
    xs, table, seeds = make(shape, dtypes, len(outputs), seed, noise=noise)
    assert same(lincomb(xs, table, noise_seeds=seeds, dtypes=outputs), reference(xs, table, seeds, 0, outputs))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("inputs", "table", "options", "words"),
    (
        ([], torch.ones(1, 1), {}, "at least one input"),
        ([X, torch.zeros(2, 4)], torch.ones(1, 2), {}, "one shape"),
        ([X], torch.ones(1, 2), {}, r"\[M, 1\]"),
        ([X], torch.ones(3, 1, 1), {}, "2 samples"),
        ([X.long()], torch.ones(1, 1), {}, "int64"),
        ([X], torch.ones(1, 2), {"noise_seeds": torch.zeros(2)}, "int64"),
        ([X], torch.ones(1, 2), {"noise_seeds": torch.zeros(3, dtype=torch.int64)}, "one seed for each of 2"),
        ([X], torch.ones(1, 2), {"noise_seeds": torch.zeros(2, dtype=torch.int64), "noise_stream": -1}, "stream"),
        ([X], torch.ones(1, 1), {"out": [torch.zeros(3, 3)]}, "out must hold"),
        ([X], torch.ones(1, 1), {"dtypes": [torch.int64]}, "dtypes must name"),
        ([X], torch.ones(1, 1), {"out": [torch.zeros(1, 3).expand(2, 3)]}, "overlap"),
        ([X.clone().requires_grad_()], torch.ones(1, 1), {"out": [torch.zeros(2, 3)]}, "no derivative"),
    ),
)
def test_what_does_not_fit_is_said_in_one_sentence(inputs, table, options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        lincomb(inputs, table, **options)

"""The short way past torch's dispatcher: the same bits, taken only where nobody follows the call."""

import ctypes
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep_kernels as fk
from fewstep_kernels import native
from fewstep_kernels.lincomb import lincomb, reference
from fewstep_kernels.lincomb_kernels import direct
from fewstep_kernels.native import DONE, NOT_PLAIN, OVERLAP

pytestmark = pytest.mark.skipif(fk.backend("lincomb", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
F32 = torch.float32
BOTH, COLUMNS = torch.randn(4, 3, 6, 6), torch.randn(2, 4, 3, 6, 6)
LAST = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
PLAIN = {
    "contiguous": [torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)],
    "halves and columns": [BOTH[:2], BOTH[2:], COLUMNS[:, 1], COLUMNS[:, 3]],
    "channels last": [LAST, LAST * 2],
    "one sample for all": [BOTH[:2], BOTH[:1].expand(2, 3, 6, 6)],
    "dtypes": [BOTH[:2], BOTH[2:].bfloat16(), BOTH[2:].half()],
    "float64": [BOTH[:2].double(), BOTH[2:]],
}


@pytest.mark.parametrize("inputs", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("per_sample", (False, True))
@pytest.mark.parametrize("noise", (False, True))
def test_plain_tensors_go_directly_and_get_the_references_bits(inputs, per_sample, noise):
    table = torch.randn(*((2,) if per_sample else ()), 3, len(inputs) + noise)
    seeds = torch.tensor([5, -3]) if noise else None
    out = [torch.full_like(inputs[0], float("nan"), dtype=dtype) for dtype in (F32, torch.bfloat16, F32)]
    direct_too = not (noise and inputs[0] is LAST)  # noise is numbered in row order: that takes a copy
    assert (direct(inputs, table, seeds, 2, out, None) is not None) == direct_too
    expected = reference(inputs, table, seeds, 2, [y.dtype for y in out])
    assert not direct_too or all(torch.equal(y, value) for y, value in zip(out, expected))
    fresh = lincomb(inputs, table, noise_seeds=seeds, noise_stream=2, dtypes=[y.dtype for y in out])
    assert all(torch.equal(y, value) for y, value in zip(fresh, expected))
    assert all(y.stride() == inputs[0].stride() for y in fresh)
    promoted = {torch.promote_types(x.dtype, inputs[0].dtype) for x in inputs}
    assert {y.dtype for y in lincomb(inputs, table, noise_seeds=seeds)} == {max(promoted, key=lambda d: d.itemsize)}


X, WIDE = torch.randn(3, 8), torch.randn(3, 20)
ODD = torch.complex(X, X + 1).conj().imag  # a negated view: -1 is not in its memory


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("inputs", "table", "out"),
    (
        ([X, WIDE[:, ::2][:, :8]], torch.ones(1, 2), None),
        ([X], torch.ones(2, 1), [WIDE[:, :8], WIDE[:, 4:12]]),
        ([WIDE[:, :8]], torch.ones(1, 1), [WIDE[:, 4:12]]),
        ([X, X], torch.ones(1, 2, dtype=torch.bfloat16), None),
        ([ODD], torch.ones(1, 1), None),
        ([ODD[:1, :1]], torch.ones(1, 1), None),
        ([ODD[:, 0]], torch.ones(1, 1), None),
        ([ODD[:, :1]], torch.ones(1, 1), [WIDE[:, :2:2]]),
        ([X[:, None].expand(3, 2, 8)], torch.ones(1, 1), None),
        ([X.view(3, *[1] * 16, 8)], torch.ones(1, 1), None),
        ([torch._neg_view(X)], torch.ones(1, 1), None),
        ([X, torch._neg_view(X)[:1].expand(3, 8)], torch.ones(1, 2), None),
        ([X], torch._neg_view(torch.ones(1, 1)), None),
        ([X], torch.tensor([[1j]]).conj().imag, None),
        ([X.as_subclass(Marked)], torch.ones(1, 1), None),
        ([torch.nn.Parameter(X)], torch.ones(1, 1), None),
        ([X[:0]], torch.ones(1, 1), None),
        ([X], torch.ones(65, 1), None),
    ),
)
def test_what_is_not_plain_is_not_written_directly_and_still_right(inputs, table, out):
    expected = reference([x.clone() for x in inputs], table, dtypes=[F32] * table.shape[0])
    before = None if out is None else [y.clone() for y in out]
    assert direct(inputs, table, None, 0, out, None) is None
    if out is not None:
        assert all(torch.equal(y, old) for y, old in zip(out, before))
        if len(out) > 1:  # outputs that overlap each other hold the last one written where they do
            return
    with torch.no_grad():
        found = lincomb(inputs, table, out=out)
    assert all(torch.equal(y, value) for y, value in zip(found, expected))


def test_an_output_that_a_bit_negates_is_refused_not_written_with_the_wrong_sign():
    out = torch._neg_view(torch.zeros(3, 8))
    with pytest.raises(RuntimeError, match="materialize all the negation input"):  # torch's own
        lincomb([X], torch.ones(1, 1), out=[out])
    assert (out == 0).all()


def test_negated_seeds_are_the_seeds_they_say():
    seeds, table = torch.arange(3), torch.tensor([[0.0, 1.0]])
    expected = lincomb([X], table, noise_seeds=-seeds)
    assert torch.equal(lincomb([X], table, noise_seeds=torch._neg_view(seeds))[0], expected[0])


def test_a_tensor_of_another_device_is_refused():
    with pytest.raises(ValueError, match="one device; got cpu and meta"):
        lincomb([X, X.to("meta")], torch.ones(1, 2))
    with pytest.raises(ValueError, match="one device; got cpu and meta"):
        lincomb([X], torch.ones(1, 1, device="meta"))


@pytest.mark.parametrize(
    ("inputs", "table", "seeds"),
    (
        ([X, X[:, :4]], torch.ones(1, 2), None),
        ([X, X[None]], torch.ones(1, 2), None),
        ([X, X.long()], torch.ones(1, 2), None),
        ([X.to_sparse()], torch.ones(1, 1), None),
        ([X], torch.ones(2), None),
        ([X], torch.ones(1, 2), None),
        ([X], torch.ones(2, 1, 1), None),
        ([X], torch.ones(1, 1, dtype=torch.int64), None),
        ([X], torch.ones(1, 2), torch.arange(2)),
        ([X], torch.ones(1, 2), torch.arange(3, dtype=torch.int32)),
        ([X], torch.ones(1, 2), torch.arange(3)[:, None]),
    ),
)
def test_what_cannot_be_is_left_to_the_checks(inputs, table, seeds):
    assert direct(inputs, table, seeds, 0, [torch.empty_like(X)], None) is None
    with pytest.raises((TypeError, ValueError, RuntimeError)):  # RuntimeError: torch's, of sparse tensors
        lincomb(inputs, table, noise_seeds=seeds)


@pytest.mark.parametrize("stream", (-1, 1 << 32))
def test_a_stream_that_is_none_is_refused(stream):
    assert direct([X], torch.ones(1, 2), torch.arange(3), stream, None, None) is None
    with pytest.raises((TypeError, ValueError)):
        lincomb([X], torch.ones(1, 2), noise_seeds=torch.arange(3), noise_stream=stream)


def test_a_job_run_at_once_gets_the_bits_of_one_run_after_it_was_looked_at():
    inputs, table = [torch.randn(3, 8) for _ in range(4)], torch.randn(2, 4)
    now, later = ([torch.empty(3, 8) for _ in range(2)] for _ in range(2))
    products = 3 * 8 * 4 * 2
    code, job = native.look((*inputs, *later, table), 4, 2, 0, 0, products - 1)
    assert code == 0
    assert all(y.data_ptr() == row for y, row in zip(later, job[native.HEAD + 3 * 4 :: 3]))
    native.call("lincomb", inputs[0], job.buffer_info()[0])
    assert native.look((*inputs, *now, table), 4, 2, 0, 0, products)[0] == DONE
    assert all(torch.equal(x, y) for x, y in zip(now, later))
    assert native.look((*inputs, now[0], now[0], table), 4, 2, 0, 0, products)[0] == OVERLAP


def test_where_torch_lets_no_c_code_look_the_operator_serves(monkeypatch):
    inputs, table = [X, X * 2], torch.randn(2, 2)
    monkeypatch.setattr(native.cpu(), "look", None)
    assert native.look((*inputs, X, table), 2, 1, 0, 0, 0)[0] == NOT_PLAIN
    assert all(torch.equal(x, y) for x, y in zip(lincomb(inputs, table), reference(inputs, table, dtypes=[F32] * 2)))


def test_a_dispatch_mode_sees_the_operator():
    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    heard: list[str] = []
    with Listening():
        lincomb([X], torch.ones(1, 1), out=[torch.empty_like(X)])
        lincomb([X], torch.ones(1, 1))
    assert "fewstep_kernels._lincomb_out.default" in heard
    assert "fewstep_kernels._lincomb.default" in heard


def test_fake_tensors_stay_fake():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        (y,) = lincomb([mode.from_tensor(X)], torch.ones(1, 1))
    assert isinstance(y, FakeTensor)
    assert isinstance(lincomb([mode.from_tensor(X)], mode.from_tensor(torch.ones(1, 1)))[0], FakeTensor)


def test_a_profiler_sees_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        lincomb([X], torch.ones(1, 1))
    assert "fewstep_kernels::_lincomb" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("strided", (False, True))
def test_autograd_notices_that_a_tensor_it_saved_was_overwritten(strided):
    saved, weight = torch.ones(3, 16)[:, :: 1 + strided], torch.ones((), requires_grad=True)
    loss = (saved * weight).sum()
    with torch.no_grad():
        lincomb([saved], torch.full((1, 1), 5.0), out=[saved])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_offsets_beyond_two_to_the_31_elements():
    buffer = torch.empty(2**31 + 4096, dtype=torch.bfloat16)  # virtual: only what is written takes memory
    far = buffer.as_strided((2, 700), (2**31, 1), 100)
    near = torch.randn(2, 700)
    far.copy_(near)
    inputs, table, seeds = [far, near], torch.randn(2, 2, 3), torch.tensor([3, 4])
    expected = reference(inputs, table, seeds, 0, [torch.bfloat16, F32])
    out = [buffer.as_strided((2, 700), (2**31, 1), 1000), torch.empty(2, 700)]
    assert direct(inputs, table, seeds, 0, out, None) is not None
    assert all(torch.equal(y, value) for y, value in zip(out, expected))


def test_overlap_is_what_sharing_bytes_means():
    memory = torch.zeros(512, dtype=torch.float64)
    chance = random.Random(4)
    seen = {0: 0, OVERLAP: 0}
    for _ in range(1500):
        batch, count = chance.choice((1, 2, 3)), chance.choice((1, 2, 4))
        tensors = []
        for _ in range(3):  # two inputs, one output
            code = chance.choice((0, 1, 3))
            size = (4, 2, 2, 8)[code]
            stride = chance.choice((count, count + 2, 2 * count, 3 * count))
            tensors.append((memory.data_ptr() + size * chance.randrange(12), stride, code, size))

        def sample(tensor, b, count=count):
            address, stride, _, size = tensor
            return set(range(address + b * stride * size, address + (b * stride + count) * size))

        def reads_what_it_should_not(x, y=tensors[-1], batch=batch):
            same = x[0] == y[0] and x[2] == y[2] and (x[1] == y[1] or batch == 1)
            everywhere = [set().union(*(sample(z, b) for b in range(batch))) for z in (x, y)]
            return not same and bool(everywhere[0] & everywhere[1])

        rows = [v for tensor in tensors for v in tensor[:3]]
        overlap = any(reads_what_it_should_not(x) for x in tensors[:2])
        coefficients = (ctypes.c_float * 2)(0.0, 0.0)
        job = [2, 1, batch, count, 0, 0, ctypes.addressof(coefficients), 0, 2, 1, 0, *rows]
        code = native.cpu().functions["lincomb"](native.table(job), 1)
        assert code in seen
        seen[code] += 1
        # strides that differ are not told apart sample by sample: then only touching spans count
        spans_touch = code == OVERLAP
        assert spans_touch or not overlap
        if len({tensor[1] * tensor[3] for tensor in tensors}) == 1:
            assert spans_touch == overlap
        assert native.cpu().functions["overlaps"](native.table(job)) == code
    assert min(seen.values()) > 100

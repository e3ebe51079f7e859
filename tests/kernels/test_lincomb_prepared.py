"""A prepared lincomb writes lincomb's bits, or says that it cannot and writes nothing."""

import importlib.util

import pytest
import torch

import fewstep_kernels as fk
from fewstep_kernels import backends
from fewstep_kernels.lincomb import lincomb
from fewstep_kernels.lincomb_prepared import PreparedLincomb, Share
from tests.kernels.ahead_of_time import python

pytestmark = pytest.mark.skipif(fk.backend("lincomb", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
SHAPE = (2, 3, 5, 7)
NAN = float("nan")


def prepared(dtype=torch.float32, stream=None, out_given=True):
    """Two kept inputs and both halves of one that is given; one kept output and one that is given."""
    kept = [torch.randn(SHAPE).to(dtype) for _ in range(2)]
    own = torch.full(SHAPE, NAN, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.randn(2, 4 + (stream is not None), dtype=wide)
    out = [own, Share(1) if out_given else torch.full(SHAPE, NAN, dtype=dtype)]
    call = PreparedLincomb([kept[0], Share(0, 0, 2), Share(0, 1, 2), kept[1]], table, out, own, stream)
    return call, kept, table, own


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("stream", (None, 3))
def test_calls_write_lincombs_bits(dtype, stream):
    call, kept, table, own = prepared(dtype, stream)
    for turn in range(3):
        answer, given = torch.randn(4, *SHAPE[1:]).to(dtype), torch.full(SHAPE, NAN, dtype=dtype)
        seeds = None if stream is None else torch.tensor([turn, -7])
        assert call((answer, given), seeds)
        inputs = [kept[0], answer[:2], answer[2:], kept[1]]
        expected = lincomb(inputs, table, noise_seeds=seeds, noise_stream=stream or 0)
        assert torch.equal(own, expected[0])
        assert torch.equal(given, expected[1])


def test_given_tensors_may_differ_in_dtype_and_batch_stride_from_call_to_call():
    call, kept, table, own = prepared()
    columns = torch.randn(4, 2, *SHAPE[1:])
    for answer in (torch.randn(4, *SHAPE[1:]).bfloat16(), columns[:, 1], torch.randn(1, *SHAPE[1:]).expand(4, 3, 5, 7)):
        given = torch.full((2, 2, *SHAPE[1:]), NAN, dtype=torch.float64)[:, 0]
        assert call((answer, given))
        inputs = [kept[0], answer[:2], answer[2:], kept[1]]
        expected = lincomb(inputs, table, dtypes=[torch.float32, torch.float64])
        assert torch.equal(own, expected[0])
        assert torch.equal(given, expected[1])


def test_an_input_given_may_be_an_output():
    call, kept, table, _ = prepared()
    answer = torch.randn(4, *SHAPE[1:])
    expected = lincomb([kept[0], answer[:2], answer[2:], kept[1]], table)
    assert call((answer, answer[2:]))
    assert torch.equal(answer[2:], expected[1])


@pytest.mark.parametrize(
    ("answer", "given"),
    (
        (torch.zeros(4, 3, 7, 5).transpose(2, 3), None),
        (torch.zeros(3, 3, 5, 7), None),
        (torch.zeros(4, 3, 5, 7, dtype=torch.int64), None),
        (torch.zeros(4, 3, 5, 7, device="meta"), None),
        (torch.nn.Parameter(torch.zeros(4, 3, 5, 7)), None),
        ([torch.zeros(2, 3, 5, 7)], None),
        (None, torch.zeros(1, 3, 5, 7).expand(2, 3, 5, 7)),
        (None, torch.zeros(2, 3, 5, 8)[..., :7]),
    ),
)
def test_what_is_not_plain_is_refused_and_nothing_is_written(answer, given):
    call, _, _, own = prepared()
    answer = torch.zeros(4, *SHAPE[1:]) if answer is None else answer
    given = torch.full(SHAPE, NAN) if given is None else given
    before = given.clone()
    assert not call((answer, given))
    assert own.isnan().all()
    assert torch.equal(given.nan_to_num(5.0), before.nan_to_num(5.0))


def test_overlap_seeds_and_other_backends_are_refused():
    call, _, _, own = prepared()
    buffer = torch.zeros(700)
    overlapping = buffer[:420].view(4, *SHAPE[1:]), buffer[7:217].view(SHAPE)
    assert not call(overlapping)
    assert own.isnan().all() and (buffer == 0).all()
    noisy, *_, own = prepared(stream=0)
    assert not noisy((torch.zeros(4, *SHAPE[1:]), torch.zeros(SHAPE)), torch.arange(4)[::2])
    assert not noisy((torch.zeros(4, *SHAPE[1:]), torch.zeros(SHAPE)), torch._neg_view(torch.arange(2)))
    assert not call((torch._neg_view(torch.zeros(4, *SHAPE[1:])), torch.zeros(SHAPE)))
    assert not PreparedLincomb([Share(0)], torch._neg_view(torch.zeros(1, 1)), [Share(1)], own).ready
    with backends.asking("reference"):
        assert not prepared()[0].ready
    assert not PreparedLincomb([Share(0)] * 65, torch.zeros(1, 65), [own], own).ready
    assert not PreparedLincomb([Share(0)], torch.zeros(1, 2), [own], own).ready
    assert not PreparedLincomb([Share(0)], torch.zeros(1, 1), [Share(1)], torch.zeros(1)).ready


def test_what_lincomb_takes_for_a_call():
    call, kept, _, own = prepared()
    answer, given = torch.randn(4, *SHAPE[1:]), torch.zeros(SHAPE)
    inputs, out = call.tensors((answer, given))
    assert inputs[0] is kept[0] and inputs[3] is kept[1] and out[0] is own and out[1] is given
    assert torch.equal(inputs[1], answer[:2]) and torch.equal(inputs[2], answer[2:])


INTERPRETED = """
import torch
from fewstep_kernels import backend
from fewstep_kernels.lincomb import reference
from fewstep_kernels.lincomb_prepared import PreparedLincomb, Share

assert backend("lincomb", "cpu") == "triton"
kept, own = torch.randn(2, 3, 7), torch.full((2, 3, 7), float("nan"))
for stream in (None, 2):
    table = torch.randn(2, 3 + (stream is not None))
    call = PreparedLincomb([kept, Share(0, 0, 2), Share(0, 1, 2)], table, [own, Share(1)], own, stream)
    seeds = None if stream is None else torch.tensor([4, -5])
    for turn in range(2):
        answer, given = torch.randn(4, 3, 7), torch.full((2, 3, 7), float("nan"), dtype=torch.float16)
        assert call((answer, given), seeds)
        expected = reference([kept, answer[:2], answer[2:]], table, seeds, stream or 0, [own.dtype, given.dtype])
        assert torch.equal(own, expected[0]) and torch.equal(given, expected[1])
memory = torch.zeros(4 * 21 + 1)
assert not call((memory[1:].view(4, 3, 7), memory[:42].view(2, 3, 7)), seeds)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_calls_through_triton_write_the_references_bits():
    assert python(INTERPRETED, TRITON_INTERPRET="1", FEWSTEP_KERNELS="triton") == "equal\n"

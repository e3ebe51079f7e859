"""Averages looked at once, past torch's dispatcher: the same bits, and only where all is plain."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fewstep_kernels as fk
from fewstep_kernels.ema import _direct, _move, element_origins

pytestmark = pytest.mark.skipif(fk.backend("ema_update", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
IMAGE = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


def model():
    parameters = [torch.nn.Parameter(torch.randn(9, 5)), torch.randn(0), torch.randn(()), IMAGE, torch.randn(70).half()]
    averages = [[torch.randn_like(p, dtype=dtype) for p in parameters] for dtype in (torch.float32, torch.bfloat16)]
    return parameters, averages


@pytest.mark.parametrize("given", (None, [0, 80, 8, 160, 400]))
def test_plain_averages_go_directly_and_get_the_operators_bits(given):
    parameters, averages = model()
    expected = [[x.clone() for x in profile] for profile in averages]
    decays, origins = [0.9, 0.99], element_origins(parameters) if given is None else given
    with torch.no_grad():
        flat = [x for profile in expected for x in profile]
        _move(flat, parameters, decays, [None, None], 7, 3, None, origins)
        assert _direct(averages, parameters, decays, given, 7, 3)
    assert all(torch.equal(x, y) for own, other in zip(averages, expected) for x, y in zip(own, other))


def test_averages_stacked_in_one_tensor():
    """Its rows are new objects at every look."""
    stacked, rows = torch.zeros(2, 50, 7), [torch.full((7,), float(i)) for i in range(50)]
    fk.ema_update(stacked[0], rows, 0.0)
    fk.ema_update(stacked, rows, [0.0, 0.5])
    assert torch.equal(stacked, torch.stack(rows) * torch.tensor([1.0, 0.5]).view(2, 1, 1))


def test_fake_tensors_outside_their_mode():
    average, parameter = (FakeTensorMode().from_tensor(torch.ones(3)) for _ in range(2))
    with pytest.raises(AssertionError, match="Mixing fake modes"):
        fk.ema_update([average], [parameter], 0.5)
    fk.ema_update([average], [average], 0.5)


def test_a_fake_number_outside_its_mode_is_refused():
    average, decay = torch.zeros(3), FakeTensorMode().from_tensor(torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor with memory; got FakeTensor"):
        fk.ema_update([average], [torch.ones(3)], decay)
    assert (average == 0).all()


def test_what_a_bit_negates_is_averaged_negated():
    one = torch.tensor([1 + 2j]).conj().imag  # -2, and 2 in its memory
    assert one.is_neg() and one.is_contiguous()
    average = torch.zeros(1)
    fk.ema_update([average], [torch.nn.Parameter(one)], 0.5)
    assert average == -1.0
    negated = torch._neg_view(torch.zeros(3))
    with pytest.raises(RuntimeError, match="materialize all the negation input"):  # torch's own
        fk.ema_update([negated], [torch.ones(3)], 0.0)
    assert (negated == 0.0).all()
    fk.ema_update([average], [torch.ones(1)], torch._neg_view(torch.tensor(-0.5)))
    assert average == 0.0


class Marked(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("parameter", "average"),
    (
        (torch.ones(6), torch.zeros(5)),
        (torch.ones(6), torch.zeros(6, 1)),
        (torch.ones(6), torch.zeros(12)[::2]),
        (IMAGE, torch.zeros(2, 3, 4, 5)),
        (torch.ones(6), torch.zeros(6, dtype=torch.int64)),
        (torch.ones(6), torch.zeros(6).as_subclass(Marked)),
        (torch.ones(6), torch.zeros(6, device="meta")),
        (torch.eye(6).to_sparse(), torch.zeros(6, 6)),
        (torch.ones(6), 0.0),
        (torch._neg_view(torch.ones(6)), torch.zeros(6)),
        (torch.ones(6), torch._neg_view(torch.zeros(6))),
    ),
)
def test_what_is_not_plain_is_left_as_it_was(parameter, average):
    first = torch.zeros(3)
    assert not _direct([[first, average]], [torch.ones(3), parameter], [0.5], None, None, 0)
    assert (first == 0).all()
    assert not _direct([[first]], [torch.ones(3), parameter], [0.5], None, None, 0)

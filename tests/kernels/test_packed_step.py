"""AdamWEma keeps its tables from one step to the next: the bits are those of a step that looks at everything anew."""

import copy

import pytest
import torch

from fewstep_kernels import AdamWEma, backend
from fewstep_kernels.decay_profiles import Constant, Power
from fewstep_kernels.packed_step import PackedStep

pytestmark = pytest.mark.skipif(backend("adamw_ema_step", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
SHAPES = ((7,), (4, 3, 3, 3), (0,), (5, 9), (), (2, 6, 1, 1))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    made[1].data = made[1].data.to(memory_format=torch.channels_last)
    return made


def gradients(ps, step, missing=()):
    generator = torch.Generator().manual_seed(step + 10)
    for i, p in enumerate(ps):
        drawn = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in missing else torch.empty_like(p).copy_(drawn)  # laid out like p


class Pair:
    """Two optimisers of equal parameters; one forgets its tables before every step."""

    def __init__(self, monkeypatch, dtype=torch.float32, **options):
        self.taken = 0
        whole = PackedStep.step

        def counted(step, *arguments):
            self.taken += 1
            return whole(step, *arguments)

        monkeypatch.setattr(PackedStep, "step", counted)
        self.lists = [parameters(dtype) for _ in range(2)]
        copies = [[torch.zeros_like(p, dtype=torch.bfloat16) for p in ps] for ps in self.lists]
        self.optimizers = [
            AdamWEma([{"params": ps[:3]}, {"params": ps[3:], "lr": 3e-2}], working=working, **options)
            for ps, working in zip(self.lists, copies)
        ]

    def step(self, number, packed, change=lambda optimizer, ps: None, missing=()):
        """One step of both; packed: how many groups' tables the first could keep."""
        self.taken = 0
        for optimizer, ps in zip(self.optimizers, self.lists):
            gradients(ps, number, missing)
            change(optimizer, ps)
        self.optimizers[0].step()
        assert self.taken == packed
        self.optimizers[1]._packed.clear()
        self.optimizers[1].step()
        for a, b in zip(*map(self.everything, range(2)), strict=True):
            assert torch.equal(a, b)

    def everything(self, which):
        optimizer, ps = self.optimizers[which], self.lists[which]
        return [*ps, *(x for p in ps for x in optimizer.state[p].values()), *optimizer._working.values()]


def packed() -> tuple[list[torch.Tensor], AdamWEma]:
    """Parameters and their optimiser after the step that packs its tables and one that uses them."""
    ps = parameters()
    optimizer = AdamWEma(ps)
    for number in range(2):
        gradients(ps, number)
        optimizer.step()
    return ps, optimizer


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_tables_are_kept_and_the_bits_are_the_same(monkeypatch, dtype):
    profiles = [Constant(0.9), Power(6.94)]
    pair = Pair(monkeypatch, profiles=profiles, average_dtype=torch.bfloat16, seed=4, max_norm=1.0, dtype=dtype)
    pair.step(0, 0)
    for number in range(1, 6):
        pair.step(number, 2)


def replaced_gradient(optimizer, ps):
    ps[1].grad = ps[1].grad.contiguous()


def other_weight_decay(optimizer, ps):
    optimizer.param_groups[0]["weight_decay"] = 0.5


def masked(optimizer, ps):
    optimizer.param_groups[0]["weight_decay_mask"] = [True, False, True]


def moved_parameter(optimizer, ps):
    ps[0].data = ps[0].data * 2


def turned_parameter(optimizer, ps):
    ps[3].data = torch.arange(45.0).view(9, 5).t()
    ps[3].grad = ps[3].grad.contiguous()


def moved_state(optimizer, ps):
    optimizer.state[ps[0]]["exp_avg"] = optimizer.state[ps[0]]["exp_avg"] * 0.5


def loaded(optimizer, ps):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def emptied(optimizer, ps):
    optimizer.state.clear()


def followed(optimizer, ps):
    optimizer.follow([[p.detach().clone() for p in ps[:3]]], [0.3])


def nothing(optimizer, ps):
    pass


@pytest.mark.parametrize(
    ("change", "missing", "kept"),
    (
        (nothing, (), (2, 2, 2)),
        (nothing, (0,), (1, 1, 2)),
        (nothing, (3, 4), (1, 1, 2)),
        (replaced_gradient, (), (1, 1, 2)),
        (other_weight_decay, (), (1, 2, 2)),
        (masked, (), (1, 2, 2)),
        (moved_parameter, (), (1, 2, 2)),
        (turned_parameter, (), (1, 1, 1)),  # its states lie otherwise: the reference serves it
        (moved_state, (), (1, 2, 2)),
        (loaded, (), (0, 2, 2)),
        (emptied, (), (0, 2, 2)),
        (followed, (), (1, 2, 2)),
    ),
)
@pytest.mark.parametrize("profiles", ((), (Constant(0.9),)))
def test_whatever_changes_is_noticed(monkeypatch, change, missing, kept, profiles):
    pair = Pair(monkeypatch, profiles=profiles)
    pair.step(0, 0)
    pair.step(1, 2)
    pair.step(2, kept[0], change, missing)
    pair.step(3, kept[1])
    pair.step(4, kept[2])


def test_a_group_added_later_is_stepped():
    ps = parameters()
    optimizer = AdamWEma(ps[:3])
    for number in range(3):
        gradients(ps, number)
        optimizer.step()
    optimizer.add_param_group({"params": ps[3:]})
    before = [p.detach().clone() for p in ps]
    gradients(ps, 9)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(ps, before) if p.numel())


def test_numbers_are_checked_at_every_step():
    _, optimizer = packed()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr must be in"):
        optimizer.step()


def test_a_gradient_that_turns_sparse_is_refused():
    ps, optimizer = packed()
    ps[3].grad = ps[3].grad.to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()


def test_autograd_notices_a_packed_step():
    ps, optimizer = packed()
    answer = (ps[0] * torch.ones(7, requires_grad=True)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        answer.backward()

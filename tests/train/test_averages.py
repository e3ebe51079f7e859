"""Averages move within the optimiser's step, to the numbers they had when they moved after it."""

import copy

import pytest
import torch
from torch import nn

import fewstep_kernels as fk
from fewstep.methods import OptimizerConfig
from fewstep.nets.mlp import MLP
from fewstep.train import Trainer
from fewstep.train.ema import Average, Averages
from fewstep.train.strategies.single import Single
from tests.train import small

DECAYS = (0.9, 0.99, 0.5)


class Run:
    """A network with three averages, warmed up and not, and a head without any, in one engine."""

    def __init__(self, optimizer="adamw", clip=0.05, averages=3, freeze=False):
        torch.manual_seed(1)
        strategy = Single(torch.device("cpu"))
        self.net, self.head = MLP(4, width=16, depth=1), nn.Linear(4, 3)
        if freeze:
            self.net.first.weight.requires_grad_(False)
        names = [f"average_{i}" for i in range(averages)]
        self.averages = [copy.deepcopy(self.net).requires_grad_(False) for _ in names]
        networks = {"net": self.net, "head": self.head}
        configs = dict.fromkeys(networks, OptimizerConfig(name=optimizer, lr=1e-2, weight_decay=0.1))
        options = {"clip": clip, "warmup": 3, "micro_batch": 8, "accumulate": 1}
        self.engine = strategy.engine("e", networks, configs, **options)
        followers = [Average(n, "net", DECAYS[i % 3], warmup=i == 1) for i, n in enumerate(names)]
        modules = {**networks, **dict(zip(names, self.averages))}
        self.book = Averages(strategy, modules, followers, dict.fromkeys(networks, self.engine))

    def update(self, number, fault=False):
        generator = torch.Generator().manual_seed(number)
        x, t = torch.randn(8, 4, generator=generator), torch.rand(8, generator=generator)
        loss = (self.head(self.net(x, t)) - x[:, :3]).square().mean()
        self.engine.backward(loss * (float("nan") if fault else 1.0), True)
        norm = self.engine.step(self.book.decays(self.engine.networks))
        for name in self.engine.networks:
            self.book.after(name)
        return norm

    def tensors(self):
        return [p.detach() for module in (self.net, self.head, *self.averages) for p in module.parameters()]


def test_the_step_is_torchs_and_the_averages_are_those_of_a_pass_of_their_own():
    ours, torchs = Run(), Run("torch_adamw")
    kept = [[p.detach().clone() for p in ours.net.parameters()] for _ in DECAYS]
    for number in range(6):
        norms = [run.update(number) for run in (ours, torchs)]
        assert norms[0] > 0.05  # clipped
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        decays = [0.9, min(0.99, (1 + number) / (10 + number)), 0.5]
        fk.ema_update(kept, list(ours.net.parameters()), decays)
        for average, expected in zip(ours.averages, kept):
            assert all(torch.equal(a, b) for a, b in zip(average.parameters(), expected))
    # six steps of float32 roundings, and Adam's 1 / sqrt(v) makes a gradient's last digit one of the step
    torch.testing.assert_close(ours.tensors(), torchs.tensors(), rtol=1e-4, atol=1e-5)
    assert ours.book.state() == torchs.book.state() == {"average_0": 6, "average_1": 6, "average_2": 6}


def test_averages_of_frozen_parameters_and_a_fifth_average_move_too():
    for run in (Run(freeze=True), Run(averages=5)):
        before = run.averages[-1].first.weight.clone()
        with torch.no_grad():
            run.net.first.weight.add_(1.0)  # as a stage that copies weights does
        run.update(0)
        expected = before.lerp(run.net.first.weight, 1 - run.book.by_source["net"][-1].decay)
        torch.testing.assert_close(run.averages[-1].first.weight, expected)


@pytest.mark.parametrize("name", ["adamw", "torch_adamw"])
def test_a_gradient_that_is_not_finite_leaves_weights_and_optimiser_alone(name):
    run = Run(name)
    run.update(0)
    before = [x.clone() for x in run.tensors()], run.engine.state()
    norm = run.update(1, fault=True)
    assert not torch.isfinite(norm)
    weights = len(list(run.net.parameters())) + 2
    held = weights if name == "torch_adamw" else len(before[0])  # ours leaves the averages alone as well
    assert all(torch.equal(a, b) for a, b in zip(run.tensors()[:held], before[0]))
    after = run.engine.state()
    assert all(torch.equal(value, after[key]) for key, value in before[1].items())
    assert all(torch.isfinite(x).all() for x in run.tensors())


def test_an_update_without_any_gradient_moves_averages_only():
    run = Run()
    with torch.no_grad():
        run.net.first.weight.add_(1.0)
    before = run.averages[0].first.weight.clone()
    assert run.engine.step(run.book.decays(["net"])) == 0.0
    assert run.engine.state() == {}
    torch.testing.assert_close(run.averages[0].first.weight, before + 0.1)


@pytest.mark.parametrize("names", [("adamw", "torch_adamw"), ("torch_adamw", "adamw")])
def test_a_run_goes_on_with_the_other_optimiser(tmp_path, names):
    """A checkpoint holds torch's moments, whoever wrote it."""

    def run(folder, name, **train):
        recipe = small.recipe(folder, optimizer={"name": name, "lr": 1e-3}, **train)
        again = Trainer(
            recipe, teacher=small.teacher(), loader=small.Digits(), resume=(folder / "checkpoints").exists()
        )
        again.fit()
        return again, small.weights(again)

    _, whole = run(tmp_path / "whole", names[0], updates=6)
    run(tmp_path / "cut", names[0], updates=3)
    last, cut = run(tmp_path / "cut", names[1], updates=6)
    assert last.step == 6
    for network, state in whole.items():
        for key, value in state.items():  # three steps of roundings
            torch.testing.assert_close(cut[network][key], value, rtol=1e-4, atol=1e-6)


def test_a_clip_of_none_does_not_clip():
    ours, torchs = Run(clip=None), Run("torch_adamw", clip=None)
    for number in range(3):
        ours.update(number)
        torchs.update(number)
    torch.testing.assert_close(ours.tensors(), torchs.tensors(), rtol=1e-4, atol=1e-5)

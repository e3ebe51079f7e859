"""AdamWEma against torch.optim.AdamW: steps, state dicts, clipping, scaling, missing gradients, averages."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch

from fewstep_kernels import AdamWEma, ema_update
from fewstep_kernels.decay_profiles import Constant, Power, WarmUp

SHAPES = ((1,), (63,), (500, 7), (8191,), (2, 3, 4))


def parameters(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def gradients(step, *lists, missing=lambda step, i: False, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for i, shape in enumerate(SHAPES):
        gradient = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for ps in lists:
            ps[i].grad = None if missing(step, i) else gradient.to(ps[i].dtype)


def groups(ps):
    return [{"params": ps[:3], "weight_decay": 0.1, "lr": 3e-3}, {"params": ps[3:], "weight_decay": 0.0}]


def close(a, b):
    # twenty steps of a few float64 roundings each
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-14)


def sometimes(step, i):
    return (step + i) % 3 == 0


def test_twenty_steps_of_groups_with_missing_gradients_are_torchs():
    ours, theirs = parameters(), parameters()
    mine, torchs = AdamWEma(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(20):
        gradients(step, ours, theirs, missing=sometimes)
        mine.step()
        torchs.step()
    close(ours, theirs)
    for a, b in zip(ours, theirs):
        assert mine.state[a].keys() == torchs.state[b].keys()
        close(mine.state[a].values(), torchs.state[b].values())


@pytest.mark.parametrize("first", ("AdamWEma", "torch"))
def test_state_dicts_are_exchanged_with_torch(first):
    ours, theirs = parameters(), parameters()
    kinds = {"AdamWEma": AdamWEma, "torch": torch.optim.AdamW}
    before, after = (kinds[k] for k in (("AdamWEma", "torch") if first == "AdamWEma" else ("torch", "AdamWEma")))
    changed, steady = before(groups(ours), lr=1e-2), torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(20):
        if step == 10:
            saved = copy.deepcopy(changed.state_dict())
            changed = after(groups(ours), lr=0.5)
            changed.load_state_dict(saved)
        gradients(step, ours, theirs)
        changed.step()
        steady.step()
    close(ours, theirs)
    assert changed.param_groups[1]["lr"] == 1e-2


def test_a_run_that_is_saved_and_loaded_goes_on_with_the_same_bits(tmp_path):
    options = {"profiles": (Constant(0.9), Power(6.94), WarmUp(0.99)), "average_dtype": torch.bfloat16, "seed": 3}
    whole, parts = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    steady, broken = AdamWEma(whole, lr=1e-2, **options), AdamWEma(parts, lr=1e-2, **options)
    for step in range(20):
        if step == 10:
            torch.save(broken.state_dict(), tmp_path / "state")
            broken = AdamWEma(parts, lr=0.5, **options)
            broken.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        gradients(step, whole, parts)
        steady.step()
        broken.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    for profile in range(3):
        assert all(torch.equal(a, b) for a, b in zip(steady.averages(profile), broken.averages(profile)))


def test_float32_averages_of_bfloat16_parameters_survive_loading():
    ps = parameters(dtype=torch.bfloat16)
    optimizer = AdamWEma(ps, lr=1e-2, profiles=[Constant(0.9)])
    for step in range(5):
        gradients(step, ps)
        optimizer.step()
    other = AdamWEma(ps, profiles=[Constant(0.9)])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(optimizer.averages(), other.averages()):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def test_averages_follow_every_parameter_from_its_first_value():
    ps, decays = parameters(), (0.9, 0.3)
    optimizer = AdamWEma(groups(ps), profiles=[Constant(d) for d in decays], average_dtype=None)
    expected = [[p.detach().clone() for p in ps] for _ in decays]
    for step in range(8):
        gradients(step, ps, missing=sometimes)
        optimizer.step()
        ema_update(expected, [p.detach() for p in ps], decays)
        for profile in range(len(decays)):
            close(optimizer.averages(profile), expected[profile])


def test_a_power_average_is_the_mean_its_weights_say():
    ps = parameters()
    optimizer = AdamWEma(ps, profiles=[Power(0.0)], average_dtype=None)  # decay 1 - 1/n: the plain mean
    total = [torch.zeros_like(p) for p in ps]
    for step in range(10):
        gradients(step, ps)
        optimizer.step()
        for t, p in zip(total, ps):
            t += p.detach()
    close(optimizer.averages(), [t / 10 for t in total])


def test_averages_of_the_callers_follow_by_the_decays_of_their_group():
    ps = parameters()
    optimizer = AdamWEma(groups(ps), profiles=[Constant(0.9)], average_dtype=None)
    held = [[p.detach().clone() for p in ps[3:]] for _ in range(2)]
    expected = [[p.detach().clone() for p in ps[3:]] for _ in range(2)]
    optimizer.follow(held, [1.0, 1.0], group=1)
    for step in range(6):
        gradients(step, ps, missing=sometimes)
        decays = [0.5, 1.0 - 1.0 / (step + 1)]
        optimizer.param_groups[1]["decays"] = decays
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(torch_like(optimizer.state_dict())))
        optimizer.step()
        ema_update(expected, [p.detach() for p in ps[3:]], decays)
    assert all(torch.equal(a, b) for x, y in zip(held, expected) for a, b in zip(x, y))
    assert not any(name.startswith("average_1") for state in optimizer.state_dict()["state"].values() for name in state)


def torch_like(saved):
    """A state dict as torch's AdamW leaves it: no decays among its groups."""
    return {**saved, "param_groups": [{k: v for k, v in g.items() if k != "decays"} for g in saved["param_groups"]]}


def test_a_parameter_that_never_had_a_gradient_has_averages_but_no_moments():
    ps = parameters()
    optimizer = AdamWEma(ps, profiles=[Constant(0.9)])
    optimizer.follow([[p.detach().clone() for p in ps]], [0.5])
    gradients(0, ps, missing=lambda step, i: i == 1)
    optimizer.step()
    assert set(optimizer.state[ps[1]]) == {"average_0"}
    assert set(optimizer.state[ps[0]]) == {"average_0", "exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("scale", (1e-3, 10.0))
def test_clipping_is_torchs(scale):
    ours, theirs = parameters(), parameters()
    mine, torchs = AdamWEma(ours, lr=1e-2, max_norm=0.5), torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(5):
        gradients(step, ours, theirs, scale=scale)
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        torch.testing.assert_close(mine.norm, norm, rtol=1e-13, atol=0)
    close(ours, theirs)


@pytest.mark.parametrize("option", ({"skip_nonfinite": True}, {"max_norm": 1.0}))
def test_a_nonfinite_gradient_skips_the_step_whole(option):
    ours, theirs = parameters(), parameters()
    copies = [torch.zeros_like(p) for p in ours]
    options = {"profiles": [Power(6.94)], "average_dtype": None, **option}
    mine, clean = AdamWEma(ours, working=copies, **options), AdamWEma(theirs, **options)
    for step in range(6):
        gradients(step, ours, theirs)
        if step in (0, 3):
            ours[2].grad[3, 3] = float("nan")
            before = [c.clone() for c in copies]
            mine.step()
            assert all(torch.equal(a, b) for a, b in zip(copies, before))
        else:
            mine.step()
            clean.step()
            assert all(torch.equal(a, b) for a, b in zip(copies, ours))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert all(torch.equal(a, b) for a, b in zip(mine.averages(), clean.averages()))
    assert mine.param_groups[0]["updates"] == 4
    assert all(mine.state[p]["step"] == 4 for p in ours)


def test_a_grad_scaler_unscales_in_the_pass_and_skips():
    ours, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    mine, plain = AdamWEma(ours, lr=1e-2, max_norm=1.0), AdamWEma(theirs, lr=1e-2, max_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(5):
        gradients(step, ours, theirs)
        plain.step()
        for p in ours:
            p.grad *= scaler.scale(torch.ones(()))
        scaler.step(mine)
        scaler.update()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # a power of two: the norm's roundings alone differ
    before = [p.detach().clone() for p in ours]
    gradients(9, ours)
    ours[0].grad[0] = float("inf")
    scaler.scale(torch.ones(()))
    scaler.step(mine)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(ours, before))


def test_masks_learning_rate_tensors_and_given_norms():
    ours, theirs = parameters(), parameters()
    mask = [True, False, True, False, True]
    mine = AdamWEma([{"params": ours, "weight_decay_mask": mask}], lr=torch.tensor(1e-2), weight_decay=0.1, max_norm=1)
    split = [
        {"params": [p for p, m in zip(theirs, mask) if m == keep], "weight_decay": 0.1 * keep} for keep in (True, False)
    ]
    torchs = torch.optim.AdamW(split, lr=float(torch.tensor(1e-2)))
    for step in range(3):
        gradients(step, ours, theirs)
        mine.step(norm=torch.tensor(4.0, dtype=torch.float64))  # as if other ranks held the rest
        for p in theirs:
            p.grad /= 4.0 + 1e-6
        torchs.step()
    close(ours, theirs)


def test_parameters_without_gradients_need_no_state_and_closures_run():
    ps = parameters()
    optimizer = AdamWEma(ps)
    assert optimizer.step(lambda: 7) == 7
    assert not optimizer.state


@pytest.mark.parametrize(
    ("make", "words"),
    (
        (lambda: AdamWEma(parameters(), profiles=[Constant(0.9)] * 5), "at most 4 averages; got 5"),
        (lambda: AdamWEma(parameters(), max_norm=0.0), "max_norm must be positive"),
        (lambda: AdamWEma(parameters(), working=[None]), "1 working copies for 5"),
        (lambda: AdamWEma(parameters()).follow([parameters()], []), "got 1 more and 0 decays beside 0 profiles"),
        (lambda: AdamWEma(parameters()).follow([parameters()[:1]], [0.5]), "got 1 averages for 5 parameters"),
        (lambda: AdamWEma(parameters()).averages(), r"profile must be in \[0, 0\)"),
        (
            lambda: AdamWEma(parameters()).load_state_dict(torch.optim.AdamW(parameters(), amsgrad=True).state_dict()),
            "no amsgrad",
        ),
    ),
)
def test_what_does_not_fit_is_said(make, words):
    with pytest.raises(ValueError, match=words):
        make()


DEEPSPEED = """
    import os, sys, torch
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    import deepspeed
    import torch.distributed as dist
    from fewstep_kernels import AdamWEma
    from fewstep_kernels.decay_profiles import Constant

    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for stage in (1, 2):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        twin = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
        twin.load_state_dict(net.state_dict())
        optimizer = AdamWEma(net.parameters(), lr=1e-2, profiles=[Constant(0.5)])
        plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
                  "zero_force_ds_cpu_optimizer": False, "zero_optimization": {"stage": stage}}
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        for step in range(3):
            x = torch.randn(4, 5)
            engine.backward(engine(x).square().mean())
            engine.step()
            twin(x).square().mean().backward()
            plain.step()
            plain.zero_grad()
        for a, b in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        (average,), (shard,) = optimizer.averages(), (group["params"][0] for group in optimizer.param_groups)
        assert average.shape == shard.shape and not torch.equal(average, shard)
        print("stage", stage, "agrees")
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_deepspeed_takes_it_as_client_optimizer(tmp_path):
    pytest.importorskip("deepspeed")
    command = [sys.executable, "-c", textwrap.dedent(DEEPSPEED), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stage 1 agrees" in done.stdout
    assert "stage 2 agrees" in done.stdout

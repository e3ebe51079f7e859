"""The executor runs a table and adds nothing of its own."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import solvers
from fewstep.analytic import Mixture
from fewstep.diffusion import Denoiser, schedules
from fewstep.diffusion.prediction import Prediction
from fewstep.errors import UserError
from fewstep.solvers import memory
from fewstep_kernels import lincomb, normal

SOLVERS = [("ddim", {}), ("ddim", {"eta": 0.7}), ("heun", {}), ("dpmpp_2m", {}), ("consistency", {})]
SOLVERS += [(name, {}) for name in solvers.names(alone=True) if name not in {listed for listed, _ in SOLVERS}]
EDM = schedules.get("edm")
MIXTURE = Mixture([0.4, 0.6], [[-0.5, 0.3], [0.4, -0.2]], [0.5, 0.35])


class Net(torch.nn.Module):
    """A small nonlinear conditional network on [B, 2, 3, 3]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = torch.nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        self.table = torch.nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64))
        self.inputs: list[int] = []

    def forward(self, x, t, cond=None):
        self.inputs.append(x.data_ptr())
        shift = 0.0 if cond is None else self.table[cond][:, :, None, None]
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.mix, x) + shift) + t[:, None, None, None]

    def null(self, cond):
        return torch.full_like(cond, 3)


def noise(batch: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_a_batch_of_sixteen_is_sixteen_batches_of_one(solver, options, guidance):
    denoiser, start = Denoiser(Net(), EDM, "edm"), noise(16).float()
    denoiser.float()
    plan = solvers.plan(solver, EDM, 4, prediction="edm", guidance=guidance, **options)
    cond, seeds = torch.arange(16) % 3, torch.arange(16) + 7
    whole = solvers.sample(denoiser, plan, start, cond, seeds=seeds)
    for i in range(16):
        one = slice(i, i + 1)
        alone = solvers.sample(denoiser, plan, start[one], cond[one], seeds=seeds[one])
        # the network's own sums may be reordered with the batch; the executor's are not
        torch.testing.assert_close(alone, whole[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("solver", "options"), [("ddim", {"eta": 1.0}), ("consistency", {})])
def test_carried_noise_and_seeds_are_the_same_thing(solver, options):
    denoiser, seeds = Denoiser(Net(), EDM, "edm"), torch.tensor([3, 1, 4, 1])
    plan = solvers.plan(solver, EDM, 4, prediction="edm", **options)
    streams = [normal(seeds, (2, 3, 3), stream=k, dtype=torch.float64) for k in range(1 + plan.stochastic_stages)]
    carried = solvers.sample(denoiser, plan, torch.stack(streams, 1))
    drawn = solvers.sample(denoiser, plan, streams[0], seeds=seeds)
    # seeds are drawn in the accumulation's own width, one rounding apart at most
    torch.testing.assert_close(carried, drawn, rtol=1e-6, atol=1e-6)
    assert torch.equal(drawn[1], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_results_do_not_depend_on_gradients_buffers_or_earlier_runs(solver, options, guidance):
    denoiser = Denoiser(Net(), EDM, "edm")
    plan = solvers.plan(solver, EDM, 4, prediction="edm", guidance=guidance, **options)
    cond, seeds = torch.tensor([0, 1, 2, 0]), torch.arange(4)
    first = solvers.sample(denoiser, plan, noise(), cond, seeds=seeds)
    kept = first.clone()
    other = solvers.sample(denoiser, plan, noise(seed=1), cond, seeds=seeds)
    again = solvers.sample(denoiser, plan, noise(), cond, seeds=seeds)
    tracked = solvers.execute(plan, denoiser, noise(), cond=cond, seeds=seeds, gradient="all")
    assert torch.equal(first, kept) and torch.equal(again, kept) and not torch.equal(other, kept)
    torch.testing.assert_close(tracked.x.detach(), kept, rtol=0, atol=1e-13)
    assert tracked.x.requires_grad and not first.requires_grad


class Watch(TorchDispatchMode):
    """Records operators by name, but not those inside lincomb, whose backends differ."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.paused = False

    def lincomb(self, *arguments, out, **options):
        self.paused = True
        result = lincomb(*arguments, out=out, **options)
        self.paused = False
        assert out is not None
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.paused:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_after_the_first_run_it_allocates_only_its_result_and_never_asks_the_device(
    solver, options, guidance, monkeypatch
):
    class Fixed(torch.nn.Module):
        """Answers from memory it owns, so that every allocation seen is the executor's."""

        answers: dict[int, torch.Tensor] = {}

        def forward(self, x, t, cond=None):
            if len(x) not in self.answers:
                self.answers[len(x)] = torch.ones_like(x)
            inputs.append(x.data_ptr())
            return self.answers[len(x)]

        def null(self, cond):
            return cond

    inputs: list[int] = []
    denoiser = Denoiser(Fixed(), EDM, "edm")
    plan = solvers.plan(solver, EDM, 5, prediction="edm", guidance=guidance, **options)
    start, cond, seeds = noise(), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    solvers.sample(denoiser, plan, start, cond, seeds=seeds)
    with Watch() as watch:
        monkeypatch.setattr(solvers.executor, "lincomb", watch.lincomb)
        solvers.sample(denoiser, plan, start, cond, seeds=seeds)
    makes = {"empty", "full", "zeros", "ones", "clone", "cat", "stack", "lift_fresh", "_to_copy"}
    made = [
        name
        for name in watch.names
        if name.split("::")[1].split(".")[0].removeprefix("new_").removesuffix("_like") in makes
    ]
    assert len([name for name in made if "cat" not in name]) == 1
    assert len(made) == (1 if guidance is None else 2)  # joining the conditions writes into a buffer
    assert not [name for name in watch.names if "local_scalar" in name or "nonzero" in name or "item" in name]
    assert len(set(inputs)) == 1  # every call of both runs read the same memory


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_what_networks_read_unscaled_is_the_state_itself(solver, options):
    """Each map then writes one tensor less: both halves of the joined input, and the state is the first."""
    vp, cond, seeds = schedules.get("vp"), torch.tensor([0, 1, 2, 0]), torch.arange(4)
    denoiser = Denoiser(Net(), vp, "eps")
    plan = solvers.plan(solver, vp, 4, prediction="eps", guidance=2.0, **options)
    found = [solvers.sample(denoiser, plan, noise(), cond, seeds=seeds) for _ in range(2)]
    fresh = solvers.execute(plan, denoiser, noise(), cond=cond, seeds=seeds, gradient="all", record=["x"])
    kept = solvers.execute(plan, denoiser, noise(), cond=cond, seeds=seeds, record=["x"])
    assert torch.equal(*found) and torch.equal(kept.x, found[0])
    for x, y in zip(kept.recorded["x"], fresh.recorded["x"], strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=1e-13 * max(1.0, float(y.abs().max())))
    buffers = memory.buffers_of(plan, noise())
    assert buffers["x"].data_ptr() == buffers.joined.data_ptr()
    scaled = solvers.plan(solver, EDM, 4, prediction="edm", guidance=2.0, **options)
    assert memory.buffers_of(scaled, noise())["x"].data_ptr() != memory.buffers_of(scaled, noise()).joined.data_ptr()


def test_one_network_call_and_one_map_a_stage():
    net = Net()
    plan = solvers.plan("dpmpp_2m", EDM, 5, prediction="edm", guidance=2.0)
    solvers.sample(Denoiser(net, EDM, "edm"), plan, noise(), torch.zeros(4, dtype=torch.int64))
    assert len(net.inputs) == plan.evaluations == 5


def test_threads_do_not_share_buffers():
    denoiser = Denoiser(Net(), EDM, "edm")
    plan = solvers.plan("dpmpp_2m", EDM, 6, prediction="edm")
    expected = [solvers.sample(denoiser, plan, noise(seed=i)) for i in range(4)]
    found: dict[int, list[torch.Tensor]] = {}

    def work(i: int) -> None:
        found[i] = [solvers.sample(denoiser, plan, noise(seed=i)) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected[i]) for i in range(4) for result in found[i])


def test_buffers_made_in_inference_mode_serve_every_mode():
    denoiser, plan = Denoiser(Net(), EDM, "edm"), solvers.plan("heun", EDM, 3, prediction="edm")
    with torch.inference_mode():
        expected = solvers.sample(denoiser, plan, noise())
    assert torch.equal(solvers.sample(denoiser, plan, noise()), expected)
    solvers.execute(plan, denoiser, noise(), gradient="all").x.sum().backward()
    assert denoiser.net.mix.grad is not None


def literal_ddim(denoiser: Denoiser, times: tuple[float, ...], x: torch.Tensor, cond: torch.Tensor, w: float):
    """States and answers of guided DDIM, written out; no part of the package but the denoiser."""
    states, answers = [x], []
    for t, s in itertools.pairwise(times):
        null = torch.full_like(cond, 3)
        answer = denoiser(x, t, null) + w * (denoiser(x, t, cond) - denoiser(x, t, null))
        x = answer + s / t * (x - answer)
        states.append(x)
        answers.append(answer)
    return states, answers


def test_gradients_are_those_of_a_literal_loop():
    denoiser, cond = Denoiser(Net(), EDM, "edm"), torch.tensor([0, 1, 2, 0])
    plan = solvers.plan("ddim", EDM, 4, prediction="edm", guidance=1.6)
    wanted = [noise().requires_grad_(), *denoiser.parameters()]
    weights = noise(seed=2)
    states, _ = literal_ddim(denoiser, plan.times, 80.0 * wanted[0], cond, 1.6)
    expected = torch.autograd.grad((states[-1] * weights).sum(), wanted)
    for recompute in (False, True):
        run = solvers.execute(plan, denoiser, wanted[0], cond=cond, gradient="all", checkpoint=recompute)
        found = torch.autograd.grad((run.x * weights).sum(), wanted)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_the_last_stages_gradient_is_that_of_one_call_at_a_detached_state():
    denoiser, cond = Denoiser(Net(), EDM, "edm"), torch.tensor([0, 1, 2, 0])
    plan = solvers.plan("ddim", EDM, 4, prediction="edm", guidance=1.6)
    run = solvers.execute(plan, denoiser, noise(), cond=cond, stop=3, gradient="last")
    with torch.no_grad():
        before = literal_ddim(denoiser, plan.times[:3], 80.0 * noise(), cond, 1.6)[0][-1]
    states, answers = literal_ddim(denoiser, plan.times[2:4], before, cond, 1.6)
    parameters = list(denoiser.parameters())
    for found, expected in ((run.x, states[-1]), (run.denoised, answers[-1])):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        one, other = (torch.autograd.grad(v.square().sum(), parameters, retain_graph=True) for v in (found, expected))
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_two_stage_and_multistep_tables():
    plans = [solvers.plan(s, EDM, 2, grid=[2.0, 0.7, 0.2], prediction="edm") for s in ("heun", "dpmpp_2m")]
    net = Net()

    def run(start, mix, plan):
        def call(x, t, cond=None):
            return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x)) + t[:, None, None, None]

        return solvers.execute(plan, call, start, gradient="all").x

    for plan in plans:
        assert torch.autograd.gradcheck(
            lambda start, mix, plan=plan: run(start, mix, plan), (noise(1).requires_grad_(), net.mix)
        )


def test_recorded_states_answers_and_means():
    denoiser, cond = Denoiser(Net(), EDM, "edm"), torch.tensor([0, 1, 2, 0])
    plan = solvers.plan("ddim", EDM, 4, prediction="edm", guidance=1.6)
    run = solvers.execute(plan, denoiser, noise(), cond=cond, record=("x", "denoised"))
    states, answers = literal_ddim(denoiser, plan.times, 80.0 * noise(), cond, 1.6)
    assert len(run.recorded["x"]) == 5 and len(run.recorded["denoised"]) == 4
    for found, expected in zip(run.recorded["x"] + run.recorded["denoised"], states + answers, strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-11)

    noisy = solvers.plan("ddim", EDM, 3, prediction="edm", eta=1.0)
    seeds = torch.arange(4)
    run = solvers.execute(noisy, denoiser, noise(), seeds=seeds, record=("x", "mean"))
    for k, stage in enumerate(noisy.stages):
        added = stage.row("x").get("noise", 0.0) * normal(seeds, (2, 3, 3), stream=k + 1, dtype=torch.float64)
        torch.testing.assert_close(run.recorded["mean"][k] + added, run.recorded["x"][k + 1], rtol=1e-6, atol=1e-6)


def test_a_run_in_two_parts_is_the_run():
    denoiser = Denoiser(Net(), EDM, "edm")
    plan = solvers.plan("consistency", EDM, 4, prediction="edm")
    seeds = torch.arange(4)
    whole = solvers.execute(plan, denoiser, noise(), seeds=seeds)
    half = solvers.execute(plan, denoiser, noise(), seeds=seeds, stop=2)
    rest = solvers.execute(plan, denoiser, half.x, seeds=seeds, start=2)
    # the scaled network input is one row of the stage before, or a product at the start: one rounding apart
    torch.testing.assert_close((rest.x, rest.denoised), (whole.x, whole.denoised), rtol=0, atol=1e-13)
    none = solvers.execute(plan, denoiser, noise(), stop=0)
    assert torch.equal(none.x, 80.0 * noise())


def test_a_methods_network_is_called_through_its_own_entries():
    class Held:
        """The shape of a method's Network: an engine with gradients, a value without."""

        def __init__(self, module):
            self.module, self.calls = module, []

        def __call__(self, *arguments, **options):
            self.calls.append("engine")
            return self.module(*arguments, **options)

        def value(self, *arguments, **options):
            self.calls.append("value")
            with torch.no_grad():
                return self.module(*arguments, **options)

    held = Held(Denoiser(Net(), EDM, "edm"))
    plan = solvers.plan("consistency", EDM, 3, prediction="edm")
    run = solvers.execute(plan, held, noise(), seeds=torch.arange(4), gradient="last")
    assert held.calls == ["value", "value", "engine"] and run.denoised.requires_grad
    torch.testing.assert_close(
        run.x.detach(), solvers.sample(held.module, plan, noise(), seeds=torch.arange(4)), rtol=0, atol=1e-12
    )


def test_one_network_per_stage():
    low, high = Denoiser(Net(), EDM, "edm"), Denoiser(Net(), EDM, "edm")
    with torch.no_grad():
        high.net.mix.mul_(0.5)
    plan = solvers.plan("ddim", EDM, 2, prediction="edm")
    middle = solvers.execute(plan, high, noise(), stop=1).x
    expected = solvers.execute(plan, low, middle, start=1).x
    assert torch.equal(solvers.execute(plan, [high, low], noise()).x, expected)


def test_uncond_replaces_the_networks_null_condition():
    teacher = MIXTURE.teacher(EDM, "edm")
    plan = solvers.plan("ddim", EDM, 3, prediction="edm", guidance=2.0)
    start = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond = torch.tensor([0, 1, 0, 1])
    null = torch.full((4,), 2)
    assert torch.equal(
        solvers.sample(teacher, plan, start, cond, uncond=null), solvers.sample(teacher, plan, start, cond)
    )
    other = solvers.sample(teacher, plan, start, cond, uncond=1 - cond)
    assert not torch.allclose(other, solvers.sample(teacher, plan, start, cond))


def test_guidance_of_one_is_no_guidance():
    teacher, cond = MIXTURE.teacher(EDM, "edm"), torch.tensor([0, 1, 0, 1])
    start = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one, none = (solvers.plan("heun", EDM, 3, prediction="edm", guidance=w) for w in (1.0, None))
    assert torch.equal(solvers.sample(teacher, one, start, cond), solvers.sample(teacher, none, start, cond))


def test_lower_precision_keeps_its_dtype():
    plan = solvers.plan("dpmpp_2m", EDM, 3, prediction="edm")
    denoiser = Denoiser(Net().to(torch.bfloat16), EDM, "edm")
    found = solvers.sample(lambda x, t: denoiser.net(x, t.bfloat16()), plan, noise().bfloat16())
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()


PLAIN = solvers.plan("ddim", EDM, 3, prediction="edm")
NOISY = solvers.plan("consistency", EDM, 3, prediction="edm")
GUIDED = solvers.plan("ddim", EDM, 3, prediction="edm", guidance=2.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net: solvers.sample(net, PLAIN, noise()[0, 0, 0]), "noise has shape [3]; give [B, C, H, W]"),
        (lambda net: solvers.sample(net, PLAIN, noise().long()), "noise is torch.int64"),
        (lambda net: solvers.sample(net, PLAIN, None), "noise is NoneType"),
        (
            lambda net: solvers.sample(net, NOISY, noise()),
            "draws noise in 2 stages and got neither seeds nor their noise",
        ),
        (
            lambda net: solvers.sample(net, NOISY, noise()[:, None].expand(-1, 2, -1, -1, -1)),
            "this plan has 2 stochastic stages; give [B, 3, ...]",
        ),
        (lambda net: solvers.sample(net, NOISY, noise(), seeds=torch.arange(3)), "seeds are torch.int64 [3]"),
        (lambda net: solvers.sample(net, NOISY, noise(), seeds=[1, 2, 3, 4]), "seeds are list"),
        (lambda net: solvers.sample(net, GUIDED, noise()), "this plan is guided and got no condition"),
        (
            lambda net: solvers.sample(lambda x, t, c: x, GUIDED, noise(), torch.zeros(4)),
            "has no null(cond); give uncond",
        ),
        (
            lambda net: solvers.sample(Denoiser(Net(), EDM, Prediction("edm", sigma_data=1.0)), PLAIN, noise()),
            "the denoiser's prediction",
        ),
        (
            lambda net: solvers.sample(Denoiser(Net(), schedules.get("edm", t_max=40.0), "edm"), PLAIN, noise()),
            "the denoiser's schedule",
        ),
        (lambda net: solvers.sample(lambda x, t: x[:, :1], PLAIN, noise()), "the network answered [4, 1, 3, 3]"),
        (lambda net: solvers.sample("net", PLAIN, noise()), "the network is str"),
        (lambda net: solvers.execute(PLAIN, net, noise(), gradient="some"), "gradient 'some' is not known"),
        (lambda net: solvers.execute(PLAIN, net, noise(), record=("y",)), "record 'y' is not known"),
        (lambda net: solvers.execute(PLAIN, net, noise(), stop=4), "give 0 <= start <= stop <= 3"),
        (lambda net: solvers.execute(PLAIN, [net], noise()), "1 networks were given for 3 stages"),
        (
            lambda net: solvers.execute(solvers.plan("heun", EDM, 3, prediction="edm"), net, noise(), start=1),
            "stage 1 of this plan reads 'base'",
        ),
    ],
)
def test_a_mistake_is_one_sentence(call, words):
    with pytest.raises(UserError) as error:
        call(Denoiser(Net(), EDM, "edm"))
    assert words in str(error.value)


@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("gradient", ["none", "all"])
def test_a_network_that_writes_into_its_input_is_refused(gradient, guidance):
    """Its input is the sampler's own state, or shares memory with it; the picture would be another without a word."""
    plan = solvers.plan("ddim", schedules.get("vp"), 3, prediction="eps", guidance=guidance)
    noise, label = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(2)

    def network(x, t, cond):
        x -= x.mean()
        return x.sin() * cond.view(-1, 1, 1, 1)

    with pytest.raises(UserError, match=r"wrote into its input.*x\.clone\(\)"):
        solvers.execute(plan, network, noise, cond=label, uncond=0.0 * label, gradient=gradient)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_a_run_under_a_transform_leaves_nothing_to_later_runs(transform):
    """A tensor made inside one is its own kind; kept with the plan it would fail every run after."""
    plan = solvers.plan("ddim", schedules.get("vp"), 3, prediction="eps")
    network = lambda x, t: x.sin()  # noqa: E731
    run = lambda x: solvers.execute(plan, network, x, gradient="all").x  # noqa: E731
    torch.func.vmap(run)(noise()[None]) if transform == "vmap" else torch.func.jvp(run, (noise(),), (noise(),))
    assert torch.equal(
        solvers.sample(network, plan, noise()),
        solvers.sample(network, solvers.plan("ddim", schedules.get("vp"), 3, prediction="eps"), noise()),
    )

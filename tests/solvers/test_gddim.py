"""gDDIM where diffusion mixes a picture with a velocity, or blurs it: exact on a point, of its order on a Gaussian."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from fewstep import solvers
from fewstep.analytic import Gaussian, ProcessTeacher
from fewstep.diffusion import schedules
from fewstep.diffusion.processes import Blurring, CriticallyDamped, apply
from fewstep.errors import UserError
from fewstep.solvers.gddim import gddim

HEIGHT, WIDTH, STD = 3, 4, 0.35
COSINE = schedules.get("cosine")
SPECTRUM = 0.2 + torch.rand(HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
MEAN = torch.randn(1, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PROCESSES = {
    "damped": (CriticallyDamped(), STD**2),
    "damped without floor": (CriticallyDamped(beta=3.0, friction=1.3, gamma=0.1, floor=0.0), STD**2),
    "blurring": (Blurring(COSINE, HEIGHT, WIDTH, blur=4.0), SPECTRUM),
    "blurring vp": (Blurring(schedules.get("vp"), HEIGHT, WIDTH, blur=8.0), STD**2),
}
NAMES = list(PROCESSES)


def noise_for(process):
    channels = 2 if isinstance(process, CriticallyDamped) else 1
    return torch.randn(
        3, channels, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(channels)
    )


def started(process, t):
    noise = noise_for(process)
    return process.state(apply(process.root(t), process.parts(noise)))


def drift_and_push(process, t):
    """(F, G G^T) as the papers write them; blurring's from derivatives of alpha and sigma."""
    if isinstance(process, CriticallyDamped):
        inverse_mass = 4.0 / process.friction**2
        drift = [[0.0, inverse_mass], [-1.0, -process.friction * inverse_mass]]
        push = [[0.0, 0.0], [0.0, 2.0 * process.friction]]
        return (process.beta * torch.tensor(one, dtype=torch.float64) for one in (drift, push))
    h = 1e-5
    rate = (process.alpha(t + h).log() - process.alpha(t - h).log()) / (2.0 * h)
    sigma, sigma_rate = process.schedule.sigma(t), process.schedule.derivatives(t)[1]
    return rate[None, None], (2.0 * sigma * (sigma_rate - rate * sigma))[None, None]


def runge_kutta(slope, x, start, end, steps):
    """The classical rule in the square root of time."""
    high, low = math.sqrt(start), math.sqrt(end)
    h = (low - high) / steps
    for i in range(steps):
        at = high + i * h
        k1 = 2.0 * at * slope(x, at * at)
        middle = at + 0.5 * h
        k2 = 2.0 * middle * slope(x + 0.5 * h * k1, middle * middle)
        k3 = 2.0 * middle * slope(x + 0.5 * h * k2, middle * middle)
        to = at + h
        k4 = 2.0 * to * slope(x + h * k3, to * to)
        x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return x


@pytest.mark.parametrize("variance", [0.0, STD**2])
def test_the_damped_root_is_the_papers_integral(variance):
    """dR/dt = F R + G G^T R^-T/2 from a diagonal root, as the published code walks it in 100000 steps."""
    process = CriticallyDamped()
    drift, push = drift_and_push(process, 0.0)
    start = torch.diag(torch.tensor([variance + 1e-6, 0.01 + 1e-6], dtype=torch.float64).sqrt())
    torch.testing.assert_close(process.root(0.0, variance), start, rtol=1e-14, atol=1e-16)
    found = runge_kutta(lambda r, t: drift @ r + 0.5 * push @ torch.linalg.inv(r).T, start, 0.0, 0.7, 800)
    # fourth order, whose first steps see a root that changes over a thousandth of the time
    torch.testing.assert_close(process.root(0.7, variance), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("point", [False, True])
def test_the_teachers_map_solves_the_probability_flow(name, point):
    """du/dt = F u - G G^T score/2, with a score that knows the covariance and nothing of how its root turns."""
    process, variance = PROCESSES[name]
    teacher = ProcessTeacher(process, MEAN, 0.0 if point else variance)

    def slope(x, t):
        drift, push = drift_and_push(process, t)
        score = process.parts(teacher.score(x, torch.tensor([t])))
        return process.state(apply(drift, process.parts(x)) - 0.5 * apply(push, score))

    start = started(process, 0.8)
    found = runge_kutta(slope, start, 0.8, 0.1, 100)
    torch.testing.assert_close(teacher.flow_map(start, 0.8, 0.1), found, rtol=1e-5, atol=1e-5)
    assert float((found - start).abs().max()) > 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_point_is_reached_exactly_in_any_steps(name, order):
    """2206.05564, proposition 2."""
    process, _ = PROCESSES[name]
    point = ProcessTeacher(process, MEAN, 0.0)
    for times in ([0.9, 0.0], [0.95, 0.5, 0.45, 0.2, 0.0], [0.6, 0.59, 0.02]):
        found = gddim(process, times, order=order).sample(point.eps, noise_for(process))
        expected = point.flow_map(started(process, times[0]), times[0], times[-1])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        if times[-1] == 0.0:
            # of the floor's standard deviation, a thousandth, what is left is at most that times the largest noise
            left = 5.0 * math.sqrt(getattr(process, "floor", 0.0)) + 1e-9
            torch.testing.assert_close(found[:, :1], MEAN.expand(3, 1, -1, -1), rtol=0, atol=left)


def test_another_root_of_the_covariance_is_not_exact():
    """Cholesky's, as in 2112.07068: its eps turns along the flow (2206.05564, section 3.1)."""

    class Cholesky(CriticallyDamped):
        def root(self, t, variance=0.0):
            turned = super().root(t, variance)
            return torch.linalg.cholesky(turned @ turned.T)

    exact = ProcessTeacher(CriticallyDamped(), MEAN, 0.0)
    start, process = started(Cholesky(), 0.9), Cholesky()
    found = gddim(process, [0.9, 0.1]).sample(ProcessTeacher(process, MEAN, 0.0).eps, noise_for(process))
    assert float((found - exact.flow_map(start, 0.9, 0.1)).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, order) for name in ("damped", "blurring") for order in (1, 2, 3)),
        ("damped without floor", 3),
        ("blurring vp", 2),
    ],
)
def test_its_order_of_convergence_is_the_theorys(name, order):
    """On Gaussian pictures; the steps grow from nothing, so that the warm-up's lower orders cost no order."""
    process, variance = PROCESSES[name]
    teacher, first, last = ProcessTeacher(process, MEAN, variance), 0.5, 0.3
    exact = teacher.flow_map(started(process, first), first, last)
    errors = []
    for steps in (128, 256) if name.startswith("blurring") else (64, 128):  # frequencies differ, and so do their scales
        times = [first + (last - first) * (i / steps) ** 2 for i in range(steps + 1)]
        found = gddim(process, times, order=order).sample(teacher.eps, noise_for(process))
        errors.append(float((found - exact).abs().max()))
    assert order - 0.15 <= math.log2(errors[0] / errors[1]) <= order + 0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_papers_integral(name):
    """Psi u + int Psi(., s) G G^T R^-T/2 (polynomial through past eps) d tau, by a rule of 200 points."""
    process, _ = PROCESSES[name]
    times = [0.7, 0.62, 0.5, 0.31]
    found = gddim(process, times, order=3).moves[-1]
    nodes, parts = numpy.polynomial.legendre.leggauss(200)
    t, s, past = times[2], times[3], [times[2], times[1], times[0]]
    expected = [torch.zeros_like(matrix) for matrix in found[1:]]
    for node, part in zip(nodes, parts):
        tau = 0.5 * (t + s) + 0.5 * (s - t) * node
        inverse = torch.linalg.inv(process.root(tau).movedim((0, 1), (-2, -1))).movedim((-2, -1), (1, 0))
        _, push = drift_and_push(process, tau)
        pushed = torch.einsum("ij...,jk...,kl...->il...", process.transition(tau, s), 0.5 * push, inverse)
        for j, own in enumerate(past):
            share = math.prod((tau - other) / (own - other) for other in past if other != own)
            expected[j] = expected[j] + 0.5 * (s - t) * part * share * pushed
    torch.testing.assert_close(found[0], process.transition(t, s), rtol=0, atol=0)
    for matrix, other in zip(found[1:], expected):
        # the drift of blurring is a difference quotient here
        torch.testing.assert_close(matrix, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_blur_it_is_ddim_and_deis_in_time(order):
    process, data = Blurring(COSINE, HEIGHT, WIDTH, blur=0.0), Gaussian(MEAN, STD)
    times = [0.9, 0.7, 0.55, 0.3, 0.12]
    teacher, noise = data.teacher(COSINE, "eps"), noise_for(process)
    options = {} if order == 1 else {"order": order, "coordinate": "t"}
    plan = solvers.plan("ddim" if order == 1 else "deis", COSINE, 4, grid=times, prediction="eps", **options)
    found = gddim(process, times, order=order)
    row = plan.stages[0].row("x")
    for matrix, key in zip(found.moves[0], ("x", "cond")):
        torch.testing.assert_close(matrix[0, 0], torch.full_like(SPECTRUM, row[key]), rtol=1e-14, atol=1e-14)
    expected = solvers.sample(teacher, plan, noise)
    torch.testing.assert_close(found.sample(teacher.net, noise), expected, rtol=1e-10, atol=1e-10)


def test_every_frequency_is_a_diffusion_of_its_own():
    """The row of frequency (1, 2) is DDIM's at its own alpha, and the constant picture's the schedule's."""
    process = Blurring(COSINE, HEIGHT, WIDTH, blur=4.0)
    keep, gain = gddim(process, [0.8, 0.3]).moves[0]
    plain = solvers.plan("ddim", COSINE, 1, grid=[0.8, 0.3], prediction="eps").stages[0].row("x")
    assert float(keep[0, 0, 0, 0]) == pytest.approx(plain["x"], rel=1e-14)
    assert float(gain[0, 0, 0, 0]) == pytest.approx(plain["cond"], rel=1e-14)

    def alpha(t):
        blur = 4.0 * math.sin(0.5 * math.pi * t) ** 2
        lost = ((math.pi / HEIGHT) ** 2 + (2.0 * math.pi / WIDTH) ** 2) * blur**2 / 2.0
        return COSINE.alpha(t) * (0.999 * math.exp(-lost) + 0.001)

    ratio = alpha(0.3) / alpha(0.8)
    assert float(keep[0, 0, 1, 2]) == pytest.approx(ratio, rel=1e-12)
    assert float(gain[0, 0, 1, 2]) == pytest.approx(COSINE.sigma(0.3) - ratio * COSINE.sigma(0.8), rel=1e-12)


def test_parts_and_state_undo_each_other_and_keep_lengths():
    wave = torch.cos(math.pi * 2 * (torch.arange(WIDTH, dtype=torch.float64) + 0.5) / WIDTH).expand(1, 1, HEIGHT, -1)
    found = Blurring(COSINE, HEIGHT, WIDTH).parts(wave)[0, 0, 0]
    found[0, 2] -= wave.norm()  # one cosine is one frequency
    assert float(found.abs().max()) < 1e-14
    for process, _ in PROCESSES.values():
        x = noise_for(process)
        torch.testing.assert_close(process.state(process.parts(x)), x, rtol=0, atol=1e-14)
        assert float(process.parts(x).norm()) == pytest.approx(float(x.norm()), rel=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_may_answer_the_score(name):
    process, variance = PROCESSES[name]
    teacher, noise = ProcessTeacher(process, MEAN, variance), noise_for(process)
    times = [0.9, 0.6, 0.4, 0.1]
    expected = gddim(process, times, order=2).sample(teacher.eps, noise)
    found = gddim(process, times, order=2, prediction="score").sample(teacher.score, noise)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_low_precision_noise_keeps_its_dtype_and_accumulates_in_float32():
    process = CriticallyDamped()
    compiled = gddim(process, [1.0, 0.5, 0.2, 0.0], order=2)
    times, cond = [], torch.tensor([0.5, 0.0, -0.5])

    def network(x, t, cond):
        times.append(t)
        return (0.1 * x.float().cos() + cond[:, None, None, None]).to(x.dtype)

    noise = noise_for(process).bfloat16()
    found = compiled.sample(network, noise, cond)
    assert found.dtype == torch.bfloat16 and {t.dtype for t in times} == {torch.float32}
    expected = compiled.sample(lambda x, t, c: network(x.bfloat16(), t, c).double(), noise.double(), cond)
    # the network reads bfloat16 either way; its answers and the end are rounded to 8 bits
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gddim(CriticallyDamped(), [1.0, 0.0], order=4), "order=4; choose one of: 1, 2, 3"),
        (lambda: gddim(CriticallyDamped(), [1.0, 0.0], order=1.0), "order=1.0; choose one of: 1, 2, 3"),
        (lambda: gddim(CriticallyDamped(), [1.0, 0.0], prediction="x0"), "prediction of gDDIM, 'x0' is not known"),
        (lambda: gddim(CriticallyDamped(), [0.0, 1.0]), "give 2 or more that fall, from at most 1 to 0 or above"),
        (lambda: gddim(CriticallyDamped(), [1.5, 1.0]), "give 2 or more that fall"),
        (lambda: gddim(CriticallyDamped(), [1.0]), "give 2 or more that fall"),
        (lambda: gddim(Blurring(schedules.get("flow"), 2, 2), [1.0, 0.5]), "nothing is left of the picture"),
        (lambda: CriticallyDamped(gamma=0.0), "gamma=0.0"),
        (lambda: Blurring(schedules.get("edm"), 2, 2), "times go from 0 to at most 1"),
        (lambda: Blurring(COSINE, 0, 2), "height=0"),
        (
            lambda: gddim(Blurring(COSINE, 2, 2), [0.9, 0.0]).sample(lambda x, t: x, torch.zeros(1, 1, 4, 4)),
            "blurs pictures of 2 x 2 and got a state",
        ),
        (
            lambda: gddim(CriticallyDamped(), [0.9, 0.0]).sample(lambda x, t: x, torch.zeros(1, 3, 2, 2)),
            "twice the picture's channels",
        ),
        (
            lambda: gddim(CriticallyDamped(), [0.9, 0.0]).sample(lambda x, t: x[:, :1], torch.zeros(1, 2, 2, 2)),
            "they must be alike",
        ),
        (
            lambda: gddim(CriticallyDamped(), [0.9, 0.0]).sample(lambda x, t: None, torch.zeros(1, 2, 2, 2)),
            "answered NoneType to a state",
        ),
        (lambda: gddim(CriticallyDamped(), [0.9, 0.0]).sample(lambda x, t: x, torch.zeros(2)), r"\[2\]; give a float"),
        (
            lambda: gddim(CriticallyDamped(), [0.9, 0.0]).sample(lambda x, t: x, torch.zeros(1, 2, 2, 2).long()),
            "torch.int64",
        ),
    ],
)
def test_a_mistake_is_one_sentence(make, words):
    with pytest.raises(UserError, match=words):
        make()

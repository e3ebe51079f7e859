"""Guidance by per-sample sums: each equals its paper's formula in plain torch, in value, gradient and tangent."""

import pytest
import torch
from torch.func import grad, jvp

from fewstep.diffusion import gram_guidance as guidance
from fewstep.errors import UserError
from fewstep.methods.critic import matching_direction

GENERATOR = torch.Generator().manual_seed(3)
SHAPE = (3, 4, 5, 6)


SIZES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)


def draw():
    """Standard normal numbers, samples of three sizes."""
    return SIZES * torch.randn(SHAPE, generator=GENERATOR, dtype=torch.float64)


def dims(x):
    return tuple(range(1, x.ndim))


def dot(a, b):
    return (a * b).sum(dims(a), keepdim=True)


def norm(x):
    return dot(x, x).sqrt()


def rescaled(cond, uncond, w, phi=0.7):
    guided = uncond + w * (cond - uncond)
    matched = guided * cond.std(dims(cond), keepdim=True) / guided.std(dims(cond), keepdim=True)
    return phi * matched + (1 - phi) * guided


def projected(cond, uncond, w, parallel, radius, momentum=0.0, previous=None, base="cond"):
    d = cond - uncond + (momentum * previous if previous is not None else 0.0)
    running = d
    d = d * torch.minimum(torch.ones(()), radius / norm(d))
    along = dot(d, cond) / dot(cond, cond) * cond
    update = d - along + parallel * along
    return (cond + (w - 1) * update if base == "cond" else uncond + w * update), running


def perpendicular(positive, uncond, negatives, w, weights):
    p = positive - uncond
    total = p
    for negative, weight in zip(negatives, weights):
        n = negative - uncond
        total = total - weight * (n - dot(n, p) / dot(p, p) * p)
    return uncond + w * total


def step_error(high, low, previous, absolute, relative):
    within = absolute * high[0].numel() ** 0.5 + relative * torch.maximum(norm(low), norm(previous))
    return (norm(high - low) / within).flatten()


W = torch.tensor([1.5, 4.0, 7.5], dtype=torch.float64)
WIDE = W.view(3, 1, 1, 1)
CASES = {
    "rescaled": (2, lambda c, u: guidance.rescaled(c, u, 5.0), lambda c, u: rescaled(c, u, 5.0)),
    "rescaled, a scale a sample": (
        2,
        lambda c, u: guidance.rescaled(c, u, W, 0.3),
        lambda c, u: rescaled(c, u, WIDE, 0.3),
    ),
    "projected": (
        2,
        lambda c, u: guidance.projected(c, u, 5.0, parallel=0.2, radius=15.0)[0],
        lambda c, u: projected(c, u, 5.0, 0.2, 15.0)[0],
    ),
    "projected, unbounded, from uncond": (
        2,
        lambda c, u: guidance.projected(c, u, W, base="uncond")[0],
        lambda c, u: projected(c, u, WIDE, 0.0, 1e9, base="uncond")[0],
    ),
    "projected with momentum": (
        3,
        lambda c, u, r: guidance.projected(c, u, 5.0, radius=16.0, momentum=-0.5, previous=r)[0],
        lambda c, u, r: projected(c, u, 5.0, 0.0, 16.0, -0.5, r)[0],
    ),
    "perpendicular": (
        4,
        lambda p, u, n, m: guidance.perpendicular(p, u, [n, m], 5.0, [0.5, W]),
        lambda p, u, n, m: perpendicular(p, u, [n, m], 5.0, [0.5, WIDE]),
    ),
    "direction": (
        3,
        guidance.normalised_direction,
        lambda x, f, d: (f - d) / (x - d).abs().mean(dims(x), keepdim=True),
    ),
    "tangent": (1, guidance.normalised_tangent, lambda g: g / (norm(g) + 0.1)),
    "tangent, mean": (
        1,
        lambda g: guidance.normalised_tangent(g, 0.1, mean=True),
        lambda g: g / (norm(g) / g[0].numel() ** 0.5 + 0.1),
    ),
    "step error": (
        3,
        lambda h, low, p: guidance.step_error(h, low, p, 0.01, 0.1),
        lambda h, low, p: step_error(h, low, p, 0.01, 0.1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_papers_formula_in_value_gradient_and_tangent(name):
    count, ours, formula = CASES[name]
    inputs, tangents = tuple(draw() for _ in range(count)), tuple(draw() for _ in range(count))

    def close(found, expected):
        # float64; variances come from raw moments, which costs a digit or two
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)

    close(jvp(ours, inputs, tangents), jvp(formula, inputs, tangents))
    value = formula(*inputs)
    weight = torch.randn(value.shape, generator=GENERATOR, dtype=torch.float64)
    every = tuple(range(count))
    close(
        grad(lambda *x: (ours(*x) * weight).sum(), every)(*inputs),
        grad(lambda *x: (formula(*x) * weight).sum(), every)(*inputs),
    )
    single = [x.float() for x in inputs]
    expected = formula(*inputs).float()
    torch.testing.assert_close(ours(*single).float(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_radius_binds_for_some_samples_only():
    sizes = norm(draw() - draw()).flatten()
    assert sizes.min() < 16.0 < sizes.max()


def test_momentum_keeps_the_running_difference():
    cond, uncond = draw(), draw()
    first, running = guidance.projected(cond, uncond, 4.0, momentum=-0.5)
    torch.testing.assert_close(running, cond - uncond)
    torch.testing.assert_close(first, projected(cond, uncond, 4.0, 0.0, 1e9)[0])
    _, running = guidance.projected(cond, uncond, 4.0, momentum=-0.5, previous=running)
    torch.testing.assert_close(running, 0.5 * (cond - uncond))
    assert guidance.projected(cond, uncond, 4.0)[1] is None


def test_plain_guidance_is_the_limit_of_both():
    cond, uncond = draw(), draw()
    plain = uncond + 4.0 * (cond - uncond)
    torch.testing.assert_close(guidance.rescaled(cond, uncond, 4.0, 0.0), plain)
    for base in ("cond", "uncond"):
        torch.testing.assert_close(guidance.projected(cond, uncond, 4.0, parallel=1.0, base=base)[0], plain)


def test_rescaled_guidance_has_the_conditional_deviation():
    cond, uncond = draw() + 2.0, draw()
    found = guidance.rescaled(cond, uncond, 7.5, 1.0)
    torch.testing.assert_close(found.std(dims(found)), cond.std(dims(cond)))


def test_the_direction_is_the_critics_and_zero_where_nothing_differs():
    x, fake, real = draw(), draw(), draw()
    written = (fake - real) / (x - real).abs().mean(dims(x), keepdim=True)
    torch.testing.assert_close(guidance.normalised_direction(x, fake, real), written)
    real[1] = x[1]
    found = guidance.normalised_direction(x, fake, real)
    assert (found[1] == 0).all()
    assert torch.equal(found, matching_direction(x, fake, real))
    floored = guidance.normalised_direction(x, fake, real, least=1e-5)
    torch.testing.assert_close(floored[1], (fake - real)[1] * 1e5)


def test_identical_outputs_leave_every_number_finite():
    cond = draw().requires_grad_()
    for found in (
        guidance.projected(cond, cond.detach(), 4.0, radius=2.0)[0],
        guidance.normalised_tangent(cond * 0),
        guidance.step_error(cond, cond.detach(), cond.detach()),
    ):
        (slope,) = torch.autograd.grad(found.sum(), cond, allow_unused=True)
        assert torch.isfinite(found).all()
        assert slope is None or torch.isfinite(slope).all()


def test_what_does_not_fit_is_said():
    with pytest.raises(UserError, match="base 'middle'; it must be 'cond' or 'uncond'"):
        guidance.projected(draw(), draw(), 2.0, base="middle")
    with pytest.raises(UserError, match="a weight for each; got 1 negatives and 2 weights"):
        guidance.perpendicular(draw(), draw(), [draw()], 2.0, [1.0, 2.0])

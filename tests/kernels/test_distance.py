"""Per-sample distances: values against float64 and against the formulas as written, and derivatives by value."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fewstep_kernels as fk
from fewstep_kernels import distance as fused
from fewstep_kernels import l1, l2, pseudo_huber, pseudo_huber_elementwise
from tests.kernels.reductions import COUNTS, DTYPES, draw, error, nan_filled, one_and_two_threads

needs_cpu = pytest.mark.skipif(fk.backend("distance", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
C = 0.3
NAMES = ("l2", "l1", "pseudo_huber_elementwise", "pseudo_huber")
FUSED = {
    "l2": l2,
    "l1": l1,
    "pseudo_huber_elementwise": lambda a, b, w=None: pseudo_huber_elementwise(a, b, w, c=C),
    "pseudo_huber": lambda a, b, w=None: pseudo_huber(a, b, w, c=C),
}


def plain(name, a, b, w=None):
    """The formulas as they are written, in the tensors' own dtype."""
    d = a - b
    w = torch.ones((), dtype=d.dtype) if w is None else w.view(-1, *[1] * (d.ndim - 1)) if w.ndim == 1 else w
    if name == "l2":
        terms = w * d.square()
    elif name == "l1":
        terms = w * d.abs()
    elif name == "pseudo_huber_elementwise":
        terms = w * (torch.sqrt(d.square() + C**2) - C)
    else:
        inside = w.numel() > len(d)
        distance = torch.sqrt(((w if inside else 1.0) * d.square()).flatten(1).sum(1) + C**2) - C
        return distance if inside else w.reshape(-1) * distance
    return terms.flatten(1).mean(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
def test_error_is_at_most_twice_that_of_torch(name, dtype, count):
    a, b = draw(3, count, dtype=dtype), draw(3, count, dtype=dtype)
    for weight in (None, draw(3, dtype=dtype).abs(), draw(3, count, dtype=dtype).abs()):
        truth = plain(name, a.double(), b.double(), None if weight is None else weight.double())
        ours, torchs = FUSED[name](a, b, weight), plain(name, a, b, weight)
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # where torch happens to be exact: the few roundings of one term
        floor = 4 * torch.finfo(ours.dtype).eps * truth.abs().max()
        assert error(ours, truth) <= 2 * error(torchs, truth) + floor


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", (1, 63, 500))
def test_gradients_are_at_most_three_times_torchs(name, dtype, count):
    a, b = draw(3, count, dtype=dtype), draw(3, count, dtype=dtype)
    weight = draw(3, count, dtype=dtype).abs()

    def gradients(function, *tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    truth = gradients(lambda *x: plain(name, *x), a.double(), b.double(), weight.double())
    torchs = gradients(lambda *x: plain(name, *x), a, b, weight)
    for ours, other, true in zip(gradients(FUSED[name], a, b, weight), torchs, truth):
        assert ours.dtype == dtype
        floor = 4 * torch.finfo(dtype).eps * true.abs().max()
        assert error(ours, true) <= 3 * error(other, true) + floor


@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_set_is_as_exact(name, instructions):
    for dtype in DTYPES:
        test_error_is_at_most_twice_that_of_torch(name, dtype, 4097)
        test_gradients_are_at_most_three_times_torchs(name, dtype, 500)


def test_the_pseudo_huber_form_takes_every_magnitude(instructions):
    """An estimated square root must not fail at 0, where squares underflow, or near the largest number."""
    d = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 1e18])[:, None].repeat(1, 33)  # vectors and a rest
    for c in (1e-30, 1e-3, 1e18):
        found = pseudo_huber_elementwise(d, torch.zeros_like(d), c=c)
        wide = d[:, 0].double()
        truth = wide**2 / (torch.sqrt(wide**2 + c**2) + c)
        torch.testing.assert_close(found, truth.float(), rtol=2e-6, atol=1e-30)  # atol: of squares that underflow


def test_small_differences_survive_the_pseudo_huber_form():
    a = draw(2, 500)
    b = a + 1e-4 * draw(2, 500)
    truth = plain("pseudo_huber_elementwise", a.double(), b.double())
    assert error(pseudo_huber_elementwise(a, b, c=C) / truth, torch.ones(2)) < 1e-6
    assert error(plain("pseudo_huber_elementwise", a, b) / truth, torch.ones(2)) > 1e-2


def test_the_two_pseudo_huber_distances_agree_on_one_element_only():
    a, b = draw(5, 1), draw(5, 1)
    torch.testing.assert_close(pseudo_huber(a, b, c=C), pseudo_huber_elementwise(a, b, c=C))
    a, b = draw(5, 9), draw(5, 9)
    assert (pseudo_huber(a, b, c=C) - pseudo_huber_elementwise(a, b, c=C)).abs().min() > 0.1


def test_weights_that_broadcast_and_sums():
    a, b, mask = draw(2, 3, 4, 5), draw(2, 3, 4, 5), draw(2, 1, 4, 5).abs()
    torch.testing.assert_close(l2(a, b, mask), (mask * (a - b).square()).flatten(1).mean(1))
    torch.testing.assert_close(l1(a, b, reduction="sum"), (a - b).abs().flatten(1).sum(1))
    torch.testing.assert_close(l1(a, b, mask[:, :, :1, :1]), mask[:, 0, 0, 0] * (a - b).abs().flatten(1).mean(1))


@pytest.mark.parametrize("kind", range(3))
def test_a_sample_depends_neither_on_its_batch_nor_on_threads(kind):
    a, b, w = (draw(16, 9001) for _ in range(3))
    for together in one_and_two_threads(lambda: fused._total(kind, C, a, b, w)):
        assert torch.equal(fused._total(kind, C, a[5:6], b[5:6], w[5:6])[0], together[5])


@needs_cpu
def test_every_element_of_a_gradient_is_written(monkeypatch):
    monkeypatch.setattr("fewstep_kernels.layout.like_sample", nan_filled(fused.layout.like_sample))
    for count in (1, 63, 5000):
        for wanted in ((True, True), (True, False), (False, True)):
            found = fused._gradient(2, C, draw(2), draw(2, count), draw(2, count), None, *wanted)
            assert len(found) == sum(wanted)
            assert all(torch.isfinite(x).all() for x in found)


def test_layouts():
    a, b = draw(2, 3, 5, 8), draw(4, 3, 5, 8)
    expected = plain("l2", a, b[2:])
    last = a.to(memory_format=torch.channels_last)
    for given in (last, torch.stack([a, a], -1)[..., 0], torch.stack([a, b[2:]], 1)[:, 0]):
        torch.testing.assert_close(l2(given, b[2:]), expected)
        leaf = given.detach().requires_grad_()
        l2(leaf, b[2:]).sum().backward()
        torch.testing.assert_close(leaf.grad, 2 * (a - b[2:]) / 120)
    torch.testing.assert_close(l2(a[:1].expand(2, -1, -1, -1), b[2:]), plain("l2", a[:1], b[2:]))
    broadcast = a[:1].clone().requires_grad_()
    l2(broadcast.expand(2, -1, -1, -1), b[2:]).sum().backward()
    torch.testing.assert_close(broadcast.grad, (2 * (a[:1] - b[2:]) / 120).sum(0, keepdim=True))
    assert l2(draw(0, 3), draw(0, 3)).shape == (0,)
    assert (l2(draw(2, 0), draw(2, 0), reduction="sum") == 0).all()


def test_nan_is_not_hidden():
    a = draw(2, 20)
    a[1, 3] = math.nan
    for name in NAMES:
        assert FUSED[name](a, draw(2, 20)).isnan().tolist() == [False, True]
    leaf = a.requires_grad_()
    l1(leaf, draw(2, 20)).sum().backward()
    assert leaf.grad.isnan().sum() == 1


def test_what_does_not_fit_is_said():
    a, b = draw(2, 3), draw(2, 3)
    with pytest.raises(ValueError, match="two tensors of one shape"):
        l2(a, draw(2, 4))
    with pytest.raises(ValueError, match="l1's weight must be"):
        l1(a, b, draw(4))
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        l2(a, b, reduction="max")
    with pytest.raises(ValueError, match="c must be a positive number; got 0"):
        pseudo_huber(a, b, c=0)
    with pytest.raises(TypeError, match="floating-point"):
        l2(a, torch.ones(2, 3, dtype=torch.int64))
    for given in ((a, b.to("meta")), (a.clone().requires_grad_(), b.to("meta")), (a, b, b.to("meta"))):
        with pytest.raises(ValueError, match="one device; got cpu and meta"):
            l2(*given)


def test_a_tensor_negated_by_a_bit():
    a, b = torch.randn(6, dtype=torch.complex64).conj().imag, draw(6)
    assert a.is_neg()
    assert torch.equal(l2(a, b), l2(a.resolve_neg(), b))
    assert torch.equal(fk.gram([a, b]).products, fk.gram([a.resolve_neg(), b]).products)


PRIMALS = (draw(3, 7, dtype=torch.float64), draw(3, 7, dtype=torch.float64), draw(3, 7, dtype=torch.float64).abs())
TANGENTS = tuple(draw(3, 7, dtype=torch.float64) for _ in range(3))
EVERY = pytest.mark.parametrize("name", NAMES)
SOME = pytest.mark.parametrize("arguments", (2, 3), ids=("plain", "weighted"))


def close(found, expected):
    # float64; the pseudo-Huber forms differ by the cancellation that the plain formula suffers
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def pair(name, arguments):
    return FUSED[name], (lambda *x: plain(name, *x)), PRIMALS[:arguments], TANGENTS[:arguments]


@EVERY
@SOME
def test_tangents_cotangents_and_jacobians(name, arguments):
    ours, formula, primals, tangents = pair(name, arguments)
    every = tuple(range(arguments))
    close(jvp(ours, primals, tangents), jvp(formula, primals, tangents))
    for n in every:  # one argument alone
        alone = tuple(t if i == n else torch.zeros_like(t) for i, t in enumerate(tangents))
        one = [lambda x, f=f, n=n: f(*primals[:n], x, *primals[n + 1 :]) for f in (ours, formula)]
        close(jvp(one[0], (primals[n],), (tangents[n],))[1], jvp(formula, primals, alone)[1])
        close(grad(lambda x, f=one[0]: f(x).sum())(primals[n]), grad(lambda x, f=one[1]: f(x).sum())(primals[n]))
    cotangent = draw(3, dtype=torch.float64)
    close(vjp(ours, *primals)[1](cotangent), vjp(formula, *primals)[1](cotangent))
    close(jacfwd(ours, every)(*primals), jacrev(formula, every)(*primals))
    close(jacrev(ours, every)(*primals), jacrev(formula, every)(*primals))


@EVERY
@SOME
def test_second_derivatives(name, arguments):
    ours, formula, primals, tangents = pair(name, arguments)
    every = tuple(range(arguments))

    def along(function):
        return lambda *x: jvp(lambda *y: function(*y).sin().sum(), x, tangents)[1]

    close(grad(along(ours), every)(*primals), grad(along(formula), every)(*primals))
    small = tuple(x[:1, :3] for x in primals)
    energies = [lambda *x, f=f: f(*x).sin().sum() for f in (ours, formula)]
    close(hessian(energies[0])(*small), hessian(energies[1])(*small))
    leaves = [x[:2, :3].clone().requires_grad_() for x in primals]
    assert torch.autograd.gradcheck(ours, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, leaves)


@EVERY
@SOME
def test_vmap_of_tangents(name, arguments):
    ours, formula, primals, _ = pair(name, arguments)
    tangents = tuple(draw(4, *x.shape, dtype=torch.float64) for x in primals)

    def push(function):
        return vmap(lambda *t: jvp(function, primals, t)[1])(*tangents)

    close(push(ours), push(formula))
    stacked = torch.stack([primals[0], -primals[0]], 1)
    dims = (1, *[None] * (arguments - 1))
    close(vmap(ours, dims)(stacked, *primals[1:]), vmap(formula, dims)(stacked, *primals[1:]))


def test_opcheck():
    a, b, w = draw(2, 3), draw(2, 3), draw(2, 3)
    raw = torch.ops.fewstep_kernels
    torch.library.opcheck(raw._distance.default, (0, 0.0, a, b, None, None, None))
    torch.library.opcheck(raw._distance.default, (2, C, a, b, w, b, a))
    torch.library.opcheck(raw._distance_gradient.default, (2, C, draw(2), a, b, w, True, True))

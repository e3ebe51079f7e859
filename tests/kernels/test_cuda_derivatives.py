"""Derivatives on a GPU, by VALUE, against the references differentiated by torch in float64 on the CPU: jvp, vjp, the
gradient of a jvp, jacfwd and vmap(jvp). FEWSTEP_TEST_DEVICE=cpu tries the tests without a GPU."""

import pytest
import torch
from torch.func import grad, jacfwd, jvp, vjp, vmap

import fewstep_kernels as fk
from fewstep_kernels import backends, normalisation
from tests.kernels import normalisation_cases
from tests.kernels.on_device import DEVICE, MARKS, here
from tests.kernels.reductions import draw

pytestmark = MARKS
IMAGE, ROWS, FLAT = (2, 6, 3, 5), (2, 4, 7), (2, 35)


def normalised(kind):
    return lambda *x: (normalisation_cases.row(kind)(*x),)


CASES = {
    "lincomb": (lambda table, *x: tuple(fk.lincomb(x, table)), [draw(2, 3, 2), draw(*FLAT), draw(*FLAT)]),
    "lincomb, channels last": (
        lambda table, x: tuple(fk.lincomb([x], table)),
        [draw(2, 1), draw(*IMAGE).to(memory_format=torch.channels_last)],
    ),
    "gram": (lambda *x: tuple(fk.gram(x, [(1, -1), (0, 1)])), [draw(*FLAT), draw(*FLAT)]),
    "l2": (lambda *x: (fk.l2(*x),), [draw(*FLAT), draw(*FLAT), draw(*FLAT)]),
    "l1": (lambda *x: (fk.l1(*x),), [draw(*FLAT), draw(*FLAT)]),
    "pseudo_huber": (lambda *x: (fk.pseudo_huber(*x, c=0.3),), [draw(*FLAT), draw(*FLAT)]),
    "pseudo_huber_elementwise": (
        lambda *x: (fk.pseudo_huber_elementwise(*x, c=0.3),),
        [draw(*FLAT), draw(*FLAT), draw(2)],
    ),
    "threshold": (lambda x: (fk.threshold(3 * x, 0.8),), [draw(*FLAT)]),
    "group_norm_silu": (lambda *x: (normalisation_cases.group(3)(*x),), normalisation_cases.inputs(IMAGE, 6)),
    "layer_norm_modulate": (normalised("layer"), normalisation_cases.inputs(ROWS, 7)[:5]),
    "rms_norm_modulate": (normalised("rms"), normalisation_cases.inputs(ROWS, 7)[:5]),
    "attention": (lambda *x: (fk.attention(*x),), [draw(1, 2, 9, 16), draw(1, 2, 7, 16), draw(1, 2, 7, 16)]),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """Where the tests are tried on a CPU, the fast backend serves small tensors too."""
    monkeypatch.setattr(normalisation, "worthwhile", lambda form, x, given: True)


def prepared(name, seed=0):
    """(function, primals, tangents, cotangents for every output), in float32 on the CPU."""
    function, primals = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    tangents = tuple(torch.randn(x.shape, generator=generator) for x in primals)
    with backends.asking("reference"):
        outputs = function(*primals)
    return function, tuple(primals), tangents, tuple(torch.randn(y.shape, generator=generator) for y in outputs)


def both(name, compute):
    """compute(function, primals, tangents, cotangents) on the device, and in float64 by the reference on the CPU."""
    function, *given = prepared(name)
    with backends.asking("reference"):
        truth = compute(function, *(tuple(x.double() for x in tensors) for tensors in given))
    found = compute(function, *(tuple(here(tensors)) for tensors in given))
    for one, other in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(truth), strict=True):
        # float32 sums of at most 35 products, twice differentiated: values up to a hundred
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-4, atol=3e-4)
    moved = any(x.abs().max() > 0.01 for x in torch.utils._pytree.tree_leaves(truth))
    assert moved or name == "l1"  # which has no second derivative


@EVERY_CASE
def test_tangents(name):
    both(name, lambda f, primals, tangents, _: jvp(f, primals, tangents))


@EVERY_CASE
def test_cotangents(name):
    both(name, lambda f, primals, _, cotangents: vjp(f, *primals)[1](cotangents))


@EVERY_CASE
def test_gradients_by_backward(name):
    def compute(f, primals, _, cotangents):
        leaves = [x.clone().requires_grad_() for x in primals]
        return torch.autograd.grad(f(*leaves), leaves, cotangents)

    both(name, compute)


@EVERY_CASE
def test_gradients_of_tangents(name):
    def compute(f, primals, tangents, _):
        def along(*x):
            return sum(y.sin().sum() for y in jvp(f, x, tangents)[1])

        return grad(along, tuple(range(len(primals))))(*primals)

    both(name, compute)


@EVERY_CASE
def test_jacobians_forward(name):
    both(name, lambda f, primals, *_: jacfwd(f)(*primals))


@EVERY_CASE
def test_mapped_tangents(name):
    def compute(f, primals, tangents, _):
        many = tuple(torch.stack([t, -2 * t, t + 1]) for t in tangents)
        return vmap(lambda *t: jvp(f, primals, t)[1])(*many)

    both(name, compute)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_everything_compiles_whole():
    x, y = here([draw(2, 6, 8, 8), draw(2, 6, 8, 8)])
    scale = draw(2, 6).to(DEVICE)

    def everything(x, y):
        mixed = fk.lincomb([x, y], torch.ones(1, 2, device=x.device))[0]
        value, tangent = jvp(lambda x: fk.group_norm_silu(x, 3, scale=scale), (mixed,), (y,))
        rows = fk.layer_norm_modulate(x.flatten(2).transpose(1, 2), scale, scale)
        slope = grad(lambda x: (fk.pseudo_huber(x, y, c=0.3) * fk.gram([x, y]).products[:, 0, 1]).sum())(x)
        return value, tangent, rows, slope, jvp(fk.attention, (x, y, y), (y, x, x)), fk.threshold(x, 0.9, least=0.1)

    compiled = torch.compile(everything, fullgraph=True)
    # Inductor may contract or reorder float32 sums of some four hundred terms
    torch.testing.assert_close(compiled(x, y), everything(x, y), rtol=2e-4, atol=2e-4)

"""Under a compiler every transform gives the values of plain torch: nothing opaque reaches the graph, nothing is lost.

The compiler stops at aten (aot_eager), which is where tangents and operators get lost; what Inductor makes of aten is
tested once in test_lincomb_derivatives.py and test_threshold.py.
"""

import pytest
import torch
from torch.func import grad, jacfwd, jvp, vjp, vmap

import fewstep_kernels as fk

GENERATOR = torch.Generator().manual_seed(3)
SEEDS = torch.tensor([3, -1])
TABLE = torch.randn(2, 2, generator=GENERATOR, dtype=torch.float64)
ROWS = ((1.0, -1.0), (0.0, 1.0))


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def lincomb(x, y):
    return torch.stack(fk.lincomb([x, y], TABLE))


def plain_lincomb(x, y):
    return torch.einsum("mk,kbn->mbn", TABLE, torch.stack([x, y]))


def gram(x, y):
    found = fk.gram([x, y], ROWS)
    return torch.cat([found.products.flatten(1), found.sums, found.absolutes], 1)


def plain_gram(x, y):
    z = torch.stack([x - y, y], 1)
    return torch.cat([(z @ z.transpose(1, 2)).flatten(1), z.sum(-1), z.abs().sum(-1)], 1)


CASES = {
    "lincomb": (lincomb, plain_lincomb),
    "gram": (gram, plain_gram),
    "l2": (fk.l2, lambda x, y: (x - y).square().mean(1)),
    "l1": (fk.l1, lambda x, y: (x - y).abs().mean(1)),
    "pseudo_huber": (
        lambda x, y: fk.pseudo_huber(x, y, c=0.3),
        lambda x, y: torch.sqrt((x - y).square().sum(1) + 0.09) - 0.3,
    ),
    "multi_tensor_l2norm": (
        lambda x, y: fk.multi_tensor_l2norm([x, y]),
        lambda x, y: torch.cat([x, y]).square().sum().sqrt(),
    ),
}


def everything(function):
    """Values, jvp, vjp, gradient of a jvp, jacfwd and vmap of a jvp."""

    def energy(x, y):
        return function(x, y).sin().sum()

    def found(x, y, tangents, cotangent, several):
        value, tangent = jvp(function, (x, y), tangents)
        pulled = vjp(function, x, y)[1](cotangent)
        second = grad(lambda x: jvp(energy, (x, y), tangents)[1])(x)
        jacobian = jacfwd(function)(x, y)
        pushed = vmap(lambda t: jvp(lambda x: function(x, y), (x,), (t,))[1])(several)
        return value, tangent, *pulled, second, jacobian, pushed

    return found


@pytest.mark.parametrize("name", CASES)
def test_every_transform_compiles_to_plain_torchs_values(name):
    ours, plain = CASES[name]
    x, y = draw(2, 5), draw(2, 5)
    given = (x, y, (draw(2, 5), draw(2, 5)), torch.ones_like(plain(x, y)), draw(3, 2, 5))
    torch._dynamo.reset()
    compiled = torch.compile(everything(ours), fullgraph=True, backend="aot_eager")
    expected = everything(plain)(*given)
    # float64; the plain pseudo-Huber distance cancels where ours does not
    for found in (compiled(*given), everything(ours)(*given)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_drawn_numbers_are_the_same_bits_when_compiled():
    def drawn(seeds):
        (mixed,) = fk.lincomb([torch.ones(2, 7)], torch.ones(1, 2), noise_seeds=seeds)
        return mixed, fk.uniform(seeds, (7,), stream=2, dtype=torch.bfloat16)

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(SEEDS), drawn(SEEDS)))

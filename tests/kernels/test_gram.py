"""Gram matrices: values against float64, independence of batch and threads, layouts, and derivatives by value."""

import importlib

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import fewstep_kernels as fk
from fewstep_kernels import gram, inner_products
from fewstep_kernels.gram import reference
from fewstep_kernels.inner_products import products
from tests.kernels.reductions import COUNTS, DTYPES, draw, error, nan_filled, one_and_two_threads

needs_cpu = pytest.mark.skipif(fk.backend("gram", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")
DIFFERENCE = ((1.0, -1.0, 0.0), (0.0, 1.0, 0.5))
TABLES = pytest.mark.parametrize("table", ((), DIFFERENCE), ids=("inputs", "combinations"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@TABLES
def test_error_is_at_most_twice_that_of_torch(count, dtype, table):
    inputs = [draw(3, count, dtype=dtype), draw(3, count, dtype=dtype), draw(3, count, dtype=torch.bfloat16)]
    truth = reference([x.double() for x in inputs], table)
    for ours, torchs, true in zip(gram(inputs, table or None), reference(inputs, table), truth):
        assert ours.dtype == torchs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # where torch happens to be exact: the rounding of the result, and in float64 also that of the truth
        floor = torch.finfo(ours.dtype).eps * true.abs().max() * (8 if dtype == torch.float64 else 1)
        assert error(ours, true) <= 2 * error(torchs, true) + floor


def test_every_number_of_tensors_on_every_instruction_set(instructions):
    inputs = [draw(2, 1100) for _ in range(8)]
    for size in range(1, 9):
        truth, torchs = reference([x.double() for x in inputs[:size]]), reference(inputs[:size])
        ours = [products(inputs[:size], (), (), sums=False)[0], *(gram(inputs[:size]) if size <= 6 else ())]
        for found, true, other in zip(ours, (truth[0], *truth), (torchs[0], *torchs)):
            floor = torch.finfo(torch.float32).eps * true.abs().max()  # where torch happens to be exact
            assert error(found, true) <= 2 * error(other, true) + floor


def test_a_small_difference_of_large_tensors_keeps_its_digits():
    a = draw(2, 4096)
    b = a + 1e-3 * draw(2, 4096)
    true = (a.double() - b.double()).square().sum(1)
    within = gram([a, b], [(1, -1)]).products[:, 0, 0]
    table = gram([a, b]).products
    expanded = table[:, 0, 0] - 2 * table[:, 0, 1] + table[:, 1, 1]
    assert error(within / true, torch.ones(2)) < 1e-6
    assert error(expanded / true, torch.ones(2)) > 1e-4


def test_products_are_symmetric_and_absolutes_are_sums_of_magnitudes():
    inputs = [draw(4, 500) for _ in range(6)]
    found = gram(inputs)
    assert found.products.shape == (4, 6, 6)
    assert torch.equal(found.products, found.products.transpose(1, 2))
    torch.testing.assert_close(found.absolutes, torch.stack([x.abs().sum(1) for x in inputs], 1))
    torch.testing.assert_close(found.products, inner_products(inputs, inputs))


def test_a_sample_depends_neither_on_its_batch_nor_on_threads():
    inputs = [draw(16, 9001) for _ in range(3)]
    for together in one_and_two_threads(lambda: gram(inputs, DIFFERENCE)):
        alone = gram([x[5:6] for x in inputs], DIFFERENCE)
        assert all(torch.equal(one[0], many[5]) for one, many in zip(alone, together))


@needs_cpu
def test_every_result_is_written(monkeypatch):
    module = importlib.import_module("fewstep_kernels.inner_products")
    monkeypatch.setattr(module, "_empty", nan_filled(module._empty))
    for count in (1, 63, 5000):
        inputs = [draw(2, count) for _ in range(3)]
        assert all(torch.isfinite(x).all() for x in gram(inputs))


def test_layouts():
    x, y = draw(2, 3, 5, 8), draw(4, 3, 5, 8)
    expected = reference([x, y[2:]])
    for given in (
        [x.to(memory_format=torch.channels_last), y[2:]],
        [x.to(memory_format=torch.channels_last), y[2:].to(memory_format=torch.channels_last)],
        [torch.stack([x, x], -1)[..., 0], y[2:]],
        [torch.stack([x, y[2:]], 1)[:, 0], y[2:]],
    ):
        # sums of 120 float32 numbers in another order
        torch.testing.assert_close(gram(given), fk.Gram(*expected), rtol=1e-5, atol=1e-5)
    repeated = x[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(gram([repeated]).sums, repeated.flatten(1).sum(1)[:, None])
    assert gram([draw(0, 3)]).products.shape == (0, 1, 1)
    assert all((x == 0).all() for x in gram([draw(2, 0)]))


def test_samples_further_apart_than_two_gigabytes():
    apart = torch.empty(2**29 + 101)  # the pages in between are never touched
    x = apart.as_strided((2, 63), (2**29 + 5, 1))
    x.copy_(draw(2, 63))
    torch.testing.assert_close(gram([x]), gram([x.clone()]), rtol=0, atol=0)
    assert torch.equal(fk.l2(x, x + 1), fk.l2(x.clone(), x.clone() + 1))
    assert torch.equal(fk.threshold(x, 0.9, least=0.1), fk.threshold(x.clone(), 0.9, least=0.1))


def test_what_does_not_fit_is_said():
    x = draw(2, 3)
    with pytest.raises(ValueError, match="one to 6 tensors; got 7"):
        gram([x] * 7)
    with pytest.raises(ValueError, match="one device; got cpu and meta"):
        gram([draw(2, 3), torch.ones(2, 3, device="meta")])
    with pytest.raises(ValueError, match="one shape"):
        gram([x, draw(2, 4)])
    with pytest.raises(TypeError, match=r"floating-point tensors; got torch\.int64"):
        gram([torch.ones(2, 3, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"rows of 2 numbers; got rows of \[1\]"):
        gram([x, x], [(1.0,)])
    with pytest.raises(ValueError, match="finite"):
        gram([x], [(float("nan"),)])


def test_opcheck():
    x = [draw(2, 3), draw(2, 3)]
    raw = torch.ops.fewstep_kernels._gram.default
    torch.library.opcheck(raw, (x, [], [], True))
    torch.library.opcheck(raw, (x, x, [1.0, -1.0], True))


def test_the_raw_operator_refuses_what_it_would_lose():
    x = draw(2, 3)
    with pytest.raises(RuntimeError, match=r"lose this one silently; call fewstep_kernels\.gram"):
        jvp(lambda x: torch.ops.fewstep_kernels._gram([x], [], [], True)[0], (x,), (x,))


PRIMALS = tuple(draw(3, 7, dtype=torch.float64) for _ in range(3))
TANGENTS = tuple(draw(3, 7, dtype=torch.float64) for _ in range(3))


def both(table):
    """The operator and its reference as functions of three tensors."""
    return (lambda *x: tuple(gram(x, table or None))), (lambda *x: tuple(reference(x, table)))


def energy(function):
    """A scalar of all results, linear in none."""
    return lambda *x: sum((y.sin() * (n + 1)).sum() for n, y in enumerate(function(*x)))


def close(found, expected):
    # float64 sums of some twenty products in another order
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@TABLES
def test_tangents_and_cotangents(table):
    ours, plain = both(table)
    close(jvp(ours, PRIMALS, TANGENTS), jvp(plain, PRIMALS, TANGENTS))
    values = ours(*PRIMALS)
    cotangents = tuple(x.cos() for x in values)
    close(vjp(ours, *PRIMALS)[1](cotangents), vjp(plain, *PRIMALS)[1](cotangents))
    for n in range(3):  # one result alone
        one = [lambda *x, f=f, n=n: f(*x)[n].sin().sum() for f in (ours, plain)]
        close(grad(one[0], (0, 2))(*PRIMALS), grad(one[1], (0, 2))(*PRIMALS))


@TABLES
def test_jacobians_and_second_derivatives(table):
    ours, plain = both(table)
    expected = jacrev(plain, (0, 1, 2))(*PRIMALS)
    close(jacfwd(ours, (0, 1, 2))(*PRIMALS), expected)
    close(jacrev(ours, (0, 1, 2))(*PRIMALS), expected)

    def along(function):
        return lambda *x: jvp(energy(function), x, TANGENTS)[1]

    close(grad(along(ours), (0, 1, 2))(*PRIMALS), grad(along(plain), (0, 1, 2))(*PRIMALS))
    small = [x[:2, :3].clone().requires_grad_() for x in PRIMALS]
    assert torch.autograd.gradcheck(ours, small, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, small)


@TABLES
def test_vmap_of_values_and_tangents(table):
    ours, plain = both(table)
    tangents = tuple(draw(4, *x.shape, dtype=torch.float64) for x in PRIMALS)

    def push(function):
        return vmap(lambda *t: jvp(function, PRIMALS, t)[1])(*tangents)

    close(push(ours), push(plain))
    stacked = torch.stack([PRIMALS[0], -PRIMALS[1]], 1)
    close(vmap(ours, (1, None, None))(stacked, *PRIMALS[1:]), vmap(plain, (1, None, None))(stacked, *PRIMALS[1:]))


def test_gradients_keep_the_inputs_dtypes():
    x = draw(2, 6, dtype=torch.bfloat16).requires_grad_()
    found = gram([x, draw(2, 6)])
    (found.products[:, 0, 0].sum() + found.sums[:, 0].sum()).backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, (2 * x.detach().float() + 1).bfloat16())

"""lincomb's derivatives are compared by VALUE with plain torch: an operator can lose a tangent without raising."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from fewstep_kernels import lincomb, normal

SEEDS = torch.tensor([3, -1, 40])
GENERATOR = torch.Generator().manual_seed(1)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def fused(x, y, table):
    return lincomb([x, y], table, noise_seeds=SEEDS[: len(x)], noise_stream=1)


def plain(x, y, table):
    noise = normal(SEEDS[: len(x)], x.shape[1:], stream=1, dtype=torch.float64)
    return tuple(
        torch.einsum("...mk,kb...n->m...bn" if table.ndim == 2 else "bmk,kbn->mbn", table, torch.stack([x, y, noise]))
    )


PER_SAMPLE = (draw(3, 5), draw(3, 5), draw(3, 2, 3))
SHARED = (draw(3, 5), draw(3, 5), draw(2, 3))
CASES = pytest.mark.parametrize("case", (PER_SAMPLE, SHARED), ids=("per_sample", "shared"))


def close(left, right):
    # float64 throughout; the coefficient gradient is one sum of 15 products in another order
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def energy(function):
    """A scalar that is not linear in anything, so second derivatives do not vanish."""
    return lambda *case: sum((y.sin() * (m + 1)).sum() for m, y in enumerate(function(*case)))


@CASES
def test_tangents(case):
    tangents = tuple(draw(*x.shape) for x in case)
    close(jvp(fused, case, tangents), jvp(plain, case, tangents))


@CASES
@pytest.mark.parametrize("moving", range(3))
def test_the_tangent_of_one_argument_alone(case, moving):
    def only(function):
        return lambda z: function(*(z if i == moving else x for i, x in enumerate(case)))

    tangent = (draw(*case[moving].shape),)
    found = jvp(only(fused), (case[moving],), tangent)
    close(found, jvp(only(plain), (case[moving],), tangent))
    assert found[1][0].abs().max() > 0.1


@CASES
def test_cotangents(case):
    cotangents = tuple(draw(3, 5) for _ in range(2))
    close(vjp(fused, *case)[1](cotangents), vjp(plain, *case)[1](cotangents))


@CASES
def test_gradients_by_backward_and_twice(case):
    def second(function):
        leaves = [x.clone().requires_grad_() for x in case]
        first = torch.autograd.grad(energy(function)(*leaves), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    close(second(fused), second(plain))


def test_gradient_when_only_some_outputs_or_inputs_count():
    x, y, table = PER_SAMPLE

    def partial(function):
        a, t = x.clone().requires_grad_(), table.clone().requires_grad_()
        return torch.autograd.grad(function(a, y, t)[1].square().sum(), (a, t))

    close(partial(fused), partial(plain))


def test_derivatives_of_a_part_bring_no_number_from_the_host():
    """On a GPU an index made of a list is a copy that the host waits for."""
    x, y, table = (z.clone().requires_grad_() for z in SHARED)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        _, second = fused(x, y.detach(), table)
        second.sum().backward()
        jvp(lambda y: fused(x.detach(), y, table.detach()), (y.detach(),), (x.detach(),))
    names = {event.key for event in seen.key_averages()}
    assert not names & {"aten::lift_fresh", "aten::index", "aten::index_copy", "aten::item", "aten::_to_copy"}, names


@CASES
def test_gradient_of_a_tangent(case):
    tangents = tuple(draw(*x.shape) for x in case)

    def along(function):
        return lambda *primals: jvp(energy(function), primals, tangents)[1]

    close(grad(along(fused), argnums=(0, 1, 2))(*case), grad(along(plain), argnums=(0, 1, 2))(*case))


@CASES
def test_jacobians_forward_and_reverse(case):
    expected = jacrev(plain, argnums=(0, 1, 2))(*case)
    close(jacfwd(fused, argnums=(0, 1, 2))(*case), expected)
    close(jacrev(fused, argnums=(0, 1, 2))(*case), expected)


@CASES
def test_vmap_of_a_tangent(case):
    tangents = tuple(draw(4, *x.shape) for x in case)

    def push(function):
        return vmap(lambda *ts: jvp(function, case, ts)[1])(*tangents)

    close(push(fused), push(plain))


@pytest.mark.parametrize("dims", ((0, 0, 0), (1, None, 0), (None, 0, None), (0, None, 1)))
@CASES
def test_vmap_over_any_argument(case, dims):
    stacked = [x if d is None else torch.stack([x, 2 * x, -x, x + 1], d) for x, d in zip(case, dims)]
    close(vmap(fused, dims)(*stacked), vmap(plain, dims)(*stacked))


def test_dual_numbers_without_functorch():
    x, y, table = PER_SAMPLE
    tangent = draw(3, 5)
    with torch.autograd.forward_ad.dual_level():
        out = fused(torch.autograd.forward_ad.make_dual(x, tangent), y, table)
        found = [torch.autograd.forward_ad.unpack_dual(o).tangent for o in out]
    close(tuple(found), jvp(lambda x: plain(x, y, table), (x,), (tangent,))[1])


def test_gradients_keep_the_inputs_dtypes():
    x = torch.randn(2, 6, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(2, 6, requires_grad=True)
    table = torch.randn(1, 2, requires_grad=True)
    lincomb([x, y], table)[0].sum().backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.grad, table[0, 1].detach().expand(2, 6))
    torch.testing.assert_close(table.grad, torch.stack([x.float().sum(), y.sum()])[None].detach())


@CASES
def test_numerical_derivatives_agree(case):
    leaves = [x[:2, :2].clone().requires_grad_() for x in case[:2]] + [case[2][:2].clone().requires_grad_()]
    assert torch.autograd.gradcheck(fused, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fused, leaves)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("count", (1, 63, 500, 8191))
def test_gradients_are_at_most_three_times_torchs(dtype, count):
    inputs, table, out = torch.randn(2, 3, count).to(dtype), torch.randn(3, 2).to(dtype), torch.randn(3, 3, count)

    def gradients(function, inputs, table):
        leaves = [x.clone().requires_grad_() for x in (*inputs, table)]
        answer = function(torch.stack(leaves[:2]), leaves[2])
        return torch.autograd.grad((answer * out.to(answer.dtype)).sum(), leaves)

    def ours(x, table):
        return torch.stack(lincomb([*x], table))

    def theirs(x, table):
        return torch.einsum("mk,kbn->mbn", table, x)

    exact = gradients(theirs, inputs.double(), table.double())
    for mine, other, true in zip(gradients(ours, inputs, table), gradients(theirs, inputs, table), exact):
        assert mine.dtype == dtype
        floor = torch.finfo(dtype).eps * true.abs().max()  # one rounding of the result, where torch is exact
        assert (mine.double() - true).abs().max() <= 3 * (other.double() - true).abs().max() + floor


@pytest.mark.parametrize("name", ("_lincomb", "_lincomb_out"))
def test_the_raw_operator_refuses_what_it_would_lose(name):
    raw = getattr(torch.ops.fewstep_kernels, name)
    x, table = torch.ones(2, 3), torch.ones(1, 1)

    def call(x):
        out = [0] if name == "_lincomb" else [torch.zeros(2, 3)]
        return raw([x], table, None, 0, out)

    with pytest.raises(RuntimeError, match=r"lose this one silently; call fewstep_kernels\.lincomb"):
        jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        call(x.clone().requires_grad_())
    call(x)


def test_opcheck():
    x, table = torch.randn(2, 3), torch.randn(2, 2, 2)
    seeds = torch.tensor([1, 2])
    raw = torch.ops.fewstep_kernels
    torch.library.opcheck(raw._lincomb.default, ([x], table, seeds, 1, [0, 1]))
    outputs = [torch.zeros(2, 3), torch.zeros(2, 3)]
    torch.library.opcheck(raw._lincomb_out.default, ([x], table, seeds, 1, outputs))


def test_exported_programs_hold_plain_aten_only():
    class Step(torch.nn.Module):
        def forward(self, x, table):
            return lincomb([x, x * 2], table)

    program = torch.export.export(Step(), (torch.randn(2, 3), torch.randn(1, 2)), strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert all(target.startswith("aten.") for target in targets)


@pytest.mark.slow
def test_compiled_values_tangents_and_gradients():
    x, y, table = (v.float() for v in PER_SAMPLE)
    tangents = (torch.ones_like(x), torch.ones_like(y), torch.ones_like(table))

    def everything(x, y, table):
        def once(x, y, table):
            return lincomb([x, y], table[..., :2])[0]

        value, tangent = jvp(once, (x, y, table), tangents)
        return value, tangent, grad(lambda z: once(x, y, z).square().sum())(table)

    compiled = torch.compile(everything, fullgraph=True)
    # Inductor may contract or reorder float32 sums of three terms
    torch.testing.assert_close(compiled(x, y, table), everything(x, y, table), rtol=1e-5, atol=1e-5)

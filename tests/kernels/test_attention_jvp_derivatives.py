"""Attention's derivatives are compared by VALUE with plain attention: an operator can lose a tangent without
raising."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from fewstep_kernels import attention, attention_jvp, attention_primal
from tests.kernels.test_attention_jvp import draw, make_mask, plain

SHAPE = (2, 4, 2, 5, 7, 3)
PRIMALS, TANGENTS = draw(*SHAPE)
MASKED = pytest.mark.parametrize("mask", (None, "dead", "added"))


def pair(mask, causal=True):
    given = make_mask(mask, *SHAPE[:2], *SHAPE[3:5])
    return (
        lambda q, k, v: attention(q, k, v, mask=given, causal=causal),
        lambda q, k, v: plain(q, k, v, given, causal),
    )


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)  # float64, sums in another order


def energy(function):
    return lambda *case: function(*case).sin().sum()


@MASKED
def test_cotangents(mask, attention_backend):
    ours, theirs = pair(mask)
    cotangent = torch.cos(torch.arange(120.0).double()).view(2, 4, 5, 3)
    close(vjp(ours, *PRIMALS)[1](cotangent), vjp(theirs, *PRIMALS)[1](cotangent))


@MASKED
def test_gradients_by_backward_once_and_twice(mask, attention_backend):
    def both(function):
        leaves = [x.clone().requires_grad_() for x in PRIMALS]
        once = torch.autograd.grad(energy(function)(*leaves), leaves)
        first = torch.autograd.grad(energy(function)(*leaves), leaves, create_graph=True)
        return once, first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours, theirs = map(both, pair(mask))
    close(ours, theirs)
    close(ours[0], ours[1])


@MASKED
def test_gradient_of_a_tangent(mask, attention_backend):
    def along(function):
        return lambda *primals: jvp(energy(function), primals, TANGENTS)[1]

    ours, theirs = pair(mask)
    close(grad(along(ours), argnums=(0, 1, 2))(*PRIMALS), grad(along(theirs), argnums=(0, 1, 2))(*PRIMALS))


@MASKED
def test_gradients_of_values_and_tangents_with_respect_to_both(mask, attention_backend):
    """The way of training: tangents by func.jvp, gradients by backward."""
    given = make_mask(mask, *SHAPE[:2], *SHAPE[3:5])

    def backward(function, weight):
        leaves = [x.clone().requires_grad_() for x in (*PRIMALS, *TANGENTS)]
        value, tangent = function(leaves[:3], leaves[3:])
        return torch.autograd.grad((value * weight).sin().sum() + tangent.cos().sum(), leaves)

    def carried(primals, tangents):
        return attention_jvp(*primals, *tangents, mask=given)

    def transformed(function):
        return lambda primals, tangents: jvp(lambda *x: function(*x), tuple(primals), tuple(tangents))

    ours, theirs = pair(mask, causal=False)
    expected = backward(transformed(theirs), 0.7)
    close(backward(transformed(ours), 0.7), expected)
    close(backward(carried, 0.7), expected)


def test_the_value_beside_a_tangent_costs_no_score_matrix(monkeypatch):
    """Weights inside func.jvp want gradients: nothing of size N x M is kept, and the gradient is the fused one."""
    fused = []
    honest = attention_primal.backward

    def counted(*arguments):
        fused.append(1)
        return honest(*arguments)

    monkeypatch.setattr(attention_primal, "backward", counted)
    q, k, v = (x.float() for x in draw(1, 2, 2, 96, 80, 4)[0])
    weight = torch.eye(4).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        value, _ = jvp(lambda q: attention(q @ weight, k, v), (q,), (q,))
    value.square().sum().backward()
    assert max(saved) < 2 * 96 * 80
    assert fused
    other = torch.eye(4).requires_grad_()
    plain(q @ other, k, v).square().sum().backward()
    torch.testing.assert_close(weight.grad, other.grad, rtol=1e-4, atol=1e-5)  # float32, sums of 80 x 96


@MASKED
def test_jacobians_forward_and_reverse_and_hessians(mask):
    ours, theirs = pair(mask)
    expected = jacrev(theirs, argnums=(0, 1, 2))(*PRIMALS)
    close(jacfwd(ours, argnums=(0, 1, 2))(*PRIMALS), expected)
    close(jacrev(ours, argnums=(0, 1, 2))(*PRIMALS), expected)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        close(outer(inner(energy(ours)))(*PRIMALS), outer(inner(energy(theirs)))(*PRIMALS))


@MASKED
def test_vmap_of_a_tangent(mask):
    many = tuple(torch.stack([x, 2 * x, -x]) for x in TANGENTS)

    def push(function):
        return vmap(lambda *ts: jvp(function, PRIMALS, ts)[1])(*many)

    close(*map(push, pair(mask)))


@pytest.mark.parametrize("dims", ((0, 0, 0), (1, None, 0), (None, 2, None)))
@MASKED
def test_vmap_over_any_argument(mask, dims):
    stacked = [x if d is None else torch.stack([x, 2 * x, -x, x + 1], d) for x, d in zip(PRIMALS, dims)]
    ours, theirs = pair(mask)
    close(vmap(ours, dims)(*stacked), vmap(theirs, dims)(*stacked))
    masks = torch.stack([make_mask("dead", *SHAPE[:2], *SHAPE[3:5])] * 4) & (torch.arange(4) > 0).view(4, 1, 1, 1, 1)
    found = vmap(lambda *x: attention(*x[:3], mask=x[3]), (*dims, 0))(*stacked, masks)
    close(found, vmap(lambda *x: plain(*x), (*dims, 0))(*stacked, masks))


def test_an_added_mask_has_derivatives_too():
    bias = torch.randn(1, 4, 5, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = torch.cat([bias, bias.cos()] * 3 + [bias], -1)  # [1, 4, 5, 7], one for all samples

    def ours(q, bias):
        return attention(q, *PRIMALS[1:], mask=bias)

    def theirs(q, bias):
        return plain(q, *PRIMALS[1:], bias)

    case, tangents = (PRIMALS[0], bias), (TANGENTS[0], bias.sin())
    close(jvp(ours, case, tangents), jvp(theirs, case, tangents))
    close(grad(energy(ours), (0, 1))(*case), grad(energy(theirs), (0, 1))(*case))
    leaf, other = (bias.clone().requires_grad_() for _ in range(2))
    energy(ours)(PRIMALS[0], leaf).backward()
    energy(theirs)(PRIMALS[0], other).backward()
    close(leaf.grad, other.grad)
    close(
        grad(lambda *x: jvp(energy(ours), x, tangents)[1], (0, 1))(*case),
        grad(lambda *x: jvp(energy(theirs), x, tangents)[1], (0, 1))(*case),
    )


def test_dual_numbers_without_functorch():
    ours, theirs = pair(None)
    with torch.autograd.forward_ad.dual_level():
        out = ours(torch.autograd.forward_ad.make_dual(PRIMALS[0], TANGENTS[0]), *PRIMALS[1:])
        value, tangent = torch.autograd.forward_ad.unpack_dual(out)
    expected = jvp(lambda q: theirs(q, *PRIMALS[1:]), PRIMALS[:1], TANGENTS[:1])
    close((value, tangent), expected)


def test_a_blocks_tangent_may_be_checkpointed():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def run(kept):
        leaf = weight.clone().requires_grad_()

        def block(x):
            return x + attention(x @ leaf, *PRIMALS[1:])

        def pushed(x, tx):
            return jvp(block, (x,), (tx,))

        x, tx = PRIMALS[0], TANGENTS[0]
        y, ty = checkpoint(pushed, x, tx, use_reentrant=False) if kept else pushed(x, tx)
        return y, ty, torch.autograd.grad(y.sin().sum() + ty.cos().sum(), leaf)

    close(run(True), run(False))


def test_a_checkpoint_inside_a_tangent_is_refused_in_one_sentence():
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()

    def block(x):
        return checkpoint(lambda x: attention(x @ weight, *PRIMALS[1:]), x, use_reentrant=False)

    torchs = "must implement the jvp function"  # torch 2.10's own checkpoint refuses before ours
    with pytest.raises(RuntimeError, match=rf"checkpoint the block's jvp: checkpoint\(lambda x, tx|{torchs}"):
        jvp(block, PRIMALS[:1], TANGENTS[:1])
    block(PRIMALS[0]).sum().backward()  # without a tangent it is allowed
    if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 10):
        with torch.no_grad():  # and where nothing will be recomputed
            jvp(block, PRIMALS[:1], TANGENTS[:1])


def test_the_raw_operator_refuses_what_it_would_lose():
    def call(q):
        return torch.ops.fewstep_kernels._attention_jvp(q, *PRIMALS[1:], *TANGENTS, None, False, 1.0)

    with pytest.raises(RuntimeError, match=r"lose this one silently; call fewstep_kernels\.attention_jvp"):
        jvp(call, PRIMALS[:1], TANGENTS[:1])
    with pytest.raises(RuntimeError, match="has no derivatives"):
        call(PRIMALS[0].clone().requires_grad_())
    call(PRIMALS[0])


def test_opcheck():
    mask = make_mask("dead", *SHAPE[:2], *SHAPE[3:5])
    for arguments in ((*PRIMALS, *TANGENTS, mask, True, 0.5), (*PRIMALS, None, None, TANGENTS[2], None, False, 1.0)):
        torch.library.opcheck(torch.ops.fewstep_kernels._attention_jvp.default, arguments)


def test_exported_programs_hold_plain_aten_only():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, mask):
            return attention(q, k, v), attention(q, k, v, mask=mask)

    q, k, v = (x.float() for x in draw(2, 2, 2, 5, 5, 8)[0])
    mask = torch.randn(5, 5)
    length = torch.export.Dim("length", min=2, max=64)
    shapes = {name: {2: length} for name in "qkv"} | {"mask": {0: length, 1: length}}
    program = torch.export.export(Attend(), (q, k, v, mask), dynamic_shapes=shapes, strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fewstep" in target for target in targets)
    q, k, v = (x.float() for x in draw(2, 2, 2, 9, 9, 8)[0])
    mask = torch.randn(9, 9)
    expected = plain(q, k, v), plain(q, k, v, mask)
    torch.testing.assert_close(program.module()(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_compiled_values_tangents_and_gradients():
    q, k, v = (x.float() for x in draw(1, 2, 2, 5, 7, 8)[0])
    tangents = (q.cos(), k.sin(), v.cos())

    def everything(q, k, v):
        value, tangent = jvp(attention, (q, k, v), tangents)
        carried = attention_jvp(q, k, v, *tangents, causal=True)
        return value, tangent, carried, attention(q, k, v), grad(lambda q: attention(q, k, v).square().sum())(q)

    compiled = torch.compile(everything, fullgraph=True)
    # Inductor may contract or reorder float32 sums of eight terms
    torch.testing.assert_close(compiled(q, k, v), everything(q, k, v), rtol=1e-5, atol=1e-5)

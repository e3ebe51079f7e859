"""Attention and its tangent over drawn shapes, masks, layouts and dtypes; inside torch's own modules; far offsets."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fewstep_kernels as fk
from fewstep_kernels import attention, attention_jvp, backends, native
from tests.kernels.test_attention_jvp import draw, plain

HERE = ("reference",) if native.cpu().missing else ("reference", "cpu")
LAYOUTS = ("contiguous", "tokens first", "one head for all", "every other channel", "packed")


def laid_out(x, layout):
    """The same numbers, but for 'one head for all', in another place in memory."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "one head for all":
        return x[:, :1].expand_as(x)
    if layout == "every other channel":
        return torch.stack([x, x.cos()], -1).flatten(-2)[..., ::2]
    return torch.stack([x.sin(), x, x.cos()])[1] if layout == "packed" else x


@st.composite
def cases(sampled):
    batch, key_heads, repeats = (sampled(st.integers(1, 3)) for _ in range(3))
    rows, keys = (sampled(st.sampled_from((1, 2, 3, 7, 13, 31, 63))) for _ in range(2))
    width, value_width = (sampled(st.sampled_from((1, 3, 8, 16, 40, 72, 88))) for _ in range(2))
    heads = key_heads * repeats
    mask = sampled(st.sampled_from((None, "boolean", "added")))
    if mask is not None:
        full = (batch, heads, rows, keys)
        sizes = [size if sampled(st.booleans()) else 1 for size in full][sampled(st.integers(0, 3)) :]
        values = torch.randn(sizes, generator=torch.Generator().manual_seed(3))
        mask = values if mask == "added" else values > -0.3
    return {
        "shape": (batch, heads, key_heads, rows, keys, width, value_width),
        "mask": mask,
        "causal": sampled(st.booleans()),
        "scale": sampled(st.sampled_from((None, 0.3, -1.0))),
        "dtype": sampled(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))),
        "layouts": [sampled(st.sampled_from(LAYOUTS)) for _ in range(6)],
    }


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_any_call_equals_the_definition(name, case):
    drawn = [x for part in draw(*case["shape"], dtype=case["dtype"]) for x in part]
    drawn = [laid_out(x, layout) for x, layout in zip(drawn, case["layouts"])]
    wide = [x.double() for x in drawn]
    mask = case["mask"] if case["mask"] is None or case["mask"].dtype == torch.bool else case["mask"].double()

    def definition(*primals):
        return plain(*primals, mask, case["causal"], case["scale"])

    expected = jvp(definition, *(tuple(x.contiguous() for x in part) for part in (wide[:3], wide[3:])))
    options = {"mask": case["mask"], "causal": case["causal"], "scale": case["scale"]}
    # sums of at most 88 products and 63 weights; roundings of the result and of what makes it, scores up to thirty
    bound = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[case["dtype"]]
    apart = [x.contiguous() if layout == LAYOUTS[2] else x for x, layout in zip(drawn, case["layouts"])]
    with backends.asking(name):
        direct = attention_jvp(*drawn, **options)
        # torch.func.jvp itself takes no expanded tensors
        through = jvp(lambda *primals: attention(*primals, **options), tuple(apart[:3]), tuple(apart[3:]))
    for found in (direct, through):
        for ours, exact in zip(found, expected):
            assert ours.dtype == case["dtype"] and ours.shape == exact.shape
            assert ((ours.double() - exact).abs() <= bound * (1 + exact.abs().max())).all()


@pytest.mark.parametrize(("rows", "keys"), ((5, 9), (9, 5), (1, 7), (7, 1)))
def test_causal_counts_keys_from_the_first_as_torch_does(rows, keys):
    q, k, v = draw(1, 2, 2, rows, keys, 8)[0]
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", (500, 1009, 8191))
def test_long_and_prime_lengths(keys, attention_backend):
    primals, tangents = draw(1, 1, 1, 67, keys, 40)
    for found, exact in zip(attention_jvp(*primals, *tangents), jvp(plain, primals, tangents)):
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)  # float64, sums in another order


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_errors_of_gradients_are_within_three_times_those_of_torchs_mathematical_attention(dtype):
    primals, (gradient, *_) = draw(2, 2, 2, 63, 63, 40, dtype=dtype)

    def pulled(function, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        return torch.autograd.grad(function(*leaves), leaves, gradient.to(tensors[0].dtype))

    truth = pulled(plain, [x.double() for x in primals])
    with sdpa_kernel(SDPBackend.MATH):
        theirs = pulled(functional.scaled_dot_product_attention, primals)
    for ours, rival, exact in zip(pulled(attention, primals), theirs, truth):
        assert 0 < (ours.double() - exact).norm() <= 3 * (rival.double() - exact).norm()


def test_gradcheck_in_both_modes():
    bias = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 3, 4, 3)[0]]
    for options in ({}, {"causal": True}, {"mask": torch.rand(3, 4) > 0.3}):
        function = functools.partial(attention, **options)
        assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradcheck(lambda q, k, v, m: attention(q, k, v, mask=m), (*leaves, bias))


class Block(torch.nn.Module):
    """Self-attention as networks have it: one projection to queries, keys and values in [B, N, 3, H, D]."""

    def __init__(self, attend, width=16, heads=2):
        super().__init__()
        self.attend, self.heads = attend, heads
        self.into, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.into(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def test_a_modules_tangent_along_its_input_and_its_weights():
    torch.manual_seed(0)
    ours = Block(attention).double()
    theirs = Block(plain).double()
    theirs.load_state_dict(ours.state_dict())
    x, tangent = (torch.randn(2, 7, 16, dtype=torch.float64) for _ in range(2))
    weights = dict(ours.named_parameters())
    moved = {name: torch.randn_like(w) for name, w in weights.items()}

    def along(block):
        return jvp(lambda x, w: functional_call(block, w, (x,)), (x, weights), (tangent, moved))

    torch.testing.assert_close(along(ours), along(theirs), rtol=1e-11, atol=1e-11)  # float64


def test_torchs_own_attention_module_has_tangents_in_the_context():
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    x, tangent = (torch.randn(2, 7, 16, dtype=torch.float64) for _ in range(2))

    def along(weights):
        return jvp(lambda x: module(x, x, x, need_weights=weights)[0], (x,), (tangent,))

    expected = along(True)  # written out by torch where the weights are wanted
    with fk.carrying_tangents():
        torch.testing.assert_close(along(False), expected, rtol=1e-11, atol=1e-11)  # float64
        positional = functional.scaled_dot_product_attention(x, x, x, None, 0.0, True)
    torch.testing.assert_close(positional, functional.scaled_dot_product_attention(x, x, x, is_causal=True))


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpointed_module_inside_a_tangent_is_refused_in_one_sentence(reentrant):
    block = Block(attention).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError) as refused:
        jvp(lambda x: checkpoint(block, x, use_reentrant=reentrant), (x,), (x,))
    assert len(str(refused.value).splitlines()) == 1
    torchs = "must implement the jvp function" in str(refused.value)  # torch 2.10's own checkpoint refuses before ours
    assert reentrant or torchs or "checkpoint the block's jvp" in str(refused.value)


def test_saved_tensor_hooks_of_any_kind_are_left_alone():
    q, k, v = (x.requires_grad_() for x in draw(1, 1, 1, 3, 4, 8)[0])
    kept = []
    pack = functools.partial(lambda places, x: (places.append(x.shape), x)[1], kept)
    with torch.autograd.graph.saved_tensors_hooks(pack, functools.partial(lambda x: x)):
        out = attention(q, k, v)
    out.sum().backward()
    assert kept and q.grad is not None


def test_heads_further_apart_than_two_to_the_31_elements(attention_backend):
    """In memory that is never touched between them."""
    apart = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    far = apart.as_strided((1, 2, 9, 24), (2**31 + 3000, 2**31 + 512, 24, 1))
    (near, k, v), tangents = draw(1, 2, 2, 9, 11, 24, dtype=torch.bfloat16)
    far.copy_(near)
    found = attention_jvp(far, k, v, *tangents)
    for ours, other in zip(found, attention_jvp(near, k, v, *tangents)):
        assert torch.equal(ours, other)

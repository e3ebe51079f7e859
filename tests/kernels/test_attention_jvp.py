"""Attention and its tangent, against plain attention differentiated by torch in float64, on every backend."""

from pathlib import Path

import pytest
import torch
from torch.func import jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep_kernels as fk
from fewstep_kernels import attention, attention_jvp, attention_primal, backends
from fewstep_kernels.attention_reference import raw, reference
from tests.kernels.reductions import one_and_two_threads


def plain(q, k, v, mask=None, causal=False, scale=None):
    """The definition; a query that attends nothing gives zero."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0) @ v


def draw(batch, heads, key_heads, rows, keys, width, value_width=None, seed=0, dtype=torch.float64):
    """q, k, v and their tangents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, rows, width), (batch, key_heads, keys, width)]
    shapes.append((batch, key_heads, keys, value_width or width))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in (*shapes, *shapes)]
    return tuple(drawn[:3]), tuple(drawn[3:])


def make_mask(kind, batch, heads, rows, keys):
    generator = torch.Generator().manual_seed(5)
    if kind is None:
        return None
    if kind == "added":
        return torch.randn(heads, rows, keys, generator=generator)
    if kind == "padding":  # the last keys of each sample, in one row for all queries
        return torch.arange(keys) < torch.arange(keys, keys - batch, -1).clamp_min(1)[:, None, None, None]
    mask = torch.rand(batch, 1, rows, keys, generator=generator) > 0.4
    if kind == "dead":
        mask[:, :, ::3] = False
    return mask if kind != "dead added" else torch.zeros(mask.shape).masked_fill(mask.cumsum(-2) % 2 == 0, -torch.inf)


SHAPES = {  # batch, heads, key heads, queries, keys, width
    "single": (1, 1, 1, 1, 1, 16),
    "odd": (2, 3, 3, 7, 7, 40),
    "cross": (2, 2, 2, 63, 7, 72),
    "grouped": (1, 6, 2, 7, 130, 80),
    "long": (1, 2, 1, 130, 63, 16),
}
MASKS = (None, "added", "padding", "random", "dead", "dead added")
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64, sums in another order


@EVERY_SHAPE
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", (False, True))
def test_values_and_tangents(shape, mask, causal, attention_backend):
    primals, tangents = draw(*shape)
    mask = make_mask(mask, *shape[:2], *shape[3:5])
    expected = jvp(lambda *x: plain(*x, mask, causal), primals, tangents)
    close(attention_jvp(*primals, *tangents, mask=mask, causal=causal), expected)
    close(jvp(lambda *x: attention(*x, mask=mask, causal=causal), primals, tangents), expected)
    close(attention(*primals, mask=mask, causal=causal), expected[0])
    assert expected[1].abs().max() > 1e-3 or shape[4] == 1 or "dead" in str(mask)


def test_values_of_another_width_and_another_scale(attention_backend):
    primals, tangents = draw(2, 4, 2, 9, 11, 24, value_width=5)
    expected = jvp(lambda *x: plain(*x, scale=0.7), primals, tangents)
    close(attention_jvp(*primals, *tangents, scale=0.7), expected)
    close(attention(*primals, scale=0.7), expected[0])


@pytest.mark.parametrize("moving", range(3))
def test_a_missing_tangent_is_zero(moving, attention_backend):
    primals, tangents = draw(2, 4, 2, 9, 11, 24)
    some = [t if i == moving else None for i, t in enumerate(tangents)]
    zeros = [t if i == moving else torch.zeros_like(t) for i, t in enumerate(tangents)]
    close(attention_jvp(*primals, *some), attention_jvp(*primals, *zeros))


def test_queries_that_attend_nothing_give_zeros(attention_backend):
    primals, tangents = draw(1, 2, 2, 5, 4, 16)
    mask = torch.ones(5, 4, dtype=torch.bool)
    mask[2] = False
    for given in (mask, torch.zeros(5, 4).masked_fill(~mask, -torch.inf)):
        for answer in attention_jvp(*primals, *tangents, mask=given):
            assert (answer[:, :, 2] == 0).all()
            assert answer[:, :, 1].abs().max() > 0
    without_keys, moving = draw(1, 2, 2, 5, 0, 16)
    assert all((answer == 0).all() for answer in attention_jvp(*without_keys, *moving))
    assert attention(*draw(1, 2, 2, 0, 3, 16)[0]).shape == (1, 2, 0, 16)


ACCURACY = ((2, 2, 2, 63, 130, 40), (1, 4, 4, 130, 63, 72), (1, 2, 2, 256, 256, 64), (2, 2, 2, 7, 500, 256))


def test_every_instruction_set_and_any_threads_compute_the_same_function(instructions):
    for shape in ((2, 4, 2, 131, 200, 24), (1, 2, 2, 70, 7, 3)):
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):  # float32 sums of at most 200 products
            primals, tangents = draw(*shape, dtype=dtype)
            mask = make_mask("dead", *shape[:2], *shape[3:5])
            mask[:, :, 1::3, :110] = False  # more keys than are taken at a time
            expected = jvp(lambda *x, mask=mask: plain(*x, mask, True), *draw(*shape))
            one, two = one_and_two_threads(lambda: attention_jvp(*primals, *tangents, mask=mask, causal=True))  # noqa: B023
            for found, other, exact in zip(one, two, expected):
                assert torch.equal(found, other)
                torch.testing.assert_close(found.double(), exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ACCURACY)
def test_errors_are_within_twice_those_of_torchs_mathematical_attention(dtype, shape, attention_backend):
    primals, tangents = draw(*shape, dtype=dtype)
    truth = jvp(plain, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))
    found = attention_jvp(*primals, *tangents)
    with sdpa_kernel(SDPBackend.MATH):
        rival = jvp(functional.scaled_dot_product_attention, primals, tangents)
    for ours, theirs, exact in zip(found, rival, truth):
        assert ours.dtype == dtype

        def error(x, exact=exact):
            return (x.double() - exact).norm() / exact.norm()

        assert 0 < error(ours) <= 2 * error(theirs)


def test_what_moves_all_scores_alike_costs_no_digits(attention_backend):
    """As keys' tangents do that share a direction: those of a time embedding."""
    primals, tangents = draw(2, 2, 2, 130, 120, 40, dtype=torch.float32)
    tangents = (tangents[0], tangents[1] + 30 * torch.linspace(-1, 1, 40), tangents[2])
    exact = jvp(plain, tuple(x.double() for x in primals), tuple(x.double() for x in tangents))[1]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = jvp(functional.scaled_dot_product_attention, primals, tangents)[1]
    ours = attention_jvp(*primals, *tangents)[1]
    assert (ours.double() - exact).norm() <= 1.5 * (theirs.double() - exact).norm()  # uncentred, it is 2.4


def test_strides_do_not_matter(attention_backend):
    (q, k, v), (tq, tk, tv) = draw(2, 3, 3, 9, 11, 16)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, tq, tk, tv)]
    close(attention_jvp(*turned), attention_jvp(q, k, v, tq, tk, tv))
    close(attention(*turned[:3]), attention(q, k, v))
    packed = torch.randn(2, 9, 3, 3, 16, dtype=torch.float64).permute(2, 0, 3, 1, 4).unbind(0)
    close(attention(*packed), plain(*packed))


def test_memory_grows_with_the_length_not_its_square(monkeypatch):
    sizes = []
    matmul = torch.Tensor.__matmul__

    def watched(self, other):
        out = matmul(self, other)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    primals, tangents = draw(1, 2, 2, 2048, 2048, 16, dtype=torch.float32)
    with backends.asking("reference"):
        attention_jvp(*primals, *tangents)
    assert max(sizes) <= attention_primal.SCORES < 2 * 2048 * 2048 / 8


def test_memory_in_cpp_holds_no_scores():
    if fk.backend("attention_jvp", "cpu") != "cpu":
        pytest.skip("libfewstep_cpu.so was not built")
    primals, tangents = draw(1, 1, 1, 8192, 8192, 16, dtype=torch.float32)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("this system does not tell the peak of a process's memory")

    def resident(kind):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition(f"{kind}:")[2].split()[0])

    before = resident("VmRSS")
    attention_jvp(*primals, *tangents)
    assert resident("VmHWM") - before < 2**25 < 4 * 8192 * 8192 / 4


def test_every_element_is_written(attention_backend):
    primals, tangents = draw(1, 2, 2, 63, 7, 40, dtype=torch.float32)
    expected = attention_jvp(*primals, *tangents)
    torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        found = attention_jvp(*primals, *tangents)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_the_signature_of_torchs_function():
    q, k, v = (x.float() for x in draw(2, 4, 2, 9, 11, 16)[0])
    mask = torch.randn(9, 11)
    calls = [
        ((q, q, q), {}),
        ((q, k, v), {"enable_gqa": True, "attn_mask": mask}),
        ((q[0, 0], k[0, 0], v[0, 0], mask), {"scale": 0.3}),
        ((q[0], q[0], q[0]), {"is_causal": True}),
        ((q[None], q[None], q[None], mask[:, :9]), {}),
    ]
    for arguments, named in calls:
        found = fk.scaled_dot_product_attention(*arguments, **named)
        expected = functional.scaled_dot_product_attention(*arguments, **named)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, sums of 11 in another order
    with pytest.raises(ValueError, match=r"no dropout; got dropout_p=0\.1"):
        fk.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="4 heads and key 2; pass enable_gqa=True"):
        fk.scaled_dot_product_attention(q, k, v)


def test_networks_written_with_torchs_function_get_tangents_in_the_context():
    primals, tangents = draw(1, 2, 2, 7, 9, 16)
    expected = jvp(plain, primals, tangents)
    with fk.carrying_tangents():
        close(jvp(functional.scaled_dot_product_attention, primals, tangents), expected)
        assert functional.scaled_dot_product_attention(*primals, dropout_p=0.9).shape == expected[0].shape


def test_autocast_casts_as_torchs_attention_does(attention_backend):
    q, k, v = draw(1, 2, 2, 7, 9, 16, dtype=torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v.bfloat16())
        tangent = attention_jvp(q, k, v.bfloat16(), q, k, None)[1]
    assert out.dtype == tangent.dtype == torch.bfloat16
    expected = attention_jvp(*(x.bfloat16() for x in (q, k, v, q, k)), None)[1]
    assert torch.equal(tangent, expected)


def test_what_does_not_fit_is_refused_in_one_sentence():
    (q, k, v), tangents = draw(2, 4, 2, 9, 11, 16)
    with pytest.raises(TypeError, match=r"takes floating-point q .* got torch.float64 \[4, 9, 16\]"):
        attention(q[0], k, v)
    with pytest.raises(TypeError, match=r"one dtype; got torch\.float32, torch\.float64"):
        attention(q.float(), k, v)
    with pytest.raises(ValueError, match="one device; got cpu and meta"):
        attention_jvp(q, k.to("meta"), v, *tangents)
    with pytest.raises(ValueError, match=r"takes q \[B, H, N, D\], k .* got \[2, 4, 9, 16\]"):
        attention(q, k[..., :8], v)
    with pytest.raises(ValueError, match="multiple of the keys' 2 heads as query heads; got 3"):
        attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match=r"mask that broadcasts to \[2, 4, 9, 11\]; got torch.bool \[9, 10\]"):
        attention(q, k, v, mask=torch.ones(9, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes tangents like q, k and v"):
        attention_jvp(q, k, v, tangents[1], None, None)


def test_the_log_sum_exp_is_what_it_says(attention_backend):
    (q, k, v), tangents = draw(1, 2, 2, 7, 9, 16)
    expected = (q @ k.transpose(-1, -2) * 0.25).logsumexp(-1)
    close(reference(q, k, v, *tangents, None, False, 0.25)[2], expected)
    close(raw(q, k, v, *tangents, None, False, 0.25)[2], expected)
    close(attention_primal.forward(q, k, v, None, False, 0.25)[1], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", (16, 40, 64, 72, 96, 128, 160, 256))
@pytest.mark.parametrize(
    ("mask", "causal", "rows", "keys"),
    ((None, False, 130, 63), (None, True, 257, 257), ("dead", False, 63, 130), ("added", True, 64, 500)),
)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_values_tangents_and_gradients_on_a_gpu(width, mask, causal, rows, keys, dtype):
    shape = (2, 4, 2, rows, keys, width)
    primals, tangents = (tuple(x.cuda() for x in given) for given in draw(*shape, dtype=dtype))
    mask = make_mask(mask, *shape[:2], *shape[3:5])
    mask = mask if mask is None else mask.cuda()

    def everything(function, wide):
        leaves = [x.to(wide, copy=True).requires_grad_() for x in primals]
        value, tangent = jvp(lambda *x: function(*x, mask, causal), tuple(leaves), tuple(t.to(wide) for t in tangents))
        gradients = torch.autograd.grad(value.square().sum(), leaves)
        leaves = [x.to(wide, copy=True).requires_grad_() for x in primals]
        alone = torch.autograd.grad(function(*leaves, mask, causal).square().sum(), leaves)
        return value, tangent, *gradients, *alone

    with torch.device("cuda"):  # plain makes its causal mask there
        expected = everything(plain, torch.float64)
    found = everything(lambda q, k, v, m, c: attention(q, k, v, mask=m, causal=c), dtype)
    bound = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]  # a few roundings of the dtype
    for ours, exact in zip(found, expected):
        assert not ours.isnan().any()
        assert (ours.double() - exact).norm() <= bound * exact.norm()

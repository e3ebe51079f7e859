"""group_norm_silu: values and derivatives, in both layouts, against float64 and torch's own operations."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import fewstep_kernels as fk
from fewstep_kernels import group_norm_silu, normalisation
from fewstep_kernels.group_norm_silu import reference
from tests.kernels.normalisation_cases import (
    assert_as_accurate,
    double,
    group,
    group_torch,
    inputs,
    nan_filled_allocations,
    with_gradients,
)

WORTHWHILE = normalisation.worthwhile
SHAPES = (((2, 6, 5, 5), 3), ((1, 8, 1, 1), 2), ((3, 63, 7, 9), 7), ((2, 500, 4, 4), 5), ((2, 8, 33, 32), 2))
LAYOUTS = pytest.mark.parametrize("last", (False, True), ids=("contiguous", "channels_last"))
SMALL = ((2, 6, 3, 2), 3)
needs_cpu = pytest.mark.skipif(fk.backend("group_norm_silu", "cpu") != "cpu", reason="libfewstep_cpu.so was not built")


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """The fast backend serves the small tensors of these tests too."""
    monkeypatch.setattr(normalisation, "worthwhile", lambda form, x, given: True)


def close(left, right):
    # float32 inside ours, float64 in the truth; values below about 10
    torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-4, check_dtype=False)


@LAYOUTS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_errors_are_near_torchs_in_the_same_dtype(shape, groups, dtype, last, monkeypatch):
    tensors = inputs(shape, shape[1], dtype, dtype, last=last)
    gradient = torch.randn(shape, dtype=torch.float64).to(dtype)
    for activation in ("silu", None):
        truth = with_gradients(group_torch(groups, activation), double(tensors), gradient.double())
        torchs = with_gradients(group_torch(groups, activation), tensors, gradient)
        with monkeypatch.context() as patch:
            nan_filled_allocations(patch)
            ours = with_gradients(group(groups, activation), tensors, gradient)
        assert_as_accurate(ours, torchs, truth, gradient)
        assert ours[0].dtype == dtype
        assert ours[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@LAYOUTS
def test_float32_parameters_of_a_bfloat16_tensor(last):
    tensors = inputs((2, 6, 5, 5), 6, torch.bfloat16, last=last)
    truth = group_torch(3)(*double(tensors))
    found = with_gradients(group(3), tensors, torch.ones(2, 6, 5, 5))
    assert [g.dtype for g in found] == [torch.bfloat16] * 2 + [torch.float32] * 5
    torch.testing.assert_close(found[0].double(), truth, rtol=2**-8, atol=2**-8)  # one rounding to bfloat16


def test_the_two_shifts_differ_and_are_where_they_say():
    x, *_, shift, added = inputs((2, 6, 5, 5), 6)
    before = group_norm_silu(x, 3, input_shift=added)
    torch.testing.assert_close(before, group_norm_silu(x + added[:, :, None, None], 3))
    after = group_norm_silu(x, 3, shift=shift, activation=None)
    torch.testing.assert_close(after, group_norm_silu(x, 3, activation=None) + shift[:, :, None, None])
    assert (group_norm_silu(x, 3, shift=added) - before).abs().max() > 0.1


@pytest.mark.parametrize("shape", ((0, 6, 5, 5), (2, 6, 0, 5)))
def test_empty_tensors(shape):
    x = torch.randn(shape, requires_grad=True)
    y = group_norm_silu(x, 3, torch.ones(6), scale=torch.zeros(shape[0], 6))
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("shape", ((4, 6), (2, 6, 10), (2, 6, 2, 3, 4)))
def test_any_number_of_positions(shape):
    tensors = inputs(shape, 6)
    close(group(3)(*tensors), group_torch(3)(*double(tensors)))


def test_a_view_that_is_neither_layout_is_copied():
    x = torch.randn(2, 5, 6, 7).transpose(1, 2)
    torch.testing.assert_close(group_norm_silu(x, 3), group_norm_silu(x.contiguous(), 3))


def test_an_offset_a_thousand_times_the_spread_costs_no_more_than_torch():
    x = torch.randn(1, 4, 32, 32) + 1000
    truth = torch.nn.functional.group_norm(x.double(), 2)
    ours = (group_norm_silu(x, 2, activation=None).double() - truth).abs().max()
    assert ours <= 2 * (torch.nn.functional.group_norm(x, 2).double() - truth).abs().max()


@needs_cpu
@LAYOUTS
def test_the_number_of_threads_changes_no_bit(last):
    tensors = inputs((3, 64, 32, 32), 64, last=last)
    gradient = torch.randn(3, 64, 32, 32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(group(4), tensors, gradient)
        torch.set_num_threads(3)
        three = with_gradients(group(4), tensors, gradient)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def float32(seed=0, last=False):
    return tuple(inputs(SMALL[0], SMALL[0][1], seed=seed, last=last))


OURS, TORCHS = group(3), group_torch(3)


@LAYOUTS
def test_tangents_and_cotangents(last):
    primals, tangents = float32(0, last), float32(1, last)
    wide, wide_tangents = tuple(double(primals)), tuple(double(tangents))
    close(jvp(OURS, primals, tangents), jvp(TORCHS, wide, wide_tangents))
    close(vjp(OURS, *primals)[1](tangents[0]), vjp(TORCHS, *wide)[1](wide_tangents[0]))


@pytest.mark.parametrize("moving", range(6))
def test_the_tangent_of_one_argument_alone(moving):
    primals, tangent = float32(), float32(1)[moving]

    def only(function, given):
        return lambda z: function(*(z if i == moving else p for i, p in enumerate(given)))

    found = jvp(only(OURS, primals), (primals[moving],), (tangent,))
    close(found, jvp(only(TORCHS, double(primals)), (primals[moving].double(),), (tangent.double(),)))
    assert found[1].abs().max() > 0.1


def test_gradient_of_a_tangent():
    primals, tangents = float32(), float32(1)

    def along(function, directions):
        return lambda *given: jvp(lambda *p: function(*p).sin().sum(), given, directions)[1]

    every = tuple(range(6))
    truth = grad(along(TORCHS, tuple(double(tangents))), argnums=every)(*double(primals))
    close(grad(along(OURS, tangents), argnums=every)(*primals), truth)
    close(grad(along(OURS, tuple(double(tangents))), argnums=every)(*double(primals)), truth)


def test_jacobians_forward_and_reverse():
    primals, places = float32(), (0, 1, 3, 5)
    expected = jacrev(TORCHS, argnums=places)(*double(primals))
    close(jacfwd(OURS, argnums=places)(*primals), expected)
    close(jacrev(OURS, argnums=places)(*primals), expected)


def test_vmap_of_a_tangent():
    primals = float32()
    tangents = tuple(torch.stack([t, -2 * t, t + 1]) for t in float32(1))

    def push(function, given, directions):
        return vmap(lambda *ts: jvp(function, given, ts)[1])(*directions)

    close(push(OURS, primals, tangents), push(TORCHS, tuple(double(primals)), tuple(double(tangents))))


@pytest.mark.parametrize(
    "dims", ((0, None, None, None, None, None), (1, None, None, 0, None, 1), (0, 0, 1, None, 0, 0))
)
def test_vmap_over_any_argument(dims):
    stacked = [p if d is None else torch.stack([p, 2 * p, p + 1], d) for p, d in zip(float32(), dims)]
    close(vmap(OURS, dims)(*stacked), vmap(TORCHS, dims)(*double(stacked)))


def test_dual_numbers_without_functorch():
    primals, tangent = float32(), float32(1)[0]
    wide = double(primals)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(primals[0], tangent)
        found = torch.autograd.forward_ad.unpack_dual(OURS(dual, *primals[1:])).tangent
    close(found, jvp(lambda x: TORCHS(x, *wide[1:]), (wide[0],), (tangent.double(),))[1])


def test_gradients_twice():
    def second(function, given):
        leaves = [p.clone().requires_grad_() for p in given]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for found, expected in zip(second(OURS, float32()), second(TORCHS, double(float32()))):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3, check_dtype=False)  # sums of squares near 100


def test_gradcheck_of_the_reference_and_of_our_formulas():
    wide = [t.requires_grad_() for t in double(inputs((2, 4, 2, 2), 4))]
    assert torch.autograd.gradcheck(group(2), wide, check_forward_ad=True)

    form = normalisation.Form("group_norm_silu", 2, 1e-5, True)
    gradient = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    dx, da, db = normalisation.gradients(form, gradient, wide[0], normalisation.Parameters(*wide[1:]))
    needs, given = (True,) * 5, normalisation.Parameters(*wide[1:])
    ours = [dx, *normalisation.parameter_gradients(given, needs, da, db, dx)]
    theirs = torch.autograd.grad(group_torch(2)(*wide), wide, gradient)
    torch.testing.assert_close(ours, list(theirs), rtol=1e-10, atol=1e-10)  # float64 throughout


@needs_cpu
def test_the_raw_operators_pass_opcheck_and_refuse_what_they_would_lose():
    x, weight, bias, scale, shift, added = inputs(SMALL[0], 6, last=True)
    options = (3, 1e-5, True)
    raw = torch.ops.fewstep_kernels
    forward, given = raw._group_norm_silu.default, (weight, bias, scale, shift, added)
    torch.library.opcheck(forward, (x, *given, *options))
    _, mean, rstd = forward(x, *given, *options)
    torch.library.opcheck(raw._group_norm_silu_backward.default, (x, x, mean, rstd, *given, *options))
    torch.library.opcheck(raw._group_norm_silu_tangent.default, (x, x, *given, scale, None, shift, *options))
    with pytest.raises(RuntimeError, match=r"lose this one silently; call fewstep_kernels\.group_norm_silu"):
        jvp(lambda z: forward(z, *given, *options), (x,), (x,))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        forward(x.clone().requires_grad_(), *given, *options)


def test_a_compiler_and_an_exporter_see_plain_aten():
    class Net(torch.nn.Module):
        def forward(self, x, weight, bias, scale, shift, added):
            return group(3)(x, weight, bias, scale, shift, added)

    primals = float32()
    program = torch.export.export(Net(), primals, strict=False)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and all(target.startswith("aten.") for target in targets)

    def pushed(*given):
        return jvp(OURS, given, given)

    compiled = torch.compile(pushed, fullgraph=True, backend="aot_eager")
    close(compiled(*primals), jvp(TORCHS, tuple(double(primals)), tuple(double(primals))))


X = torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: group_norm_silu(X, 4), "divides 6 channels; got 4"),
        (lambda: group_norm_silu(X, 0), "positive number of groups; got 0"),
        (lambda: group_norm_silu(X.long(), 2), "int64"),
        (lambda: group_norm_silu(torch.zeros(3), 1), r"\[B, C, ...\]"),
        (lambda: group_norm_silu(X, 2, torch.ones(5)), r"weight as a floating-point tensor \[6\]"),
        (lambda: group_norm_silu(X, 2, scale=torch.ones(6)), r"scale as a floating-point tensor \[2, 6\]"),
        (lambda: group_norm_silu(X, 2, activation="relu"), "\"silu\" or None; got 'relu'"),
    ),
)
def test_what_does_not_fit_is_said_in_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


def test_the_reference_is_what_runs_in_float64():
    x, weight, *_ = double(inputs(SMALL[0], 6))
    assert torch.equal(group_norm_silu(x, 3, weight), reference(x, 3, weight))


@needs_cpu
def test_small_tensors_on_a_cpu_go_to_plain_torch_and_large_ones_do_not():
    large = torch.zeros(2, 16, 128, 128)
    form, none = normalisation.Form("group_norm_silu", 2, 1e-5, True), normalisation.Parameters()
    assert WORTHWHILE(form, large, none) and not WORTHWHILE(form, large[:, :, :4, :4], none)
    modulated = none._replace(scale=torch.zeros(2, 16))
    assert WORTHWHILE(form, large[:, :, :8], modulated) and not WORTHWHILE(form, large[:, :, :8], none)
    learning = large[:, :, :64].requires_grad_()
    assert WORTHWHILE(form, learning, modulated) and not WORTHWHILE(form, learning, none)

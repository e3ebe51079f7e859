"""layer_norm_modulate and rms_norm_modulate: values and derivatives against float64 and torch's own operations."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import fewstep_kernels as fk
from fewstep_kernels import backends, layer_norm_modulate, normalisation, rms_norm_modulate
from fewstep_kernels.norm_modulate import layer_norm_modulate_reference, rms_norm_modulate_reference
from tests.kernels.normalisation_cases import (
    OURS,
    assert_as_accurate,
    double,
    inputs,
    nan_filled_allocations,
    row,
    row_torch,
    row_torch_own,
    with_gradients,
)

REFERENCES = {"layer": layer_norm_modulate_reference, "rms": rms_norm_modulate_reference}
KINDS = pytest.mark.parametrize("kind", ("layer", "rms"))
SMALL = (2, 3, 7)
needs_cpu = pytest.mark.skipif(
    fk.backend("layer_norm_modulate", "cpu") != "cpu", reason="libfewstep_cpu.so was not built"
)


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """The fast backend serves the small tensors of these tests too."""
    monkeypatch.setattr(normalisation, "worthwhile", lambda form, x, given: True)


def given(shape, dtype=torch.float32, parameter_dtype=torch.float32, seed=0):
    return tuple(inputs(shape, shape[-1], dtype, parameter_dtype, seed)[:5])


def close(left, right):
    # float32 inside ours, float64 in the truth; values below about 10
    torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-4, check_dtype=False)


@KINDS
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("shape", ((2, 7, 63), (1, 3, 500), (3, 1, 1), (2, 5, 2500), (40, 8)), ids=str)
def test_errors_are_near_torchs_in_the_same_dtype(kind, shape, dtype, monkeypatch):
    tensors = given(shape, dtype, dtype)
    gradient = torch.randn(shape, dtype=torch.float64).to(dtype)
    truth = with_gradients(row_torch(kind), double(tensors), gradient.double())
    torchs = with_gradients(row_torch_own(kind), tensors, gradient)
    with monkeypatch.context() as patch:
        nan_filled_allocations(patch)
        ours = with_gradients(row(kind), tensors, gradient)
    assert_as_accurate(ours, torchs, truth, gradient)
    assert ours[0].dtype == dtype


@KINDS
def test_every_parameter_may_be_absent(kind):
    x, weight, bias, scale, shift = given((2, 5, 63))
    one, nought = torch.ones_like, torch.zeros_like
    whole = [one(weight), nought(bias), nought(scale), nought(shift)]
    for i, p in enumerate((weight, bias, scale, shift)):
        only: list = [None] * 4
        only[i], filled = p, [p if j == i else q for j, q in enumerate(whole)]
        close(row(kind)(x, *only), row_torch(kind)(x.double(), *double(filled)))
    close(OURS[kind](x, None, None), OURS[kind](x, scale * 0, shift * 0))


@KINDS
def test_float32_parameters_of_a_bfloat16_tensor(kind):
    tensors = given((2, 5, 63), torch.bfloat16)
    found = with_gradients(row(kind), tensors, torch.ones(2, 5, 63))
    assert [g.dtype for g in found] == [torch.bfloat16] * 2 + [torch.float32] * 4
    truth = row_torch(kind)(*double(tensors))
    torch.testing.assert_close(found[0].double(), truth, rtol=2**-8, atol=2**-8)  # one rounding to bfloat16


@KINDS
@pytest.mark.parametrize("shape", ((0, 3, 8), (2, 0, 8)))
def test_empty_tensors(kind, shape):
    x = torch.randn(shape, requires_grad=True)
    scale = torch.zeros(shape[0], 8, requires_grad=True)
    y = OURS[kind](x, scale, scale)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape and scale.grad.abs().sum() == 0


@KINDS
def test_a_transposed_view_and_more_dimensions(kind):
    x, weight, bias, scale, shift = given((2, 5, 6, 7))
    turned = x.transpose(1, 2)
    close(row(kind)(turned, weight, bias, scale, shift), row(kind)(x, weight, bias, scale, shift).transpose(1, 2))


@needs_cpu
@KINDS
def test_the_number_of_threads_changes_no_bit(kind):
    tensors, gradient = given((3, 200, 300)), torch.randn(3, 200, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_gradients(row(kind), tensors, gradient)
        torch.set_num_threads(3)
        three = with_gradients(row(kind), tensors, gradient)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


@KINDS
def test_tangents_and_cotangents(kind):
    primals, tangents = given(SMALL), given(SMALL, seed=1)
    wide, wide_tangents = tuple(double(primals)), tuple(double(tangents))
    close(jvp(row(kind), primals, tangents), jvp(row_torch(kind), wide, wide_tangents))
    close(vjp(row(kind), *primals)[1](tangents[0]), vjp(row_torch(kind), *wide)[1](wide_tangents[0]))


@KINDS
@pytest.mark.parametrize("moving", range(5))
def test_the_tangent_of_one_argument_alone(kind, moving):
    primals, tangent = given(SMALL), given(SMALL, seed=1)[moving]

    def only(function, fixed):
        return lambda z: function(*(z if i == moving else p for i, p in enumerate(fixed)))

    found = jvp(only(row(kind), primals), (primals[moving],), (tangent,))
    close(found, jvp(only(row_torch(kind), double(primals)), (primals[moving].double(),), (tangent.double(),)))
    assert found[1].abs().max() > 0.1


@KINDS
def test_gradient_of_a_tangent(kind):
    primals, tangents = given(SMALL), given(SMALL, seed=1)

    def along(function, directions):
        return lambda *fixed: jvp(lambda *p: function(*p).sin().sum(), fixed, directions)[1]

    every = tuple(range(5))
    truth = grad(along(row_torch(kind), tuple(double(tangents))), argnums=every)(*double(primals))
    close(grad(along(row(kind), tangents), argnums=every)(*primals), truth)
    close(grad(along(row(kind), tuple(double(tangents))), argnums=every)(*double(primals)), truth)


@KINDS
def test_jacobians_forward_and_reverse(kind):
    primals, places = given(SMALL), (0, 1, 3)
    expected = jacrev(row_torch(kind), argnums=places)(*double(primals))
    close(jacfwd(row(kind), argnums=places)(*primals), expected)
    close(jacrev(row(kind), argnums=places)(*primals), expected)


@KINDS
def test_vmap_of_a_tangent_and_over_any_argument(kind):
    primals = given(SMALL)
    tangents = tuple(torch.stack([t, -2 * t, t + 1]) for t in given(SMALL, seed=1))

    def push(function, fixed, directions):
        return vmap(lambda *ts: jvp(function, fixed, ts)[1])(*directions)

    close(push(row(kind), primals, tangents), push(row_torch(kind), tuple(double(primals)), tuple(double(tangents))))
    for dims in ((0, None, None, 0, None), (1, 0, None, None, 0)):
        stacked = [p if d is None else torch.stack([p, 2 * p, p + 1], d) for p, d in zip(primals, dims)]
        close(vmap(row(kind), dims)(*stacked), vmap(row_torch(kind), dims)(*double(stacked)))


@KINDS
@pytest.mark.parametrize("wide", (False, True), ids=("float32", "float64"))
def test_gradients_twice(kind, wide):
    def second(function, fixed):
        leaves = [p.clone().requires_grad_() for p in fixed]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    primals = given(SMALL)
    found, expected = second(row(kind), double(primals) if wide else primals), second(row_torch(kind), double(primals))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3, check_dtype=False)  # sums of squares near 100


@KINDS
def test_gradcheck_in_both_modes(kind):
    wide = [t.requires_grad_() for t in double(given((2, 2, 4)))]
    assert torch.autograd.gradcheck(row(kind), wide, check_forward_ad=True)


@needs_cpu
@KINDS
def test_the_raw_operators_pass_opcheck(kind):
    x, weight, bias, scale, shift = given(SMALL)
    parameters, options, raw = (weight, bias, scale, shift, None), (0, 1e-5, False), torch.ops.fewstep_kernels
    forward = getattr(raw, f"_{kind}_norm_modulate").default
    torch.library.opcheck(forward, (x, *parameters, *options))
    _, mean, rstd = forward(x, *parameters, *options)
    backward, tangent = (getattr(raw, f"_{kind}_norm_modulate_{what}").default for what in ("backward", "tangent"))
    torch.library.opcheck(backward, (x, x, mean, rstd, *parameters, *options))
    torch.library.opcheck(tangent, (x, x, *parameters, scale, shift, None, *options))
    with pytest.raises(RuntimeError, match="has no derivatives"):
        forward(x.clone().requires_grad_(), *parameters, *options)


def test_one_graph_under_a_compiler():
    def pushed(*fixed):
        return jvp(row("layer"), fixed, fixed)

    primals = given(SMALL)
    compiled = torch.compile(pushed, fullgraph=True, backend="aot_eager")
    close(compiled(*primals), jvp(row_torch("layer"), tuple(double(primals)), tuple(double(primals))))


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: layer_norm_modulate(torch.zeros(2, 3).long(), None, None), "int64"),
        (lambda: layer_norm_modulate(torch.zeros(3), None, None), r"\[B, ..., D\]"),
        (
            lambda: rms_norm_modulate(torch.zeros(2, 3, 4), torch.ones(4), None),
            r"scale as a floating-point tensor \[2, 4\]",
        ),
        (lambda: rms_norm_modulate(torch.zeros(2, 3, 4), None, None, torch.ones(3)), r"weight .* \[4\]; got .* \[3\]"),
    ),
)
def test_what_does_not_fit_is_said_in_one_sentence(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@KINDS
def test_the_reference_is_what_is_computed_and_what_runs_in_float64(kind):
    x, weight, bias, scale, shift = given((2, 5, 63))
    of_rows, reference = OURS[kind], REFERENCES[kind]
    with backends.asking("reference"):
        assert torch.equal(of_rows(x, scale, shift, weight, bias), reference(x, scale, shift, weight, bias))
    assert torch.equal(of_rows(x.double(), scale, None, eps=0.1), reference(x.double(), scale, None, eps=0.1))
    truth = row_torch(kind)(*double((x, weight, bias, scale, shift)))
    found = reference(x.double(), scale, shift, weight, bias, eps=1e-5)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)  # float64 sums in another order

"""What the tests of the normalisation pairs share: inputs, float64 truth, and torch's own operations in one dtype."""

import torch
from torch.nn import functional

from fewstep_kernels import group_norm_silu, layer_norm_modulate, rms_norm_modulate

OURS = {"layer": layer_norm_modulate, "rms": rms_norm_modulate}
NAMES = ("x", "weight", "bias", "scale", "shift", "input_shift")


def inputs(shape, channels, dtype=torch.float32, parameter_dtype=torch.float32, seed=0, last=False):
    """x [B, ...] away from zero mean, weight, bias [C], scale, shift, input_shift [B, C] (halves of one tensor)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x = (draw(*shape) + 0.5).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    scale, shift, added = draw(shape[0], 3 * channels).to(parameter_dtype).chunk(3, 1)
    return [x, *(draw(channels).to(parameter_dtype) for _ in range(2)), scale, shift, added]


def group(groups, activation="silu"):
    """Our operator as a function of the six tensors."""

    def call(x, weight, bias, scale, shift, added):
        options = {"scale": scale, "shift": shift, "input_shift": added, "activation": activation}
        return group_norm_silu(x, groups, weight, bias, **options)

    return call


def group_torch(groups, activation="silu"):
    """The same in torch's own operations, in the dtype of its inputs."""

    def call(x, weight, bias, scale, shift, added):
        positions = (..., *(None,) * (x.ndim - 2))
        u = torch.group_norm(x + added[positions], groups, weight, bias, 1e-5)
        u = u * (1 + scale[positions]) + shift[positions]
        return functional.silu(u) if activation else u

    return call


def row(kind):
    def call(x, weight, bias, scale, shift):
        return OURS[kind](x, scale, shift, weight, bias, 1e-5)

    return call


def row_torch(kind):
    """Float64 truth for rows, written out: the gradient of torch.nn.functional.layer_norm's own tangent is wrong."""

    def call(x, weight, bias, scale, shift):
        rows = (slice(None), *(None,) * (x.ndim - 2))
        z = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        u = z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias
        return u * (1 + scale[rows]) + shift[rows]

    return call


def row_torch_own(kind):
    """The same in torch's own operations, in the dtype of its inputs."""

    def call(x, weight, bias, scale, shift):
        width, rows = x.shape[-1:], (slice(None), *(None,) * (x.ndim - 2))
        if kind == "layer":
            u = functional.layer_norm(x, width, weight, bias)
        else:
            u = functional.rms_norm(x, width, weight, 1e-5) + bias
        return u * (1 + scale[rows]) + shift[rows]

    return call


def double(tensors):
    return [t.double().contiguous() for t in tensors]  # torch's group_norm has no tangent for channels-last tensors


def with_gradients(function, tensors, gradient):
    """The output and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(y.dtype))]


def assert_as_accurate(ours, torchs, truth, gradient):
    """At most 2x (output) and 3x (gradients) torch's own error, beyond a few roundings of the largest value: of the
    result's own, or of the gradient that came in, from which SiLU's slope and the projection cancel."""
    for name, a, b, t in zip(("y", *NAMES), ours, torchs, truth, strict=False):
        error, allowed = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        # torch's error may be nil by luck on a small tensor: 4 roundings of the largest value always pass
        largest = t.abs().max() if name == "y" else torch.maximum(t.abs().max(), gradient.abs().max().double())
        floor = 4 * torch.finfo(a.dtype).eps * largest
        assert torch.isfinite(a).all(), name
        assert error <= (2 if name == "y" else 3) * allowed + floor, (name, error, allowed, a.dtype)


def nan_filled_allocations(monkeypatch):
    """Every tensor that torch.empty_like or new_empty makes starts as NaN."""
    like, new = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new(*a, **k).fill_(float("nan")))

"""Methods that train through a tangent need its gradient, which torch's layer_norm gets wrong (torch 2.13)."""

import pytest
import torch

from fewstep import nets

CONFIGS = {
    "dit": {"channels": 2, "patch": 4, "width": 32, "depth": 2, "heads": 2},
    "unet": {"channels": 2, "widths": [16, 32], "embedding": 32},
    "mlp": {"dim": 128, "width": 32},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_of_the_tangent_is_its_derivative(name):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    net = nets.build({"name": name, "classes": 10, **CONFIGS[name]}).double()
    parameters = {key: p.detach() + 0.05 * draw(*p.shape) for key, p in net.named_parameters()}  # a fresh net is 0
    x, direction, cotangent, step = (draw(3, 2, 8, 8) for _ in range(4))
    steps = {key: draw(*p.shape) for key, p in parameters.items()}
    t, label = torch.linspace(-1.5, 1.1, 3, dtype=torch.float64), torch.arange(3) * 5

    def energy(x, parameters):
        def answer(a, b):
            return torch.func.functional_call(net, parameters, (a, b, label))

        return (torch.func.jvp(answer, (x, t), (direction, torch.full_like(t, 0.7)))[1] * cotangent).sum()

    h = 1e-6  # central difference: error h^2 times third derivatives of some 1e5, rounding 1e-14 / h
    of_x, of_parameters = torch.func.grad(energy, (0, 1))(x, parameters)
    difference = (energy(x + h * step, parameters) - energy(x - h * step, parameters)) / (2 * h)
    torch.testing.assert_close((of_x * step).sum(), difference, rtol=1e-5, atol=1e-6)
    moved = [energy(x, {key: p + sign * h * steps[key] for key, p in parameters.items()}) for sign in (1, -1)]
    along = sum((of_parameters[key] * steps[key]).sum() for key in parameters)
    torch.testing.assert_close(along, (moved[0] - moved[1]) / (2 * h), rtol=1e-5, atol=1e-6)

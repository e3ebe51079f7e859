"""Small runs for the tests of training: points or digits, tiny networks, a teacher with random weights."""

import copy
from pathlib import Path

import torch

import fewstep_kernels as fk
from fewstep import config, nets
from fewstep.diffusion import prediction, schedules
from fewstep.diffusion.denoiser import Denoiser
from fewstep.methods import Batch

METHODS = {
    "consistency_distillation": {"name": "consistency_distillation", "target_decay": 0.9, "nodes": 8},
    "dmd2": {"name": "dmd2", "critic_updates": 2, "steps": [1, 2]},
    "adapted_dmd2": {"name": "dmd2", "critic_updates": 2, "steps": [1, 2]},
}
ADAPTERS = {"adapted_dmd2": {"student": {"rank": 4}, "critic": {"rank": 2, "alpha": 4.0, "targets": ["0", "2"]}}}
CLIPS = {
    "consistency_distillation": 0.05,
    "dmd2": 2e-4,
    "adapted_dmd2": 2e-5,
}  # below every gradient norm of the student in these runs


def recipe(output: Path, method: dict | str = "consistency_distillation", **train) -> config.Recipe:
    """A distillation of `teacher()`; `train` overrides the section of that name."""
    settings = {
        "updates": 4,
        "optimizer": {"lr": 1e-3},
        "clip": CLIPS.get(method, 1.0) if isinstance(method, str) else 1.0,
        "log_every": 1,
        "checkpoint_every": 0,
        "ema": {"decay": 0.9},
        "device": "cpu",
        **train,
    }
    content = {
        "name": "small",
        "teacher": "given",
        "method": METHODS[method] if isinstance(method, str) else method,
        "adapters": ADAPTERS.get(method, {}) if isinstance(method, str) else {},
        "data": {"batch_size": 16},
        "train": settings,
        "output": str(output),
    }
    return config.from_dict(content)


def teacher(width: int = 16) -> Denoiser:
    """An EDM teacher of 8x8 digits with seeded weights, the last layer too."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = nets.build({"name": "mlp", "dim": 64, "width": width, "depth": 2, "classes": 10})
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return Denoiser(net, schedules.get("edm"), prediction.get("edm", sigma_data=0.5)).requires_grad_(False).eval()


class Digits:
    """Images [B, 1, 8, 8] drawn by sample number, this rank's slots of each global batch."""

    image_shape = (1, 8, 8)
    classes = 10

    def __init__(self, batch_size: int = 16, rank: int = 0, world: int = 1, fault: int | None = None) -> None:
        self.batch_size, self.rank, self.world, self.fault = batch_size, rank, world, fault
        self.step = 0

    def __next__(self) -> Batch:
        share = self.batch_size // self.world
        index = self.step * self.batch_size + self.rank * share + torch.arange(share)
        x0 = fk.normal(index, self.image_shape, stream=9).tanh()
        if self.step == self.fault:
            x0 = x0 * float("nan")
        self.step += 1
        return Batch(index=index, x0=x0, cond=index % 10, null=torch.full_like(index, 10))

    def state(self) -> dict:
        return {"step": self.step}

    def load_state(self, state: dict) -> None:
        self.step = state["step"]


def weights(trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Every network's whole weights, copied."""
    return {name: copy.deepcopy(trainer.strategy.gather(module)) for name, module in trainer.modules.items()}

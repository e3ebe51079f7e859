"""Artefacts with random weights, small enough to run everywhere.

What makes them is imported when one is asked for: the kernels' tests need torch alone.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep import host

host.prepare()  # before torch starts its threads

import pytest
import torch

# What a script starts in its background, or nohup, ignores these from birth, and so would all that tests start.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

if TYPE_CHECKING:
    from fewstep.diffusion.denoiser import Denoiser

SHAPE = (1, 8, 8)
CLASSES = 10


def tiny_denoiser(boundary: float | None = None) -> Denoiser:
    """A class-conditional EDM denoiser whose weights are all random (a fresh net's last layer is zero)."""
    from fewstep import nets
    from fewstep.diffusion import schedules
    from fewstep.diffusion.denoiser import Denoiser
    from fewstep.diffusion.prediction import Prediction

    net = nets.build(
        {"name": "dit", "channels": 1, "image_size": 8, "width": 32, "depth": 1, "heads": 2, "classes": CLASSES}
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return Denoiser(net, schedules.get("edm"), Prediction("edm", sigma_data=0.5, boundary=boundary))


@pytest.fixture(autouse=True)
def same_numbers_every_run() -> None:
    """Whatever a test draws without a generator of its own is the same in every run and order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multistep consistency student for 1, 2 and 4 steps."""
    from fewstep import artefact, solvers

    denoiser = tiny_denoiser(boundary=0.002)
    plans = {
        steps: solvers.plan("consistency", denoiser.schedule, steps, prediction=denoiser.prediction)
        for steps in (1, 2, 4)
    }
    return artefact.save(
        tmp_path_factory.mktemp("artefacts") / "student",
        denoiser=denoiser,
        plans=plans,
        image_shape=SHAPE,
        classes=CLASSES,
        provenance={"method": "none", "seed": 0},
    )


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that records Euler at 8 steps."""
    from fewstep import artefact, solvers

    denoiser = tiny_denoiser()
    plan = solvers.plan("euler", denoiser.schedule, 8, prediction=denoiser.prediction)
    return artefact.save(
        tmp_path_factory.mktemp("artefacts") / "teacher",
        denoiser=denoiser,
        plans={8: plan},
        image_shape=SHAPE,
        classes=CLASSES,
        provenance={"method": "denoising"},
        kind="teacher",
    )


@pytest.fixture(scope="session")
def graph(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student at 4 steps, three of them stochastic, as ONNX."""
    from fewstep.export.onnx import export_onnx

    return export_onnx(student_folder, tmp_path_factory.mktemp("onnx") / "student.onnx", steps=4)

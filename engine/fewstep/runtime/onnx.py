"""Running a sampler in ONNX Runtime: network and solver become ONE graph of standard ONNX operators.

    noise      float32 [B, 1 + S, C, H, W]   standard normal: the start, then one slot for each stochastic stage
    condition  int64 [B]                     a class, or the number of classes for none; absent without classes
    negative_k int64 [B]                     likewise, for each negative of perpendicular guidance
    image      float32 [B, C, H, W]

B is free. Networks of further roles that a plan names are in the graph.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fewstep.errors import UserError
from fewstep.runtime.given import Takes
from fewstep.runtime.sampler import Sampler
from fewstep.runtime.student import Student
from fewstep.solvers import Plan

OPSET = 20
CLASSES = "fewstep.classes"  # where a graph says how many it knows
NEGATIVE = "negative_"
LARGEST_BATCH = 65536


class OnnxSampler:
    """An exported graph in ONNX Runtime on the CPU. UserError where the package or the file is missing or unfit."""

    def __init__(self, model: str | os.PathLike[str], threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("running an ONNX graph needs a package: pip install onnxruntime.") from error
        if not Path(model).is_file():
            raise UserError(f"there is no ONNX file {str(model)!r}; write one with fewstep export --onnx.")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise UserError(f"threads is {threads!r}, it must be a whole number from 1, or None for torch's own.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        try:
            self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class of their own
            reason = str(error).splitlines()[0]
            raise UserError(f"ONNX Runtime cannot load {str(model)!r} ({reason}); export it again.") from error
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.takes = self._takes()

    def _takes(self) -> Takes | None:
        """What the graph is sampled from; None where it is no sampler's."""
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        try:
            classes = json.loads(self.metadata.get(CLASSES, "null"))
        except ValueError:
            return None
        sizes = shapes.get("noise", [])[1:]
        conditional = type(classes) is int and classes > 0
        if not sizes or not all(type(size) is int for size in sizes) or ("condition" in shapes) != conditional:
            return None
        return Takes(tuple(sizes[1:]), sizes[0] - 1, classes, none=True, who="graph")

    def __call__(
        self,
        noise: Tensor,
        condition: int | Sequence[int] | Tensor | None = None,
        negatives: Sequence[int | Sequence[int] | Tensor] | None = (),
    ) -> Tensor:
        """Images [B, C, H, W] on the CPU, from noise [B, 1 + S, C, H, W] of any floating dtype.

        condition: a class, or one for each image, the number of classes meaning none; left out without classes.
        negatives: likewise, one for each that the graph's guidance steers away from.
        """
        if self.takes is None:
            raise UserError(f"this ONNX graph takes {', '.join(self.inputs)} and is no sampler's; export one again.")
        feed = {"noise": self.takes.noise(noise)}
        if condition is not None:
            feed["condition"] = self.takes.labels(condition, len(noise), "condition")
        elif self.takes.classes is not None:
            raise UserError(
                f"this ONNX graph needs a class for each image; give condition ({self.takes.classes} for none)."
            )
        wanted = [name for name in self.inputs if name.startswith(NEGATIVE)]
        given = () if negatives is None else negatives
        if len(given) != len(wanted):
            raise UserError(f"this ONNX graph takes {len(wanted)} negatives and got {len(given)}; give that many.")
        for name, away in zip(wanted, given):
            feed[name] = self.takes.labels(away, len(noise), name)
        return self.run(feed)

    def run(self, feed: Mapping[str, Tensor]) -> Tensor:
        """The graph's answer; floating inputs are given as float32."""
        arrays = {
            name: (x.detach().float() if x.is_floating_point() else x.detach()).cpu().numpy()
            for name, x in feed.items()
        }
        try:
            return torch.from_numpy(self.session.run(None, arrays)[0])
        except Exception as error:  # its exceptions share no base class of their own
            reason = str(error).splitlines()[0]
            raise UserError(f"ONNX Runtime cannot run this graph ({reason}); export it again.") from error


class OnnxNetwork(nn.Module):
    """A network whose evaluations run in ONNX Runtime, for plans too long to unroll: any executor can drive it."""

    def __init__(self, network: nn.Module, model: str | os.PathLike[str]) -> None:
        super().__init__()
        self.null = network.null
        self.graph = OnnxSampler(model)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        feed = {"x": x, "t": t, **({} if cond is None else {"cond": cond})}
        return self.graph.run(feed).to(x.device)


def convert(student: Student, plan: Plan, others: Mapping[str, nn.Module] | None = None) -> Any:
    """The sampler as a `torch.onnx.ONNXProgram` of opset 20; others: the networks of the plan's further roles.

    Raises UserError where the exporter's packages are missing, a network cannot be traced, or the program holds an
    operator that ONNX does not know.
    """
    inputs = list(_inputs(student, plan))
    names = [name for name in inputs if name != "negatives"]
    names += [f"{NEGATIVE}{number}" for number in range(plan.negatives)]
    converted = _converted(exported_program(student, plan, others), names, "image")
    converted.model.metadata_props[CLASSES] = json.dumps(student.classes)
    return converted


def convert_network(student: Student) -> Any:
    """The bare network, `x` [B, C, H, W], `t` [B], int64 `cond` [B] to `output`, as a `torch.onnx.ONNXProgram`."""
    batch = Dim("batch", min=1, max=LARGEST_BATCH)
    arguments = {
        "x": torch.zeros((2, *student.image_shape), device=student.device),
        "t": torch.zeros(2, device=student.device),
    }
    if student.classes is not None:
        arguments["cond"] = torch.zeros(2, dtype=torch.int64, device=student.device)
    program = _exported(student.denoiser.net, arguments, {name: {0: batch} for name in arguments})
    return _converted(program, list(arguments), "output")


def _converted(program: ExportedProgram, names: list[str], output: str) -> Any:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX export needs two packages: pip install onnx onnxscript.") from error
    opaque = opaque_operators(program)
    if opaque:
        raise UserError(f"the operators {', '.join(opaque)} do not exist in ONNX; build the network from torch's own.")
    with _quiet():
        return torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names, output_names=[output], verbose=False
        )


def exported_program(student: Student, plan: Plan, others: Mapping[str, nn.Module] | None = None) -> ExportedProgram:
    """The sampler as a torch.export program with a free batch."""
    free = {0: Dim("batch", min=1, max=LARGEST_BATCH)}
    arguments = _inputs(student, plan)
    shapes = {name: (free,) * len(x) if isinstance(x, tuple) else free for name, x in arguments.items()}
    sampler = Sampler(student.denoiser, plan, others).eval()
    return _exported(sampler, arguments, shapes)


def _inputs(student: Student, plan: Plan) -> dict[str, Any]:
    """What the exporter traces the sampler with, two images of zeros, by `Sampler.forward`'s names."""
    found: dict[str, Any] = {
        "noise": torch.zeros((2, 1 + plan.stochastic_stages, *student.image_shape), device=student.device)
    }
    if student.classes is not None:
        label = torch.zeros(2, dtype=torch.int64, device=student.device)
        found["condition"] = label
        if plan.negatives:
            found["negatives"] = tuple(label.clone() for _ in range(plan.negatives))
    return found


def _exported(module: nn.Module, arguments: Mapping[str, Any], shapes: Mapping[str, Any]) -> ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, (), dict(arguments), dynamic_shapes=dict(shapes))
    except UserError:
        raise
    except Exception as error:  # a compiler's, a symbolic shape's or the network's own
        reason = " ".join(str(error).partition("\n")[0].split())[:200].rstrip(".")
        raise UserError(
            f"this sampler cannot be exported ({type(error).__name__}: {reason}); its networks must be graphs of "
            "torch's own operators for any batch."
        ) from error


def opaque_operators(program: ExportedProgram) -> list[str]:
    """Names of operators in the program (its sub-graphs too) that are not torch's own: there must be none."""
    targets = {
        node.target
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
    }
    return sorted(str(target) for target in targets if target.namespace not in {"aten", "prim"})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on stdout, in its log and in warnings about packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

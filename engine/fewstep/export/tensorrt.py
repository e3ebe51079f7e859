"""A TensorRT engine from an exported ONNX graph, built ahead of time on a machine with or without a GPU."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import UserError, choose
from fewstep.export import tensorrt_backend

ARCHITECTURES = ("SM80", "SM86", "SM89", "SM120")


@dataclass(frozen=True)
class Engine:
    """A built engine: its file, size, what built it and for what. `log` holds the builder's warnings."""

    path: Path
    bytes: int
    backend: str
    version: str
    seconds: float
    architectures: tuple[str, ...]
    batches: tuple[int, int, int]
    log: tuple[str, ...]


def build_engine(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    batches: tuple[int, int, int] = (1, 16, 64),
    architectures: Sequence[str] = ARCHITECTURES,
) -> Engine:
    """Build an engine from the ONNX file `model` for (least, best, most) batch sizes and write it to `out`.

    Architectures are those TensorRT-RTX can build for; NVIDIA TensorRT builds for the GPU that is present.
    Raises UserError: no TensorRT, a file that does not parse (naming the node), a path that cannot be written.
    """
    name, trt = tensorrt_backend.load()
    source, target = Path(model), Path(out)
    if not source.is_file():
        raise UserError(f"there is no ONNX file {str(source)!r}; write one with fewstep export --onnx.")
    whole = isinstance(batches, (tuple, list)) and all(type(size) is int for size in batches)
    if not whole or len(batches) != 3 or not 1 <= batches[0] <= batches[1] <= batches[2]:
        raise UserError(f"batches are {batches!r}, they must be whole numbers that rise from 1: least, best, most.")
    least, best, most = batches
    log = _logger(trt)
    begun = time.perf_counter()
    builder = trt.Builder(log)
    network = _parse(trt, builder, source, log)
    config = builder.create_builder_config()
    built_for = _set_architectures(trt, config, architectures)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        rest = tuple(value.shape)[1:]
        profile.set_shape(value.name, (least, *rest), (best, *rest), (most, *rest))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise UserError(f"TensorRT could not build {source.name!r} ({log.last_error()}); check the GPU and the graph.")
    content = bytes(serialized)
    seconds = time.perf_counter() - begun
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        os.replace(beside, target)
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r} ({error.strerror}); give a writable path.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
    return Engine(target, len(content), name, trt.__version__, seconds, built_for, (least, best, most), log.warnings())


def _parse(trt: Any, builder: Any, source: Path, log: Any) -> Any:
    """The network of an ONNX file; its types are the graph's own."""
    flags = 0
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        if parser.num_errors == 0:
            raise UserError(f"TensorRT cannot parse {source.name!r} ({log.last_error()}); export it again.")
        error = parser.get_error(0)
        node = error.node_name() or f"number {error.node()}"
        reason = " ".join(str(error.desc()).split()).rstrip(".")
        raise UserError(
            f"TensorRT cannot parse {source.name!r} at node {node!r} ({error.node_operator() or 'unknown operator'}): "
            f"{reason}; export it again or report this operator."
        )
    for index in range(network.num_inputs):
        value = network.get_input(index)
        if value.shape[0] != -1:
            raise UserError(f"{source.name!r} fixes the batch of {value.name!r} to {value.shape[0]}; export it again.")
    return network


def _set_architectures(trt: Any, config: Any, architectures: Sequence[str]) -> tuple[str, ...]:
    if not tensorrt_backend.builds_ahead_of_time(trt):
        import torch

        if not torch.cuda.is_available():
            raise UserError("this TensorRT builds only for a GPU that is present; install tensorrt-rtx-cu13-bindings.")
        major, minor = torch.cuda.get_device_capability()
        return (f"SM{major}{minor}",)
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    if isinstance(architectures, str) or not architectures:
        raise choose("list of architectures", architectures, known)
    config.num_compute_capabilities = len(architectures)
    for index, architecture in enumerate(architectures):
        if architecture not in known:
            raise choose("architecture", architecture, known)
        config.set_compute_capability(getattr(trt.ComputeCapability, architecture), index)
    return tuple(architectures)


def _logger(trt: Any) -> Any:
    """A TensorRT logger that keeps what it is told instead of printing it."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[tuple[int, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.WARNING):
                self.kept.append((int(severity), " ".join(message.split())))

        def last_error(self) -> str:
            errors = [message for severity, message in self.kept if severity <= int(trt.ILogger.ERROR)]
            return errors[-1] if errors else "no reason given"

        def warnings(self) -> tuple[str, ...]:
            return tuple(dict.fromkeys(message for _, message in self.kept))

    return Log()

"""The C libraries built from csrc/, loaded with ctypes. csrc/include/fewstep_kernels.h lists every function."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 4
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
BOOL = 5  # in masks
SCALAR_DTYPES = {torch.float32: 0, torch.float64: 3, torch.int64: 4}
_int, _double, _pointer = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "lincomb": [_pointer],
    "normal": [_pointer, _int, _int, _int, _pointer, _int],
    "uniform": [_pointer, _int, _int, _int, _pointer, _int],
    "ema_update": [_int, _int, _pointer, _pointer, _pointer, _pointer],
    "multi_tensor_l2norm": [_int, _pointer, _pointer, _pointer, _int],
    "adamw_ema_step": [_int, _int, _pointer, _pointer, _pointer, _pointer],
    "gram": [_int, _int, _int, _int, _int, _pointer, _pointer, _pointer, _pointer, _pointer, _int],
    "distance": [_int, _double, _int, _int, _pointer, _double, _double, _pointer, _int],
    "distance_gradient": [_int, _double, _int, _int, _pointer, _pointer, _int],
    "threshold": [_int, _int, _pointer, _double, _double, _double],
    "normalise": [_pointer],
    "normalise_backward": [_pointer],
    "normalise_tangent": [_pointer],
    "attention_jvp": [_pointer],
}
SEEDS, HEAD = 4, 11  # places in fewstep_lincomb, in int64 numbers: of the seeds' address, of the first tensor
OVERLAP, NOT_PLAIN, DONE = 2, 3, 4  # what the functions for a lincomb answer beside 0
_BLANK = array("q", [0])
_PLAIN = (Tensor, torch.nn.Parameter)
_HERE = contextlib.nullcontext()
_threads = torch.get_num_threads
_ON_CUDA = ("lincomb", "normal", "uniform", "ema_update", "multi_tensor_l2norm", "adamw_ema_step")


class Library:
    """One shared library: `functions` by operator name, or `missing`, one sentence that says why there are none.

    look, look_at_averages: fewstep_cpu_look.., None where torch does not let C code read its tensors.
    """

    def __init__(self, kind: str, loader: type[ctypes.CDLL], last: type, names: tuple[str, ...]) -> None:
        path = Path(__file__).parent / "_lib" / f"libfewstep_{kind}.so"
        self.functions: dict[str, ctypes._NamedFuncPointer] = {}
        self.missing = ""
        self.instructions = ""
        self.look: ctypes._NamedFuncPointer | None = None
        self.look_at_averages: ctypes._NamedFuncPointer | None = None
        if not path.is_file():
            compiler = "g++" if kind == "cpu" else "nvcc"
            self.missing = f"{path.name} was not built: install {compiler} and run pip install again"
            return
        try:
            library = loader(str(path))
            if getattr(library, f"fewstep_{kind}_abi")() != ABI:
                self.missing = f"{path.name} is from another version: run pip install again"
                return
            for name in names:
                function = getattr(library, f"fewstep_{kind}_{name}")
                function.argtypes, function.restype = [*_SIGNATURES[name], last], ctypes.c_int
                self.functions[name] = function
            if kind == "cpu":
                library.fewstep_cpu_instructions.restype = ctypes.c_char_p
                self.instructions = library.fewstep_cpu_instructions().decode()
                self.functions["overlaps"], library.fewstep_cpu_overlaps.argtypes = (
                    library.fewstep_cpu_overlaps,
                    [_pointer],
                )
                library.fewstep_cpu_exchange.argtypes = [_pointer]
                if library.fewstep_cpu_exchange(_exchange_table()) == 0:
                    holding = ctypes.PyDLL(str(path))  # the interpreter lock, while Python's objects are read
                    self.look, self.look_at_averages = holding.fewstep_cpu_look, holding.fewstep_cpu_look_at_averages
                    self.look.argtypes = [_pointer, _pointer, _int]
                    self.look_at_averages.argtypes = [_int, _int, _pointer, _pointer, _pointer]
        except (OSError, AttributeError) as error:
            self.missing = f"{path.name} does not load: {error}"


def _exchange_table() -> int | None:
    """The address of the functions by which torch (2.10 and later) lets C code read its tensors: DLPack's."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    pointer = ctypes.PYFUNCTYPE(_pointer, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    return None if capsule is None else pointer(capsule, b"dlpack_exchange_api")


@functools.cache
def cpu() -> Library:
    """CDLL: the calls release the interpreter lock."""
    return Library("cpu", ctypes.CDLL, _int, tuple(_SIGNATURES))


@functools.cache
def cuda() -> Library:
    """PyDLL: a launch takes a few microseconds, less than handing the interpreter lock over and back."""
    return Library("cuda", ctypes.PyDLL, _pointer, _ON_CUDA)


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes a GPU tensor's device the current one, where it is not."""
    index = tensor.get_device()
    if index < 0 or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


def run(name: str, tensor: Tensor, *arguments: object) -> int:
    """The code an operator of the library for the tensor's device answers with.

    Its last argument, which this adds, is the threads to use or the current stream.
    """
    if tensor.is_cuda:
        # Not yet run on a GPU: compiled and tested for its host side only.
        with on_device_of(tensor):
            return cuda().functions[name](*arguments, torch._C._cuda_getCurrentRawStream(tensor.get_device()))
    return cpu().functions[name](*arguments, _threads())


def check(name: str, tensor: Tensor, code: int) -> None:
    """Raises RuntimeError for a code that is not 0."""
    if code:
        raise RuntimeError(f"fewstep_{tensor.device.type}_{name} failed with code {code}.")


def call(name: str, tensor: Tensor, *arguments: object) -> None:
    """Run an operator in the library for the tensor's device. Raises RuntimeError where it answers with a code."""
    check(name, tensor, run(name, tensor, *arguments))


class _Scalar(ctypes.Structure):
    _fields_ = (("value", ctypes.c_double), ("address", _int), ("dtype", _int))


def scalars(values: Sequence[float | Tensor]) -> ctypes.Array:
    """Numbers as the C functions take them: floats by value, 0-d tensors (float32, float64, int64) by address.

    Raises TypeError for a tensor without memory, such as a fake one outside its mode.
    """
    array = (_Scalar * len(values))()
    for slot, value in zip(array, values):
        if isinstance(value, Tensor):
            if type(value) not in _PLAIN or not value.data_ptr():
                raise TypeError(
                    f"a number on the device must be a torch.Tensor with memory; got {type(value).__name__}."
                )
            if value.is_neg():  # by a bit, which is not in its memory
                slot.value = float(value)
                continue
            slot.address, slot.dtype = value.data_ptr(), SCALAR_DTYPES[value.dtype]
        else:
            slot.value = value
    return array


@functools.lru_cache(256)
def _packer(length: int) -> struct.Struct:
    return struct.Struct(f"{length}q")


def table(values: Sequence[int]) -> bytes:
    """int64 numbers as the C functions read them: an argument by itself, good for one call."""
    return _packer(len(values)).pack(*values)


def look(
    tensors: Sequence[Tensor], inputs: int, outputs: int, noise: int, noise_stream: int, small: int
) -> tuple[int, array[int]]:
    """(fewstep_cpu_look's code, the job of a lincomb where that is 0) of plain tensors, looked at once.

    tensors: inputs, outputs, coefficients and, with noise = 1, seeds. A job of no more than `small` products on the
    CPU is run at once, and the code is DONE. Where torch lets no C code look, all are NOT_PLAIN.
    """
    job = _BLANK * (HEAD + 3 * (inputs + outputs))
    read = cpu().look
    if read is None:
        return NOT_PLAIN, job
    given = table((inputs, outputs, noise, noise_stream, *map(id, tensors)))
    try:
        return read(given, job.buffer_info()[0], small), job
    except Exception:  # torch's own, on a tensor without memory
        return NOT_PLAIN, job


def look_at_averages(
    profiles: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor], origins: Sequence[int] | None
) -> array[int] | None:
    """The table of ema_update of tensors looked at once; None where they are not plain, or C code cannot look."""
    read, count = cpu().look_at_averages, len(parameters)
    if read is None:
        return None
    objects = array("q", map(id, parameters))
    for averages in profiles:
        objects.extend(map(id, averages))
    table = _BLANK * (count * (4 + 2 * len(profiles)))
    starts = None if origins is None else array("q", origins)
    numbers = None if starts is None else starts.buffer_info()[0]
    try:
        code = read(count, len(profiles), objects.buffer_info()[0], numbers, table.buffer_info()[0])
    except Exception:  # torch's own, on a tensor without memory
        return None
    return None if code else table

"""Builds and installs `fewstep` (engine/) and `fewstep_kernels` (kernels/) with the shared libraries in csrc/.

csrc has a plain C ABI and needs only g++ (and nvcc for the CUDA half); no torch at build time. Where a compiler is
missing the installation succeeds without that library and says so: plain torch then serves those operators.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARIES = "fewstep_kernels/_lib"
# Contraction stays off: drawn noise must have the same bits on every processor.
CPU_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
CPU_FLAGS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"]
INSTRUCTIONS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=256"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
CUDA_ARCHITECTURES = ("80", "90", "100")
CUDA_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden"]


class BuildLibraries(build_ext):
    """Compiles csrc/cpu with g++ and csrc/cuda with nvcc into fewstep_kernels/_lib."""

    def run(self):
        self.built = []
        source = ROOT / "kernels" / LIBRARIES
        place = source if self.inplace else Path(self.build_lib) / LIBRARIES
        place.mkdir(parents=True, exist_ok=True)
        self._attempt("CPU", "a C++ compiler (g++)", self._build_cpu, place / "libfewstep_cpu.so")
        self._attempt("CUDA", "nvcc", self._build_cuda, place / "libfewstep_cuda.so")

    def _attempt(self, what, needs, build, target):
        try:
            build(target)
        except FileNotFoundError:
            if what == "CPU":
                self._notice(
                    f"no C++ operators: {needs} was not found, so plain torch serves the operators on the CPU (slower)."
                )
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            self._notice(
                f"no {what} operators: {needs} failed ({lines[0]}); plain torch serves in their place (slower)."
            )
        else:
            self.built.append(target)

    def _notice(self, sentence):
        print(f"fewstep: {sentence}", file=sys.stderr)

    def _build_cpu(self, target):
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
        if not compiler:
            raise FileNotFoundError("g++")
        x86 = platform.machine() in ("x86_64", "AMD64")
        flags = [*CPU_FLAGS, f"-I{CSRC / 'include'}", *(["-DFEWSTEP_X86"] if x86 else [])]
        units = []  # a file named *chunk.cpp is compiled once for each instruction set, any other once
        for path in sorted((CSRC / "cpu").glob("*.cpp")):
            if path.stem.endswith("chunk"):
                for name in INSTRUCTIONS if x86 else ["baseline"]:
                    define = f"-DFEWSTEP_CHUNK={path.stem}_{name}"
                    units.append((path, f"{path.stem}_{name}", [define, *INSTRUCTIONS[name]]))
            else:
                units.append((path, path.stem, []))
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            objects = [f"{folder}/{name}.o" for _, name, _ in units]
            commands = [
                [*compiler.split(), *flags, *extra, "-c", str(path), "-o", object_]
                for (path, _, extra), object_ in zip(units, objects)
            ]
            list(pool.map(_call, commands))
            self._place(target, [*compiler.split(), "-shared", "-fopenmp", *objects])

    def _build_cuda(self, target):
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        compiler = shutil.which("nvcc") or (f"{home}/bin/nvcc" if os.access(f"{home}/bin/nvcc", os.X_OK) else None)
        sources = sorted(str(path) for path in (CSRC / "cuda").glob("*.cu"))
        if not compiler or not sources:
            raise FileNotFoundError("nvcc")
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        targets.append(f"-gencode=arch=compute_{CUDA_ARCHITECTURES[-1]},code=compute_{CUDA_ARCHITECTURES[-1]}")
        self._place(
            target, [compiler, *CUDA_FLAGS, *targets, f"-I{CSRC / 'include'}", "-shared", "--threads", "2", *sources]
        )

    def _place(self, target, command):
        """Written beside and renamed: a process that has the old library mapped keeps it whole."""
        part = target.with_suffix(f".{os.getpid()}.part")
        try:
            _call([*command, "-o", str(part)])
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def get_outputs(self):
        return [str(path) for path in getattr(self, "built", [])]

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    """The libraries know no Python version: one wheel per platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


def _call(command):
    subprocess.run(command, check=True, capture_output=True, text=True)


EXPORT = ["onnx", "onnxscript", "onnxruntime", "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"]
EXTRAS = {
    "export": EXPORT,
    "serve": ["fastapi", "uvicorn"],
    "deepspeed": ["deepspeed"],
    "dali": ["nvidia-dali-cuda130"],
    "triton": ["triton"],
    "log": ["tensorboard"],
}
EXTRAS["test"] = [
    *(name for names in EXTRAS.values() for name in names),
    *("pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "httpx", "diffusers", "transformers"),
]

setup(
    name="fewstep",
    version="0.1.0",
    description="Distils diffusion and flow teachers into few-step students, and runs them fast",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"fewstep": "engine/fewstep", "fewstep_kernels": "kernels/fewstep_kernels"},
    packages=[*find_packages("engine", include=["fewstep*"]), *find_packages("kernels", include=["fewstep_kernels*"])],
    package_data={"": ["py.typed"], "fewstep": ["**/*.html", "**/*.css", "**/*.js", "**/*.yaml", "**/*.json"]},
    install_requires=[
        "torch>=2.10",
        "numpy",
        "scipy",
        "scikit-learn",
        "pillow",
        "pyyaml",
        "safetensors",
        "pydantic>=2",
        "tqdm",
        "matplotlib",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fewstep = fewstep.cli:main"]},
    ext_modules=[Extension("fewstep_kernels._lib", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
    zip_safe=False,
)

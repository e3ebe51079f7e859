"""Where the processes come from: torchrun (or any launcher that sets RANK), or local ones started here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import fewstep
import fewstep_kernels
from fewstep.errors import UserError
from fewstep.train import interruption
from fewstep.train.strategies.base import Strategy
from fewstep.train.strategies.single import Single

if TYPE_CHECKING:
    from fewstep.config import Recipe

STORE = "FEWSTEP_STORE"


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(recipe: Recipe) -> Strategy:
    """The strategy the recipe names, its processes joined. Raises `UserError` where they do not fit the recipe."""
    train = recipe.train
    rank, world = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched() else (0, 1)
    device = _device(train.device, int(os.environ.get("LOCAL_RANK", rank)))
    if train.strategy == "single":
        if world > 1:
            raise UserError(f"train.strategy 'single' was launched with {world} processes; set it to ddp or deepspeed.")
        return Single(device)
    if train.ranks not in (1, world):
        raise UserError(f"train.ranks is {train.ranks} but the launcher started {world} processes; make them equal.")
    if recipe.data.batch_size % (world * train.accumulate):
        raise UserError(
            f"data.batch_size {recipe.data.batch_size} is not divisible by {world} ranks x train.accumulate "
            f"{train.accumulate}; choose a multiple of {world * train.accumulate}."
        )
    _join(device, rank, world)
    if train.strategy == "ddp":
        from fewstep.train.strategies.ddp import Ddp

        return Ddp(device, rank, world)
    from fewstep.train.strategies.deepspeed import DeepSpeed

    return DeepSpeed(device, rank, world, stage=train.zero_stage, options=train.deepspeed)


def launch(recipe: Recipe, resume: bool) -> None:
    """Run the recipe in `train.ranks` local processes and wait; Ctrl-C, SIGTERM and SIGHUP are handed on to them.

    The first process speaks for all; what another has to say is shown where it is the one that failed.

    Raises SystemExit with the code of the first process that failed (which has said why), 130 after an interruption.
    """
    with tempfile.TemporaryDirectory(prefix="fewstep-") as folder:
        path = Path(folder) / "recipe.json"
        path.write_text(json.dumps(recipe.to_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "fewstep.train", str(path), *(["--resume"] if resume else [])]
        logs = [Path(folder) / f"rank{r}.log" for r in range(1, recipe.train.ranks)]
        processes = [_process(command, _environment(folder, r, recipe.train.ranks), log)
                     for r, log in enumerate([None, *logs])]  # fmt: skip

        def hand_on(number: int, _frame: Any) -> None:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        before = {
            number: signal.signal(number, hand_on)
            for number in interruption.NUMBERS
            if _main() and signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            code, rank = _wait(processes)
            if rank:
                with interruption.outliving_the_terminal():
                    print(logs[rank - 1].read_text(encoding="utf-8", errors="replace").rstrip(), file=sys.stderr)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
    if code:
        raise SystemExit(code)


def _process(command: list[str], environment: dict[str, str], log: Path | None) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as held:
        stream = held.enter_context(log.open("wb")) if log is not None else None
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=stream, stderr=stream)


def _wait(processes: list[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """(0, 0) when all end well, else the code and rank of what failed, a user's mistake (2) before anything else."""
    running = list(processes)
    while running:
        for process in list(running):
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            running.remove(process)
            if code:
                for other in running:  # the others end the same way, or are stuck waiting for this one
                    try:
                        other.wait(timeout=10)
                    except subprocess.TimeoutExpired:
                        other.kill()
                codes = [other.poll() or 0 for other in processes]
                rank = codes.index(2) if 2 in codes else processes.index(process)
                return (codes[rank] if codes[rank] > 0 else 128 - codes[rank]), rank
    return 0, 0


def _environment(folder: str, rank: int, world: int) -> dict[str, str]:
    sources = [str(Path(package.__file__ or "").resolve().parents[1]) for package in (fewstep, fewstep_kernels)]
    paths = [*sources, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world))),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        STORE: str(Path(folder) / "store"),
    }


def _join(device: torch.device, rank: int, world: int) -> None:
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {"rank": rank, "world_size": world}
    if STORE in os.environ:
        options["init_method"] = f"file://{os.environ[STORE]}"
    elif not launched():
        options["store"] = dist.HashStore()
    dist.init_process_group(backend, **options)


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is 'cuda' but torch sees no CUDA device; set it to auto or cpu.")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _main() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()

"""Both digit methods under every strategy on two gloo ranks, and resuming under ZeRO. Run by test_strategies.py."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fewstep.train import Trainer, checkpoint
from fewstep.train.strategies.ddp import Ddp
from fewstep.train.strategies.deepspeed import DeepSpeed
from tests.train import small

CPU = torch.device("cpu")
# the names of cases, and what they change of a run
CASES = {
    "ddp-consistency_distillation": {},
    "ddp-dmd2": {"accumulate": 2},
    "zero1-consistency_distillation": {},
    "zero1-dmd2": {},
    "zero2-consistency_distillation": {"accumulate": 2},
    "zero2-dmd2": {},
    "zero3-consistency_distillation": {},
    "zero3-dmd2": {"accumulate": 2},
    "ddp-adapted_dmd2": {},
    "zero2-adapted_dmd2": {},
    "zero3-adapted_dmd2": {"accumulate": 2},
}
RESUMED = ("zero2-dmd2", "zero3-dmd2", "zero3-adapted_dmd2")


def strategy(name):
    rank = dist.get_rank()
    return Ddp(CPU, rank, 2) if name == "ddp" else DeepSpeed(CPU, rank, 2, stage=int(name[-1]))


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith(("loss/", "gradient_norm/"))} for line in lines]


def trainer(folder, case, resume=False, **train):
    kind, method = case.split("-")
    home = strategy(kind)
    recipe = small.recipe(folder, method, **CASES[case], **train)
    data = small.Digits(rank=home.rank, world=2)
    return Trainer(recipe, strategy=home, teacher=small.teacher(), loader=data, resume=resume)


def held(run):
    """The share of the teacher's parameters in this rank's memory, counted by storage."""
    module = run.modules["teacher"]
    own = sum(p.numel() for p in module.parameters())
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    shards = sum(shard.numel() for shard in run.strategy.shards(list(module.parameters())))
    return {"resident": own, "shards": shards, "whole": whole}


def means_after_resuming(folder):
    """What this rank's next line of the log is to be the mean of, before and after resuming."""
    run = trainer(folder, "ddp-dmd2", log_every=100)
    for _ in range(3):
        run.iterate()
    run.save_checkpoint()
    return run.means.partial(), trainer(folder, "ddp-dmd2", resume=True).means.partial()


def main(folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['FEWSTEP_STORE']}", rank=int(os.environ["RANK"]), world_size=2
    )
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        run = trainer(folder / case, case, checkpoint_every=2)
        run.fit()
        found[case] = {"teacher": held(run)}
        if run.strategy.leads:
            found[case]["losses"] = losses(folder / case)
        if case in RESUMED:
            ended = small.weights(run)
            again = folder / f"{case}-again"
            trainer(again, case, updates=2).fit()
            go_on = trainer(again, case, resume=True)
            assert go_on.step == 2
            go_on.fit()
            resumed = small.weights(go_on)
            if run.strategy.leads:
                found[case]["unequal after resuming"] = [
                    f"{network}.{name}"
                    for network, state in ended.items()
                    for name, value in state.items()
                    if not torch.equal(value, resumed[network][name])
                ]
                parts = [checkpoint.read(place / "checkpoints", 4).parts for place in (folder / case, again)]
                found[case]["unequal states"] = [
                    f"{part}.{name}"
                    for part, tensors in parts[0].items()
                    for name, value in tensors.items()
                    if not torch.equal(value, parts[1][part][name])
                ]
                found[case]["states"] = sum(len(tensors) for tensors in parts[0].values())
    found["means"] = means_after_resuming(folder / "means")
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

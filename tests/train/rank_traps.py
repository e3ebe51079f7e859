"""The traps of sharded training, the wrong way and ours, on two gloo ranks. Run by test_traps.py.

Each function returns errors against one process on the whole batch (relative to the largest entry), or what was raised.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from fewstep.errors import UserError
from fewstep.methods import OptimizerConfig
from fewstep.train.strategies.deepspeed import DeepSpeed, Roles

CPU = torch.device("cpu")
ADAM = OptimizerConfig(lr=1e-2)
SLOW = OptimizerConfig(name="sgd", lr=1.0, betas=(0.0, 0.9))  # a step of 1 times the gradient shows the gradient itself


def net(out=4):
    return nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, out))


def nets(*outs):
    torch.manual_seed(3)
    return [net(out) for out in outs]


def data(count=1):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, 4, generator=generator) for _ in range(count)]


def mine(x):
    return x[dist.get_rank() * 4 : dist.get_rank() * 4 + 4]


def strategy(stage, **options):
    return DeepSpeed(CPU, dist.get_rank(), 2, stage=stage, options=options)


def engine(home, networks, config=SLOW, clip=None, accumulate=1):
    return home.engine(
        "e", networks, dict.fromkeys(networks, config), clip=clip, warmup=0, micro_batch=4, accumulate=accumulate
    )


def difference(home, module, reference):
    """Largest difference of weights between a sharded module and the reference, relative to the reference's change."""
    state, worst = home.gather(module), 0.0
    if home.leads:
        for name, value in reference.state_dict().items():
            worst = max(worst, (state[name] - value).abs().max().item())
    box = [worst]
    dist.broadcast_object_list(box, 0)
    return box[0]


def stepped(modules, loss):
    """The reference: one plain SGD step of rate 1 on the loss."""
    for module in modules:
        module.zero_grad()
    loss.backward()
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad


def raised(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def frozen_teacher():
    """Trap 4."""
    (teacher,) = nets(4)
    reference = copy.deepcopy(teacher)
    whole = data()[0].requires_grad_(True)
    reference(whole).square().sum().backward()
    expected = mine(whole.grad)
    home = strategy(3)
    held = home.frozen(teacher.requires_grad_(False))
    x = mine(whole.detach()).clone().requires_grad_(True)
    home.network(held).fixed(x).square().sum().backward()
    wrong = home._engines[id(held)]
    result = {
        "module": (x.grad - expected).abs().max().item(),
        "share": sum(shard.numel() for shard in home.shards(list(held.parameters())))
        / sum(p.numel() for p in reference.parameters()),
    }

    def twice():
        y = x.detach().clone().requires_grad_(True)
        (first,) = torch.autograd.grad(held(y).square().sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), y)
        z = mine(whole.detach()).clone().requires_grad_(True)
        (first,) = torch.autograd.grad(reference(z).square().sum(), z, create_graph=True)
        (expected,) = torch.autograd.grad(first.square().sum(), z)
        assert torch.allclose(second, expected, rtol=1e-4), "wrong second derivative"

    def through_engine():
        y = x.detach().clone().requires_grad_(True)
        wrong(y).square().sum().backward()
        assert torch.allclose(y.grad, expected, atol=1e-6), "wrong gradient"

    result["engine"] = raised(through_engine)
    result["twice"] = raised(twice)
    return result


def critic_in_the_students_turn(stage, way):
    """Trap 5: the student's loss goes through the critic; then the critic takes its own turn."""
    student, critic = nets(4, 4)
    plain = copy.deepcopy(student), copy.deepcopy(critic)
    (x,) = data()
    stepped(plain[:1], plain[1].requires_grad_(False)(plain[0](x)).square().mean())
    plain[1].requires_grad_(True)
    stepped(plain[1:], (plain[1](x) - x).square().mean())
    home = strategy(stage)
    ours, theirs = engine(home, {"student": student}), engine(home, {"critic": critic})
    a, b = home.network(student, ours.forward("student")), home.network(critic, theirs.forward("critic"))
    call = {"fixed": b.fixed, "bare": b.module, "engine": b}[way]

    def turns():
        ours.backward(call(a(mine(x))).square().mean(), True)
        ours.step()
        theirs.backward((b(mine(x)) - mine(x)).square().mean(), True)
        theirs.step()

    error = raised(turns)
    if error:
        return error
    return max(difference(home, student, plain[0]), difference(home, critic, plain[1]))


def bare_call(way):
    """Trap 6: two micro-batches under ZeRO-3, the trained network called through its engine or bare."""
    (student,) = nets(4)
    plain = copy.deepcopy(student)
    xs = data(2)
    stepped([plain], sum((plain(plain(x)) - x).square().mean() / 2 for x in xs))
    home = strategy(3)
    own = engine(home, {"student": student}, accumulate=2)
    call = own.forward("student") if way == "engine" else student

    def update():
        for position, x in enumerate(xs):
            own.backward((call(call(mine(x))) - mine(x)).square().mean() / 2, position == 1)
        own.step()

    return raised(update) or difference(home, student, plain)


class Adapted(nn.Module):
    """A trained module over a base that is not in its tree."""

    def __init__(self, base, adapter):
        super().__init__()
        self.base = [base]
        self.adapter = adapter

    def forward(self, x):
        return self.base[0](x) + self.adapter(x)


def adapters():
    """Trap 7, the right way: one frozen base, two adapters in engines of their own."""
    base, first, second = nets(4, 4, 4)
    plain = [copy.deepcopy(module) for module in (base, first, second)]
    (x,) = data()
    for adapter in plain[1:]:
        stepped([adapter], (plain[0](x).detach() + adapter(x) - x).square().mean())
    home = strategy(3)
    held = home.frozen(base.requires_grad_(False))
    worst = 0.0
    for adapter, reference in zip((first, second), plain[1:]):
        module = Adapted(held, adapter)
        own = engine(home, {"student": module})
        own.backward((own.forward("student")(mine(x)) - mine(x)).square().mean(), True)
        own.step()
        worst = max(worst, difference(home, adapter, reference))
    return worst


def two_engines_over_one_base():
    """Trap 7, a wrong way: the base inside the trees of two engines, and trained by both."""
    base, first, second = nets(4, 4, 4)
    plain = [copy.deepcopy(module) for module in (base, first, second)]
    (x,) = data()
    for adapter in plain[1:]:
        stepped([plain[0], adapter], (plain[0](x) + adapter(x)).square().mean())
    home = strategy(3)

    class Over(nn.Module):
        def __init__(self, adapter):
            super().__init__()
            self.base, self.adapter = base, adapter

        def forward(self, x):
            return self.base(x) + self.adapter(x)

    def build_and_step():
        engines = [engine(home, {"student": Over(adapter)}) for adapter in (first, second)]
        for own in engines:
            own.backward(own.forward("student")(mine(x)).square().mean(), True)
            own.step()

    error = raised(build_and_step)
    return error or max(difference(home, a, b) for a, b in zip((base, first, second), plain))


def unused_role(stage):
    """Trap 7, another: a role of a shared engine that a loss does not use still moves (here by weight decay)."""
    config = OptimizerConfig(lr=1e-2, weight_decay=0.5)
    used, unused = nets(4, 4)
    before = copy.deepcopy(unused)
    home = strategy(stage)
    own = engine(home, {"used": used, "unused": unused}, config)
    (x,) = data()
    own.backward(own.forward("used")(mine(x)).square().mean(), True)
    own.step()
    return difference(home, unused, before)


def forward_mode(stage):
    """Trap 8."""
    (student,) = nets(4)
    plain = copy.deepcopy(student)
    (x,) = data()
    expected = torch.func.jvp(plain, (mine(x),), (torch.ones_like(mine(x)),))[1]
    home = strategy(stage)
    own = engine(home, {"student": student})
    held = home.network(student, own.forward("student"))
    linear = torch.nn.functional.linear
    try:
        change = held.tangent((mine(x),), (torch.ones_like(mine(x)),))[1]
        ours = (change - expected).abs().max().item()
    except UserError as error:
        ours = str(error)
    raw = raised(lambda: torch.func.jvp(student, (mine(x),), (torch.ones_like(mine(x)),)))
    return {"ours": ours, "raw": raw, "linear": f"{linear.__module__}.{linear.__qualname__}"}


def clipping():
    """Trap 9: DeepSpeed's own default clips; clip=None in ours does not."""
    import deepspeed

    changes = {}
    for name in ("default", "ours"):
        (student,) = nets(4)
        plain = copy.deepcopy(student)
        (x,) = data()
        stepped([plain], 1e3 * plain(x).square().mean())
        home = strategy(1)
        if name == "ours":
            own = engine(home, {"student": student})
            own.backward(1e3 * own.forward("student")(mine(x)).square().mean(), True)
            own.step()
        else:
            wrapped = Roles({"student": student})
            zero, *_ = deepspeed.initialize(
                model=wrapped,
                optimizer=torch.optim.SGD(wrapped.parameters(), lr=1.0),
                config={**home._configuration(4, 1)},
                dist_init_required=False,
            )
            zero.backward(1e3 * zero("student", mine(x)).square().mean())
            zero.step()
        changes[name] = difference(home, student, plain)
    return changes


def main(folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(os.environ["RANK"]), world_size=2)
    torch.set_num_threads(1)
    found = {}
    for stage in (1, 2, 3):
        found[f"forward_mode_{stage}"] = forward_mode(stage)
        for way in ("fixed", "bare", "engine"):
            found[f"critic_{way}_{stage}"] = critic_in_the_students_turn(stage, way)
    found["unused_1"] = unused_role(1)
    found["unused_3"] = unused_role(3)
    found["frozen"] = frozen_teacher()
    found["bare_engine"] = bare_call("engine")
    found["bare_bare"] = bare_call("bare")
    found["adapters"] = adapters()
    found["two_engines"] = two_engines_over_one_base()
    found["clipping"] = clipping()
    Path(folder, f"rank{dist.get_rank()}.json").write_text(json.dumps(found, indent=1))
    dist.barrier()
    os._exit(0)  # engines that were broken on purpose keep threads which abort an orderly exit


if __name__ == "__main__":
    main(sys.argv[1])

"""A trial of milliseconds, steered by environment variables; run as a script, a nursery that forks runs of it.

The nursery imports torch once; each "go" on its standard input forks a child that runs the trial, and prints the child's pid and,
when it ended, its exit status. TOY_LOG: a file to which every cell appends a line when it starts. TOY_SLEEP: seconds a cell takes.
TOY_BREAK: "arm=how" of an arm that breaks (error, interrupt, exit, kill, nan).
"""

import json
import os
import signal
import sys
import time

import torch
from torch import nn

from surefoot.core.task import Split, Task, Training
from surefoot.core.trial import Arm, Claim, Setup, Stack, Trial


def task(seed, data_dir):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 2, generator=generator)
    y = (x[:, 0] > 0).long()
    parts = [Split(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    return Task("toy", *parts, num_classes=2, modality="vector", bounds=None, seed=seed, facts={"dir": str(data_dir)})


def play(arm, task, generator, level, **settings):
    """An accuracy about `level`; the noise is the seed's, so that differences are paired."""
    if "TOY_LOG" in os.environ:
        with open(os.environ["TOY_LOG"], "a") as log:
            log.write(json.dumps([arm, task.seed, settings]) + "\n")
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    broken, _, how = os.environ.get("TOY_BREAK", "").partition("=")
    if arm == broken:
        if how == "error":
            raise RuntimeError("the toy is broken")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "exit":
            sys.exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        level = float("nan")
    noise = torch.randn(2, generator=generator, dtype=torch.float64)
    return {"accuracy": level + 0.01 * noise[0].item() + 0.001 * task.seed, "loss": 1 - level + 0.01 * noise[1].item()}


def control(task, generator):
    return play("control", task, generator, 0.5)


def method(task, generator, strength):
    own = task.generator("method's own")
    bonus = 0.001 * torch.rand((), generator=own, dtype=torch.float64).item()
    return play("method", task, generator, 0.6 - 0.1 * abs(strength - 2) + bonus, strength=strength)


def net(task, generator):
    model = nn.Linear(task.input_shape[0], task.num_classes)
    nn.init.normal_(model.weight, generator=generator)
    nn.init.zeros_(model.bias)
    return model


def measure(run):
    logits = run.model(run.task.test.x)
    return {
        "accuracy": (logits.argmax(1) == run.task.test.labels).double().mean().item(),
        "epochs": len(run.history),
        "weight": run.model.weight.double().sum().item(),
    }


SETUP = Setup(
    task=task,
    arms={
        "control": Arm(control, system=True),
        "method": Arm(method, grid={"strength": (1.0, 2.0, 3.0)}, system=True),
        "trained": Arm(lambda lr: Stack((), Training(epochs=2, batch_size=4, lr=lr)), grid={"lr": (0.01, 0.1)}),
    },
    claims=[
        Claim("The method is better.", "accuracy", "method", "control"),
        Claim("The method has the smaller loss.", "loss", "method", "control", better="lower"),
        Claim("The method is better in every seed.", "accuracy", "method", "control", every_seed=True),
        Claim(
            "Training reaches more than chance by far.", effect=lambda arms: arms["trained"]["accuracy"], at_least=2.0
        ),
    ],
    model=net,
    measure=measure,
    on_epoch=lambda model, task, epoch: {"epoch": epoch},
)
TRIAL = Trial("toys/toy", {"embedded": SETUP}, notes="A toy.")


def comparable(result):
    """What must not depend on who computed the cells, or how often they were killed."""
    arms = {
        arm: {metric: list(values) for metric, values in metrics.items() if metric not in ("seconds", "peak_mb")}
        for arm, metrics in result.arms.items()
    }
    claims = [[c.claim, c.verdict, c.effect, c.low, c.high, str(c.p)] for c in result.claims]
    return json.loads(json.dumps({"arms": arms, "settings": result.settings, "claims": claims}))


def nursery(store, seeds, workers):
    from surefoot.core import engine

    engine.code_fingerprint = lambda trial: "toy"
    torch.optim.Adam(
        [torch.zeros(1, requires_grad=True)]
    )  # imports more of torch at its first use, a second in each child
    children = {}
    for number, line in enumerate(sys.stdin):
        if line.strip() == "go":
            pid = os.fork()
            if pid == 0:
                result = engine.run_trial(f"{__file__}:TRIAL", seeds=seeds, store=store, workers=workers)
                with open(f"{store}.{number}.json", "w") as file:
                    json.dump(comparable(result), file)
                os._exit(0)
            children[pid] = number
            sys.stdout.write(f"{pid}\n")
        else:
            pid = int(line)
            status = os.waitpid(pid, 0)[1]
            sys.stdout.write(f"{status} {store}.{children[pid]}.json\n")
        sys.stdout.flush()


if __name__ == "__main__":
    nursery(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

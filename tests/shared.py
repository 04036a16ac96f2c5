"""What several tests need: a model that has learned something, data whose channels depend on each other, a second process."""
import os, subprocess, sys
from pathlib import Path

import torch

import train
from data.hub import config_from_hub
from model import Config, Transformer

ROOT = Path(__file__).resolve().parent.parent


def trained(windows, steps, **shape):
    """A model of this shape after a few steps on prepared windows."""
    model = Transformer(Config(**shape)).initialize(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss, count, _ = train.cross_entropy(model, windows.training_rows(0, step * 16, 16))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def config_of(hub):
    """The Config of a parsed config.json."""
    return Config(**config_from_hub(hub, Config))


def correlated(n=4000, size=64, rows=24, seed=0):
    """(weight (rows, size), inputs (n, size) whose channels depend on each other and differ in size)."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=g) * torch.logspace(0, -2, size)[:, None]
    return torch.randn(rows, size, generator=g), torch.randn(n, size, generator=g) @ mix


def hessian_of(x):
    return x.double().T @ x.double()


def fresh_logits(directory, names, ids):
    """{name: logits} of the models directory/name for ids, by a process of its own with as many threads."""
    torch.save(ids, directory / "ids.pt")
    code = ("import os, sys, torch; sys.path.insert(0, sys.argv[1]); os.chdir(sys.argv[2]); from model import load; "
            "ids = torch.load('ids.pt', weights_only=True); "
            "torch.save({n: load(n)(ids).detach() for n in sys.argv[3:]}, 'logits.pt')")
    subprocess.run([sys.executable, "-c", code, ROOT, directory, *names], check=True,
                   env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    return torch.load(directory / "logits.pt", weights_only=True)

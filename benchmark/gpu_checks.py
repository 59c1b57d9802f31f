"""The checks of benchmark/gpu.py: is what a GPU computes right? They need no pytest.

Losses are compared over 50 updates, from the same seed: captured as a CUDA graph or compiled as
well, against the plain update.
"""

import os
import traceback
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import efficiency
import pandas as pd
import torch

CHECKED = ("om2p", "diffusion_ql-5", "om2p-jvp", "td3_bc", "fql-10")
CAPTURED = {"TORCHDYNAMO_DISABLE": "1"}  # torch.compile leaves functions as they are


@contextmanager
def environment(**variables: str):
    """With these variables set, for new processes and for torch.compile."""
    before = dict(os.environ)
    os.environ.update(variables)
    yield
    os.environ.clear()
    os.environ.update(before)


def trained(args, method: str, how: str, stop: int = 0, **changes) -> torch.Tensor:
    """Train, plain, captured or compiled as well, until evaluation `stop`; (updates, losses)."""
    name, settings = efficiency.METHODS[method]
    module, kept, calls = efficiency.load_script(name), [], []
    compiled, evaluate = module.compiled, module.evaluate

    def watched(update, on_gpu):
        for losses in iter(update, None) if how == "plain" else compiled(update, on_gpu):
            kept.append(torch.stack([*losses.values()]))
            yield losses

    def stopping(*inputs):
        calls.append(None)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return evaluate(*inputs)

    module.compiled, module.evaluate = watched, stopping
    settings = settings | {"data_dir": args.work / "few", "run_dir": args.work / f"{method}-{how}"}
    settings |= {"device": args.device, "compile": True, "num_updates": 50, "eval_episodes": 10}
    settings |= {"hidden_dims": (64, 64), "batch_size": 64, "eval_interval": 25} | changes
    with suppress(KeyboardInterrupt), environment(**{} if how == "compiled" else CAPTURED):
        module.train(module.Args(**settings))
    return torch.stack(kept).double().cpu()


def compared(new: torch.Tensor, old: torch.Tensor) -> str:
    """The largest differences of losses, relative to 1 + |loss|; an error if they are large."""
    gap = ((new - old).abs() / (1 + old.abs())).amax(dim=1).cummax(dim=0).values
    text = f"{gap[0]:.1e} at the first update, {gap[9]:.1e} in ten, {gap[-1]:.1e} in {len(gap)}"
    if not (gap[9] < 1e-3 and gap[-1] < 2e-2):
        raise ValueError(text)
    return text


def two_seeds(folder: Path, device: str) -> str:
    """Each seed has its rows, and its half of the policy acts alone; all else shares one stream."""
    weights, kind = torch.load(folder / "policy.pt"), efficiency.load_script("om2p").MeanFlowPolicy
    teams = [kind(n, 18, 2, (64, 64)).to(device) for n in (6, 3, 3)]
    for team, half in zip(teams, (slice(6), slice(3), slice(3, 6)), strict=True):
        team.load_state_dict({key: value[half] for key, value in weights.items()})
    obs, noise = (torch.randn(6, 50, n, device=device) for n in (18, 2))
    parts = zip(teams[1:], obs.split(3), noise.split(3), strict=True)
    alone = torch.cat([team.act(*inputs) for team, *inputs in parts])
    gap = (teams[0].act(obs, noise) - alone).abs().max()
    seeds = pd.read_csv(folder / "metrics.csv").seed.tolist()
    if not gap < 1e-4 or seeds != [0, 1, 0, 1]:
        raise ValueError(f"difference {gap:.1e}, rows of seeds {seeds}")
    return f"each half acts as alone, but for {gap:.1e}"


def check(args, kind: str, *words) -> tuple[str, str]:
    """A check by its kind, a method and how it runs; its outcome, and numbers.

    `args` are those of gpu.py; the kind `compile` measures a point, and leaves it in the cache.
    """
    train = partial(trained, args, *words)
    try:
        if kind == "capture":
            return "passed", compared(train(), trained(args, words[0], "plain"))
        if kind == "evaluate":  # more often, which changes nothing
            return "passed", compared(train(name="often", eval_interval=5), train(name="seldom"))
        if kind == "resume":
            train(name="part", stop=2)
            rest = train(name="part", resume=True)
            return "passed", compared(rest, train(name="whole")[25:])
        if kind == "seeds":
            train(name="group", num_seeds=2)
            (folder,) = args.work.rglob("om2p_mpe-group/seed-0-1")
            return "passed", two_seeds(folder, args.device)
        settings = efficiency.Args((), (), args.device, not args.tiny, 0.01)
        return "passed", f"{efficiency.measure(efficiency.Point(*words), settings)}"
    except BaseException as problem:
        cause = problem
        while isinstance(cause, SystemExit) and cause.__context__:  # what its one line hides
            cause = cause.__context__
        print("".join(traceback.format_exception(cause)), flush=True)
        return "failed", f"{problem!r}, {cause!r}"[:500]

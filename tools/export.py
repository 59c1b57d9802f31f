"""Export a trained team as one file that needs no script of this project, only PyTorch.

    python tools/export.py runs/simple_tag-expert/om2p_mpe/seed-0 --out team.pt2

The file is a torch.export program. In it is `team.json`, the agents' sizes and action limits. The
program takes observations (N, B, obs_dim), float32 or float64, any B. A stochastic policy's also
takes its noise (K, N, B, action_dim). It returns float32 actions (N, B, action_dim) in [-1, 1],
means of K samples. A team learned from logs takes and gives the log's own units. The class in
`tools/team.py`, to be copied, draws the noise and needs no B:

    action = Team("team.pt2")(obs)

All this is checked against the script's actions before the file is written.
"""

import inspect
import io
import json
import math
import timeit
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn as nn
import tyro
from team import Team
from torch import Tensor
from torch.overrides import TorchFunctionMode
from watch import load_team, stop


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """run directory of any script, with args.json and policy.pt"""
    out: Path = Path("team.pt2")
    """file to write, .pt2"""
    samples: int = 1
    """an action is the mean of so many sampled ones, 1 or more"""
    noise_scale: float = 1.0
    """what noise is multiplied by, 0 or more; 0 acts without noise"""
    seed: int | None = None
    """in a run of several seeds, whose team; default: the first"""
    data_dir: Path | None = None
    """where the prey is, if not in the --data-dir of the run"""


class Noise(TorchFunctionMode):
    """Within it normal random numbers are multiplied by `scale`, and drawings counted."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale, self.count = scale, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        values = function(*args, **(kwargs or {}))
        drawn = function in (torch.randn, torch.randn_like)
        self.count += drawn
        return self.scale * values if drawn else values


class Act(nn.Module):
    """A policy whose forward pass is an action, the mean of K samples from one batch."""

    def __init__(self, policy: nn.Module, samples: int = 1, noise_scale: float = 1.0):
        super().__init__()
        self.policy, self.samples, self.noise_scale = policy, samples, noise_scale

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """(N, B, obs_dim), (K, N, B, action_dim) -> (N, B, action_dim)."""
        obs = torch.empty_like(obs, dtype=torch.float32).copy_(obs)  # unlike `to`, of any type
        inputs = [obs.repeat(1, self.samples, 1)]
        if noise is not None:
            noise = torch.empty_like(noise, dtype=torch.float32).copy_(noise)
            inputs += [self.noise_scale * noise.transpose(0, 1).flatten(1, 2)]
        with Noise(self.noise_scale):  # scales what `act` itself draws
            action = self.policy.act(*inputs)
        return action.view(len(obs), self.samples, obs.shape[1], -1).mean(dim=1).detach()


def export(policy: nn.Module, facts: dict) -> bytes:
    """A .pt2 file with the policy's `act` for any batch size, and `facts` as its team.json."""
    samples, buffer = facts["samples"], io.BytesIO()
    inputs = [torch.zeros(len(facts["obs_dims"]), 2, max(facts["obs_dims"]))]
    if facts["noise"]:
        inputs += [torch.zeros(samples, len(inputs[0]), 2, max(facts["action_dims"]))]
    batch, act = torch.export.Dim("batch", min=1), Act(policy, samples, facts["noise_scale"])
    shapes = ({1: batch}, {2: batch})[: len(inputs)]
    with torch.no_grad():
        program = torch.export.export(act, tuple(inputs), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, buffer, extra_files={"team.json": json.dumps(facts)})
    return buffer.getvalue()


@torch.no_grad()
def difference(policy: nn.Module, team: Team, batch_size: int) -> float:
    """The largest difference of the file's actions to the script's, with the same noise; NaN: no.

    The script's are the mean over K calls of its `act`, or where this draws noise itself, of one.
    """
    num_agents, K, width = len(team.obs_dims), team.samples, max(team.action_dims)
    obs, noise = torch.randn(num_agents, batch_size, max(team.obs_dims)), None
    scale = torch.ones(num_agents, 1, width)
    if team.raw:  # observations as the log has them, differences as shares of the actions' range
        obs = policy.obs_mean + policy.obs_sd * obs
        scale = policy.action_half.masked_fill(policy.action_half == 0, 1)
    if team.noise:
        noise = torch.randn(K, num_agents, batch_size, width)
        expected = torch.stack([policy.act(obs, team.noise_scale * e) for e in noise]).mean(dim=0)
    else:
        with Noise(team.noise_scale):
            torch.manual_seed(0)
            expected = policy.act(obs.repeat(1, K, 1)).unflatten(1, (K, -1)).mean(dim=1)
    errors = torch.zeros(())
    calls = [(obs, noise), (obs.double(), noise if noise is None else noise.double())]
    if batch_size == 1:  # without the dimension of the batch
        calls += [(obs[:, 0], noise if noise is None else noise[:, :, 0])]
    for inputs in calls:
        torch.manual_seed(0)
        action = team(*inputs)
        if action.dtype != torch.float32 or action.ndim != inputs[0].ndim:
            return math.nan
        error = (action.view_as(expected) - expected) / scale
        errors = errors.maximum(error.abs().max())
    return errors.item()


def decision_ms(act, obs: Tensor) -> float:
    """Milliseconds for one decision of the whole team, median."""
    return 1_000 * median(timeit.repeat(lambda: act(obs), number=1, repeat=200))


def describe(run, args: Args) -> dict:
    """What a file tells about its team, in team.json; limits are the environment's or log's own."""
    policy, boxes = run.policy, getattr(run.env, "boxes", ())
    obs_dims, dims = ([int(x) for x in sizes] for sizes in (run.env.obs_dims, run.env.action_dims))
    if raw := hasattr(policy, "action_mid"):
        rows = zip(policy.action_mid[:, 0], policy.action_half[:, 0], dims, strict=True)
        boxes = [SimpleNamespace(low=(x - y)[:n], high=(x + y)[:n]) for x, y, n in rows]
    facts = {"task": run.settings["task"], "obs_dims": obs_dims, "action_dims": dims, "raw": raw}
    facts["action_low"] = [x.low.tolist() for x in boxes] or [[-1.0] * width for width in dims]
    facts["action_high"] = [x.high.tolist() for x in boxes] or [[1.0] * width for width in dims]
    facts |= {"samples": args.samples, "noise_scale": args.noise_scale}
    return facts | {"noise": "noise" in inspect.signature(policy.act).parameters}


def main(args: Args) -> None:
    """Export, check, write."""
    out = args.out.expanduser()
    if out.suffix != ".pt2":
        stop(f"--out {out} must end in .pt2")
    if args.samples < 1 or not 0 <= args.noise_scale < math.inf:
        stop("--samples must be 1 or more, --noise-scale 0 or more")
    run = load_team(args.run_dir, 1, args.seed, args.data_dir)
    policy, facts = run.policy, describe(run, args)
    obs = torch.zeros(len(facts["obs_dims"]), 1, max(facts["obs_dims"]))
    with Noise(1.0) as drawn:
        policy.act(obs)
    if not drawn.count and (args.samples, args.noise_scale) != (1, 1.0):
        stop("this policy has no noise: --samples and --noise-scale are for stochastic ones")
    team = Team(io.BytesIO(content := export(policy, facts)))
    for batch_size in (1, 1_000):
        if not (error := difference(policy, team, batch_size)) < 1e-4:
            stop(f"the exported team acts otherwise than the script, by {error}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as problem:
        stop(f"{out} cannot be written: {problem}")
    print(
        f"{str(out)!a}: observations of {facts['obs_dims']} numbers, actions of "
        f"{facts['action_dims']}, {len(content) / 2**20:.1f} MiB; a decision takes "
        f"{decision_ms(team, obs):.2f} ms, the script's {decision_ms(policy.act, obs):.2f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))

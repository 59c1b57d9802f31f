"""Let the trained teams of a grid act with less noise and with more, and tabulate their scores.

    python benchmark/noise.py --grid mamujoco    # needs the grid's runs, by benchmark/run.py

The recorded actions carry exploration noise of standard deviation 0.1. A deterministic policy,
fitted by least squares, averages it away. A stochastic one that generates actions like the recorded
ones reproduces it. Here stochastic teams act by the mean of several actions, and deterministic ones
with the data's noise added. `spread` is the standard deviation of the several actions, over all
steps and action components. Writes benchmark/results/noise_<grid>.csv.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import run  # noqa: E402
from steps import find_team  # noqa: E402

DATA = {"mamujoco": run.ROBOT, "mpe_long": run.TUNING_DATA}
EPISODES = {"mamujoco": 100, "mpe_long": 1_000}
DETERMINISTIC = ("bc", "td3_bc", "omar")


@dataclass
class Args:
    grid: Literal[tuple(DATA)] = "mamujoco"
    """whose teams play"""
    run_dir: Path = Path("runs/benchmark")
    """the grid's --run-dir"""
    methods: tuple[str, ...] = ("om2p", "diffusion_ql", "td3_bc")
    """whose teams play"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the runs"""
    samples: int = 16
    """actions whose mean is taken"""
    noise_sd: float = 0.1
    """of the noise that is added, and clipped to [-1, 1] with the action"""


class Acting:
    """A policy that acts by the mean of `samples` actions, and adds noise to it."""

    def __init__(self, policy, samples: int = 1, noise_sd: float = 0.0):
        self.policy, self.samples, self.noise_sd = policy, samples, noise_sd
        self.variances = []

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(N, B, obs_dim) -> actions in [-1, 1], (N, B, action_dim)."""
        actions = self.policy.act(obs.repeat_interleave(self.samples, dim=1))
        actions = actions.unflatten(1, (-1, self.samples))
        self.variances.append(actions.var(dim=2, correction=0).mean().item())
        action = actions.mean(dim=2)
        return (action + self.noise_sd * torch.randn_like(action)).clamp(-1, 1)


def main(args: Args) -> None:
    """Evaluate every run."""
    torch.set_num_threads(1)
    rows, place = [], run.Args(args.grid, run_dir=args.run_dir)
    cells = [cell for cell in run.cells_of(args.grid) if cell[1:3] in DATA[args.grid]]
    for cell in [cell for name in args.methods for cell in cells if cell.method == name]:
        if cell.seed not in args.seeds:
            continue
        if cell.method in DETERMINISTIC:
            change = {f"noise {args.noise_sd} added": {"noise_sd": args.noise_sd}}
        else:
            change = {f"mean of {args.samples} actions": {"samples": args.samples}}
        folder = run.command([cell], place)[1].parent
        team = find_team(folder, cell.seed, EPISODES[args.grid])
        for acting, settings in {"as trained": {}, **change}.items():
            policy = Acting(team.policy, **settings)
            returns = team.module.evaluate(policy, [team.env], [cell.seed])
            scores = team.module.normalized_score(cell.task, returns)
            score, median = (round(float(f(scores)), 2) for f in (np.mean, np.median))
            row = dict(zip(cell._fields[:4], cell, strict=False)) | {"acting": acting}
            spread = round(float(np.mean(policy.variances)) ** 0.5, 4)
            rows.append(row | {"score": score, "median": median, "spread": spread})
    run.write_table(ROOT / "benchmark" / "results" / f"noise_{args.grid}.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Args))

"""Let trained HalfCheetah teams act with less noise and with more, and tabulate their scores.

    python benchmark/noise.py          # needs the runs of `python benchmark/run.py --grid mamujoco`

The recorded actions carry exploration noise of standard deviation 0.1. A deterministic policy,
fitted by least squares, averages it away. A stochastic one that generates actions like the recorded
ones reproduces it. Here stochastic teams act by the mean of several actions, and deterministic ones
with the data's noise added. `spread` is the standard deviation of the several actions, over all
steps and joints. Writes benchmark/results/noise.csv.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
from run import CHEETAH, QUALITIES, write_table  # noqa: E402
from steps import find_team  # noqa: E402

DETERMINISTIC = ("bc", "td3_bc", "omar")


@dataclass
class Args:
    run_dir: Path = Path("runs/benchmark/mamujoco")
    """the --run-dir of the runs"""
    methods: tuple[str, ...] = ("om2p", "diffusion_ql", "td3_bc")
    """those of the grid mamujoco"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the runs"""
    samples: int = 16
    """actions whose mean is taken"""
    noise_sd: float = 0.1
    """of the noise that is added, and clipped to [-1, 1] with the action"""
    episodes: int = 100
    """evaluation episodes of each"""


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
    rows = []
    for method in args.methods:
        if method in DETERMINISTIC:
            change = {f"noise {args.noise_sd} added": {"noise_sd": args.noise_sd}}
        else:
            change = {f"mean of {args.samples} actions": {"samples": args.samples}}
        for quality, seed in product(QUALITIES, args.seeds):
            folder = args.run_dir / f"{CHEETAH}-{quality}" / f"{method}_mamujoco"
            team = find_team(folder, seed, args.episodes)
            for acting, settings in {"as trained": {}, **change}.items():
                policy = Acting(team.policy, **settings)
                returns = team.module.evaluate(policy, [team.env], [seed])
                scores = team.module.normalized_score(CHEETAH, returns)
                score, median = (round(float(f(scores)), 2) for f in (np.mean, np.median))
                row = {"method": method, "quality": quality, "seed": seed, "acting": acting}
                spread = round(float(np.mean(policy.variances)) ** 0.5, 4)
                rows.append(row | {"score": score, "median": median, "spread": spread})
    write_table(ROOT / "benchmark" / "results" / "noise.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Args))

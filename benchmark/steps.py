"""Let trained OM2P teams act in one step and in several, and tabulate their scores.

    python benchmark/steps.py          # needs the runs of `python benchmark/run.py --grid mpe`

With K steps the interval [0, 1] is cut into K, and the mean velocity is followed over each part.
Writes benchmark/results/steps.csv.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "tools")]
from run import ABLATION_DATA, write_table  # noqa: E402
from watch import load_team  # noqa: E402


@dataclass
class Args:
    run_dir: Path = Path("runs/benchmark/mpe")
    """the --run-dir of the runs of om2p_mpe.py"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """of the runs"""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """numbers of steps, 1 or more"""
    episodes: int = 1_000
    """evaluation episodes of each"""


def find_team(folder: Path, seed: int, episodes: int):
    """A seed's team, from its own run or that of several seeds, below the folder of its script."""
    for path in sorted(folder.glob("seed-*/policy.pt")):
        seeds = [int(number) for number in path.parent.name.split("-")[1:]]
        if seeds[0] <= seed <= seeds[-1]:
            return load_team(path.parent, episodes, seed)
    raise SystemExit(f"error: {folder} has no finished run of seed {seed}; first run its grid")


class SeveralSteps:
    """A mean-flow policy that follows the flow in `steps` equal steps."""

    def __init__(self, policy, steps: int):
        self.policy, self.steps = policy, steps

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(N, B, obs_dim) -> actions in [-1, 1], (N, B, action_dim)."""
        x = torch.randn(*obs.shape[:-1], self.policy.mask.shape[-1])
        for k in range(self.steps):
            r, t = (torch.full_like(x[..., :1], j / self.steps) for j in (k, k + 1))
            x = x + self.policy(obs, x, r, t) / self.steps
        return x.clamp(-1, 1)


def main(args: Args) -> None:
    """Evaluate every run."""
    torch.set_num_threads(1)
    rows = []
    for (task, quality), seed in product(ABLATION_DATA, args.seeds):
        team = find_team(args.run_dir / f"{task}-{quality}" / "om2p_mpe", seed, args.episodes)
        for steps in args.steps:
            returns = team.module.evaluate(SeveralSteps(team.policy, steps), [team.env], [seed])
            score = round(float(team.module.normalized_score(task, returns.mean())), 2)
            key = {"task": task, "quality": quality, "seed": seed, "steps": steps}
            rows.append({**key, "score": score})
    write_table(ROOT / "benchmark" / "results" / "steps.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Args))

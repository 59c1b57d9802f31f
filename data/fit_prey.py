"""Fit this project's prey of simple_tag and simple_world to OMAR's, and check how close it is.

OMAR's prey is part of those environments, so scores are comparable only against a prey that acts as
it does. This script imitates it on the states that roll-outs visit and writes
data/behavior/<task>_prey.npz. It needs the original, --original, which `bash data/download.sh
<task>` fetches; with --check it only compares, and writes --table.

    python data/fit_prey.py --task simple_tag
    python data/fit_prey.py --task simple_tag --check --table benchmark/results/prey_simple_tag.csv
"""

import csv
import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from collect_mpe import BEHAVIOR_DIR, load_behavior
from convert_prey import read_original, write_prey
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mpe import MPE, load_prey


@dataclass
class Args:
    task: Literal["simple_tag", "simple_world"] = "simple_tag"
    """the task"""
    original: Path | None = None
    """OMAR's pretrained_adv_model.pt; by default that in data/<task>/"""
    num_updates: int = 30_000
    """gradient steps on batches of 2,048 states"""
    seed: int = 0
    """seed of the states and the network"""
    check: bool = False
    """compare the prey that is there, without fitting a new one"""
    table: Path | None = None
    """csv file for the comparison"""


@torch.no_grad()
def play(task: str, hunter, prey_policy, num_episodes: int, seed: int):
    """Roll out a team, (N, K, D) -> (N, K, 2): the prey's observations (K * 25, D) and returns."""
    env = MPE(task, num_episodes, seed, prey_policy)
    torch.manual_seed(seed)
    obs, seen, returns = env.reset(), [], 0.0
    for _ in range(env.horizon):
        seen.append(env.observe([3])[0])
        obs, reward = env.step(hunter(obs))
        returns = returns + reward.mean(axis=0)
    return np.concatenate(seen), returns


def hunters(task: str, stages=("random", "medium-replay", "medium", "expert"), noise=0.1) -> dict:
    """The behaviour policies, by dataset quality, as functions of NumPy observations."""

    def team(policy):
        if policy is None:
            return lambda obs: 2 * torch.rand(*obs.shape[:-1], 2).numpy() - 1
        return lambda obs: policy.act(torch.from_numpy(obs), noise).numpy()

    return {stage: [team(p) for p in load_behavior(task, stage, MPE(task, 1))] for stage in stages}


def fit(args: Args, original) -> None:
    """Imitate the original by mean squared error on 3 million states; save a ReLU network."""
    torch.manual_seed(args.seed)
    noises = (0.1, 0.1, 0.3, 1.0)  # most states as data collection visits them, some wilder ones
    teams = [
        t for noise in noises for stage in hunters(args.task, noise=noise).values() for t in stage
    ]
    states = []
    for k in tqdm(range(120), desc="states", disable=None):
        states.append(play(args.task, teams[k % len(teams)], original, 1_000, 1_000 + k)[0])
    obs = torch.from_numpy(np.concatenate(states))
    target = torch.from_numpy(original(obs.numpy()[None])[0])
    sizes = (obs.shape[1], 256, 256, 2)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Tanh())
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.num_updates)
    for step in (bar := tqdm(range(args.num_updates), desc="fit", disable=None)):
        index = torch.randint(len(obs), (2_048,))
        loss = F.mse_loss(net(obs[index]), target[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            bar.set_postfix_str(f"mse {loss.item():.5f}")
    arrays = {}
    for k, layer in enumerate(layers):
        arrays[f"weight_{k}"] = layer.weight.detach().T.half().numpy()
        arrays[f"bias_{k}"] = layer.bias.detach().half().numpy()
    np.savez_compressed(BEHAVIOR_DIR / f"{args.task}_prey.npz", **arrays)


def check(args: Args, original, ours) -> list[dict]:
    """Compare actions on visited states, and 1,000 returns from the same starts, per hunter."""
    rows = []
    for stage, teams in hunters(args.task, ("random", "medium", "expert")).items():
        obs, theirs = play(args.task, teams[0], original, 1_000, 7)
        _, mine = play(args.task, teams[0], ours, 1_000, 7)
        gap = np.abs(ours(obs[None]) - original(obs[None])).mean()
        row = {
            "task": args.task,
            "hunters": stage,
            "mean action difference": round(float(gap), 4),
            "return, original": round(theirs.mean(), 2),
            "return, ours": round(mine.mean(), 2),
            "standard error": round(theirs.std() / len(theirs) ** 0.5, 2),
        }
        rows.append(row)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    return rows


def main(args: Args) -> None:
    """Fit unless told not to, then compare."""
    if args.num_updates < 1:
        raise SystemExit(f"error: --num-updates is {args.num_updates}; it must be 1 or more")
    if args.table and not args.table.parent.is_dir():
        raise SystemExit(f"error: --table {args.table}: {args.table.parent} is no folder")
    default = BEHAVIOR_DIR.parent / args.task / "pretrained_adv_model.pt"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prey.npz")
        write_prey(path, read_original(args.original or default))
        original = load_prey(path)
    if not args.check:
        fit(args, original)
    rows = check(args, original, load_prey(BEHAVIOR_DIR / f"{args.task}_prey.npz"))
    if args.table:
        with args.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Args))

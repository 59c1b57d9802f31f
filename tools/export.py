"""Export a trained team as one file that needs no script of this project, only PyTorch.

    python tools/export.py runs/simple_tag-expert/om2p_mpe/seed-0 --out team.pt2

The file is a torch.export program, which takes observations (N, B, obs_dim), float32, any B, and
returns actions (N, B, action_dim) in [-1, 1]; noise is drawn inside, by torch's own generator:

    team = torch.export.load("team.pt2").module()
    action = team(obs)

It is checked against the script's actions before it is written.
"""

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from watch import load_team, stop


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """run directory of any script, with args.json and policy.pt"""
    out: Path = Path("team.pt2")
    """file to write, .pt2"""
    seed: int | None = None
    """in a run of several seeds, whose team; default: the first"""
    data_dir: Path | None = None
    """where the prey is, if not in the --data-dir of the run"""


class Act(nn.Module):
    """A policy whose forward pass is an action."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = policy

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """(N, B, obs_dim) -> (N, B, action_dim)."""
        return self.policy.act(obs)


def export(policy: nn.Module, num_agents: int, obs_dim: int) -> torch.export.ExportedProgram:
    """The policy's `act` as a program for any batch size; the policy stays as it is."""
    batch = torch.export.Dim("batch", min=1, max=2**20)
    obs = torch.zeros(num_agents, 2, obs_dim)
    with torch.no_grad():
        return torch.export.export(Act(policy), (obs,), dynamic_shapes={"obs": {1: batch}})


@torch.no_grad()
def difference(policy: nn.Module, program: nn.Module, obs: torch.Tensor) -> float:
    """The largest difference of two policies' actions, with the same noise."""
    actions = []
    for act in (policy.act, program):
        torch.manual_seed(0)
        actions.append(act(obs))
    return (actions[0] - actions[1]).abs().max().item()


@torch.no_grad()
def decision_ms(act, obs: torch.Tensor, calls: int = 200) -> float:
    """Milliseconds for one decision of the whole team, median."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        act(obs)
        seconds.append(time.perf_counter() - start)
    return 1_000 * float(np.median(seconds))


def main(args: Args) -> None:
    """Export, check, write."""
    if args.out.suffix != ".pt2":
        stop(f"--out {args.out} must end in .pt2")
    team = load_team(args.run_dir, 1, args.seed, args.data_dir)
    num_agents, obs_dim = team.env.num_agents, max(team.env.obs_dims)
    buffer = io.BytesIO()
    torch.export.save(export(team.policy, num_agents, obs_dim), buffer)
    program = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    for batch_size in (1, 1_000):
        obs = torch.randn(num_agents, batch_size, obs_dim)
        if not (error := difference(team.policy, program, obs)) < 1e-5:
            stop(f"the exported team acts otherwise than the script, by {error}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(buffer.getvalue())
    except OSError as problem:
        stop(f"{args.out} cannot be written: {problem}")
    obs = torch.zeros(num_agents, 1, obs_dim)
    print(
        f"{args.out}: {num_agents} agents, observations of {obs_dim} numbers, "
        f"{len(buffer.getvalue()) / 2**20:.1f} MiB; a decision takes "
        f"{decision_ms(program, obs):.2f} ms, the script's {decision_ms(team.policy.act, obs):.2f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))

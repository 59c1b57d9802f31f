"""How far the Q term may move an action, by trained critics: why q_weight differs between tasks.

    python benchmark/q_scale.py RUN_DIR ...

MA-TD3+BC's loss is the squared distance to a recorded action, mean over its A components, minus
q_weight Q / E|Q|. If Q is linear in the action, the minimum lies at the distance

    move = q_weight A |dQ/da| / (2 E|Q|)

from the recorded action, in the units of actions, which go from -1 to 1. Other losses have the same
Q term, but hold actions to the data otherwise: their moves compare tasks, not methods. A run's last
critic is taken, at up to 10,000 recorded actions of every agent. Writes
benchmark/results/q_scale.csv; `steepness` is E|dQ/da| / E|Q|.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "tools")]
from run import write_table  # noqa: E402
from watch import load_team  # noqa: E402

FIRST = "net.1.weight"  # the first layer's; a critic's has four dimensions, a policy's three


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """directories of finished runs whose loss has a q_weight"""


def steepness(critic, obs, action, mask) -> tuple[float, float]:
    """E|Q|, and E|dQ/da| / E|Q|, mean over agents; mask (N, 1, action_dim) is 0 on padding."""
    action = action.clone().requires_grad_(True)
    q = critic(obs, action).mean(dim=0)
    (gradient,) = torch.autograd.grad(q.sum(), action)
    size = q.detach().abs().mean(dim=1)  # (N,)
    length = (mask * gradient).norm(dim=-1).mean(dim=1)
    return float(size.mean()), float((length / size).mean())


def measure(run_dir: Path, samples: int = 10_000) -> dict:
    """A row of the table."""
    team = load_team(run_dir)
    args, module, env = team.settings, team.module, team.env
    seeds = range(args["seed"], args["seed"] + args["num_seeds"])
    place = (Path(args["data_dir"]).expanduser(), args["task"], args["quality"])
    data = module.load_dataset(*place, seeds, env)
    index = torch.randperm(data["obs"].shape[1])[:samples]
    obs, action = data["obs"][:, index], data["action"][:, index]
    critic = module.Critic(*obs.shape[::2], action.shape[-1], args["hidden_dims"])
    parts = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)["parts"]
    critic.load_state_dict(next(x for x in parts if getattr(x.get(FIRST), "ndim", 0) == 4))
    size, steep = steepness(critic, obs, action, team.policy.mask.repeat(len(seeds), 1, 1))
    row = {"method": Path(module.__file__).stem.rpartition("_")[0], "task": args["task"]}
    row |= {"quality": args["quality"], "q_weight": args["q_weight"], "mean_abs_q": round(size, 2)}
    move = args["q_weight"] * action.shape[-1] * steep / 2
    return row | {"steepness": round(steep, 5), "move": round(move, 5)}


def main(args: Args) -> None:
    """Measure every run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = [measure(run_dir) for run_dir in args.run_dirs]
    write_table(ROOT / "benchmark" / "results" / "q_scale.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Args))

"""Draw episodes of trained teams: python benchmark/picture.py RUN_DIR [RUN_DIR ...] --out team.png

Each panel is one episode of 25 steps. Lines are the paths of the agents, dots their places at the
end; targets are black, solid obstacles grey, food green, forests light green, the prey red.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from watch import agent_color, draw_landmarks, load_team, stop


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories on the particle environments, a row of panels for each"""
    out: Path = Path("team.png")
    """picture to write"""
    episodes: int = 4
    """panels in a row"""
    seed: int | None = None
    """seed of initial states and noise; in a run of several, whose team; default: the first"""


@torch.no_grad()
def main(args: Args) -> None:
    """Play the policies and draw them."""
    if not args.run_dirs:
        raise SystemExit("error: name run directories, as runs/simple_tag-expert/om2p_mpe/seed-0")
    mpl.use("Agg")
    rows, columns = len(args.run_dirs), args.episodes
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2.55 * rows), squeeze=False, layout="constrained"
    )
    for run_dir, panels in zip(args.run_dirs, axes, strict=True):
        team = load_team(run_dir, columns, args.seed)
        env, policy = team.env, team.policy
        if not hasattr(env, "landmarks"):
            stop(f"{run_dir} is not a run on the particle environments")
        torch.manual_seed(team.seed)
        obs, path, returns = env.reset(team.seed), [env.pos], 0.0
        for _ in range(env.horizon):
            obs, reward = env.step(policy.act(torch.from_numpy(obs)).numpy())
            returns = returns + reward.mean(axis=0)
            path.append(env.pos)
        path = np.stack(path, axis=1)  # (K, 26, A, 2)
        for k, panel in enumerate(panels):
            draw_landmarks(panel, team.module, env, k)
            for agent in range(path.shape[2]):
                color = agent_color(env, agent)
                panel.plot(*path[k, :, agent].T, color=color, lw=1.2, zorder=2)
                end = path[k, -1, agent]
                panel.add_patch(plt.Circle(end, env.size[agent], color=color, alpha=0.8, zorder=3))
            name = f"{env.task} {team.settings['quality']}"
            panel.set_title(f"{name}, return {returns[k]:.0f}", fontsize=8)
    out = args.out.expanduser()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110)
    except Exception as problem:
        stop(f"{out} cannot be written: {problem}")
    print(ascii(str(out)))


if __name__ == "__main__":
    main(tyro.cli(Args))

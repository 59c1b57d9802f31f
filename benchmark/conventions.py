"""Let agents mix the conventions of the multi-expert data: what independent imitators can reach.

    python benchmark/conventions.py

Three teams of equal return made these data, by other conventions of who covers which target. Here
agents choose among them together or on their own, for an episode or at every step, or take the mean
of the three actions. Writes benchmark/results/conventions.csv, 1,000 episodes each.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "benchmark")]
from collect_mpe import load_behavior  # noqa: E402
from run import write_table  # noqa: E402

from om2p_mpe import MPE, evaluate, normalized_score  # noqa: E402

TASK, NOISE, EPISODES = "simple_spread", 0.1, 1_000


class Mixed:
    """Agents that act by what `mix` makes of all teams' actions: (teams, N, B, D) -> (N, B, D)."""

    def __init__(self, teams: list, mix: Callable):
        self.teams, self.mix = teams, mix

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(N, B, obs_dim) -> actions (N, B, action_dim), with the data's noise."""
        return self.mix(torch.stack([team.act(obs, NOISE) for team in self.teams]))


def pick(actions: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The actions of those teams whose numbers (N, B) are given."""
    return torch.take_along_dim(actions, number[None, ..., None], dim=0)[0]


def main() -> None:
    """Play every mixture, and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env, rows = MPE(TASK, EPISODES), []
    teams = load_behavior(TASK, "multi-expert", env)
    kept = torch.randint(len(teams), (env.num_agents, EPISODES))
    mixtures = {
        "all agents by one team, for an episode": lambda x: pick(x, kept[:1].expand_as(kept)),
        "each agent by its own, for an episode": lambda x: pick(x, kept),
        "each agent by its own, at every step": lambda x: pick(x, kept.random_(len(teams))),
        "each agent by the mean of the three actions": lambda x: x.mean(dim=0),
    }
    for name, mix in mixtures.items():
        returns = evaluate(Mixed(teams, mix), [env]).mean()
        score = normalized_score(TASK, returns)
        rows.append({"choice": name, "return": f"{returns:.1f}", "score": f"{score:.1f}"})
    write_table(ROOT / "benchmark" / "results" / "conventions.csv", rows)


if __name__ == "__main__":
    main()

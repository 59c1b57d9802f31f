"""Try settings of examples/om2p_logs.py on made-up logs, whose good actions are known.

    python benchmark/logs.py

Four unequal robots act well but for noise. Teams learn from 40 or 300 of their episodes, and choose
actions in 200 new ones. Writes benchmark/results/logs.csv, one run each: the held-out action
distance, and the reward a step of the team's and of the recorded actions in the new ones.
"""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "examples"))
import logs_to_npy  # noqa: E402
import om2p_logs  # noqa: E402

OBS, ACTION = (10, 10, 7, 7), (3, 3, 2, 2)  # of four robots
COLUMNS = {"obs": ("0:10", "10:20", "20:27", "27:34"), "action": ("0:3", "3:6", "6:8", "8:10")}
NAMES = ["observations", "actions", "rewards", "terminals", "timeouts", "next_observations"]
OBS_UNIT, ACTION_UNIT = np.geomspace(0.1, 50, sum(OBS)), np.geomspace(50, 0.1, sum(ACTION))
SETTINGS = [(2_000, 0.0), (2_000, 0.1), (2_000, 0.5), (2_000, 2.0), (4_000, 0.1)]


def make_episodes(count, seed=0):
    """Made-up episodes of 8 to 30 steps under D4RL's names; a third of them terminate.

    Units are 0.1 to 50 large, far from 0. Each robot has a good action for what it observes, and
    takes it with noise; the squared distances to good actions are the loss of the whole team.
    """
    rng, fixed, split = *map(np.random.default_rng, (seed, 1)), np.cumsum(OBS)[:-1]
    gains = [0.4 * fixed.normal(size=sizes) for sizes in zip(OBS, ACTION, strict=True)]
    made = []
    for k in range(count):
        length, x, steps = rng.integers(8, 31), rng.normal(size=sum(OBS)), []
        for _ in range(length):
            drives = [own @ gain for own, gain in zip(np.split(x, split), gains, strict=True)]
            good, after = np.tanh(np.concatenate(drives)), 0.9 * x + 0.4 * rng.normal(size=x.size)
            action = good + 0.3 * rng.normal(size=sum(ACTION))
            steps.append((x, action, -np.square(action - good).mean(), after, good))
            x = after
        obs, action, reward, next_obs, good = map(np.stack, zip(*steps, strict=True))
        last = np.arange(length) == length - 1
        values = (obs + 3) * OBS_UNIT, (action + 2) * ACTION_UNIT, reward, last & (k % 3 == 0)
        values = *values, last & (k % 3 > 0), (next_obs + 3) * OBS_UNIT
        made.append(dict(zip(NAMES, values, strict=True)) | {"good": (good + 2) * ACTION_UNIT})
    return made


def joined(episodes):
    """Their rows in one piece, as D4RL has them."""
    return {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}


@torch.no_grad()
def team_reward(team, episodes) -> float:
    """The mean reward a step of a team's actions where these episodes have been."""
    rows, loss = joined(episodes), []
    obs = torch.zeros(len(OBS), len(rows["good"]), max(OBS))
    for i, columns in enumerate(COLUMNS["obs"]):
        obs[i, :, : OBS[i]] = torch.from_numpy(logs_to_npy.take(rows["observations"], columns))
    actions = team.act(obs).double().numpy()
    for i, columns in enumerate(COLUMNS["action"]):
        good, unit = (logs_to_npy.take(x, columns) for x in (rows["good"], ACTION_UNIT[None]))
        loss.append(np.square((actions[i, :, : ACTION[i]] - good) / unit))
    return -np.concatenate(loss, axis=1).mean()


def main() -> None:
    """Train on both logs by all settings, and write the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table, new = [], make_episodes(200, seed=1)
    for count in (40, 300):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            np.savez(folder / "robots.npz", **joined(make_episodes(count)))
            source = logs_to_npy.Args(str(folder / "robots.npz"), folder / "robots", **COLUMNS)
            logs_to_npy.convert(source)
            for updates, q_weight in SETTINGS:
                settings = {"data": folder / "robots", "run_dir": folder / "runs"}
                settings |= {"num_updates": updates, "q_weight": q_weight, "eval_interval": updates}
                args = om2p_logs.Args(**settings, device="cpu", compile=False)
                team, (figures,) = om2p_logs.train(args)
                row = {"episodes": count, "updates": f"{updates:,}", "q_weight": q_weight}
                distance = figures["held_out_action_distance"]
                row |= {"held-out action distance": f"{distance:.2f}"}
                row |= {"reward of the team": f"{team_reward(team, new):.3f}"}
                table.append(row | {"of the log": f"{joined(new)['rewards'].mean():.3f}"})
    with (ROOT / "benchmark/results/logs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()

"""Make multi-agent MuJoCo datasets: OMAR's recipe and OMAR's files, for any task of MaMuJoCo.

As `collect_mpe.py`, with behaviour policies of `data/behavior/`, which `data/train_behavior.py`
trains for any other task; `medium-replay` takes snapshots of the first part of the training.

    python data/collect_mamujoco.py --task HalfCheetah-2x3 --quality expert --seed 0

A dataset goes to data/<task>/<quality>/seed_<seed>_data/ as {obs,acs,rews,next_obs,dones}_{i}.npy,
float32, one episode after the other, with a card in `card.json`. `dones` is 1 where the robot fell,
not where time ran out. The same seed gives the same bytes on the same platform.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from collect_mpe import Quality, collect, main, roll_out
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mamujoco import FILES, MaMuJoCo


@dataclass
class Args:
    task: str = "HalfCheetah-2x3"
    """<robot>-<partition> of MaMuJoCo"""
    quality: Quality = "expert"
    """whose behaviour is recorded"""
    seed: int = 0
    """seed of initial states and noise, 0 or more; part of the dataset's path"""
    num_transitions: int = 100_000
    """transitions of every agent; the public data have 1,000,000"""
    noise: float = 0.1
    """standard deviation of the exploration noise on actions in [-1, 1], 0 to 1"""
    data_dir: Path = Path(__file__).resolve().parent
    """folder of the datasets"""


def collect_mamujoco(args: Args) -> dict:
    """Write one dataset and return its card."""
    env = MaMuJoCo(args.task, 10)

    def record(policies: list) -> dict[str, np.ndarray]:
        """Equal shares of the rows; a share's last episode may be cut off where the share ends."""
        torch.manual_seed(args.seed)
        env.reset(args.seed)
        ends = np.linspace(0, args.num_transitions, len(policies) + 1).astype(int)[1:]
        parts, size = [], 0
        with tqdm(total=args.num_transitions, unit="row", unit_scale=True, disable=None) as bar:
            for policy, end in zip(policies, ends, strict=True):
                while size < end:
                    data = roll_out(env, policy, args.noise)
                    parts.append({key: values[:, : end - size] for key, values in data.items()})
                    rows = parts[-1]["reward"].shape[1]
                    bar.update(rows)
                    size += rows
        return {key: np.concatenate([part.pop(key) for part in parts], axis=1) for key in FILES}

    return collect(args, env, record)


if __name__ == "__main__":
    main(collect_mamujoco, tyro.cli(Args))

"""Convert recorded episodes to the files that om2p_logs.py and om2p_mamujoco.py read.

    pip install h5py minari  # for these two formats
    python examples/logs_to_npy.py robots.hdf5 --out robots --obs 0:10 10:20 --action 0:3 3:6

SOURCE is an .npz or HDF5 file in D4RL's layout, or the name of a local Minari dataset. In D4RL's
layout all episodes stand one after the other, in arrays of as many rows: observations, actions,
rewards (one, or one for each agent), terminals or terminations, and timeouts or truncations, which
next_observations can replace. --obs and --action have one entry for every agent, its columns as
Python counts them: `0:10`, or `0:10,34:37` if they are not in one piece.

OUT gets {obs,acs,rews,next_obs,dones}_{i}.npy of every agent i, float32. `dones` is 1 where the
task ended (terminals), and 0 where only the recording did (timeouts). Without next_observations
they are the next row's. A row at a cut then has none and is dropped; that of a termination is kept,
with its own observation there, which a done of 1 keeps out of the TD target. Minari has them all.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

NAMES = {"obs": ["observations"], "action": ["actions"], "reward": ["rewards"]}  # in the source
NAMES |= {"done": ["terminals", "terminations"], "cut": ["timeouts", "truncations"]}
NAMES |= {"next_obs": ["next_observations"]}


@dataclass
class Args:
    source: tyro.conf.Positional[str]
    """.npz file, .hdf5 or .h5 file, or the name of a Minari dataset"""
    out: Path
    """folder to write, a new one"""
    obs: tuple[str, ...] = (":",)
    """columns of the observations that each agent has; default: one agent has all"""
    action: tuple[str, ...] = (":",)
    """columns of the actions that each agent has"""


def read_flat(file) -> dict[str, np.ndarray]:
    """Rows of an open .npz or HDF5 file, {key: (T, ...)}; `cut` or `next_obs` may be missing."""
    found = {key: [name for name in names if name in file] for key, names in NAMES.items()}
    needed = ("obs", "action", "reward", "done", *([] if found["next_obs"] else ["cut"]))
    if missing := [key for key in needed if not found[key]]:
        raise ValueError(f"it has no {' or '.join(NAMES[missing[0]])}")
    return {key: np.asarray(file[names[0]]) for key, names in found.items() if names}


def read_minari(name: str) -> dict[str, np.ndarray]:
    """Rows of a Minari dataset, whose episodes have one observation more than actions."""
    import minari

    rows = {key: [] for key in NAMES}
    for episode in minari.load_dataset(name).iterate_episodes():
        obs = np.asarray(episode.observations)
        steps = episode.actions, episode.rewards, episode.terminations, episode.truncations
        for key, values in zip(NAMES, (obs[:-1], *steps, obs[1:]), strict=True):
            rows[key].append(np.asarray(values))
    return {key: np.concatenate(values) for key, values in rows.items()}


def read_source(name: str) -> dict[str, np.ndarray]:
    """The rows of SOURCE, all (T, width), `done` and `cut` (T,) bool; errors are one line."""
    try:
        if name.endswith(".npz"):
            rows = read_flat(np.load(name))
        elif name.endswith((".hdf5", ".h5")):
            import h5py

            rows = read_flat(h5py.File(name))
        else:
            rows = read_minari(name)
        rows = {key: values.reshape(len(rows["obs"]), -1) for key, values in rows.items()}
        flags = {key: rows[key].any(axis=1) for key in ("done", "cut") if key in rows}
    except Exception as problem:
        raise SystemExit(f"error: {name} cannot be read: {problem}".splitlines()[0]) from None
    return {"cut": np.zeros_like(flags["done"])} | rows | flags


def take(values: np.ndarray, columns: str) -> np.ndarray:
    """Some columns of (T, width), written as 0:10 or 0:10,34:37, or all of them, `:`."""
    text = f"0:{values.shape[1]}" if columns == ":" else columns
    try:
        ranges = [map(int, piece.split(":")) for piece in text.split(",")]
        return values[:, [k for first, last in ranges for k in range(first, last)]]
    except (ValueError, IndexError):
        raise SystemExit(f"error: {columns} are no columns of 0:{values.shape[1]}") from None


def convert(args: Args) -> None:
    """Read SOURCE, write OUT, and say in one line what it holds."""
    if args.out.exists():
        raise SystemExit(f"error: {args.out} exists; choose another --out")
    rows, N = read_source(args.source), len(args.obs)
    done, obs = rows["done"], rows["obs"]
    if len(args.action) != N or rows["reward"].shape[1] not in (1, N):
        counts = N, len(args.action), rows["reward"].shape[1]
        raise SystemExit("error: agents in --obs, in --action, rewards: {}, {}, {}".format(*counts))
    kept = np.ones(len(done), bool)
    if "next_obs" not in rows:
        kept = ~rows["cut"] & (np.arange(len(done)) < len(done) - 1) | done
        rows["next_obs"] = np.where(done[:, None], obs, np.append(obs[1:], obs[-1:], axis=0))
    rewards, arrays = np.broadcast_to(rows["reward"], (len(done), N)), {}
    for i, (own, driven) in enumerate(zip(args.obs, args.action, strict=True)):
        arrays |= {f"{x}_{i}": take(rows[x], own) for x in ("obs", "next_obs")}
        arrays |= {f"acs_{i}": take(rows["action"], driven), f"dones_{i}": done}
        arrays |= {f"rews_{i}": rewards[:, i]}
    args.out.mkdir(parents=True)
    for name, values in arrays.items():
        np.save(args.out / f"{name}.npy", values[kept].astype(np.float32))
    print(
        f"{args.out}: {N} agents, {kept.sum():,} transitions, {done.sum():,} terminations; dropped "
        f"{(~kept).sum():,} rows at cuts, whose next observation was not recorded"
    )


if __name__ == "__main__":
    convert(tyro.cli(Args))

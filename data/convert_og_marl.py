"""Convert public data to OMAR's files: OG-MARL's vaults, and the subset that MASTARS published.

    pip install -r requirements-convert.txt  # for vaults
    python data/convert_og_marl.py simple_tag.vlt --task simple_tag --quality medium --seed 0
    python data/convert_og_marl.py seed_2000_data --task simple_tag --quality medium --seed 2000

OG-MARL (Formanek et al., 2023, arxiv.org/abs/2302.00521) has OMAR's data as Flashbax vaults,
prior_work/omar/mpe/simple_{spread,tag,world}.zip and mamujoco/2halfcheetah.zip; SOURCE is what they
unpack to, `<scenario>.vlt`, or its folder of one quality. By OG-MARL's card a vault holds all five
seeds; --seed names one. The prey is its fourth agent and is left out. Observations are padded with
-inf, which is cut off. MASTARS has {obs,acs,rews,dones}_{i}.npy of 2,000 episodes; SOURCE is their
folder, and --seed only names the result.

Neither source has next observations: they are the next row's. An episode's last row, which has
none, is dropped, so that 24 of 25 or 999 of 1,000 rows remain. Episodes end where the source says
so (terminals, truncations, dones), and after 25 or 1,000 rows at the latest. In the particle tasks
they also end wherever a position does not follow from the velocity. `dones` is written as 0, as in
OMAR's own particle data, for these tasks end by the time limit alone. The card tells whole
episodes' returns.

Checked: vaults that Flashbax 0.1.3 (vault version 1.2) writes with the structure of OG-MARL's card
are read, by tensorstore alone, without Flashbax and JAX. The public files themselves could not be
checked. Open are the order of their seeds, and whether they mark the ends of episodes. Rows of
zeros at the end of short replays are cut off. The prey is taken to be the last agent; at another
place it is refused, for its padding.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from card import HORIZONS, QUALITIES, episode_returns, find_ends, map_array
from collect_mpe import main, new_folder, write_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mpe import fail_as

SHAPES = {  # learning agents, others, obs_dim, action_dim
    "simple_spread": (3, 0, 18, 2),
    "simple_tag": (3, 1, 16, 2),
    "simple_world": (3, 1, 24, 2),
    "HalfCheetah-2x3": (2, 0, 6, 3),
}
KEYS = {"obs": "observations", "action": "actions", "reward": "rewards"}


@dataclass
class Args:
    source: tyro.conf.Positional[Path]
    """folder of a vault, or of MASTARS' files"""
    task: Literal["simple_spread", "simple_tag", "simple_world", "HalfCheetah-2x3"]
    """the task that was recorded"""
    quality: Literal["random", "medium-replay", "medium", "expert"]
    """whose behaviour was recorded"""
    seed: int = 0
    """which of a vault's seeds, 0 or more; part of the dataset's path"""
    data_dir: Path = Path(__file__).resolve().parent
    """folder of the datasets"""


def find_vault(source: Path, quality: str) -> Path:
    """The folder of one quality, Medium-Replay for medium-replay, in an unpacked zip file."""
    if (source / "metadata.json").is_file():
        if source.name.lower() in {*QUALITIES} - {quality}:
            raise SystemExit(f"error: {source} is not of quality {quality}, by its name")
        return source
    found = [path.parent for path in source.rglob("metadata.json")]
    found = [path for path in found if path.name.lower() == quality]
    if len(found) != 1:
        what = f"{len(found)} vaults of quality {quality}, not one"
        raise SystemExit(f"error: {source} holds no obs_0.npy, and {what}")
    return found[0]


def read_vault(folder: Path, args: Args) -> tuple[dict, np.ndarray, str]:
    """One seed of a vault: {key: (N, T, ...)} of the learning agents, marked ends (T,), a title.

    A vault is one OCDBT database of zarr arrays, one for each leaf of `structure_shape` in
    metadata.json. These are (seeds, time, agents, ...), and are named by the keys on the way to
    the leaf, with a dot after each. `vault_index` is the number of filled rows. Source:
    github.com/instadeepai/flashbax, vault.py.
    """
    with fail_as("reading a vault needs `pip install -r requirements-convert.txt`"):
        import tensorstore

    def open_array(name: str):
        place = {"driver": "file", "path": f"{folder.resolve()}/"}
        database = {"driver": "ocdbt", "base": place, "path": name}
        spec = {"driver": "zarr", "kvstore": database}
        return tensorstore.open(spec, read=True, open=True).result()

    with fail_as(f"{folder} cannot be read as a vault"):
        metadata = json.loads((folder / "metadata.json").read_text())
        if int(metadata["version"]) != 1:
            raise ValueError(f"its version is {metadata['version']}, not 1")
        names = {*KEYS.values(), "terminals"} | {"truncations"} & {*metadata["structure_shape"]}
        arrays = {name: open_array(f"{name}.") for name in names}
        num_rows = int(open_array("vault_index").read().result()[0])
        num_seeds, _, num_agents = arrays["rewards"].shape
        learners, others, *_ = SHAPES[args.task]
        if num_agents != learners + others:
            raise ValueError(f"it has {num_agents} agents, {args.task} has {learners + others}")
        if args.seed >= num_seeds > 1:
            raise ValueError(f"--seed is {args.seed}; it holds seeds 0 to {num_seeds - 1}")
        entry = args.seed if num_seeds > 1 else 0  # a vault of one seed serves any
        columns = {}
        for name, array in arrays.items():
            values = array[entry, :num_rows, :learners].read().result()
            if values.dtype.kind not in "biuf":
                raise ValueError(f"{name} are not numbers")
            columns[name] = np.moveaxis(values, 1, 0)
        marks = [np.atleast_3d(columns[x]).any(axis=(0, 2)) for x in names - {*KEYS.values()}]
        marks = np.any(marks, axis=0)
        filled = columns["observations"].any(axis=(0, *range(2, columns["observations"].ndim)))
    filled = slice(np.flatnonzero(filled).max(initial=-1) + 1)  # the rest was never written
    columns = {key: columns[name][:, filled] for key, name in KEYS.items()}
    title = f"OG-MARL's vault {folder.resolve().parent.name}/{folder.name}, entry {entry}"
    return columns, marks[filled], title


def read_npy(folder: Path, args: Args) -> tuple[dict, np.ndarray, str]:
    """Map MASTARS' files: {key: [(T, ...) of each learning agent]}, marked ends (T,), a title."""
    learners, others, *_ = SHAPES[args.task]
    if (folder / "next_obs_0.npy").exists():
        raise SystemExit(f"error: {folder} has next_obs, so it is in OMAR's layout already")
    if (folder / f"obs_{learners + others}.npy").exists():
        raise SystemExit(
            f"error: {folder} has more than the {learners + others} agents of {args.task}"
        )
    names = {"obs": "obs", "action": "acs", "reward": "rews", "done": "dones"}
    columns = {
        key: [
            map_array(folder / f"{name}_{i}.npy", key in ("reward", "done"))
            for i in range(learners)
        ]
        for key, name in names.items()
    }
    if len(lengths := {len(array) for arrays in columns.values() for array in arrays}) > 1:
        raise SystemExit(f"error: the files of {folder} differ in length: {sorted(lengths)}")
    marks = np.any([array != 0 for array in columns.pop("done")], axis=0)
    return columns, marks, f"MASTARS' files, {folder.resolve().name}"


def read_source(args: Args) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """Read and check {obs, action (N, T, dim), reward (N, T)}; also marked ends (T,), a title."""
    if (args.source / "obs_0.npy").exists():
        columns, marks, title = read_npy(args.source, args)
    else:
        columns, marks, title = read_vault(find_vault(args.source, args.quality), args)
    if len(marks) < 2:
        raise SystemExit(f"error: {args.source} has {len(marks)} rows, less than an episode")
    widths, data = {"obs": SHAPES[args.task][2], "action": SHAPES[args.task][3]}, {}
    with fail_as(f"{args.source} cannot be converted"), np.errstate(over="ignore"):
        for key, agents in columns.items():
            data[key], width = [], widths.get(key)
            for i, array in enumerate(agents):
                if width and array.ndim == 2 and np.isneginf(array[:, width:]).all():
                    array = array[:, :width]  # the rest is padding
                expected = (len(marks), width) if width else (len(marks),)
                if array.shape != expected:
                    raise ValueError(f"{key} of agent {i} has shape {array.shape}, not {expected}")
                array = array.astype(np.float32)
                if not np.isfinite(array).all():
                    raise ValueError(f"{key} of agent {i} holds NaN or infinite values")
                data[key].append(array)
        data = {key: np.stack(agents) for key, agents in data.items()}
        if np.abs(data["action"]).max() > 1.001:
            raise ValueError("it holds actions outside [-1, 1]")
    return data, marks, title


def convert(args: Args) -> dict:
    """Write one dataset and return its card.

    In the particle tasks obs starts with velocity and position, and inside an episode position
    moves by 0.1 times the new velocity (OMAR's multiagent-particle-envs, core.py).
    """
    folder = new_folder(args)
    data, marks, title = read_source(args)
    obs, goes_on = data["obs"], np.ones(len(marks) - 1, bool)
    if args.task.startswith("simple_"):
        jumps = np.diff(obs[..., 2:4], axis=1) - 0.1 * obs[:, 1:, 0:2]
        goes_on = (np.abs(jumps) < 1e-3).all(axis=(0, 2))
    ends = find_ends(marks, goes_on, HORIZONS[args.task])
    kept = np.delete(np.arange(len(marks)), ends)
    if len(kept) < len(marks) / 2:
        raise SystemExit(f"error: rows of {args.source} do not follow from each other")
    lengths = np.diff(ends, prepend=-1)
    returns = episode_returns(data["reward"].mean(axis=0, dtype=float), marks, ends)
    card = {
        "dataset": f"{args.task}, {args.quality}, seed {args.seed}",
        "source": title,
        "transitions": len(kept),
        "dropped": f"the last row of every episode, {len(ends)} of {len(marks)}",
        "episodes": len(ends),
        "rows of an episode": f"{lengths.min()} to {lengths.max()} in the source",
        "ends marked in the source": int(marks.sum()),
        "return mean": round(float(returns.mean()), 2),
        "return sd": round(float(returns.std()), 2),
        "command": f"python data/{Path(__file__).name} {args.source.name} --task {args.task} "
        f"--quality {args.quality} --seed {args.seed}",
    }
    data = {key: values[:, kept] for key, values in data.items()} | {
        "next_obs": obs[:, kept + 1],
        "done": np.zeros((len(obs), len(kept)), np.float32),
    }
    write_dataset(folder, data, card)
    return card


if __name__ == "__main__":
    main(convert, tyro.cli(Args))

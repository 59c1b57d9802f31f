"""Convert public data to OMAR's files: OG-MARL's vaults, and the subset that MASTARS published.

    pip install -r requirements-convert.txt  # for vaults
    python data/convert_og_marl.py simple_tag.vlt --task simple_tag --quality medium --seed 0
    python data/convert_og_marl.py seed_2000_data --task simple_tag --quality medium --seed 2000

OG-MARL (Formanek et al., 2023, arxiv.org/abs/2302.00521) has OMAR's data as Flashbax vaults,
prior_work/omar/mpe/simple_{spread,tag,world}.zip and mamujoco/2halfcheetah.zip; SOURCE is what they
unpack to, `<scenario>.vlt`, or its folder of one quality. By OG-MARL's card a vault holds all five
seeds, of which --seed names one; the prey is its fourth agent and does not come along, and
observations are padded with -inf, which is cut off. MASTARS has {obs,acs,rews,dones}_{i}.npy of
2,000 episodes; SOURCE is their folder, and --seed only names the result.

Neither source has next observations: they are the next row's, and an episode's last row, which has
none, is dropped, so that 24 of 25 or 999 of 1,000 rows remain. Episodes end where the source says
so (terminals, truncations, dones), after 25 or 1,000 rows at the latest, and in the particle tasks
wherever a position does not follow from the velocity. `dones` is written as 0, as in OMAR's own
particle data, for these tasks end by the time limit alone. The result goes to
data/<task>/<quality>/seed_<seed>_data/, float32, with a card whose returns are of whole episodes.

Checked: vaults that Flashbax 0.1.3 (vault version 1.2) writes with the structure of OG-MARL's card
are read, by tensorstore alone, without Flashbax and JAX. Not checked: the public files themselves,
so neither the order of their seeds, nor whether they mark the ends of episodes, nor whether short
replays are filled up with rows of zeros (cut off here), nor that the prey is the last agent
(another place is refused, for its padding).
"""

import json
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import tyro

SHAPES = {  # learning agents, others, obs_dim, action_dim, rows of an episode
    "simple_spread": (3, 0, 18, 2, 25),
    "simple_tag": (3, 1, 16, 2, 25),
    "simple_world": (3, 1, 24, 2, 25),
    "HalfCheetah-2x3": (2, 0, 6, 3, 1_000),
}
AXES = {  # of a vault's arrays: seeds, time, agents and, in marks it may be, one more
    "observations": (4,),
    "actions": (4,),
    "rewards": (3,),
    "terminals": (3, 4),
    "truncations": (3, 4),
}
QUALITIES = ("random", "medium-replay", "medium", "expert")


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


def stop(message: str, problem: Exception | None = None) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    reason = "" if problem is None else f": {str(problem) or type(problem).__name__}"
    raise SystemExit(f"error: {message}{reason}".splitlines()[0])


def find_vault(source: Path, quality: str) -> Path:
    """The folder of one quality, Medium-Replay for medium-replay, in an unpacked zip file."""
    if (source / "metadata.json").is_file():
        if source.name.lower() in {*QUALITIES} - {quality}:
            stop(f"{source} is not of quality {quality}, by its name")
        return source
    found = [path.parent for path in source.rglob("metadata.json")]
    found = [path for path in found if path.name.lower() == quality]
    if len(found) != 1:
        stop(f"{source} holds no obs_0.npy, and {len(found)} vaults of quality {quality}, not one")
    return found[0]


def open_vault(folder: Path) -> tuple[dict, int]:
    """Open a vault's arrays, {name: (seeds, time, agents, ...)}, and tell how many rows are filled.

    A vault is one zarr array for each leaf of `structure_shape` in metadata.json, named by the keys
    on the way to it with a dot after each, and an array `vault_index` of one number, the rows; all
    in one OCDBT database. Source: github.com/instadeepai/flashbax, vault.py.
    """
    try:
        import tensorstore
    except Exception as problem:  # or one that does not go with the NumPy that is there
        stop("reading a vault needs `pip install -r requirements-convert.txt`", problem)

    def open_array(name: str):
        place = {"driver": "file", "path": f"{folder.resolve()}/"}
        database = {"driver": "ocdbt", "base": place, "path": name}
        spec = {"driver": "zarr", "kvstore": database}
        return tensorstore.open(spec, read=True, open=True).result()

    try:
        metadata = json.loads((folder / "metadata.json").read_text())
        if int(metadata["version"]) != 1:
            raise ValueError(f"its version is {metadata['version']}, not 1")
        arrays = {
            name: open_array(f"{name}.")
            for name, leaf in metadata["structure_shape"].items()
            if isinstance(leaf, str)  # not a branch, as infos, which holds the state
        }
        return arrays, int(open_array("vault_index").read().result()[0])
    except Exception as problem:
        stop(f"{folder} cannot be read as a vault", problem)


def read_vault(folder: Path, args: Args) -> tuple[dict, np.ndarray, str]:
    """Read one seed of a vault: {name: (agents, T, ...)} of the learning agents, ends, a title.

    Ends (T,) of bool are what terminals and truncations mark. A vault of one seed serves any.
    """
    arrays, num_rows = open_vault(folder)
    learners, others, *_ = SHAPES[args.task]
    needed = {"obs": "observations", "acs": "actions", "rews": "rewards", "dones": "terminals"}
    if missing := {*needed.values()} - {*arrays}:
        stop(f"{folder} has no {', '.join(sorted(missing))}")
    for name, axes in AXES.items():
        if name in arrays and len(arrays[name].shape) not in axes:
            stop(f"{name} of {folder} are of shape {arrays[name].shape}; expected {axes[0]} axes")
    num_seeds, _, num_agents = arrays["rewards"].shape
    if num_agents != learners + others:
        stop(f"{folder} has {num_agents} agents; expected {learners + others} in {args.task}")
    if args.seed >= num_seeds > 1:
        stop(f"--seed is {args.seed}; {folder} holds seeds 0 to {num_seeds - 1}")
    entry = args.seed if num_seeds > 1 else 0

    def read(name: str) -> np.ndarray:
        try:
            array = arrays[name][entry, :num_rows, :learners].read().result()
            if array.dtype.kind not in "biuf":
                raise ValueError("it is not an array of numbers")
            return np.moveaxis(array, 1, 0)
        except Exception as problem:
            stop(f"{name} of {folder} cannot be read", problem)

    columns = {name: read(key) for name, key in needed.items()}
    marks = np.atleast_3d(columns.pop("dones")).any(axis=(0, 2))
    if "truncations" in arrays:
        marks |= np.atleast_3d(read("truncations")).any(axis=(0, 2))
    filled = columns["obs"].any(axis=(0, *range(2, columns["obs"].ndim)))
    filled = slice(np.flatnonzero(filled).max(initial=-1) + 1)  # the rest was never written
    columns = {name: values[:, filled] for name, values in columns.items()}
    title = f"OG-MARL's vault {folder.resolve().parent.name}/{folder.name}, entry {entry}"
    return columns, marks[filled], title


def read_npy(folder: Path, args: Args) -> tuple[dict, np.ndarray, str]:
    """Map MASTARS' files: {name: [(T, ...) of each learning agent]}, marked ends (T,), a title."""
    learners, others, *_ = SHAPES[args.task]
    if (folder / "next_obs_0.npy").exists():
        stop(f"{folder} has next observations, so it is in OMAR's layout already")
    if (folder / f"obs_{learners + others}.npy").exists():
        stop(f"{folder} holds more than the {learners + others} agents of {args.task}")
    columns = {name: [] for name in ("obs", "acs", "rews", "dones")}
    for name, arrays in columns.items():
        for i in range(learners):
            path = folder / f"{name}_{i}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                    raise ValueError("it is not an array of numbers")
                if len(array) != len((columns["obs"] or [array])[0]):
                    raise ValueError(f"it has {len(array)} rows, unlike obs_0.npy")
                if name in ("rews", "dones"):
                    array = array.reshape(len(array))  # (T, 1) is as good as (T,)
            except Exception as problem:
                stop(f"{path} cannot be read", problem)
            arrays.append(array)
    marks = np.logical_or.reduce([array != 0 for array in columns.pop("dones")])
    return columns, marks, f"MASTARS' files, {folder.resolve().name}"


def check_columns(array: np.ndarray, width: int | None, what: str) -> np.ndarray:
    """Cut -inf padding off (T, W) to (T, width), float32; (T,) without width.

    Ends the program if that is not its shape or another number is not finite.
    """
    expected = array.shape[:1] + (() if width is None else (width,))
    if width is not None and array.ndim == 2 and np.isneginf(array[:, width:]).all():
        array = array[:, :width]
    if array.shape != expected:
        stop(f"{what} are of shape {array.shape}; expected {expected}, or more columns of -inf")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        stop(f"{what} hold NaN or infinite values")
    return array


def find_ends(marks: np.ndarray, obs: np.ndarray, task: str) -> np.ndarray:
    """Which rows (T,) are the last of an episode, from the marked ones and obs (N, T, obs_dim).

    In the particle tasks obs starts with velocity and position, and inside an episode position
    moves by 0.1 times the new velocity (OMAR's multiagent-particle-envs, core.py).
    """
    ends = marks.copy()
    if task.startswith("simple_"):
        steps = np.diff(obs[..., 2:4], axis=1) - 0.1 * obs[:, 1:, 0:2]
        ends[:-1] |= (np.abs(steps) > 1e-3).any(axis=(0, 2))
    ends[-1] = True
    last = np.flatnonzero(ends)
    lengths = np.diff(last, prepend=-1)
    age = np.arange(len(ends)) - np.repeat(last - lengths + 1, lengths)  # rows since the start
    horizon = SHAPES[task][-1]
    return ends | (age % horizon == horizon - 1)


def read_source(args: Args) -> tuple[dict[str, np.ndarray], np.ndarray, str]:
    """Read and check a source: obs (N, T, obs_dim), acs, rews (N, T), marked ends (T,), a title."""
    if (args.source / "obs_0.npy").exists():
        columns, marks, title = read_npy(args.source, args)
    else:
        columns, marks, title = read_vault(find_vault(args.source, args.quality), args)
    if len(marks) < 2:
        stop(f"{args.source} has {len(marks)} rows; expected an episode at least")
    _, _, obs_dim, action_dim, _ = SHAPES[args.task]
    data = {}
    for name, width in (("obs", obs_dim), ("acs", action_dim), ("rews", None)):
        agents = [
            check_columns(values, width, f"{name} of agent {i} in {args.source}")
            for i, values in enumerate(columns[name])
        ]
        data[name] = np.stack(agents)
    if np.abs(data["acs"]).max() > 1.001:
        stop(f"{args.source} holds actions outside [-1, 1]")
    return data, marks, title


def write_dataset(folder: Path, data: dict[str, np.ndarray], card: dict) -> None:
    """Write {name: (N, T, ...)} and the card, into a temporary folder that is renamed at the end.

    A conversion that is stopped leaves nothing behind.
    """
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        for name, agents in data.items():
            for i, values in enumerate(agents):
                np.save(temporary / f"{name}_{i}.npy", values)
        (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as problem:
        stop(f"{folder} cannot be written", problem)
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def convert(args: Args) -> dict:
    """Write one dataset and return its card."""
    if args.seed < 0:
        stop(f"--seed is {args.seed}; it must be 0 or more")
    folder = args.data_dir / args.task / args.quality / f"seed_{args.seed}_data"
    if folder.exists():
        stop(f"{folder} is there already, and is left as it is; --data-dir can name another place")
    data, marks, title = read_source(args)
    ends = find_ends(marks, data["obs"], args.task)
    last, kept = np.flatnonzero(ends), np.flatnonzero(~ends)
    if len(kept) < len(ends) / 2:
        stop(f"rows of {args.source} do not follow from each other as in {args.task}")
    lengths = np.diff(last, prepend=-1)
    returns = np.add.reduceat(data["rews"].mean(axis=0, dtype=float), last - lengths + 1)
    card = {
        "dataset": f"{args.task}, {args.quality}, seed {args.seed}",
        "source": title,
        "transitions": len(kept),
        "dropped": f"the last row of every episode, {len(last)} of {len(ends)}",
        "episodes": len(last),
        "rows of an episode": f"{lengths.min()} to {lengths.max()} in the source",
        "ends marked in the source": int(marks.sum()),
        "return mean": round(float(returns.mean()), 2),
        "return sd": round(float(returns.std()), 2),
        "command": f"python data/{Path(__file__).name} {args.source.name} --task {args.task} "
        f"--quality {args.quality} --seed {args.seed}",
        "versions": f"numpy {np.__version__}",
    }
    data = {name: values[:, kept] for name, values in data.items()} | {
        "next_obs": data["obs"][:, kept + 1],
        "dones": np.zeros((len(data["obs"]), len(kept)), np.float32),
    }
    write_dataset(folder, data, card)
    return card


def main(args: Args) -> None:
    """Convert one dataset and print its card."""
    try:
        card = convert(args)
    except KeyboardInterrupt:
        raise SystemExit("stopped; no dataset was written") from None
    for key, value in card.items():
        print(f"{key:>26}: {value}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    main(tyro.cli(Args))

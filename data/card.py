"""Dataset card: what a folder of OMAR's files holds, and whether it holds together.

    python data/card.py data/simple_spread/expert/seed_0_data

Reads {obs,acs,rews,next_obs,dones}_{i}.npy of all agents i; next_obs may be missing. An episode
ends where `dones` is not 0 for some agent, or where some agent's next_obs is not the next row's
obs. It ends after --horizon rows at the latest, by default the horizon of the task that the path
names. Returns are of whole episodes: of those that are done, or as long as the longest one.

Three counts are 0 in data that hold together. The first is of episodes inside the files that are
shorter but not done; lost rows leave these behind. The second is of rows that go on although their
episode is over, the third of rows that go on for some agents only. A line warns of observations
whose components have standard deviations that differ by a factor of more than 10.
"""

import math
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mpe import FILES, fail_as

QUALITIES = ("expert", "medium", "medium-replay", "random")
PUBLIC_RETURNS = {  # means of five seeds (OMAR, 2022); HalfCheetah's middle of one (OG-MARL, 2023)
    "simple_spread": dict(zip(QUALITIES, (516.8, 259.9, 194.2, 159.8), strict=True)),
    "simple_tag": dict(zip(QUALITIES, (185.6, 88.7, 14.2, -4.1), strict=True)),
    "simple_world": dict(zip(QUALITIES, (79.5, 43.3, 3.5, -6.8), strict=True)),
    "HalfCheetah-2x3": dict(zip(QUALITIES, (3568.8, 1568.9, 423.5, -284.0), strict=True)),
    # OMIGA's (2023), of one seed, by OG-MARL's card
    "HalfCheetah-6x1": dict(zip(QUALITIES, (2785.1, 1425.7, 655.8, None), strict=True)),
    "Hopper-3x1": dict(zip(QUALITIES, (2452.0, 723.6, 746.4, None), strict=True)),
    "Ant-2x4": dict(zip(QUALITIES, (2055.1, 1418.7, 1029.5, None), strict=True)),
}
ONE_SEED = {  # mean and standard deviation by OG-MARL's card, in the same order
    "simple_spread": ("530.95 ± 71.41", "273.39 ± 92.06", "203.74 ± 80.49", "159.57 ± 60.46"),
    "simple_tag": ("207.90 ± 77.51", "116.36 ± 58.86", "3.90 ± 20.28", "-4.13 ± 10.81"),
    "simple_world": ("85.21 ± 31.11", "65.86 ± 29.55", "1.23 ± 13.49", "-6.83 ± 5.74"),
    "HalfCheetah-2x3": ("3338.7 ± 252.6", "1568.9 ± 273.4", "423.5 ± 655.7", "-282.9 ± 77.5"),
    "HalfCheetah-6x1": ("2785.1 ± 1053.1", "1425.7 ± 520.1", "655.8 ± 590.4", None),
    "Hopper-3x1": ("2452.0 ± 1097.9", "723.6 ± 211.7", "746.4 ± 671.9", None),
    "Ant-2x4": ("2055.1 ± 22.1", "1418.7 ± 37.0", "1029.5 ± 141.3", None),
}
HORIZONS = {task: 25 if task.startswith("simple_") else 1_000 for task in PUBLIC_RETURNS}
OTHER_TEAM = re.compile(r"(simple_spread)-[1-9]\d*")  # of another size, without public data


@dataclass
class Args:
    path: tyro.conf.Positional[Path]
    """folder of the dataset's files"""
    horizon: int | None = None
    """rows that an episode has at most, 1 or more; by default the task's, if the path names it"""


def map_array(path: Path, flat: bool = False) -> np.ndarray:
    """Map one .npy file of numbers: (T, dim), or (T,) where flat, for which (T, 1) is as good."""
    with fail_as(f"{path} cannot be used"):
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind not in "biuf":
            raise ValueError("it holds other things than numbers")
        if flat and array.shape[1:] == (1,):
            array = array[:, 0]
        if array.ndim != 2 - flat:
            raise ValueError(f"its shape is {array.shape}, not {'(T,)' if flat else '(T, dim)'}")
    return array


def read_files(folder: Path) -> dict[str, list[np.ndarray]]:
    """Map all files, {key: [(T, dim) or, of reward and done, (T,) of every agent]}."""
    files, num_agents = {key: [] for key in FILES}, len(list(folder.glob("obs_*.npy")))
    if not num_agents:
        raise SystemExit(f"error: there is no obs_0.npy in {folder}")
    if not list(folder.glob("next_obs_*.npy")):
        del files["next_obs"]
    for key, i in product(files, range(num_agents)):
        path = folder / f"{FILES[key]}_{i}.npy"
        array = map_array(path, flat=key in ("reward", "done"))
        files[key].append(array)
        rows = len(files["obs"][0])
        expected = files["obs"][i].shape if key == "next_obs" else (rows, *array.shape[1:])
        if array.shape != expected or not rows:
            raise SystemExit(f"error: {path} has shape {array.shape}, not {expected} as obs")
    return files


def find_ends(done: np.ndarray, goes_on: np.ndarray, horizon: float) -> np.ndarray:
    """Last rows of episodes: done (T,), not goes_on (T - 1,), or an episode's `horizon`-th row."""
    ends = done | np.append(~goes_on, True)
    last = np.flatnonzero(ends)
    lengths = np.diff(last, prepend=-1)
    age = np.arange(len(ends)) - np.repeat(last - lengths + 1, lengths)  # rows since the start
    horizon = min(horizon, len(ends))
    return np.flatnonzero(ends | (age % horizon == horizon - 1))


def episode_returns(reward: np.ndarray, done, ends, horizon: int | None = None) -> np.ndarray:
    """Sums (K,) of reward (T,) over episodes that are done, or of `horizon` rows, or the most."""
    lengths = np.diff(ends, prepend=-1)
    whole = done[ends] | (lengths == (horizon or lengths.max()))
    return np.add.reduceat(reward, ends - lengths + 1, dtype=float)[whole]


def count_duplicates(arrays: list[np.ndarray]) -> int:
    """Number of rows that repeat an earlier one, in all arrays (T, ...), by random 64-bit sums."""
    sums, rng = np.zeros(len(arrays[0]), np.uint64), np.random.default_rng(0)
    for array in arrays:
        with np.errstate(over="ignore"):
            bits = np.ascontiguousarray(array, np.float32).reshape(len(array), -1).view(np.uint32)
        sums += (bits * rng.integers(2**64, size=bits.shape[1], dtype=np.uint64)).sum(axis=1)
    return len(sums) - len(np.unique(sums))


def spread(arrays: list[np.ndarray]) -> tuple[list[str], str]:
    """Ranges of all components of every agent's observations (T, dim); a warning, or ""."""
    ranges, sds = [], {}
    for i, x in enumerate(map(np.ma.masked_invalid, arrays)):
        low, high = (np.ma.filled(y, np.nan) for y in (x.min(axis=0), x.max(axis=0)))
        ranges.append(", ".join(f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True)))
        sd = x.std(axis=0, dtype=float).filled(0)
        changing = np.flatnonzero(sd > 1e-6 * np.maximum(abs(low), abs(high)))
        sds |= {f"obs_{i}[:, {k}]": sd[k] for k in changing}
    least, most = (f(sds, key=sds.get, default=None) for f in (min, max))
    if not sds or sds[most] <= 10 * sds[least]:
        return ranges, ""
    names = f"{least} {sds[least]:.3g}, {most} {sds[most]:.3g}"
    return ranges, f"scales differ by more than 10 times; standard deviations: {names}"


def describe(folder: Path, horizon: int | None = None) -> tuple[dict, np.ndarray]:
    """The card, {what: number or text}, and the episodes' returns (K,), mean over agents."""
    files, names = read_files(folder), folder.resolve().parts[::-1]
    names = ["HalfCheetah-2x3" if name == "HalfCheetah-v2" else name for name in names]
    task = next((x for x in names if x in HORIZONS or OTHER_TEAM.fullmatch(x)), None)
    quality = next((x for x in names if x in QUALITIES), None)
    num_rows = len(files["obs"][0])
    done = np.any([array != 0 for array in files["done"]], axis=0)
    horizon = horizon or HORIZONS.get(OTHER_TEAM.sub(r"\1", task or ""), math.inf)
    every = some = np.ones(num_rows - 1, bool)
    if "next_obs" in files:
        pairs = zip(files["obs"], files["next_obs"], strict=True)
        goes_on = [(next_obs[:-1] == obs[1:]).all(axis=-1) for obs, next_obs in pairs]
        every, some = np.all(goes_on, axis=0), np.any(goes_on, axis=0)
    elif math.isinf(horizon) and not done.any():
        raise SystemExit(f"error: {folder} does not tell where episodes end; --horizon can")
    ends = find_ends(done, every, horizon)
    lengths = np.diff(ends, prepend=-1)
    short = (lengths < lengths.max()) & ~done[ends]
    reward = np.mean(files["reward"], axis=0, dtype=float)
    returns = episode_returns(reward, done, ends)
    returns = returns[np.isfinite(returns)]

    card = {"dataset": f"{task or 'unknown task'}, {quality or 'unknown quality'}"}
    card |= {"agents": len(files["obs"]), "transitions": num_rows}
    for key, arrays in files.items():
        card[FILES[key]] = ", ".join(sorted({f"{array.shape} {array.dtype}" for array in arrays}))
    card |= {"episodes": len(ends), "rows of an episode": f"{lengths.min()} to {lengths.max()}"}
    card["cut short at the end"] = "1 episode" if short[-1] else "none"
    card["share of done"] = float(np.mean([array != 0 for array in files["done"]]))
    if "next_obs" in files:
        card["next_obs[t] == obs[t+1]"] = f"in {every.sum()} rows of {len(every)}"
        card["short but not done"] = int(short[:-1].sum())
        card["go on past their end"] = int(every[ends[:-1]].sum())
        card["go on for some agents"] = int((some & ~every).sum())
    columns = [array for key in ("obs", "action", "reward") for array in files[key]]
    card["duplicates of earlier rows"] = count_duplicates(columns)
    for (key, name), i in product(FILES.items(), range(len(files["obs"]))):
        if key in files:
            finite = np.isfinite(array := files[key][i])
            if key in ("reward", "action") and finite.any():
                x = array[finite].astype(float)
                card[f"{name}_{i}"] = f"{x.min():.4g} to {x.max():.4g}, mean {x.mean():.4g}"
            if not finite.all():
                card[f"not finite in {name}_{i}"] = f"{(~finite).sum()} numbers"
    ranges, warning = spread(files["obs"])
    card |= {f"obs_{i}": text for i, text in enumerate(ranges)}
    card |= {"warning": warning} if warning else {}
    if len(returns):
        card["return"] = f"{returns.mean():.2f} ± {returns.std():.2f}, {len(returns)} episodes"
    if task in PUBLIC_RETURNS and quality:
        card["public return"] = PUBLIC_RETURNS[task][quality]
        card["public return, one seed"] = ONE_SEED[task][QUALITIES.index(quality)]
    return card, returns


def print_card(card: dict) -> None:
    """One line a fact."""
    for key, value in card.items():
        print(f"{key:>26}: {value}")


def main(args: Args) -> None:
    """Print the card and the histogram of the returns."""
    if args.horizon is not None and args.horizon < 1:
        raise SystemExit(f"error: --horizon is {args.horizon}; it must be 1 or more")
    card, returns = describe(args.path, args.horizon)
    print_card(card)
    counts, edges = np.histogram(returns, 15)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        print(f"{low:>11.2f} to {high:>11.2f}: {'#' * round(40 * count / max(1, *counts))} {count}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the ± where the terminal has none
    main(tyro.cli(Args))

"""Dataset card: what a folder of OMAR's files holds, and whether it holds together.

    python data/card.py data/simple_spread/expert/seed_0_data
    python data/card.py data/simple_spread/expert/seed_0_data --png returns.png

Reads {obs,acs,rews,next_obs,dones}_{i}.npy, one of each for every agent i; next_obs may be missing.
The files are mapped and read in pieces, so a million transitions need little memory.

A row is the last one of its episode if `dones` is not 0 there for some agent, if some agent's
next_obs is not the next row's obs, or if the episode has as many rows as it may have: --horizon,
else 25 in the particle tasks and 1000 in HalfCheetah, when the path names the task. An episode that
the end of the files cuts short, shorter than the longest one and not done, counts for no return.
By this rule next_obs[t] == obs[t+1] inside every episode, so three other counts tell whether the
rows hold together, and are 0 if they do: episodes that are shorter than the longest one but not
done, which a break inside an episode leaves behind; rows that go on although their episode is over;
and rows that go on for some agents only.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import tyro

PUBLIC = {  # mean return of five seeds (OMAR, ICML 2022); OG-MARL's card of one: mean, sd, rows
    "simple_spread": {
        "expert": (516.8, 530.95, 71.41, 1_000_000),
        "medium": (259.9, 273.39, 92.06, 1_000_000),
        "medium-replay": (194.2, 203.74, 80.49, 97_500),
        "random": (159.8, 159.57, 60.46, 1_000_000),
    },
    "simple_tag": {
        "expert": (185.6, 207.90, 77.51, 1_000_000),
        "medium": (88.7, 116.36, 58.86, 1_000_000),
        "medium-replay": (14.2, 3.90, 20.28, 62_500),
        "random": (-4.1, -4.13, 10.81, 1_000_000),
    },
    "simple_world": {
        "expert": (79.5, 85.21, 31.11, 1_000_000),
        "medium": (43.3, 65.86, 29.55, 1_000_000),
        "medium-replay": (3.5, 1.23, 13.49, 80_000),
        "random": (-6.8, -6.83, 5.74, 1_000_000),
    },
    "HalfCheetah-2x3": {
        "expert": (3568.8, 3338.69, 252.58, 1_000_000),
        "medium": (None, 1568.87, 273.38, 1_000_000),
        "medium-replay": (None, 423.49, 655.68, 460_000),
        "random": (-284.0, -282.89, 77.50, 1_000_000),
    },
}
HORIZONS = {"simple_spread": 25, "simple_tag": 25, "simple_world": 25, "HalfCheetah-2x3": 1_000}
OTHER_NAMES = {"HalfCheetah-v2": "HalfCheetah-2x3"}  # of tasks, in OMAR's own folders
NAMES = ("obs", "acs", "rews", "next_obs", "dones")
CHUNK = 50_000  # rows looked at together


@dataclass
class Args:
    path: tyro.conf.Positional[Path]
    """folder of the dataset's files"""
    horizon: int | None = None
    """rows that an episode has at most, 1 or more; by default the task's, if the path names it"""
    png: Path | None = None
    """file for a picture of the returns' histogram, <name>.png (needs matplotlib)"""


def stop(message: str, problem: Exception | None = None) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    reason = "" if problem is None else f": {str(problem) or type(problem).__name__}"
    raise SystemExit(f"error: {message}{reason}".splitlines()[0])


def read_files(folder: Path) -> dict[str, list[np.ndarray]]:
    """Map every agent's files: {name: [one array (T, dim) or (T,) for each agent]}.

    Rewards and dones of shape (T, 1) become (T,). Ends the program with a line that names the file
    if one is missing, is not an array of numbers, or has another shape or length than it should.
    """
    num_agents = 0
    while (folder / f"obs_{num_agents}.npy").exists():
        num_agents += 1
    if not num_agents:
        stop(f"there is no obs_0.npy in {folder}")
    names = [n for n in NAMES if n != "next_obs" or list(folder.glob("next_obs_*.npy"))]
    files = {name: [] for name in names}
    for i in range(num_agents):
        for name in names:
            path = folder / f"{name}_{i}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                    raise ValueError("it is not an array of numbers")
            except Exception as problem:
                stop(f"{path} cannot be read", problem)
            flat = name in ("rews", "dones")
            if flat and array.shape[1:] == (1,):
                array = array[:, 0]
            if array.ndim != (1 if flat else 2):
                stop(f"{path} has shape {array.shape}; expected {'(T,)' if flat else '(T, dim)'}")
            if len(array) != len(files["obs"][0] if files["obs"] else array) or not len(array):
                stop(f"{path} has {len(array)} rows; expected as many as obs_0.npy, 1 or more")
            files[name].append(array)
        if "next_obs" in files and files["next_obs"][i].shape != files["obs"][i].shape:
            stop(f"{folder / f'next_obs_{i}.npy'} has another shape than obs_{i}.npy")
    return files


def compare_rows(files: dict, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether next_obs[t] == obs[t + 1]: for all agents, and for any, both (T - 1,) of bool."""
    every, some = np.ones(num_rows - 1, bool), np.zeros(num_rows - 1, bool)
    for obs, next_obs in zip(files["obs"], files["next_obs"], strict=True):
        for first in range(0, num_rows - 1, CHUNK):
            part = slice(first, min(first + CHUNK, num_rows - 1))
            same = (next_obs[part] == obs[part.start + 1 : part.stop + 1]).all(axis=-1)
            every[part] &= same
            some[part] |= same
    return every, some


def find_ends(done: np.ndarray, goes_on: np.ndarray, horizon: float) -> np.ndarray:
    """Indices of the episodes' last rows, from (T,) and (T - 1,) of bool; see the top for the rule.

    The last row of all is always one.
    """
    horizon = min(horizon, len(done))  # a longer one ends no episode, and need not fit 64 bits
    ends = done.copy()
    ends[:-1] |= ~goes_on
    ends[-1] = True
    last = np.flatnonzero(ends)
    lengths = np.diff(last, prepend=-1)
    age = np.arange(len(ends)) - np.repeat(last - lengths + 1, lengths)  # rows since the start
    return np.flatnonzero(ends | (age % horizon == horizon - 1))


def count_duplicates(files: dict, num_rows: int) -> int:
    """Number of rows whose obs, acs and rews, of all agents, an earlier row has, too, bit by bit.

    Rows are compared by a random 64-bit sum of their float32 numbers: two that differ are taken for
    equal with a probability of 2^-33 at most (multilinear hashing).
    """
    columns = [array for name in ("obs", "acs", "rews") for array in files[name]]
    width = sum(array.shape[1] if array.ndim == 2 else 1 for array in columns)
    weights = np.random.default_rng(0).integers(2**64, size=width, dtype=np.uint64)
    sums = np.empty(num_rows, np.uint64)
    for first in range(0, num_rows, CHUNK):
        parts = [array[first : first + CHUNK] for array in columns]
        with np.errstate(over="ignore"):
            rows = np.column_stack([part.astype(np.float32) for part in parts])
        sums[first : first + CHUNK] = (rows.view(np.uint32) * weights).sum(axis=1)
    return num_rows - len(np.unique(sums))


def summarize(array: np.ndarray) -> tuple[str, int, int]:
    """Range and mean of the finite numbers of an array, as text, and the others: NaN, infinite."""
    low, high, total, nans, infinities = math.inf, -math.inf, 0.0, 0, 0
    for first in range(0, len(array), CHUNK):
        part = np.asarray(array[first : first + CHUNK], float)
        finite = np.isfinite(part)
        low = min(low, part.min(where=finite, initial=math.inf))
        high = max(high, part.max(where=finite, initial=-math.inf))
        total += part.sum(where=finite)
        nans += int(np.isnan(part).sum())
        infinities += int(np.isinf(part).sum())
    mean = total / max(array.size - nans - infinities, 1)
    return f"{low:.4g} to {high:.4g}, mean {mean:.4g}", nans, infinities


def name_dataset(folder: Path) -> tuple[str | None, str | None]:
    """Task and quality, as far as the parts of a path name them; the innermost names count."""
    parts = [OTHER_NAMES.get(part, part) for part in reversed(folder.resolve().parts)]
    task = next((part for part in parts if part in PUBLIC), None)
    return task, next((part for part in parts if part in PUBLIC["simple_spread"]), None)


def describe(folder: Path, horizon: int | None = None) -> tuple[dict, np.ndarray]:
    """The card, {what: number or text}, and the episodes' returns (K,), in the files' units.

    A return is the undiscounted sum of an episode's rewards, mean over agents. Ends the program if
    nothing tells where episodes end: no next_obs, no done, no `horizon`, no task in the path.
    """
    files, (task, quality) = read_files(folder), name_dataset(folder)
    num_agents, num_rows = len(files["obs"]), len(files["obs"][0])
    done = np.zeros(num_rows, bool)
    for array in files["dones"]:
        done |= array != 0
    horizon = horizon or HORIZONS.get(task, math.inf)
    if "next_obs" in files:
        goes_on, some = compare_rows(files, num_rows)
    else:
        goes_on = some = np.ones(num_rows - 1, bool)
        if math.isinf(horizon) and not done.any():
            stop(f"{folder} does not tell where episodes end; --horizon can")
    last = find_ends(done, goes_on, horizon)
    lengths = np.diff(last, prepend=-1)
    short = (lengths < lengths.max()) & ~done[last]

    reward = sum(np.asarray(array, float) for array in files["rews"]) / num_agents
    with np.errstate(invalid="ignore"):  # infinite rewards, which the card tells of
        returns = np.add.reduceat(reward, last - lengths + 1)[: len(last) - short[-1]]
    card = {"dataset": f"{task or 'unknown task'}, {quality or 'unknown quality'}"}
    card |= {"agents": num_agents, "transitions": num_rows}
    for name, arrays in files.items():
        kinds = Counter(f"{array.shape} {array.dtype}" for array in arrays)
        card[name] = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    card |= {"episodes": len(last), "rows of an episode": f"{lengths.min()} to {lengths.max()}"}
    if lengths.max() < HORIZONS.get(task, 0) and not done.any():  # as converted vaults have it
        card["missing of an episode"] = f"{HORIZONS[task] - lengths.max()} of {HORIZONS[task]} rows"
    card["cut short at the end"] = "1 episode" if short[-1] else "none"
    card["share of done"] = float(np.mean([(array != 0).mean() for array in files["dones"]]))
    if "next_obs" in files:
        card["next_obs[t] == obs[t+1]"] = f"in {goes_on.sum()} rows of {len(goes_on)}"
        card["short but not done"] = int(short[:-1].sum())
        card["go on past their end"] = int(goes_on[last[:-1]].sum())
        card["go on for some agents"] = int((some & ~goes_on).sum())
    card["duplicates of earlier rows"] = count_duplicates(files, num_rows)
    for name, arrays in files.items():
        for i, array in enumerate(arrays):
            text, nans, infinities = summarize(array)
            if name in ("rews", "acs"):
                card[f"{name}_{i}"] = text
            if nans or infinities:
                card[f"not finite in {name}_{i}"] = f"{nans} NaN, {infinities} infinite"
    returns = returns[np.isfinite(returns)]
    if len(returns):
        card["return"] = f"{returns.mean():.2f} ± {returns.std():.2f}, {len(returns)} episodes"
    if task and quality:
        five, mean, sd, rows = PUBLIC[task][quality]
        card["public return, five seeds"] = "not known" if five is None else five
        card["public return, one seed"] = f"{mean} ± {sd}, {rows} transitions"
    return card, returns


def count_returns(returns: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Histogram of returns (K,): counts and edges, of one bin where floats cannot tell `bins`."""
    try:
        return np.histogram(returns, bins)
    except ValueError:  # too large for what they differ by, or too far apart
        return np.histogram(returns, [returns.min(), returns.max()])


def draw(returns: np.ndarray, card: dict, path: Path) -> None:
    """Write the histogram of the returns (K,) as a PNG, the public means drawn in."""
    try:
        from matplotlib.figure import Figure
    except ImportError as problem:
        stop("--png needs matplotlib (pip install matplotlib)", problem)
    axes = (figure := Figure(figsize=(5, 3), layout="constrained")).subplots()
    axes.stairs(*count_returns(returns, 50), fill=True)
    for line, key in (("--", "public return, five seeds"), (":", "public return, one seed")):
        mean = str(card.get(key, "not known")).split(" ± ")[0]
        if mean != "not known":
            axes.axvline(float(mean), color="black", linestyle=line, label=key)
            axes.legend()
    axes.set(xlabel="return of an episode", ylabel="episodes", title=card["dataset"])
    try:
        figure.savefig(path, format="png", dpi=150)
    except (OSError, ValueError) as problem:  # or numbers that have no axis
        stop(f"{path} cannot be written", problem)


def main(args: Args) -> None:
    """Print the card and the histogram of the returns, and draw it if asked for."""
    if args.horizon is not None and args.horizon < 1:
        stop(f"--horizon is {args.horizon}; it must be 1 or more")
    if args.png and args.png.suffix.lower() != ".png":
        stop(f"--png is {args.png}; its name must end in .png")
    card, returns = describe(args.path, args.horizon)
    for key, value in card.items():
        print(f"{key:>26}: {value}")
    counts, edges = count_returns(returns, 15) if len(returns) else ((), ())
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        print(f"{low:>11.2f} to {high:>11.2f}: {'#' * round(40 * count / max(counts))} {count}")
    if args.png:
        draw(returns, card, args.png)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # the ± where the terminal has none
    main(tyro.cli(Args))

"""Run a grid of trainings in a pool of worker processes and tabulate their results.

    python benchmark/run.py --grid main        # the three tasks, four qualities, three seeds
    python benchmark/run.py --grid sweep       # one setting at a time, half the updates
    python benchmark/run.py --grid longer      # simple_spread expert with 11,000 updates
    python benchmark/run.py --grid sweep --dry-run          # only print the cells' commands

A cell is one run of one script. A finished cell is never run again and a stopped one goes on from
its checkpoint, so the same command continues a grid. Results go to benchmark/results/: <grid>.csv
with a row per finished cell, <grid>_curves.csv with its evaluations, and <grid>.json with the
machine. `benchmark/report.py` makes the README's tables and figures of them.
"""

import csv
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from om2p_mpe import MIXTURES, normalized_score  # noqa: E402

TASKS = ("simple_spread", "simple_tag", "simple_world")
QUALITIES = ("expert", "medium", "medium-replay", "random")
SWEEP_UPDATES = 3_000  # half the default, which is enough to rank settings


def main_grid() -> list[dict]:
    """OM2P with its defaults on every dataset, three seeds."""
    return [
        {"task": task, "quality": quality, "seed": seed}
        for seed, task, quality in product(range(3), TASKS, QUALITIES)
    ]


def sweep_grid() -> list[dict]:
    """The defaults with one setting changed at a time, on a narrow and on a broad dataset."""
    values = {
        "q-weight": ("0", "1", "8"),
        "flow-ratio": ("0", "0.75"),
        "time-alpha time-beta": ("0.3 1",),
        "hidden-dims": ("64 64",),
        "delta": ("0.001",),
        "box": ("penalty",),
        "derivative": ("jvp",),
    }
    changes = [("", ""), *((name, value) for name in values for value in values[name])]
    datasets = [("simple_spread", "medium"), ("simple_tag", "medium-replay")]
    return [
        {"task": task, "quality": quality, "seed": 0, "setting": name, "value": value}
        for (name, value), (task, quality) in product(changes, datasets)
    ]


def longer_grid() -> list[dict]:
    """The one dataset that the defaults do not beat, with more updates."""
    return [
        {
            "task": "simple_spread",
            "quality": "expert",
            "seed": seed,
            "setting": "num-updates",
            "value": "11000",
        }
        for seed in range(2)
    ]


GRIDS = {"main": main_grid, "sweep": sweep_grid, "longer": longer_grid}


@dataclass
class Args:
    grid: str = "main"
    """main, sweep or longer"""
    workers: int = 2
    """trainings at a time, one thread each"""
    run_dir: Path = Path("runs/benchmark")
    """where the runs go; keep it, and the grid continues"""
    data_dir: Path = Path("data")
    """folder of the datasets; what is missing is made"""
    dry_run: bool = False
    """print the commands and stop"""


def command(cell: dict, args: Args) -> tuple[list[str], Path]:
    """The cell's command line, and its run directory."""
    script = ROOT / ("benchmark/box.py" if cell.get("setting") == "box" else "om2p_mpe.py")
    words = [sys.executable, str(script), "--resume"]
    words += ["--task", cell["task"], "--quality", cell["quality"], "--seed", str(cell["seed"])]
    names, values = cell.get("setting", "").split(), cell.get("value", "").split()
    if len(names) == len(values):
        for name, value in zip(names, values, strict=True):
            words += [f"--{name}", value]
    else:
        words += [f"--{names[0]}", *values]
    if args.grid == "sweep":
        words += ["--num-updates", str(SWEEP_UPDATES), "--eval-interval", str(SWEEP_UPDATES)]
    run_dir = args.run_dir / args.grid / ("-".join([*names, *values]) or "defaults")
    words += ["--data-dir", str(args.data_dir), "--run-dir", str(run_dir)]
    words += ["--eval-episodes", "1000"]  # a standard error of 3 on simple_spread, for a second
    run_dir = run_dir / f"{cell['task']}-{cell['quality']}" / script.stem
    return words, run_dir / f"seed-{cell['seed']}"


def data_returns(data_dir: Path, task: str, quality: str, seed: int) -> np.ndarray:
    """Returns of a dataset's episodes of 25 steps, mean over agents."""
    returns = []
    for part, share in MIXTURES.get(quality, ((quality, 1.0),)):
        folder = data_dir / task / part / f"seed_{seed}_data"
        rewards = np.stack([np.load(path) for path in sorted(folder.glob("rews_*.npy"))])
        rewards = rewards[:, : round(share * rewards.shape[1])].astype(np.float64)
        returns.append(rewards.reshape(len(rewards), -1, 25).sum(axis=-1).mean(axis=0))
    return np.concatenate(returns)


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as a csv file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def result(cell: dict, folder: Path, args: Args) -> tuple[dict, list[dict]]:
    """The row of a finished cell, and its learning curve."""
    with (folder / "metrics.csv").open() as file:
        history = list(csv.DictReader(file))
    task, final = cell["task"], float(np.load(folder / "final_returns.npy").mean())
    data = data_returns(args.data_dir, task, cell["quality"], cell["seed"])
    row = {
        **cell,
        "return": round(final, 2),
        "data_return": round(float(data.mean()), 2),
        "data_sd": round(float(data.std()), 2),
        "score": round(normalized_score(task, final), 2),
        "data_score": round(normalized_score(task, float(data.mean())), 2),
        "best_score": round(max(float(row["score"]) for row in history), 2),
        "updates": history[-1]["step"],
        "seconds": round(float(history[-1]["seconds"])),
    }
    curve = [
        {**cell, "step": step["step"]}
        | {key: round(float(step[key]), 3) for key in ("score", "mean_flow")}
        for step in history
    ]
    return row, curve


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(args: Args) -> None:
    """Run what is not finished, and write the table after every cell."""
    cells = GRIDS[args.grid]()
    if args.dry_run:
        print("\n".join(" ".join(command(cell, args)[0]) for cell in cells))
        return
    results = ROOT / "benchmark" / "results"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(cell: dict) -> tuple[dict, list[dict]]:
        words, folder = command(cell, args)
        if not (folder / "final_returns.npy").exists():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "log.txt").open("a") as log:
                subprocess.run(words, env=environment, stdout=log, stderr=log, check=True)
        return result(cell, folder, args)

    for task, quality, seed in {(c["task"], c["quality"], c["seed"]) for c in cells}:
        if not (args.data_dir / task / quality / f"seed_{seed}_data").is_dir():
            collect = [sys.executable, str(ROOT / "data" / "collect_mpe.py"), "--task", task]
            collect += ["--quality", quality, "--seed", str(seed), "--data-dir", str(args.data_dir)]
            subprocess.run(collect, check=True, stdout=subprocess.DEVNULL)
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "workers": args.workers,
        "threads per worker": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (results / f"{args.grid}.json").write_text(json.dumps(machine, indent=2) + "\n")
    done, failed = {}, []
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(run, cell): k for k, cell in enumerate(cells)}
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            try:
                done[jobs[job]] = job.result()
            except subprocess.CalledProcessError as problem:
                failed.append(" ".join(problem.cmd))
                continue
            finished = [done[k] for k in sorted(done)]
            write_table(results / f"{args.grid}.csv", [row for row, _ in finished])
            write_table(
                results / f"{args.grid}_curves.csv", [point for _, c in finished for point in c]
            )
    if failed:
        raise SystemExit("\n".join(["error: these runs have failed, see their log.txt:", *failed]))


if __name__ == "__main__":
    main(tyro.cli(Args))

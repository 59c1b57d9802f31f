"""Kill runs at random and see that nothing is lost: python tests/chaos.py --kills 60

Each script is run once undisturbed. Then it is started again and again with --resume, and killed by
SIGKILL while it trains, until it ends. Some kills come at a random time, others while it writes a
checkpoint, of which a part is left. Its weights, curve and final returns must be those of the
undisturbed run, bit for bit. The table tells from which updates the runs went on. Collectors are
killed while they make datasets: what is left is nothing or the whole.

No part of the test suite; a kill takes some five seconds. The table goes to
benchmark/results/chaos.csv and from there into docs/reproduce.md by benchmark/report.py.
"""

import csv
import glob
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SUITES = {"mpe": ("simple_tag", "50000"), "mamujoco": ("Reacher-2x1", "1000")}  # task, rows
METHODS = ("om2p", "bc", "td3_bc", "omar", "diffusion_ql", "dom2", "flow_ql", "fql")
UPDATES = 200
TINY = ["--num-updates", UPDATES, "--eval-interval", 10, "--eval-episodes", 4, "--batch-size", 16]
TINY += ["--hidden-dims", 32, 32, "--device", "cpu", "--no-compile"]


@dataclass
class Args:
    kills: int = 60
    """SIGKILLs to spread over the scripts and collectors"""
    seed: int = 0
    """seed of the times of the kills"""
    out: Path = ROOT / "benchmark/results/chaos.csv"
    """table to write"""


def start(*words) -> subprocess.Popen:
    """A Python process, silent, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **pipes)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process that must end well."""
    _, error = process.communicate()
    assert process.returncode == 0, error


def wait_until(process: subprocess.Popen, reached) -> None:
    """Return as soon as reached() is true or the process has ended."""
    while process.poll() is None and not reached():
        time.sleep(0.0002)


def wait(process: subprocess.Popen, seconds: float) -> None:
    """Return after some seconds, or as soon as the process has ended."""
    end = time.monotonic() + seconds
    wait_until(process, lambda: time.monotonic() > end)


def kill(process: subprocess.Popen) -> bool:
    """Kill a process; whether it was still alive."""
    process.kill()
    _, error = process.communicate()
    assert process.returncode in (0, -9), error
    return process.returncode != 0


def outcome(folder: Path) -> tuple:
    """What a run's result is: weights, curve without times, final returns."""
    weights = torch.load(folder / "policy.pt", weights_only=True)
    with (folder / "metrics.csv").open() as file:
        curve = [{**row, "seconds": None} for row in csv.DictReader(file)]
    returns = np.load(folder / "final_returns.npy")
    weights = {key: value.numpy().tobytes() for key, value in weights.items()}
    return weights, curve, returns.tobytes()


class Run:
    """A script's run in a --run-dir of its own, which can be started many times."""

    def __init__(self, script: Path, place: Path, name: str):
        task, _ = SUITES[script.stem.rsplit("_", 1)[1]]
        self.folder = place / name / f"{task}-random" / script.stem / "seed-0"
        self.words = [script, "--task", task, "--quality", "random", *TINY, "--resume"]
        self.words += ["--data-dir", place / "data", "--run-dir", place / name]
        self.words += ["--score-dims", 16, 8] if script.stem.startswith("dom2") else []

    def start(self) -> subprocess.Popen:
        """The run's next process, as soon as it trains: when it opens a file for TensorBoard."""
        files = f"{self.folder.parent}/*seed-0*/events*"  # in those that were moved aside, too
        before, process = len(glob.glob(files)), start(*self.words)
        wait_until(process, lambda: len(glob.glob(files)) > before)
        return process

    def step(self) -> int:
        """The update of its checkpoint, which is always whole."""
        path = self.folder / "checkpoint.pt"
        return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def row(what: str, kills=0, writing=0, steps="-", result="the same") -> dict:
    """A row of the table."""
    values = (what, kills, writing, steps, result)
    names = ("what", "kills", "while writing", "after updates", "result")
    return dict(zip(names, values, strict=True))


def check_script(script: Path, place: Path, kills: int, rng: random.Random) -> dict:
    """Kill one script's runs `kills` times in all."""
    calm, steps, writing = Run(script, place, "calm"), [], 0
    process, began = calm.start(), time.monotonic()
    finish(process)
    seconds = time.monotonic() - began
    while len(steps) < kills:
        run, alive = Run(script, place, f"wild-{len(steps)}"), True
        temporary = run.folder / "checkpoint.tmp"
        while alive and len(steps) < kills:  # until it ends before it is killed
            temporary.unlink(missing_ok=True)  # of the kill before
            left, process = 1 - run.step() / UPDATES, run.start()
            wait(process, rng.uniform(0, 0.8 * seconds * left))
            if rng.random() < 0.5:
                wait_until(process, temporary.exists)
            alive = kill(process)
            steps += [run.step()] * alive
            writing += alive and temporary.exists()
        if alive:
            finish(run.start())
        assert outcome(run.folder) == outcome(calm.folder), script
    return row(script.stem, kills, writing, ", ".join(map(str, steps)))


def check_collector(suite: str, place: Path, kills: int, rng: random.Random) -> dict:
    """Kill a collector `kills` times, every other time as soon as it writes its files."""
    done = writing = tries = 0
    task, rows = SUITES[suite]
    words = [ROOT / f"data/collect_{suite}.py", "--task", task, "--quality", "random"]
    words += ["--num-transitions", rows, "--data-dir"]
    while done < kills:
        target, tries, at_file = place / f"data-{suite}-{tries}", tries + 1, done % 2
        process = start(*words, target)
        if at_file:
            pattern = f"{target}/{task}/random/.seed*/*/*.npy"
            wait_until(process, lambda pattern=pattern: glob.glob(pattern))
        else:
            wait(process, rng.uniform(0, 8))
        alive = kill(process)
        done, writing = done + alive, writing + (alive and at_file)
        if not (target / task / "random/seed_0_data").exists():
            finish(start(*words, target))
        for path in (place / "data" / task).rglob("*.np[yz]"):
            assert path.read_bytes() == (target / path.relative_to(place / "data")).read_bytes()
    return row(f"collect_{suite}", done, writing)


def main(args: Args) -> None:
    """Make tiny datasets, do all checks and write the table."""
    rng, rows = random.Random(args.seed), []
    scripts = [
        ROOT / ("" if m == "om2p" else "baselines") / f"{m}_{s}.py" for m in METHODS for s in SUITES
    ]
    targets = [*scripts, *SUITES]
    shares = [len(range(k, args.kills, len(targets))) for k in range(len(targets))]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills) as bar:
        place = Path(folder)
        for suite, (task, count) in SUITES.items():
            line = ["--task", task, "--quality", "random", "--num-transitions", count]
            finish(start(ROOT / f"data/collect_{suite}.py", *line, "--data-dir", place / "data"))
        for target, kills in zip(targets, shares, strict=True):
            check = check_collector if target in SUITES else check_script
            rows.append(check(target, place, kills, rng))
            bar.update(kills)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{sum(row['kills'] for row in rows)} kills, nothing lost; see {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))

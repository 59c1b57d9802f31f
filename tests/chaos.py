"""Kill runs at random and see that nothing is lost: python tests/chaos.py --kills 50

Each script is run once undisturbed. Then it is started again and again with --resume and killed by
SIGKILL while it trains, at a random time or in the very moment in which it writes a checkpoint (of
which half a file is left), until it ends; its weights, curve and final returns must be those of the
undisturbed run, bit for bit. The table tells between which updates kills fell. Collectors are
killed while they write datasets: what is left is nothing or the whole. A full disk (a small tmpfs
where one can be mounted, else a limit on the size of files) ends a run with one line, and with
room it goes on. Of two runs started on one run directory one is refused.

Outside of the quick test suite; a kill takes some ten seconds. The table goes to
benchmark/results/chaos.csv and from there into benchmark/README.md by benchmark/report.py.
"""

import csv
import glob
import os
import random
import signal
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
UPDATES = 400
TINY = ["--num-updates", str(UPDATES), "--eval-interval", "10", "--eval-episodes", "4"]
TINY += ["--batch-size", "16", "--hidden-dims", "32", "32", "--device", "cpu"]
TINY += ["--no-compile"]


@dataclass
class Args:
    kills: int = 50
    """SIGKILLs to spread over the scripts and collectors"""
    seed: int = 0
    """seed of the times of the kills"""
    out: Path = ROOT / "benchmark/results/chaos.csv"
    """table to write"""


def start(words: list, **options) -> subprocess.Popen:
    """A Python process, silent, with one thread."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **quiet | options)


def finish(process: subprocess.Popen) -> None:
    """Wait for a process that must end well."""
    _, error = process.communicate()
    assert process.returncode == 0, error


def wait_until(process: subprocess.Popen, reached) -> None:
    """Return as soon as reached() is true or the process has ended."""
    while process.poll() is None and not reached():
        time.sleep(0.0002)


def kill(process: subprocess.Popen) -> bool:
    """Kill a process; whether it was still alive."""
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def outcome_rows(folder: Path) -> list[dict]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def outcome(folder: Path) -> tuple:
    """What a run's result is: weights, curve without times, final returns."""
    weights = torch.load(folder / "policy.pt", weights_only=True)
    curve = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in outcome_rows(folder)
    ]
    returns = np.load(folder / "final_returns.npy")
    return (
        {key: value.numpy().tobytes() for key, value in weights.items()},
        curve,
        returns.tobytes(),
    )


def check_script(path: Path, place: Path, kills: int, rng: random.Random) -> dict:
    """Kill one script's run `kills` times; the row of the table."""
    task, _ = SUITES[path.stem.rsplit("_", 1)[1]]
    words = [path, "--task", task, "--quality", "random", "--data-dir", place / "data", *TINY]
    words += ["--score-dims", "16", "8"] if path.stem.startswith("dom2") else []
    name = Path(f"{task}-random", path.stem, "seed-0")

    def training(run_dir: Path) -> subprocess.Popen:
        """The process of a run, when its training has begun."""
        record = run_dir / name / "args.json"  # written anew by every process, just before
        before = record.stat().st_mtime_ns if record.exists() else 0
        process = start([*words, "--resume", "--run-dir", run_dir])
        wait_until(process, lambda: record.exists() and record.stat().st_mtime_ns > before)
        return process

    calm, steps, in_writing = training(place / "calm"), [], 0
    began = time.monotonic()
    finish(calm)
    seconds = time.monotonic() - began
    while len(steps) < kills:
        folder = place / f"wild-{len(steps)}" / name
        temporary, step = folder / "checkpoint.pt.tmp", 0
        while True:  # until a run ends before it is killed
            temporary.unlink(missing_ok=True)  # of the kill before
            process = training(folder.parents[len(name.parts) - 1])
            if len(steps) < kills:
                moment = time.monotonic() + rng.uniform(0, 0.8 * seconds) * (1 - step / UPDATES)
                wait_until(process, lambda moment=moment: time.monotonic() > moment)
                if rng.random() < 0.5:
                    wait_until(process, temporary.exists)
                alive = kill(process)
            else:
                finish(process)
                alive = False
            if not alive:
                assert process.returncode == 0
                break
            step = int(outcome_rows(folder)[-1]["step"]) if (folder / "metrics.csv").exists() else 0
            steps.append(step)
            in_writing += temporary.exists()
        assert outcome(folder) == outcome(place / "calm" / name), path
    return {
        "what": path.stem,
        "kills": len(steps),
        "while writing": in_writing,
        "after updates": ", ".join(map(str, steps)),
        "result": "the same",
    }


def check_collector(suite: str, place: Path, kills: int, rng: random.Random) -> dict:
    """Kill a collector `kills` times; the row of the table."""
    task, rows = SUITES[suite]
    words = [ROOT / f"data/collect_{suite}.py", "--task", task, "--quality", "random"]
    words += ["--num-transitions", rows]
    calm = place / "data" / task / "random" / "seed_0_data"
    done, in_writing, tries = 0, 0, 0
    while done < kills:
        target, tries = place / f"data-{suite}-{tries}", tries + 1
        process = start([*words, "--data-dir", target])
        if writing := done % 2 == 1:
            pattern = f"{target / task / 'random'}/.seed*/*.npy"
            wait_until(process, lambda pattern=pattern: glob.glob(pattern))
        else:
            moment = time.monotonic() + rng.uniform(0, 8)
            wait_until(process, lambda moment=moment: time.monotonic() > moment)
        alive = kill(process)
        done, in_writing = done + alive, in_writing + (alive and writing)
        left = list((target / task / "random").glob("seed*"))
        assert not left or (left[0] / "card.json").exists()
        if not left:
            finish(start([*words, "--data-dir", target]))
        for path in calm.glob("*.npy"):
            assert path.read_bytes() == (target / path.relative_to(place / "data")).read_bytes()
    return {
        "what": f"collect_{suite}",
        "kills": done,
        "while writing": in_writing,
        "after updates": "-",
        "result": "the same",
    }


def check_full_disk(path: Path, place: Path) -> dict:
    """Run a script out of space, then with space; the row of the table."""
    words = [
        path,
        "--task",
        "simple_tag",
        "--quality",
        "random",
        "--data-dir",
        place / "data",
        *TINY,
    ]
    folder, small = Path("simple_tag-random", path.stem, "seed-0"), place / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    limit = [] if mounted else ["-c", LIMITED]
    try:
        process = start([*limit, *words, "--resume", "--run-dir", small])
        _, error = process.communicate()
        assert process.returncode == 1, error
        assert error.startswith("error: "), error
        assert error.count("\n") == 1, error
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", small], check=True)
        finish(start([*words, "--resume", "--run-dir", small]))
        assert outcome(small / folder) == outcome(place / "calm" / folder)
    finally:
        if mounted:
            subprocess.run(["umount", small], check=True)
    what = "full disk (tmpfs)" if mounted else "full disk (limit on files)"
    return {
        "what": f"{path.stem}: {what}",
        "kills": 0,
        "while writing": 0,
        "after updates": "-",
        "result": "one line, then the same",
    }


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def check_two_runs(path: Path, place: Path) -> dict:
    """Start a script twice at once on one run directory; the row of the table."""
    words = [
        path,
        "--task",
        "simple_tag",
        "--quality",
        "random",
        "--data-dir",
        place / "data",
        *TINY,
    ]
    words += ["--resume", "--run-dir", place / "twice"]
    processes = [start(words) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes == [0, 1], errors
    assert any("another process is training" in error for error in errors)
    folder = Path("simple_tag-random", path.stem, "seed-0")
    assert outcome(place / "twice" / folder) == outcome(place / "calm" / folder)
    return {
        "what": f"{path.stem}: two runs at once",
        "kills": 0,
        "while writing": 0,
        "after updates": "-",
        "result": "one refused, one the same",
    }


def main(args: Args) -> None:
    """Make tiny datasets, do all checks and write the table."""
    rng, rows = random.Random(args.seed), []
    scripts = [
        ROOT / ("" if m == "om2p" else "baselines") / f"{m}_{s}.py" for m in METHODS for s in SUITES
    ]
    targets = [*scripts, *SUITES]
    shares = [len(range(k, args.kills, len(targets))) for k in range(len(targets))]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(targets) + 2) as bar:
        place = Path(folder)
        for suite, (task, count) in SUITES.items():
            line = ["--task", task, "--quality", "random", "--num-transitions", count]
            finish(start([ROOT / f"data/collect_{suite}.py", *line, "--data-dir", place / "data"]))
        for target, kills in zip(targets, shares, strict=True):
            check = check_collector if target in SUITES else check_script
            rows.append(check(target, place, kills, rng))
            bar.update()
        for check in (check_full_disk, check_two_runs):
            rows.append(check(ROOT / "om2p_mpe.py", place))
            bar.update()
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{sum(row['kills'] for row in rows)} kills, nothing lost; see {args.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main(tyro.cli(Args))

"""Run a grid of trainings, several at a time, and tabulate their results.

    python benchmark/run.py --grid mpe          # eight methods, twelve datasets, five seeds
    python benchmark/run.py --grid mamujoco     # eight methods, HalfCheetah's four, three seeds
    python benchmark/run.py --grid tune         # values of every method's main settings on the MPE
    python benchmark/run.py --grid tune_mamujoco            # and on HalfCheetah
    python benchmark/run.py --grid equal_time   # multi-step policies, for as long as OM2P takes
    python benchmark/run.py --grid ablation     # OM2P's three ideas, taken away one by one
    python benchmark/run.py --grid ablation_mamujoco        # on HalfCheetah
    python benchmark/run.py --grid tune --dry-run           # only print the cells' commands

A cell is one seed of one script. A finished one, with a row in the results, is never run again, and
a stopped one goes on from its checkpoint: the same command continues a grid. Results go to
benchmark/results/: <grid>.csv with a row per finished cell, <grid>_curves.csv with its evaluations,
and <grid>.json with the machine. `benchmark/report.py` makes the README's tables and figures.

`--num-seeds 5` trains up to five cells that differ in the seed alone in one process: for GPUs.

`--ray ADDRESS` hands the cells to a Ray cluster instead (`pip install -r requirements-ray.txt`;
`--ray local` starts one here, `--ray auto` finds the one that `ray start` has). Its machines must
all see this folder, --run-dir and --data-dir under the same paths.
"""

import csv
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import om2p_mamujoco  # noqa: E402
import om2p_mpe  # noqa: E402

MODULES = {"mpe": om2p_mpe, "mamujoco": om2p_mamujoco}
TASKS = ("simple_spread", "simple_tag", "simple_world")
QUALITIES = ("expert", "medium", "medium-replay", "random")
METHODS = ("om2p", "bc", "td3_bc", "omar", "diffusion_ql", "dom2", "flow_ql", "fql")
SEEDS = range(5)
CHEETAH = "HalfCheetah-2x3"
EVAL_EPISODES = {"mpe": "1000", "mamujoco": "20"}  # standard errors of 1 and some 3 points
KEEP_MEMORY = {  # glibc returns large tensors to the system at each update: a fifth of CQL's time
    f"MALLOC_{name}_THRESHOLD_": str(2**31 - 1) for name in ("MMAP", "TRIM")
}
ABLATION_DATA = (  # narrow, broad, and hard to improve on
    ("simple_spread", "medium"),
    ("simple_tag", "medium-replay"),
    ("simple_world", "expert"),
)
TUNING_DATA = (*ABLATION_DATA, ("simple_spread", "random"))
TUNING = {  # values of what matters most in each method, and step sizes; a comma joins a list
    "om2p": {"q-weight": ("4", "8", "16"), "learning-rate": ("0.003",)},
    "bc": {"learning-rate": ("0.003", "0.005")},
    "td3_bc": {"q-weight": ("5", "10", "20", "40"), "q-weight learning-rate": ("10 0.003",)},
    "omar": {
        "cql-alpha": ("0.03", "0.1", "0.3"),
        "omar-coe": ("0.4", "1"),
        "learning-rate": ("0.003",),
    },
    "diffusion_ql": {
        "q-weight": ("2", "4", "8"),
        "diffusion-steps": ("3", "10"),
        "learning-rate": ("0.003",),
    },
    "flow_ql": {
        "q-weight": ("16", "32", "64"),
        "flow-steps": ("5", "20"),
        "learning-rate": ("0.003",),
    },
    "fql": {
        "q-weight": ("3", "10", "30", "100"),
        "flow-steps": ("5", "20"),
        "q-weight learning-rate": ("10 0.003",),
    },
    "dom2": {
        "q-weight": ("2", "4", "8", "16", "32", "64"),
        "cql-alpha": ("0.03", "0.3"),
        "solver-steps": ("3", "10"),
        "return-quantiles": ("0.5,0.75,0.9",),
        "learning-rate": ("0.003",),
    },
}
TUNING_MAMUJOCO = {
    "om2p": {"q-weight": ("0.12", "0.5", "2"), "flow-ratio q-weight": ("0.5 0.5", "0.5 2")},
    "td3_bc": {"q-weight": ("0.06", "0.25", "1", "4", "16")},
    "omar": {"cql-alpha": ("0.1", "1", "5")},
    "diffusion_ql": {"q-weight": ("0.12", "0.5", "2", "8")},
    "flow_ql": {"q-weight": ("0.25", "1", "4", "16")},
    "fql": {"q-weight": ("0.25", "1", "4", "16")},
    "dom2": {"q-weight": ("0.5", "2", "8"), "q-weight cql-alpha": ("0.5 1",)},
}
ABLATION = {  # setting -> values; those of benchmark/variants.py and of om2p_mpe.py itself
    "derivative": ("jvp",),
    "derivative q-weight": ("jvp 32",),
    "delta": ("0.01",),
    "variant": (
        "no-derivative",
        "released",
        "short-step",
        "penalty",
        "smaller-q",
        "conservative",
        "split",
    ),
    "variant q-weight": ("no-derivative 2", "split 16"),
    "flow-ratio": ("0", "0.75", "1"),
    "time-alpha time-beta": ("0.5 1", "1 1", "2 2"),
    "time-alpha q-weight": ("0.2 16",),
    "q-weight": ("0",),
}
ABLATION_MAMUJOCO = {
    "q-weight": ("2",),
    "flow-ratio": ("0.5",),
    "flow-ratio q-weight": ("0.5 2",),
    "time-alpha flow-ratio": ("1 0.5",),
    "derivative": ("jvp",),
}
EQUAL_TIME = {  # updates in the time of OM2P's 4,000: its share of updates/s, efficiency_cpu.csv
    "diffusion_ql": "2200",
    "dom2": "690",
    "flow_ql": "1810",
}
PUBLISHED = {  # sizes and steps of OMAR's code for MA-TD3+BC, alpha of TD3+BC's paper
    "hidden-dims": "64,64",
    "learning-rate": "0.01",
    "batch-size": "1024",
    "tau": "0.01",
    "q-weight": "2.5",
    "num-updates": "2000",
}


def cell(method: str, task: str, quality: str, seed: int, setting="", value="") -> dict:
    """One run: a method on a dataset, and what is changed from its defaults."""
    keys = ("method", "task", "quality", "seed", "setting", "value")
    return dict(zip(keys, (method, task, quality, seed, setting, value), strict=True))


def mpe_grid() -> list[dict]:
    """Every method with its defaults on every dataset."""
    return [
        cell(method, task, quality, seed)
        for seed, task, quality, method in product(SEEDS, TASKS, QUALITIES, METHODS)
    ]


def equal_time_grid() -> list[dict]:
    """The multi-step policies, trained for the time that OM2P takes."""
    return [
        cell(method, task, quality, seed, "num-updates", updates)
        for (method, updates), task, quality, seed in product(
            EQUAL_TIME.items(), TASKS, QUALITIES, range(3)
        )
    ]


def tune_grid() -> list[dict]:
    """Values of every method's settings, one seed."""
    return [
        cell(method, *data, 0, setting, value)
        for method, settings in TUNING.items()
        for setting, values in settings.items()
        for value, data in product(values, TUNING_DATA)
    ]


def ablation_grid() -> list[dict]:
    """OM2P with one of its ideas changed."""
    return [
        cell("om2p", *data, seed, setting, value)
        for seed, (setting, values) in product(SEEDS, ABLATION.items())
        for value, data in product(values, ABLATION_DATA)
    ]


def ablation_mamujoco_grid() -> list[dict]:
    """OM2P on HalfCheetah with other weights, times and du/dr."""
    return [
        cell("om2p", CHEETAH, quality, seed, setting, value)
        for seed, (setting, values) in product(range(3), ABLATION_MAMUJOCO.items())
        for value, quality in product(values, QUALITIES)
    ]


def mamujoco_grid() -> list[dict]:
    """Every method with its defaults on HalfCheetah's datasets."""
    return [
        cell(method, CHEETAH, quality, seed)
        for seed, quality, method in product(range(3), QUALITIES, METHODS)
    ]


def tune_mamujoco_grid() -> list[dict]:
    """Values of every method's main setting on HalfCheetah, one seed."""
    return [
        cell(method, CHEETAH, quality, 0, setting, value)
        for method, settings in TUNING_MAMUJOCO.items()
        for setting, values in settings.items()
        for value, quality in product(values, ("medium", "medium-replay"))
    ]


def published_grid() -> list[dict]:
    """MA-TD3+BC with settings near those of the published scores, where ours are others."""
    changes = " ".join(PUBLISHED), " ".join(PUBLISHED.values())
    return [cell("td3_bc", *data, 0, *changes) for data in product(TASKS, QUALITIES)]


TRAININGS: set[subprocess.Popen] = set()  # those that run now on this machine
GRIDS = {
    "mpe": mpe_grid,
    "mamujoco": mamujoco_grid,
    "equal_time": equal_time_grid,
    "tune": tune_grid,
    "tune_mamujoco": tune_mamujoco_grid,
    "ablation": ablation_grid,
    "ablation_mamujoco": ablation_mamujoco_grid,
    "published": published_grid,
}


def suite(task: str) -> str:
    """The end of the names of a task's scripts."""
    return "mpe" if task in TASKS else "mamujoco"


@dataclass
class Args:
    grid: str = "mpe"
    """mpe, mamujoco, equal_time, tune, tune_mamujoco, ablation, ablation_mamujoco or published"""
    workers: int = 2
    """trainings at a time, one thread each"""
    run_dir: Path = Path("runs/benchmark")
    """where the runs go; keep it, and stopped cells go on from their checkpoints"""
    data_dir: Path = Path("data")
    """folder of the datasets; what is missing is made"""
    results_dir: Path = ROOT / "benchmark" / "results"
    """where the tables go, and where finished cells are looked up"""
    device: str = "cpu"
    """of the trainings: cpu, cuda"""
    compile: bool = torch.cuda.is_available()
    """as the scripts' --compile; on a CPU it pays for DOM2's and OMAR's long runs"""
    num_seeds: int = 1
    """seeds that one process trains, where as many that follow one another are missing"""
    num_updates: int | None = None
    """gradient steps of every cell, in place of the grid's"""
    ray: str | None = None
    """address of a Ray cluster, `auto` or `local`, to run the cells there instead"""
    ray_cpus: float = 1
    """processors that a cell reserves in the Ray cluster"""
    ray_gpus: float = 0
    """GPUs that a cell reserves in the Ray cluster; fractions share one"""
    dry_run: bool = False
    """print the commands and stop"""


def in_one_process(cells: list[dict], num_seeds: int) -> list[list[dict]]:
    """The cells in groups: up to `num_seeds` seeds of the same, that follow one another."""
    groups, newest = [], {}
    for cell in cells:
        key = name({**cell, "seed": "any"})
        group = newest.get(key, [])
        if not group or len(group) == num_seeds or cell["seed"] != group[-1]["seed"] + 1:
            group = newest[key] = []
            groups.append(group)
        group.append(cell)
    return groups


def command(cells: list[dict], args: Args) -> tuple[list[str], list[Path]]:
    """What trains cells that differ in the seed alone, and their run directories."""
    cell = cells[0]
    folder = ROOT if cell["method"] == "om2p" else ROOT / "baselines"
    script = folder / f"{cell['method']}_{suite(cell['task'])}.py"
    if "variant" in cell["setting"]:
        script = ROOT / "benchmark/variants.py"
    words = [sys.executable, str(script), "--resume", "--device", args.device]
    words += ["--task", cell["task"], "--quality", cell["quality"], "--seed", str(cell["seed"])]
    words += ["--num-seeds", str(len(cells))] if len(cells) > 1 else []
    words += ["--compile" if args.compile else "--no-compile"]
    names, values = cell["setting"].split(), cell["value"].split()
    for name, value in zip(names, values, strict=True):
        words += [f"--{name}", *value.split(",")]
    words += [] if args.num_updates is None else ["--num-updates", str(args.num_updates)]
    run_dir = args.run_dir / args.grid / ("-".join([*names, *values]) or "defaults")
    words += ["--data-dir", str(args.data_dir), "--run-dir", str(run_dir)]
    words += ["--eval-episodes", EVAL_EPISODES[suite(cell["task"])]]
    run_dir = run_dir / f"{cell['task']}-{cell['quality']}" / script.stem
    return words, [run_dir / f"seed-{cell['seed']}" for cell in cells]


def data_returns(data_dir: Path, task: str, quality: str, seed: int) -> np.ndarray:
    """Returns of a dataset's whole episodes, mean over agents; one ends where rows do not go on.

    One that is shorter than the longest and does not end with `done` has been cut off.
    """
    returns = []
    for part, share in om2p_mpe.MIXTURES.get(quality, ((quality, 1.0),)):
        folder = data_dir / task / part / f"seed_{seed}_data"
        rewards = np.stack([np.load(path) for path in sorted(folder.glob("rews_*.npy"))])
        rewards = rewards[:, : round(share * rewards.shape[1])].astype(np.float64).mean(axis=0)
        obs, next_obs, done = (np.load(folder / f"{k}_0.npy") for k in ("obs", "next_obs", "dones"))
        breaks = (next_obs[: len(rewards) - 1] != obs[1 : len(rewards)]).any(axis=-1)
        ends = np.append(np.flatnonzero(breaks), len(rewards) - 1)
        lengths = np.diff(ends, prepend=-1)
        whole = (lengths == lengths.max()) | (done[ends].reshape(-1) > 0)
        returns.append(np.add.reduceat(rewards, ends - lengths + 1)[whole])
    return np.concatenate(returns)


def run(cells: list[dict], args: Args) -> list[tuple[dict, list[dict]]]:
    """Train cells in one process, unless it has been done; each one's row and learning curve.

    Raises RuntimeError with the last line of the training's log if it fails.
    """
    words, folders = command(cells, args)
    if not all((folder / "final_returns.npy").exists() for folder in folders):
        folder = folders[0]
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **KEEP_MEMORY}
        with (folder / "log.txt").open("a+") as log:
            with subprocess.Popen(words, env=environment, stdout=log, stderr=log) as training:
                TRAININGS.add(training)
                status = training.wait()
                TRAININGS.discard(training)
            log.seek(0)
            if status:
                last = ["an empty log", *log.read().splitlines()][-1]
                raise RuntimeError(f"exit status {status}, {last}")
    return [result(cell, folder, args) for cell, folder in zip(cells, folders, strict=True)]


def result(cell: dict, folder: Path, args: Args) -> tuple[dict, list[dict]]:
    """The row and the learning curve of a cell that has been trained."""
    with (folder / "metrics.csv").open() as file:
        history = list(csv.DictReader(file))
    task = cell["task"]
    score = partial(MODULES[suite(task)].normalized_score, task)
    final = float(np.load(folder / "final_returns.npy").mean())
    data = data_returns(args.data_dir, task, cell["quality"], cell["seed"])
    row = {
        **cell,
        "return": round(final, 2),
        "data_return": round(float(data.mean()), 2),
        "data_sd": round(float(data.std()), 2),
        "score": round(score(final), 2),
        "data_score": round(score(float(data.mean())), 2),
        "best_score": round(max(float(row["score"]) for row in history), 2),
        "updates": history[-1]["step"],
        "seconds": round(float(history[-1]["seconds"])),
        "num_seeds": json.loads((folder / "args.json").read_text())["num_seeds"],
    }
    curve = [{**cell, "step": r["step"], "score": round(float(r["score"]), 2)} for r in history]
    return row, curve


def read_table(path: Path) -> list[dict]:
    """The rows of a csv file, none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as a csv file, in one piece."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def name(row: dict) -> tuple:
    """What tells a cell, or its row in a table, from the others."""
    keys = ("method", "task", "quality", "seed", "setting", "value")
    return tuple(str(row[key]) for key in keys)


def join_ray(args: Args) -> Callable[[list[dict]], Future]:
    """Join a Ray cluster; a function that hands it cells and returns the future of `run`."""
    try:
        import ray

        # PYTHONPATH: `run` is sent to the workers, the module om2p_mpe that it needs is not
        ray.init(args.ray, runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:${{PYTHONPATH}}"}})
    except ImportError:
        raise SystemExit("error: --ray needs `pip install -r requirements-ray.txt`") from None
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise SystemExit(f"error: --ray {args.ray} cannot be joined: {reason}") from None
    remote = ray.remote(num_cpus=args.ray_cpus, num_gpus=args.ray_gpus)(run)
    return lambda cells: remote.remote(cells, args).future()


def processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(args: Args) -> None:
    """Run what is not finished, and write the tables after every cell."""
    if args.grid not in GRIDS:
        raise SystemExit(f"error: --grid is {args.grid}; it must be one of {', '.join(GRIDS)}")
    for key in ("num_seeds", "workers"):
        if getattr(args, key) < 1:
            flag = key.replace("_", "-")
            raise SystemExit(f"error: --{flag} is {getattr(args, key)}; it must be 1 or more")
    args.run_dir, args.data_dir = args.run_dir.resolve(), args.data_dir.resolve()
    cells = GRIDS[args.grid]()
    if args.dry_run:
        groups = in_one_process(cells, args.num_seeds)
        print("\n".join(shlex.join(command(group, args)[0]) for group in groups))
        return
    paths = args.results_dir / f"{args.grid}.csv", args.results_dir / f"{args.grid}_curves.csv"
    rows = {name(row): row for row in read_table(paths[0])}
    curves: dict[tuple, list] = {}
    for point in read_table(paths[1]):
        curves.setdefault(name(point), []).append(point)
    missing = [cell for cell in cells if name(cell) not in rows]
    if not missing:
        print(f"all {len(cells)} runs of the grid {args.grid} are finished")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(args.workers)
    submit = join_ray(args) if args.ray else lambda cells: pool.submit(run, cells, args)
    for task, quality, seed in sorted({(c["task"], c["quality"], c["seed"]) for c in missing}):
        if not (args.data_dir / task / quality / f"seed_{seed}_data").is_dir():
            script = ROOT / "data" / f"collect_{suite(task)}.py"
            collect = [sys.executable, str(script), "--task", task]
            collect += ["--quality", quality, "--seed", str(seed), "--data-dir", str(args.data_dir)]
            if subprocess.run(collect, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(f"error: this has failed: {shlex.join(collect)}")
    has_gpu = args.device.startswith("cuda") and torch.cuda.is_available()
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "workers": None if args.ray else args.workers,
        "threads per worker": 1,
        "device": torch.cuda.get_device_name(args.device) if has_gpu else args.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    path = args.results_dir / f"{args.grid}.json"
    if rows and path.exists():  # finished cells may have run on another machine
        for key, before in json.loads(path.read_text()).items():
            known = [] if before is None else str(before).split(" and ")
            if known and str(machine[key]) not in [*known, "None"]:
                machine[key] = f"{before} and {machine[key]}"
            elif known:
                machine[key] = before
    path.write_text(json.dumps(machine, indent=2) + "\n")

    jobs = {submit(group): group for group in in_one_process(missing, args.num_seeds)}
    failed = []
    order = [name(cell) for cell in cells]
    bar = tqdm(total=len(cells), initial=len(cells) - len(missing), unit="run")
    try:
        for job in as_completed(jobs):
            bar.update(len(jobs[job]))
            try:
                results = job.result()
            except Exception as problem:
                reason = str(getattr(problem, "cause", problem))  # Ray wraps the training's
                words = shlex.join(command(jobs[job], args)[0])
                failed.append(f"{words}: {reason}".splitlines()[0])
                continue
            for row, curve in results:
                rows[name(row)], curves[name(row)] = row, curve
            # The row last: it is what makes a cell finished
            write_table(paths[1], [p for key in order if key in rows for p in curves[key]])
            write_table(paths[0], [rows[key] for key in order if key in rows])
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)  # what has not started does not start
        for training in list(TRAININGS):
            training.terminate()  # it writes a checkpoint first
    if failed:
        raise SystemExit("\n".join(["error: these runs have failed, see their log.txt:", *failed]))


if __name__ == "__main__":
    main(tyro.cli(Args))

"""Run a grid of trainings, several at a time, and tabulate their results.

    python benchmark/run.py --grid mpe              # the names are those of GRIDS, below
    python benchmark/run.py --grid tune --dry-run   # only print the commands

A cell is one seed of one script. A finished one, with a row in the results, is never run again, and
a stopped one goes on from its checkpoint: the same command continues a grid. Results go to
benchmark/results/: <grid>.csv with a row per cell, <grid>_curves.csv, and <grid>.json (machine).

`--num-seeds 5` trains up to five cells that differ in the seed alone in one process: for GPUs.
`--ray ADDRESS` hands the cells to a Ray cluster (`pip install -r requirements-dev.txt -r
requirements-ray.txt`): `local` starts one here, `auto` finds one. All its machines must see this
folder, --run-dir and --data-dir under the same paths.
"""

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
from card import describe  # noqa: E402

TASKS, CHEETAH = ("simple_spread", "simple_tag", "simple_world"), "HalfCheetah-2x3"
ROBOTS = ("HalfCheetah-6x1", "Hopper-3x1", "Ant-2x4")
QUALITIES = ("expert", "medium", "medium-replay", "random")
METHODS = ("om2p", "bc", "td3_bc", "omar", "diffusion_ql", "dom2", "flow_ql", "fql")
MPE, ROBOT = ([*product(tasks, QUALITIES)] for tasks in (TASKS, [CHEETAH]))
MORE = [*product(ROBOTS, QUALITIES)]
EVAL_EPISODES = {"mpe": "1000", "mamujoco": "20"}  # standard errors of 1 and some 3 points
# Or glibc returns large tensors to the system at each update: a fifth of CQL's time
KEEP_MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**31 - 1))
# One run: a method on a dataset, and what is changed from its defaults
Cell = namedtuple("Cell", ("method", "task", "quality", "seed", "setting", "value"))
# Data that are narrow, broad, and hard to improve on
ABLATION_DATA = [*zip(TASKS, ("medium", "medium-replay", "expert"), strict=True)]
MULTI = [
    ("simple_spread", "multi-expert")
]  # the hunters' conventions differ by little: see the cards
# Changes by method: a flag and its values, yes if it takes none; + joins flags that change
# together, a comma a list
DEFAULTS = dict.fromkeys(METHODS, "")
STANDARDISED = dict.fromkeys(METHODS, "standardize: yes")
TUNING = {  # what matters most in each method, and step sizes
    "om2p": "q-weight: 16 32 64; cql-alpha: 0 0.3; learning-rate: 0.003",
    "bc": "learning-rate: 0.003 0.005",
    "td3_bc": "q-weight: 5 10 20 40; q-weight+learning-rate: 10+0.003",
    "omar": "cql-alpha: 0.03 0.1 0.3; omar-coe: 0.4 1; learning-rate: 0.003",
    "diffusion_ql": "q-weight: 2 4 8; diffusion-steps: 3 10; learning-rate: 0.003",
    "flow_ql": "q-weight: 16 32 64; flow-steps: 5 20; learning-rate: 0.003",
    "fql": "q-weight: 3 10 30 100; flow-steps: 5 20; q-weight+learning-rate: 10+0.003",
    "dom2": "q-weight: 2 4 8 16 32 64; cql-alpha: 0.03 0.3; solver-steps: 3 10; "
    "return-quantiles: 0.5,0.75,0.9; learning-rate: 0.003",
}
TUNING_MAMUJOCO = {
    "om2p": "q-weight: 0.06 0.12 0.25 0.5 1 2; flow-ratio: 0.5; cql-alpha: 0",
    "td3_bc": "q-weight: 0.06 0.25 1 4 16",
    "omar": "cql-alpha: 0.1 1 5",
    "diffusion_ql": "q-weight: 0.12 0.5 2 8",
    **dict.fromkeys(("flow_ql", "fql"), "q-weight: 0.25 1 4 16"),
    "dom2": "q-weight: 0.5 2 8; q-weight+cql-alpha: 0.5+1",
}
ABLATION = {  # flags of benchmark/variants.py and of om2p_mpe.py itself
    "om2p": "derivative: jvp; variant: q-at-noise no-derivative released; cql-alpha: 0; "
    "time-alpha+time-beta: 1+1; q-weight: 0; variant+delta+q-weight: q-at-noise+0.1+8; "
    "flow-ratio: 0 0.75 1; variant: smaller-q penalty; variant+cql-alpha: conservative+0; "
    "time-alpha+time-beta: 0.5+1 2+2; variant+q-weight: no-derivative+8"
}
# Updates in the time of OM2P's 4,000, by updates/s in efficiency_epyc.csv, within 5 %
EQUAL_TIME = {"diffusion_ql": "num-updates: 2530", "dom2": "num-updates: 900"}
EQUAL_TIME |= {"flow_ql": "num-updates: 1810"}
LONG = dict.fromkeys(METHODS, "num-updates+eval-interval: 20000+2000")
REPLAY, TAG = {method: LONG[method] for method in ("om2p", "fql")}, ABLATION_DATA[1:2]
CONSERVATIVE = {"fql": "variant: cql", "om2p": "cql-alpha: 0"}
CONSERVATIVE |= dict.fromkeys(("td3_bc", "flow_ql", "diffusion_ql"), "variant: cql")
TWO_NETWORKS = {"om2p": "variant: two-networks"}
CONVENTIONS = DEFAULTS | {  # an empty value first: the defaults
    "om2p": "; variant: no-derivative released; q-weight: 0",
    **dict.fromkeys(("diffusion_ql", "flow_ql"), "; q-weight: 0"),
}
PUBLISHED = {  # sizes and steps of OMAR's code for MA-TD3+BC, alpha of TD3+BC's paper
    "bc": "hidden-dims+learning-rate+batch-size+num-updates: 64,64+0.01+1024+2000",
    "td3_bc": "hidden-dims+learning-rate+batch-size+tau+q-weight+num-updates: "
    "64,64+0.01+1024+0.01+2.5+2000",
}
TUNING_DATA = [*ABLATION_DATA, ("simple_spread", "random")]
MAIN = "every method's main setting"
MULTI_STEP = "the multi-step policies, each for as long as OM2P's 4,000 updates take"
GRIDS = {  # name -> what it compares, changes, datasets, number of seeds
    "mpe": ("all methods on the particle environments", DEFAULTS, MPE, 5),
    "mpe_long": ("all methods on ten times the data, five times as long", LONG, MPE, 3),
    "replay": ("the same on a million transitions of medium-replay", REPLAY, TAG, 3),
    "mamujoco": ("all methods on HalfCheetah-2x3", DEFAULTS, ROBOT, 3),
    "robots": ("all methods on three more robots", DEFAULTS, MORE, 3),
    "robots_standardised": ("the same, with `--standardize`", STANDARDISED, MORE, 3),
    "standardised": ("the particle environments, with `--standardize`", STANDARDISED, MPE, 3),
    "equal_time": (MULTI_STEP, EQUAL_TIME, MPE, 3),
    "tune": (f"{MAIN}s, on four datasets of the particle environments", TUNING, TUNING_DATA, 1),
    "tune_mamujoco": (f"{MAIN}, on two datasets of {CHEETAH}", TUNING_MAMUJOCO, ROBOT[1:3], 1),
    "ablation": ("OM2P without or with other ideas", ABLATION, ABLATION_DATA, 3),
    "conservative": ("OM2P without its conservative term, rivals with it", CONSERVATIVE, MPE, 3),
    "two_networks": ("OM2P with a second network of the observation", TWO_NETWORKS, MPE, 3),
    "multi_expert": ("all methods on data of several conventions", CONVENTIONS, MULTI, 3),
    "published": ("BC and MA-TD3+BC by OMAR's settings", PUBLISHED, MPE, 1),
}


@dataclass
class Args:
    grid: Literal[tuple(GRIDS)] = "mpe"
    """what to run"""
    workers: int = 2
    """trainings at a time, one thread each"""
    run_dir: Path = Path("runs/benchmark")
    """where the runs go; keep it, and stopped cells go on from their checkpoints"""
    data_dir: Path = Path("data")
    """folder of the datasets; what is missing is made"""
    num_transitions: int = 100_000
    """of datasets that are made; medium-replay has always 100,000"""
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


def cells_of(grid: str) -> list[Cell]:
    """The cells of a grid, by seed, method, change and dataset."""
    cells, (_, changes, datasets, num_seeds) = [], GRIDS[grid]
    for seed, (method, text) in product(range(num_seeds), changes.items()):
        for change in text.split("; "):
            flags, _, values = change.partition(": ")
            for value, data in product(values.split() or [""], datasets):
                pair = flags.replace("+", " "), value.replace("+", " ")
                cells.append(Cell(method, *data, seed, *pair))
    return cells


def in_one_process(cells: list[Cell], num_seeds: int) -> list[list[Cell]]:
    """The cells in groups: up to `num_seeds` seeds of the same, that follow one another."""
    groups, newest = [], {}  # by the cell that would be next
    for cell in cells:
        group = newest.pop(cell, [])
        if not group or len(group) == num_seeds:
            groups.append(group := [])
        group.append(cell)
        newest[cell._replace(seed=cell.seed + 1)] = group
    return groups


def suite(task: str) -> str:
    """The end of the names of a task's scripts."""
    return "mpe" if task in TASKS else "mamujoco"


def command(cells: list[Cell], args: Args) -> tuple[list[str], Path]:
    """What trains cells that differ in the seed alone, and its run directory."""
    method, task, quality, seed, setting, value = cells[0]
    script = f"{'' if method == 'om2p' else 'baselines/'}{method}_{suite(task)}.py"
    script = ROOT / ("benchmark/variants.py" if "variant" in setting else script)
    change, run_dir = "-".join(setting.split() + value.split()), args.run_dir / args.grid
    changed = f"--method {method} " * (method != "om2p" and "variant" in setting)
    change = f"{method}-{change}" if changed else change
    words = f"{changed}--resume --task {task} --quality {quality} --seed {seed} "
    words += f"--num-seeds {len(cells)} --device {args.device} "
    words += f"--{'' if args.compile else 'no-'}compile "
    words += f"--eval-episodes {EVAL_EPISODES[suite(task)]} {f'--name {change} ' * bool(change)}"
    for name, part in zip(setting.split(), value.split(), strict=True):
        words += f"--{name} {part.replace(',', ' ').removesuffix('yes')} "
    words += f"--num-updates {args.num_updates}" * (args.num_updates is not None)
    words = [sys.executable, str(script), *words.split()]
    words += ["--data-dir", str(args.data_dir), "--run-dir", str(run_dir)]
    run_dir = run_dir / f"{task}-{quality}" / f"{script.stem}-{change}".removesuffix("-")
    return words, run_dir / "-".join(["seed", *map(str, sorted({seed, cells[-1].seed}))])


def run(cells: list[Cell], args: Args) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train cells in one process, unless it has been done; their learning curves and rows.

    Raises RuntimeError with the last line of the training's log if it fails.
    """
    words, folder = command(cells, args)
    if not (folder / "final_returns.npy").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **KEEP_MEMORY}
        with folder.with_suffix(".log").open("a+") as log:
            status = subprocess.run(words, env=environment, stdout=log, stderr=log).returncode
            log.seek(0)
            if status:
                raise RuntimeError(f"exit status {status}, {(log.read().splitlines() or '?')[-1]}")
    returns = np.load(folder / "final_returns.npy").reshape(len(cells), -1).mean(axis=1).tolist()
    history, rows, curves = pd.read_csv(folder / "metrics.csv"), [], []
    for cell, final in zip(cells, returns, strict=True):
        module = importlib.import_module(f"om2p_{suite(cell.task)}")  # MuJoCo may be missing
        _, data = describe(args.data_dir / cell.task / cell.quality / f"seed_{cell.seed}_data")
        score = partial(module.normalized_score, cell.task)
        curve = history[history.seed == cell.seed]
        row = {"return": final, "data_return": data.mean(), "data_sd": data.std()}
        row |= {"score": score(final), "data_score": score(data.mean())}
        row |= {"best_score": curve.score.max(), "updates": curve.step.max()}
        row |= {"seconds": round(curve.seconds.max()), "num_seeds": len(cells)}
        rows.append(cell._asdict() | row)
        curves.append(curve[["step", "score"]].assign(**cell._asdict()))
    return pd.concat(curves).round(2), pd.DataFrame(rows).round(2)


def read_table(path: Path) -> pd.DataFrame:
    """The rows of a results file, none if it is not there, indexed by their cells."""
    if not path.exists():
        return pd.DataFrame(columns=Cell._fields).set_index([*Cell._fields])
    options = {"dtype": {"value": str}, "keep_default_na": False}
    return pd.read_csv(path, **options).set_index([*Cell._fields])


def write_table(path: Path, rows) -> None:
    """Write rows as a csv file, with the line ends that Python's csv has."""
    pd.DataFrame(rows).to_csv(path, index=False, na_rep="nan", lineterminator="\r\n")


def join_ray(args: Args) -> Callable[[list[Cell]], Future]:
    """Join a Ray cluster; a function that hands it cells and returns the future of `run`."""
    import ray

    # `run` is sent to the workers, the modules that it needs are not
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'data'}:${{PYTHONPATH}}"}
    ray.init(args.ray, runtime_env={"env_vars": path})
    remote = ray.remote(num_cpus=args.ray_cpus, num_gpus=args.ray_gpus)(run)
    return lambda cells: remote.remote(cells, args).future()


def machine(device: str, **settings) -> dict:
    """What runs here: processor (where Linux tells it), cores, device, versions, and settings."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        **settings,
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_machine(path: Path, args: Args, goes_on: bool) -> None:
    """Write what the grid runs on; finished cells may have run on another machine."""
    workers = {"workers": None if args.ray else args.workers, "threads per worker": 1}
    here = machine(args.device, **workers)
    before = json.loads(path.read_text()) if goes_on and path.exists() else {}
    for key, new in here.items():
        old = before.get(key) or new
        known = new is None or str(new) in str(old).split(" and ")
        here[key] = old if known else f"{old} and {new}"
    path.write_text(json.dumps(here, indent=2) + "\n")


def main(args: Args) -> None:
    """Run what is not finished, and write the tables after every cell."""
    args.run_dir, args.data_dir = args.run_dir.resolve(), args.data_dir.resolve()
    cells = cells_of(args.grid)
    if args.dry_run:
        for group in in_one_process(cells, args.num_seeds):
            print(shlex.join(command(group, args)[0]))
        return
    # The curves first: a row in the other table is what makes a cell finished
    paths = [args.results_dir / f"{args.grid}{end}.csv" for end in ("_curves", "")]
    tables = [read_table(path) for path in paths]
    finished = set(tables[1].index)
    missing = [cell for cell in cells if cell not in finished]
    if not missing:
        print(f"all {len(cells)} runs of the grid {args.grid} are finished")
        return
    pool = ThreadPoolExecutor(args.workers)
    submit = join_ray(args) if args.ray else lambda group: pool.submit(run, group, args)
    for task, quality, seed in sorted({cell[1:4] for cell in missing}):
        if not (args.data_dir / task / quality / f"seed_{seed}_data").is_dir():
            words = f"data/collect_{suite(task)}.py --task {task} --quality {quality} --seed {seed}"
            if quality != "medium-replay":
                words += f" --num-transitions {args.num_transitions}"
            words = [sys.executable, *words.split(), "--data-dir", str(args.data_dir)]
            if subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
                raise SystemExit(f"error: this has failed: {shlex.join(words)}")
    args.results_dir.mkdir(parents=True, exist_ok=True)
    write_machine(args.results_dir / f"{args.grid}.json", args, bool(finished))

    jobs = {submit(group): group for group in in_one_process(missing, args.num_seeds)}
    bar, failed = tqdm(total=len(cells), initial=len(finished), unit="run"), []
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
            for k, new in enumerate(results):
                tables[k] = pd.concat([tables[k], new.set_index([*Cell._fields])])
                order = [cell for cell in cells if cell in tables[k].index]
                write_table(paths[k], tables[k].loc[order].reset_index())
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)  # what has not started does not start
    if failed:
        raise SystemExit("\n".join(["error: these runs have failed, see their logs:", *failed]))


if __name__ == "__main__":
    main(tyro.cli(Args))

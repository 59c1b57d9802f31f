"""Settle on a GPU, in twelve minutes at most, what has been measured on CPUs alone.

    python benchmark/gpu.py                       # all stages, into benchmark/results/gpu or $OUT
    python benchmark/gpu.py --device cpu --tiny   # the rehearsal: all stages, tiny sizes

right   the captured update against the plain one, resuming, evaluating, two seeds at once, tests
        that need a GPU; meanwhile data are made, and what `claim` measures is compiled
claim   benchmark/efficiency.py: equal networks, the sweep's ends, TF32, graphs without compiling
scale   five seeds in one process against one; scores on the particle datasets, not compiled
first   `python om2p_mpe.py --seed 0` in an empty folder, as it is and without compiling

A stage that fails or runs out of time does not stop the next, which gets what it leaves over.
notes.csv has all findings, summary.json what ran and the targets, log.txt what was printed.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import efficiency
import pandas as pd
import torch
import tyro
from gpu_checks import CAPTURED, CHECKED, check, environment
from run import ABLATION_DATA, MPE, ROOT, Cell, machine, run, write_machine, write_table
from run import Args as Grid

PAIR, SWEPT = ("om2p", "diffusion_ql-20"), ("agents", "batch", "width")
RIVALS = ("td3_bc", "fql-10", "diffusion_ql-5", "flow_ql-10", "om2p-jvp", "dom2-5")
RIVALS += ("om2p-jacobian", "diffusion_ql-50")  # these take long to compile
DATASETS = [*dict.fromkeys([("simple_spread", "expert"), *ABLATION_DATA, *MPE])]
SEEDS, COLLECT = range(5), ROOT / "data" / "collect_mpe.py"
SPAWN, WORKERS = get_context("spawn"), max(2, (os.cpu_count() or 1) // 2)
WAYS = {"": {}, "captured": CAPTURED, "tf32": {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}}


@dataclass
class Args:
    out: Path = Path(os.environ.get("OUT") or ROOT / "benchmark" / "results" / "gpu")
    """where everything goes; a fresh folder"""
    device: str = "cuda"
    """what to settle it on: cuda, cpu"""
    tiny: bool = False
    """tiny sizes and few runs, nothing compiled: a rehearsal"""
    stages: tuple[str, ...] = ("right", "claim", "scale", "first")
    """which, in this order"""
    minutes: float = 11.7
    """for all stages; their limits are in proportion"""
    methods: tuple[str, ...] = RIVALS
    """of the claim, beside OM2P and Diffusion-QL"""
    work: tyro.conf.Suppress[Path] = Path()


def note(args: Args, what: str, result, detail="") -> None:
    """Append a finding to notes.csv."""
    with (args.out / "notes.csv").open("a", newline="") as file:
        csv.writer(file).writerow([time.strftime("%X"), what, result, detail])


def called(*words, **options) -> tuple[str, str]:
    """Run a Python program, and print what it prints; its outcome and its last line."""
    words, pipe = [sys.executable, *map(str, words)], subprocess.PIPE
    done = subprocess.run(words, stdout=pipe, stderr=subprocess.STDOUT, text=True, **options)
    print(*words, "\n", done.stdout, flush=True)
    last = done.stdout.rstrip().split("\n")[-1][-500:]
    return f"failed ({done.returncode})" if done.returncode else "passed", last


def right(args: Args) -> None:
    """Is what is measured right? And prepare what comes next."""
    few = ("--num-transitions", 2500)
    for seed in (0, 1):
        called(COLLECT, "--seed", seed, *few, "--data-dir", args.work / "few")
    ways, some = (("captured", "compiled"), len(CHECKED)) if not args.tiny else (("captured",), 1)
    checks = [("capture", method, how) for how in ways for method in CHECKED[:some]]
    checks += [(kind, "om2p", ways[-1]) for kind in ("resume", "evaluate", "seeds")]
    wanted = [((*SWEPT, "equal"), PAIR), (("equal",), args.methods)]
    settings = [efficiency.Args(*pair, largest=True, shrink=1 + 31 * args.tiny) for pair in wanted]
    points = [point for part in settings for point in efficiency.points(part)]
    checks += [("compile", *point) for point in points[: 1 if args.tiny else None]]
    tests = ["-m", "pytest", "-p", "no:cacheprovider", "-k", "captured_run or test_gpu"]
    tests += ["-n", 4] if find_spec("xdist") and not args.tiny else []
    suites = ("training", "scripts")[: 1 + bool(find_spec("gymnasium_robotics"))]
    tests += [f"tests/test_{name}.py" for name in suites]
    pool = ProcessPoolExecutor(WORKERS, SPAWN, max_tasks_per_child=1)
    with pool, ThreadPoolExecutor(WORKERS) as makers:
        jobs = {makers.submit(called, *tests, cwd=ROOT): "tests"}
        jobs |= {pool.submit(check, args, *words): " ".join(map(str, words)) for words in checks}
        for (task, quality), seed in product(DATASETS[: 1 if args.tiny else None], SEEDS):
            words = ["--task", task, "--quality", quality, "--seed", seed, *few[: 2 * args.tiny]]
            job = makers.submit(called, COLLECT, *words, "--data-dir", args.work / "data")
            jobs[job] = f"data {task} {quality} {seed}"
        for job in as_completed(jobs):
            note(args, jobs[job], *job.result())


def claim(args: Args) -> None:
    """What do the methods cost?"""
    size = 64 if args.tiny else 4096
    for precision in ("highest", "high"):  # fp32, TF32
        torch.set_float32_matmul_precision(precision)
        rate = efficiency.product_rate(efficiency.Point("", "", 1, size), size, args.device, 0.5)
        note(args, f"TFLOP/s of a product of {size}, precision {precision}", f"{rate / 1e12:.3g}")
    methods, swept = (args.methods[:1], ("batch",)) if args.tiny else (args.methods, SWEPT)
    wanted, both = [("", ("equal",), PAIR), ("", swept, PAIR)], ("default", "published")
    wanted += [(how, ("equal",), PAIR) for how in ("captured", "tf32")[args.tiny :]]
    wanted += [("", ("equal",), (name,)) for name in methods]
    wanted += [("", both, PAIR), ("", both, methods), ("captured", SWEPT, PAIR)] * (not args.tiny)
    for how, parts, methods in wanted:
        folder, sizes = args.work / how if how else args.out, (0.01, 32) if args.tiny else (2.0, 1)
        settings = efficiency.Args(parts, methods, args.device, not args.tiny, sizes[0], folder)
        try:
            with environment(**WAYS[how]):
                efficiency.main(replace(settings, largest=True, shrink=sizes[1]))
        except (Exception, SystemExit) as problem:
            note(args, f"{how} {parts} {methods}", "failed", str(problem)[:500])
        found = args.work.glob("*/eff*.csv")
        if tables := [pd.read_csv(path).assign(how=path.parent.name) for path in found]:
            write_table(args.out / "variants.csv", pd.concat(tables))


def scale(args: Args) -> None:
    """Five seeds in the time of one? And the scores, several runs at a time."""
    os.environ.update(CAPTURED)
    tiny = ("--no-compile", "--num-updates", 60, "--eval-interval", 30) if args.tiny else ()
    times, places = [], ("--data-dir", args.work / "data", "--run-dir", args.work / "pair")
    for number in (1, len(SEEDS)):
        words = ("--num-seeds", number, "--device", args.device, *places, *tiny)
        note(args, f"{number} seeds", *called(ROOT / "om2p_mpe.py", *words))
    for path in sorted(args.work.glob("pair/*/*/seed-*/metrics.csv")):  # seed-0, then seed-0-4
        seconds = pd.read_csv(path).seconds
        times.append(round(float(seconds.iloc[-1] - seconds.iloc[0]), 2))
    note(args, "time of five seeds", f"{times[1] / times[0]:.2f}", f"seconds {times}")
    grid = Grid("mpe", WORKERS, args.work / "runs", args.work / "data", args.out, args.device)
    grid.compile, grid.num_updates = not args.tiny, 20 if args.tiny else None
    write_machine(args.out / "mpe.json", grid, False)
    cells = product(DATASETS, ("om2p", "fql", "td3_bc", "diffusion_ql"))
    cells = [[Cell(method, *data, seed, "", "") for seed in SEEDS] for data, method in cells]
    pool, rows = ThreadPoolExecutor(WORKERS), []
    for job in as_completed([pool.submit(run, g, grid) for g in cells[: 2 if args.tiny else None]]):
        try:
            rows.append(job.result()[1])
            write_table(args.out / "mpe.csv", pd.concat(rows))
        except Exception as problem:
            note(args, "a training", "failed", str(problem)[:500])


def first(args: Args) -> None:
    """What does a newcomer see, and how long does it take?"""
    tiny = ("--device", args.device, "--num-updates", 50, "--no-compile") if args.tiny else ()
    for how in ("", "captured")[: 1 if args.tiny else None]:
        folder, start = Path(tempfile.mkdtemp(dir=args.work)), time.perf_counter()
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/1", "TRITON_CACHE_DIR": f"{folder}/2"}
        with environment(**caches, **WAYS[how]):
            found = called(ROOT / "om2p_mpe.py", "--seed", 0, *tiny, cwd=folder)
        note(args, f"first command {how}, {time.perf_counter() - start:.0f} s", *found)


STAGES = {"right": (right, 3), "claim": (claim, 4), "scale": (scale, 3.2), "first": (first, 1.5)}


def targets(table: pd.DataFrame, peaks: list[float]) -> list[tuple]:
    """What was to be reached, and what was, in the table of `claim`: what, wanted, found."""
    table = table.set_index(["part", "agents", "batch", "hidden_dims", "method"])
    ours, rival = (table.xs(name, level="method") for name in PAIR)
    time = ours.updates_per_second / rival.updates_per_second
    memory = rival.memory_mib / ours.memory_mib
    equal, decisions = ours.loc["equal"].iloc[0], (rival.decision_ms / ours.decision_ms)["equal"]
    found = [("Diffusion-QL's time, 20 steps, OM2P = 1", 5, time["equal"].iloc[0])]
    found += [("its memory", 2, memory["equal"].iloc[0]), ("its time at best", 10.8, time.max())]
    found += [("its memory at best", 3.8, memory.max()), ("its decisions", 10, decisions.iloc[0])]
    found += [("updates/s of OM2P", 2000, equal.updates_per_second)]
    rate = equal.gflop * equal.updates_per_second / 1000
    return found + [(f"share of {peak} TFLOP/s", None, rate / peak) for peak in peaks]


def summarize(args: Args, stages: list[dict]) -> None:
    """Write summary.json."""
    names = ["time", "what", "result", "detail"]
    notes = pd.DataFrame(columns=names)
    with suppress(FileNotFoundError):
        notes = pd.read_csv(args.out / "notes.csv", names=names, dtype=str, keep_default_na=False)
    find, found = lambda key: notes[notes.what.str.startswith(key)].result.astype(float), []
    with suppress(KeyError, ValueError):  # what is not there yet
        (path,) = args.out.glob("efficiency_*.csv")
        found += targets(pd.read_csv(path), [*find("TFLOP/s")])
    found += [("one seed's time, five seeds' = 1", 0.5, 1 / x) for x in find("time of five seeds")]
    met = [[what, wanted, round(x, 3), wanted and bool(x >= wanted)] for what, wanted, x in found]
    summary = {"targets: at least, found, met": met, "stages": stages, "gpu": smi()}
    summary |= {"failed": notes[notes.result.str.startswith("failed")][names[1:]].values.tolist()}
    summary["machine"] = machine(args.device)
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def smi(query="name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw") -> str:
    """What nvidia-smi says, if it is there."""
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return ""


def alone(function, args: Args) -> None:
    """Run a stage as the head of a group of processes, which can be stopped together."""
    os.setsid()
    log = os.open(args.out / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    function(args)


def main(args: Args) -> None:
    """Run the stages, each for so long at most, and say what came of them."""
    args.out.mkdir(parents=True, exist_ok=True)
    args.out, os.environ["OMP_NUM_THREADS"] = args.out.resolve(), "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and stop the stage, below
    share, end, ran = args.minutes / sum(x[1] for x in STAGES.values()), time.monotonic(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in args.stages:
            function, minutes = STAGES[name]
            start, end, clocks = time.monotonic(), end + 60 * minutes * share, []
            process = SPAWN.Process(target=alone, args=(function, replace(args, work=Path(folder))))
            process.start()
            try:
                while process.is_alive() and time.monotonic() < end:
                    process.join(min(3, max(0.01, end - time.monotonic())))
                    clocks.append(smi("clocks.sm,power.draw"))
                status = "out of time" if process.is_alive() else process.exitcode
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()  # it may not have come to be a group's head
            row = {"stage": name, "status": status, "seconds": round(time.monotonic() - start, 1)}
            ran.append(row | {"limit": round(end - start, 1), "clocks": max(clocks, default="")})
            summarize(args, ran)
    print((args.out / "summary.json").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args))

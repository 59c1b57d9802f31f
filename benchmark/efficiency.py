"""Measure what every method costs: updates per second, memory, milliseconds a decision, FLOPs.

    python benchmark/efficiency.py                  # on the CPU, or on a GPU if there is one
    python benchmark/efficiency.py --parts equal --methods om2p diffusion_ql-20
    python benchmark/efficiency.py --parts equal default --rounds 3  # where times are noisy

The update is the script's: its `train` is run on random data, and what it hands to `compiled` is
measured. Sizes are those of simple_spread: 3 agents, 18 observed numbers, 2-dimensional actions.

equal       four hidden layers of 512 and batches of 256 for all (DOM2: as many weights)
default     the scripts' own, two layers of 128 and batches of 128
published   sizes from papers and code, where they tell them; see PUBLISHED
agents, batch, width    one of them varied, the others at 3, 256 and two layers of 128

Writes benchmark/results/efficiency_<cpu or cuda>[_compiled].csv, a row for every point, and .json
with the machine; points of the same machine and settings that are there are kept or replaced.
Memory is that of the plain update, with or without --compile. FLOPs: of products.
"""

import importlib.util
import inspect
import json
import math
import os
import sys
import tempfile
from bisect import bisect_left
from collections import defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import tyro
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from run import KEEP_MEMORY, machine, write_table  # noqa: E402
from variants import SeparateLinear, jacobian_loss  # noqa: E402

OBS_DIM, ACTION_DIM = 18, 2
METHODS = {  # name -> script and settings
    "om2p": ("om2p", {}),
    "om2p-jvp": ("om2p", {"derivative": "jvp"}),
    **dict.fromkeys(("om2p-jacobian", "om2p-loop"), ("om2p", {})),
    **{name: (name, {}) for name in ("bc", "td3_bc", "omar")},
    "fql-10": ("fql", {"flow_steps": 10}),
    **{f"flow_ql-{k}": ("flow_ql", {"flow_steps": k}) for k in (5, 10, 20)},
    **{f"diffusion_ql-{k}": ("diffusion_ql", {"diffusion_steps": k}) for k in (5, 10, 20, 50)},
    "dom2-5": ("dom2", {"solver_steps": 5}),
}
# Batch and hidden layers: the authors' release, and Park et al. (2025), who have Flow-QL as a rival
PUBLISHED = dict.fromkeys(("om2p", "om2p-jacobian"), (256, "512x512x512x512"))
PUBLISHED |= dict.fromkeys(("fql-10", "flow_ql-10"), (256, "512x512x512x512"))
PUBLISHED |= dict.fromkeys(("td3_bc", "omar"), (1024, "64x64"))  # OMAR's code on the MPE
# Wang et al. (2023); DOM2's critics, our choice, its policy is SfBC's
PUBLISHED |= {"diffusion_ql-5": (256, "256x256x256"), "dom2-5": (256, "256x256")}
SWEPT = ("om2p", "td3_bc", "fql-10", "flow_ql-10", "diffusion_ql-5", "diffusion_ql-20", "dom2-5")
PARTS = ("equal", "default", "published", "agents", "batch", "width")
KEY = ("part", "method", "agents", "batch", "hidden_dims")  # of a measurement, and its row
Point = namedtuple("Point", KEY, defaults=(3, 256, "128x128"))


@dataclass
class Args:
    parts: tuple[Literal[PARTS], ...] = PARTS
    """what to measure; see above"""
    methods: tuple[Literal[tuple(METHODS)], ...] = tuple(METHODS)
    """of these methods"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where: cpu, cuda"""
    compile: bool = torch.cuda.is_available()
    """as the scripts' --compile, for the updates and decisions of all methods"""
    seconds: float = 3.0
    """how long a rate is measured, at least three updates"""
    results_dir: Path = ROOT / "benchmark" / "results"
    """where the table goes"""
    largest: bool = False
    """of agents, batch and width the largest sizes alone"""
    shrink: int = 1
    """divide all widths and batches by so much: for rehearsals"""
    rounds: int = 1
    """times that every point is measured, all points in turn; the table has the medians"""


def shrunk(point: Point, divisor: int) -> Point:
    """The same with batch and widths divided."""
    widths = (str(int(width) // divisor) for width in point.hidden_dims.split("x"))
    return point._replace(batch=point.batch // divisor, hidden_dims="x".join(widths))


def points(args: Args) -> list[Point]:
    """What to measure, sorted by method."""
    found, ends = [], slice(-1 if args.largest else 0, None)
    for method in args.methods:
        found += [Point("equal", method, hidden_dims="512x512x512x512")]
        found += [Point("default", method, batch=128)]
        if method in PUBLISHED:
            found += [Point("published", method, 3, *PUBLISHED[method])]
        if method in SWEPT:
            found += [Point("agents", method, agents=number) for number in (2, 4, 8, 16, 32)[ends]]
            batches = (256, 1024, 4096, 16_384)[ends]
            found += [Point("batch", method, batch=number) for number in batches]
            widths = (64, 128, 256, 512, 1024)[ends]
            found += [Point("width", method, hidden_dims=f"{width}x{width}") for width in widths]
    found = [point for point in found if point.part in args.parts]
    return [shrunk(point, args.shrink) for point in found]


def equal_score_dims(module, hidden_dims: tuple[int, ...]) -> tuple[int, int]:
    """Widths (2 w, w) of DOM2's score network with about the weights of the others' policies."""

    def size(net: nn.Module) -> int:
        return sum(weight.numel() for weight in net.parameters())

    net, widths = partial(module.ScorePolicy, 1, OBS_DIM, ACTION_DIM), range(4, 1024, 2)
    wanted = size(module.mlp((1,), OBS_DIM + ACTION_DIM + 2, hidden_dims, ACTION_DIM))
    with torch.device("meta"):  # sizes without numbers
        k = bisect_left(widths, wanted, key=lambda w: size(net((2 * w, w))))
        w = min(widths[k - 1 : k + 1], key=lambda w: abs(size(net((2 * w, w))) - wanted))
    return 2 * w, w


def clock(function, seconds: float) -> np.ndarray:
    """Seconds a call takes, three or more numbers, after some calls to warm up."""
    for _ in range(5):  # a CUDA graph is captured at the 4th
        function()
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    times = []
    while len(times) < 3:
        times += timer.blocked_autorange(min_run_time=seconds).times
    return np.array(times)


class Flops(TorchDispatchMode):
    """FlopCounterMode's `total` without its record of modules, which torch.func.vjp cannot bear."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def cpu_peak(update) -> int:
    """The most bytes at once that tensors made in an update take, and those left by the last."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
        update()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in events)]).max())


def state_bytes(*owners) -> int:
    """Bytes of all tensors in the states of modules and optimizers; others have none."""
    leaves = tree_leaves([x.state_dict() for x in owners if hasattr(x, "state_dict")])
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def product_rate(point: Point, width: int, device: str, seconds: float) -> float:
    """FLOP/s of a plain product of the hidden layers' size, (N, B, W) times (N, W, W)."""
    x, products = torch.randn(point.agents, point.batch, width, device=device), 1
    weight = torch.randn(point.agents, width, width, device=device)
    multiply = partial(torch.bmm, x, weight)
    if device.startswith("cuda"):  # as the update is: replayed, or launching it is what takes long
        multiply()
        torch.cuda.synchronize(device)
        graph, products = torch.cuda.CUDAGraph(), 20
        with torch.cuda.device(device), torch.cuda.graph(graph):
            for _ in range(products):
                multiply()
        multiply = graph.replay
    call = np.median(clock(multiply, seconds)) / products
    return 2 * point.agents * point.batch * width**2 / call


def load_script(name: str):
    """A method's script as a module of its own, which may be changed."""
    folder = ROOT if name == "om2p" else ROOT / "baselines"
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}_mpe.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # compiling looks it up
    spec.loader.exec_module(module)
    return module


def measure(point: Point, args: Args) -> dict:
    """Run the script's `train` with its update and its evaluation replaced by measurements."""
    name, settings = METHODS[point.method]
    module, device = load_script(name), args.device
    on_gpu, compiled, result = device.startswith("cuda"), module.compiled, {}
    before, data_bytes = [], []
    is_loop = point.method == "om2p-loop"  # one agent is measured, the others are as many again
    agents, repeats = (1, point.agents) if is_loop else (point.agents, 1)
    if is_loop:
        module.StackedLinear = SeparateLinear
    if point.method == "om2p-jacobian":
        module.mean_flow_loss = jacobian_loss
    hidden_dims = tuple(map(int, point.hidden_dims.split("x")))
    if name == "dom2":
        score_dims = {"default": module.Args.score_dims, "published": (512, 256, 128)}  # SfBC's
        equal = score_dims.get(point.part) or equal_score_dims(module, hidden_dims)
        settings = settings | {"score_dims": equal}

    def random_data(*_) -> dict[str, torch.Tensor]:
        """In place of `load_dataset`, on the stream that `train` has chosen."""
        x = torch.ones(1, 8, 8, device=device, requires_grad=True)
        torch.bmm(x, x).sum().backward()  # cuBLAS takes workspaces, for the backward thread, too
        before.append(torch.cuda.memory_allocated(device) if on_gpu else 0)
        shape = agents, max(20_000, point.batch)
        data = {key: torch.randn(*shape, OBS_DIM, device=device) for key in ("obs", "next_obs")}
        data["action"] = torch.rand(*shape, ACTION_DIM, device=device) * 2 - 1
        zeros = torch.zeros(shape, device=device)
        data |= {"reward": torch.randn(shape, device=device), "done": zeros}
        data_bytes.append(sum(values.nbytes for values in data.values()))
        return data

    def fast(function):
        """The function as it is, or compiled."""
        if not args.compile:
            return function
        torch._dynamo.reset()  # or it takes sizes for variable ones
        return partial(next, compiled(function, on_gpu))

    def measured(update, _):
        """In place of `compiled`: the one step of the training is all measurements."""
        losses = update()
        with Flops() as counter:
            update()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
            update()
            allocated = torch.cuda.max_memory_allocated(device) - before[0]
        else:
            owners = inspect.getclosurevars(update).nonlocals.values()
            allocated = cpu_peak(update) + state_bytes(*owners) + data_bytes[0]
        if is_loop:  # the other agents are not there
            allocated = math.nan
        flops, seconds = counter.total * repeats, clock(fast(update), args.seconds) * repeats
        low, rate, high = np.percentile(1 / seconds, (25, 50, 75))
        result.update(updates_per_second=rate, low=low, high=high)
        result.update(
            memory_mib=(allocated - data_bytes[0]) / 2**20, allocated_mib=allocated / 2**20
        )
        product = product_rate(point, max(hidden_dims), device, args.seconds / 5)
        result.update(gflop=flops / 1e9, share_of_product=flops * rate / product)
        yield losses

    @torch.no_grad()
    def decide(policy, *_):
        """In place of `evaluate`: how long one decision of the team takes, and 1,000 at once."""
        for key, number in (("decision_ms", 1), ("decision_1000_ms", 1_000)):
            obs = torch.randn(agents, number, OBS_DIM, device=device)
            act = fast(torch.no_grad()(partial(policy.act, obs)))
            seconds = clock(lambda act=act: act().cpu(), args.seconds / 3)  # there it is needed
            result[key] = 1_000 * np.median(seconds) * repeats
        return np.zeros((1, 1))

    module.MPE = lambda *_: SimpleNamespace()
    module.load_dataset = random_data
    module.compiled, module.evaluate = measured, decide
    with tempfile.TemporaryDirectory() as folder:
        settings = {"run_dir": Path(folder), "device": device, "compile": True} | settings
        settings |= {"batch_size": point.batch, "hidden_dims": hidden_dims}
        module.train(module.Args(num_updates=1, **settings))
    row = point._asdict() | {"score_dims": "x".join(map(str, settings.get("score_dims", ())))}
    return row | result


def quiet() -> None:
    """Let nothing that this process prints, the profiler included, be seen."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def main(args: Args) -> None:
    """Measure point by point, and write the table after each."""
    name = f"efficiency_{args.device.split(':')[0]}{'_compiled' * args.compile}"
    place, table = (args.results_dir / f"{name}.{end}" for end in ("json", "csv"))
    here = machine(args.device, threads=torch.get_num_threads(), compile=args.compile)
    rows, failed, wanted = {}, {}, points(args)
    order = points(Args(shrink=args.shrink))
    if table.exists():
        if json.loads(place.read_text()) != here:
            raise SystemExit(f"error: {table} is of another machine; choose another --results-dir")
        old = pd.read_csv(table, keep_default_na=False, na_values=["nan"]).to_dict("records")
        rows = {tuple(row[key] for key in KEY): row for row in old}
    args.results_dir.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(here, indent=2) + "\n")
    os.environ.update(KEEP_MEMORY)
    process = {"mp_context": get_context("spawn"), "initializer": quiet, "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1, **process) as pool:
        wanted, found = args.rounds * wanted, defaultdict(list)
        jobs = [pool.submit(measure, point, args) for point in wanted]
        for point, job in zip(tqdm(wanted, unit="point"), jobs, strict=True):
            try:
                found[point].append(job.result())
            except (Exception, SystemExit) as problem:
                failed[point.method] = f"{problem!r}".splitlines()[0]
                continue
            medians = pd.DataFrame(found[point]).drop(columns=[*KEY]).median(numeric_only=True)
            numbers = {key: float(f"{value:.5g}") for key, value in medians.items()}
            rows[point] = found[point][0] | numbers
            write_table(table, [rows[key] for key in order if key in rows])
    if failed:
        raise SystemExit("\n".join(f"error: {name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main(tyro.cli(Args))

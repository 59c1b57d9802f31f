"""Measure what every method costs: updates per second, memory, milliseconds a decision, FLOPs.

    python benchmark/efficiency.py                  # on the CPU, or on a GPU if there is one
    python benchmark/efficiency.py --parts equal --methods om2p diffusion_ql-20

The update is that of the script itself: its `train` is run on random data, and what it would hand
to `compiled` is measured. Every method has a process of its own, one after the other, in one run;
glibc keeps freed memory, as for benchmark/run.py.
Sizes are those of simple_spread: 3 agents, 18 observed numbers, 2-dimensional actions.

equal       four hidden layers of 512 and batches of 256 for all (DOM2: as many weights)
default     the scripts' own, two layers of 128 and batches of 128
published   sizes from papers and code, where they tell them; see PUBLISHED
agents, batch, width    one of them varied, the others at 3, 256 and two layers of 128

Writes benchmark/results/efficiency_<cpu or cuda>.csv, with --compile efficiency_<...>_compiled.csv,
a row for every point, and .json with the machine; points that are there from the same machine and
settings are kept or replaced. `benchmark/report.py` makes the README's tables and figures of them.
Memory is that of the plain update, with or without --compile.
"""

import gc
import importlib.util
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from run import KEEP_MEMORY, processor, read_table, write_table  # noqa: E402

OBS_DIM, ACTION_DIM = 18, 2
METHODS = {  # name -> script and settings
    "om2p": ("om2p", {}),
    "om2p-jvp": ("om2p", {"derivative": "jvp"}),
    "om2p-jacobian": ("om2p", {}),
    "om2p-loop": ("om2p", {}),
    "bc": ("bc", {}),
    "td3_bc": ("td3_bc", {}),
    "omar": ("omar", {}),
    "fql-10": ("fql", {"flow_steps": 10}),
    **{f"flow_ql-{k}": ("flow_ql", {"flow_steps": k}) for k in (5, 10, 20)},
    **{f"diffusion_ql-{k}": ("diffusion_ql", {"diffusion_steps": k}) for k in (5, 10, 20, 50)},
    "dom2-5": ("dom2", {"solver_steps": 5}),
}
PUBLISHED = {  # hidden layers, batch
    "om2p": ((512,) * 4, 256),  # the authors' release
    "om2p-jacobian": ((512,) * 4, 256),
    "fql-10": ((512,) * 4, 256),  # Park et al. (2025)
    "flow_ql-10": ((512,) * 4, 256),  # as FQL, which it is compared with there
    "diffusion_ql-5": ((256,) * 3, 256),  # Wang et al. (2023)
    "dom2-5": ((256,) * 2, 256),  # its critics, our choice; the policy is SfBC's
    "td3_bc": ((64,) * 2, 1024),  # OMAR's code on the particle environments
    "omar": ((64,) * 2, 1024),
}
SFBC = (512, 256, 128)  # the score network of DOM2's source
SWEPT = ("om2p", "td3_bc", "fql-10", "flow_ql-10", "diffusion_ql-5", "diffusion_ql-20", "dom2-5")
SWEEPS = {
    "agents": (2, 4, 8, 16, 32),
    "batch": (256, 1024, 4096, 16_384),
    "width": (64, 128, 256, 512, 1024),
}
PARTS = ("equal", "default", "published", *SWEEPS)


@dataclass
class Args:
    parts: tuple[str, ...] = PARTS
    """what to measure; see above"""
    methods: tuple[str, ...] = tuple(METHODS)
    """of these methods"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where: cpu, cuda"""
    compile: bool = torch.cuda.is_available()
    """as the scripts' --compile, for the updates and decisions of all methods"""
    tf32: bool = False
    """as the scripts' --tf32"""
    seconds: float = 3.0
    """how long a rate is measured, at least three updates"""
    results_dir: Path = ROOT / "benchmark" / "results"
    """where the table goes"""


@dataclass
class Point:
    """One measurement: a method with these sizes."""

    part: str
    method: str
    agents: int = 3
    batch: int = 256
    hidden_dims: tuple[int, ...] = (128, 128)
    score_dims: tuple[int, ...] | None = ()
    """DOM2's score network; empty: with as many weights as the others'; None: the script's"""


def points(args: Args) -> list[Point]:
    """What to measure, sorted by method."""
    found = []
    for method in args.methods:
        found += [Point("equal", method, hidden_dims=(512,) * 4)]
        found += [Point("default", method, batch=128, score_dims=None)]
        if method in PUBLISHED:
            layers, batch = PUBLISHED[method]
            found += [Point("published", method, 3, batch, layers, SFBC)]
        if method in SWEPT:
            found += [Point("agents", method, agents=number) for number in SWEEPS["agents"]]
            found += [Point("batch", method, batch=number) for number in SWEEPS["batch"]]
            found += [Point("width", method, hidden_dims=(n, n)) for n in SWEEPS["width"]]
    return [point for point in found if point.part in args.parts]


def point_row(point: Point) -> dict:
    """A point's columns in the table."""
    hidden_dims = "x".join(map(str, point.hidden_dims))
    return {**asdict(point), "hidden_dims": hidden_dims}


def key_of(row: dict) -> tuple[str, ...]:
    """What tells a row of the table from the others."""
    return tuple(str(row[key]) for key in ("part", "method", "agents", "batch", "hidden_dims"))


# What the scripts do not have


class SeparateLinear(nn.Module):
    """`StackedLinear` of one agent as nn.Linear layers: one, or one for each of two critics."""

    def __init__(self, stack: tuple[int, ...], in_dim: int, out_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_dim, out_dim) for _ in range(np.prod(stack)))
        self.is_critic = len(stack) == 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, B, in_dim) or (2, 1, B, in_dim) -> (1, B, out_dim) or (2, 1, B, out_dim)."""
        if not self.is_critic:
            return self.layers[0](x)
        parts = x if x.ndim == 4 else (x, x)
        return torch.stack([layer(part) for layer, part in zip(self.layers, parts, strict=True)])


def jacobian_loss(policy, obs, action, noise, r, t, *_):
    """OM2P's loss with du/dr from the Jacobian of the whole batch, whose diagonal alone is used.

    It is what the authors' release builds for its exact derivative, with the diagonal read rightly.
    """
    x, v = (1 - r) * noise + r * action, action - noise
    num_agents, batch_size, action_dim = x.shape
    u = policy(obs, x, r, t)
    _, pullback = torch.func.vjp(lambda x, r: policy(obs, x, r, t), x.detach(), r)
    rows = batch_size * action_dim
    basis = torch.eye(rows, device=x.device).view(rows, 1, batch_size, action_dim)
    with torch.no_grad():
        du_dx, du_dr = torch.func.vmap(pullback)(basis.expand(-1, num_agents, -1, -1))
        along = (du_dx * v).sum(dim=-1) + du_dr[..., 0]  # (B * D, N, B)
        along = along.view(batch_size, action_dim, num_agents, batch_size)
        along = along.diagonal(dim1=0, dim2=3).permute(1, 2, 0)  # (N, B, D)
    return ((u - (v + (t - r) * along)) ** 2).mean(dim=(-2, -1)).sum()


def equal_score_dims(module, point: Point) -> tuple[int, int]:
    """Widths (2 w, w) of DOM2's score network with about the weights of the others' policies."""
    net = module.mlp((1,), OBS_DIM + ACTION_DIM + 2, point.hidden_dims, ACTION_DIM)
    wanted = sum(weight.numel() for weight in net.parameters())

    def excess(w: int) -> int:
        with torch.device("meta"):  # sizes without numbers
            policy = module.ScorePolicy(1, OBS_DIM, ACTION_DIM, (2 * w, w))
        return abs(sum(weight.numel() for weight in policy.parameters()) - wanted)

    w = min(range(4, 1024, 2), key=excess)
    return 2 * w, w


# Measuring


def clock(function, device: str, seconds: float) -> list[float]:
    """Seconds a call takes, in each of three or more groups of calls, after some to warm up.

    A group lasts a tenth of `seconds` or one call. Warm are two calls, and six on a GPU.
    """

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    for _ in range(5 if device.startswith("cuda") else 1):  # a CUDA graph is captured at the 4th
        function()
    calls = max(1, int(seconds / 10 / timed(1)))
    groups, start = [], time.perf_counter()
    while len(groups) < 3 or time.perf_counter() - start < seconds:
        groups.append(timed(calls))
    return groups


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, in `total`, two a multiply-add.

    FlopCounterMode's numbers, without its record of modules, which torch.func.vjp does not bear.
    """

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def cpu_peak(update) -> int:
    """The most bytes that tensors made in updates take at once, from PyTorch's allocator.

    Two updates: what one leaves behind, as gradients, is there in the next.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        update()
        update()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([0, *(event.nbytes() for event in events)]).max())


def state_bytes(*owners) -> int:
    """Bytes of all tensors of modules and optimizers; others have none."""
    tensors = []
    for owner in owners:
        if isinstance(owner, torch.optim.Optimizer):
            tensors += [value for state in owner.state.values() for value in state.values()]
        elif isinstance(owner, nn.Module):
            tensors += [*owner.parameters(), *owner.buffers()]
    return sum(tensor.nbytes for tensor in tensors)


def product_rate(point: Point, device: str, seconds: float) -> float:
    """FLOP/s of a plain product of the hidden layers' size, (N, B, W) times (N, W, W)."""
    width, products = max(point.hidden_dims), 1
    x = torch.randn(point.agents, point.batch, width, device=device)
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
    call = np.median(clock(multiply, device, seconds)) / products
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
    module = load_script(name)
    on_gpu, real_compiled, result = args.device.startswith("cuda"), module.compiled, {}
    is_loop = point.method == "om2p-loop"  # one agent is measured, the others are as many again
    agents, repeats = (1, point.agents) if is_loop else (point.agents, 1)
    if is_loop:
        module.StackedLinear = SeparateLinear
    if point.method == "om2p-jacobian":
        module.mean_flow_loss = jacobian_loss
    if name == "dom2":
        score_dims = module.Args.score_dims if point.score_dims is None else point.score_dims
        settings = settings | {"score_dims": score_dims or equal_score_dims(module, point)}

    gc.collect()
    if on_gpu:  # cuBLAS takes its workspaces, for the forward and the backward thread, at once
        x = torch.ones(1, 8, 8, device=args.device, requires_grad=True)
        torch.bmm(x, x).sum().backward()
        del x
    before = torch.cuda.memory_allocated(args.device) if on_gpu else 0  # by earlier points
    transitions = max(20_000, point.batch)
    shape, generator = (agents, transitions), torch.Generator().manual_seed(0)
    dataset = {
        "obs": torch.randn(*shape, OBS_DIM, generator=generator),
        "action": torch.rand(*shape, ACTION_DIM, generator=generator) * 2 - 1,
        "reward": torch.randn(shape, generator=generator),
        "next_obs": torch.randn(*shape, OBS_DIM, generator=generator),
        "done": torch.zeros(shape),
    }
    dataset = {key: values.to(args.device) for key, values in dataset.items()}
    data_bytes = sum(values.nbytes for values in dataset.values())

    def fast_version(function, states: dict):
        """The function as it is, or compiled; an error if that does not work."""
        if not args.compile:
            return function
        torch._dynamo.reset()  # or it takes the sizes of former points for variable ones
        fast, messages = real_compiled(function, states, args.device), io.StringIO()

        def call():
            with redirect_stderr(messages):
                result = fast()
            if "--compile" in messages.getvalue():
                raise RuntimeError(messages.getvalue())
            return result

        return call

    def measured(update, states: dict, device: str):
        """In place of `compiled`: the one step of the training is all measurements."""

        def step() -> dict[str, torch.Tensor]:
            losses = update()
            with Flops() as counter:
                update()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                update()
                allocated = torch.cuda.max_memory_allocated(device) - before
            else:
                allocated = cpu_peak(update) + state_bytes(*states.values()) + data_bytes
            fast = fast_version(update, states)
            seconds = np.array(clock(fast, device, args.seconds)) * repeats
            flops = counter.total * repeats
            rates = np.percentile(1 / seconds, (25, 50, 75))
            result["updates_per_second"] = rates[1]
            result["low"], result["high"] = rates[0], rates[2]
            if is_loop:  # the other agents are not there
                allocated = math.nan
            result["memory_mib"] = (allocated - data_bytes) / 2**20
            result["allocated_mib"] = allocated / 2**20
            result["gflop"] = flops / 1e9
            product = product_rate(point, device, args.seconds / 5)
            result["share_of_product"] = flops * rates[1] / product
            return losses

        return step

    @torch.no_grad()
    def decide(policy, *_):
        """In place of `evaluate`: how long one decision of the team takes, and 1,000 at once."""
        result["policy_weights"] = repeats * sum(weight.numel() for weight in policy.parameters())
        for key, number in (("decision_ms", 1), ("decision_1000_ms", 1_000)):
            obs = torch.randn(agents, number, OBS_DIM, device=args.device)

            def act(obs=obs) -> dict[str, torch.Tensor]:
                with torch.no_grad():
                    return {"action": policy.act(obs)}

            fast = fast_version(act, {})

            def decision(fast=fast) -> None:
                fast()["action"].cpu()  # there it is needed, and this waits for the GPU

            seconds = clock(decision, args.device, args.seconds / 3)
            result[key] = 1_000 * np.median(seconds) * repeats
        return np.zeros((1, 1))

    module.MPE = lambda *_: SimpleNamespace(prey_policy=None)
    module.load_dataset = lambda *_: dataset
    module.find_prey = lambda *_: None
    module.compiled, module.evaluate = measured, decide
    with tempfile.TemporaryDirectory() as folder:
        common = {"device": args.device, "tf32": args.tf32, "compile": True, "eval_interval": 1}
        sizes = {"batch_size": point.batch, "hidden_dims": point.hidden_dims}
        run = module.Args(num_updates=1, run_dir=Path(folder), **common, **sizes, **settings)
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            module.train(run)
    score_dims = "x".join(map(str, settings.get("score_dims", ())))
    measured_values = {key: float(f"{value:.5g}") for key, value in result.items()}
    return point_row(point) | {"score_dims": score_dims} | measured_values


def child(args: Args, method: str) -> None:
    """Measure all points of one method; a line of JSON on stdout for each."""
    args.methods = (method,)
    for point in points(args):
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
            row = measure(point, args)
        print(json.dumps(row), flush=True)


def main(args: Args) -> None:
    """Measure method by method, and write the table after every point."""
    for kind, values, known in (("parts", args.parts, PARTS), ("methods", args.methods, METHODS)):
        if unknown := set(values) - set(known):
            wrong = ", ".join(sorted(unknown))
            raise SystemExit(f"error: --{kind} {wrong}: must be among {', '.join(known)}")
    kind = args.device.split(":")[0]
    on_gpu = kind == "cuda"
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(args.device) if on_gpu else args.device,
        "compile": args.compile,
        "tf32": args.tf32,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    settings = ["--device", args.device, "--seconds", str(args.seconds), "--parts", *args.parts]
    settings += [f"--{'' if args.compile else 'no-'}compile"]
    settings += [f"--{'' if args.tf32 else 'no-'}tf32"]
    kind += "_compiled" if args.compile else ""
    machine_path = args.results_dir / f"efficiency_{kind}.json"
    table_path = machine_path.with_suffix(".csv")
    rows = {key_of(row): row for row in read_table(table_path)}
    complete = set(rows) | {key_of(point_row(point)) for point in points(args)}
    if rows and (not machine_path.exists() or json.loads(machine_path.read_text()) != machine):
        if len(complete) > len(points(args)):
            raise SystemExit(
                f"error: {table_path} is of another machine or other settings: measure all points "
                f"anew, or choose another --results-dir"
            )
        rows = {}
    args.results_dir.mkdir(parents=True, exist_ok=True)
    machine_path.write_text(json.dumps(machine, indent=2) + "\n")
    order = [key_of(point_row(point)) for point in points(Args())]
    bar, failed = tqdm(total=len(points(args)), unit="point"), []
    for method in args.methods:
        words = [sys.executable, __file__, "--methods", method, *settings]
        environment = {**os.environ, **KEEP_MEMORY, "EFFICIENCY_CHILD": method}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, env=environment, **output) as process:
            for line in process.stdout:
                if line.startswith("{"):  # the profiler has its say, too
                    row = json.loads(line)
                    rows[key_of(row)] = row
                    write_table(table_path, [rows[key] for key in order if key in rows])
                    bar.update()
            errors = ["no message", *process.stderr.read().strip().splitlines()]
        if process.returncode:
            failed.append(f"error: {method} could not be measured: {errors[-1]}")
    bar.close()
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    if "EFFICIENCY_CHILD" in os.environ:
        child(arguments, os.environ["EFFICIENCY_CHILD"])
    else:
        main(arguments)

"""OM2P on recorded logs, without a simulator: any number of agents, of any sizes, in any units.

OM2P (Li et al., AAMAS 2026, arxiv.org/abs/2508.06269) trains a team of agents from recorded data.
Every agent has a mean-flow policy (Geng et al., 2025, arxiv.org/abs/2505.13447), a network that
turns noise into an action in one step. It learns to act like the data and to raise its critic's Q.
Nothing is played here, so there are no returns: what is reported is how the team does on episodes
of the log that were held out. docs/your-data.md explains the files and the numbers.

    noise, action      e ~ N(0, I) and an action of the data; flow time 0 and flow time 1
    x_t                (1 - t) noise + t action, a point on the straight path between them
    v                  action - noise, the velocity on that path
    u(x_r, r, t)       mean velocity over the interval [r, t], predicted at its start x_r
    noise + u(noise, 0, 1)                            the action: one step along the whole path
    u = v + (t - r) du/dr                             what makes u a mean velocity: the target
    L = L_meanflow - q_weight E[Q(o, a_pi)] / |Q|     the policy's loss; a_pi: the end of a path

Agents, those of all S seeds, are stacked along the first dimension of every tensor and parameter,
padded with zeros, and learn alone. N agents, B batch, E critics, K episodes, T transitions.

    python examples/om2p_logs.py --data robots --task robots --seed 0
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    task: str = "log"
    """what was recorded, part of the run directory's name"""
    # region args
    quality: str = "expert"
    """whose actions the data hold: expert, medium, medium-replay, random, medium-expert, ..."""
    seed: int = 0
    """seed of networks, batches and evaluation episodes; also names the dataset, seed_<n>_data"""
    num_seeds: int = 1
    """train so many seeds at once, from --seed up, each on its own data; meant for GPUs"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the networks and the whole dataset live: cpu, cuda, cuda:1"""
    compile: bool = torch.cuda.is_available()
    """compile the update, and on a GPU replay it as a CUDA graph; default: if there is a GPU"""
    data_dir: Path = Path("data")
    """folder of the datasets, <data-dir>/<task>/<quality>/seed_<n>_data/"""
    run_dir: Path = Path("runs")
    """outputs go to <run-dir>/<task>-<quality>/<script>/seed-<n>/"""
    name: str = ""
    """if given, <script>-<name> in that path, to keep the runs of a sweep apart"""
    resume: bool = False
    """go on from the run's checkpoint, or start if it has none"""
    # endregion args
    data: Path | None = None
    """folder with {obs,acs,rews,next_obs,dones}_{i}.npy, for all seeds; default: see --data-dir"""
    held_out: float = 0.1
    """share of the log's episodes that are not trained on, between 0 and 1"""
    eval_interval: int = 500
    """updates between evaluations on the held-out episodes, each with a checkpoint"""

    # OM2P
    num_updates: int = 2_000
    """gradient steps"""
    batch_size: int = 128
    """transitions of every agent in an update"""
    hidden_dims: tuple[int, ...] = (128, 128)
    """widths of the networks' hidden layers"""
    learning_rate: float = 2e-3
    """Adam's step size; the policy's goes down to 0 over the run, linearly"""
    gamma: float = 0.99
    """discount factor, 0 to 1"""
    tau: float = 0.005
    """update rate of target networks, 0 to 1"""
    q_weight: float = 0.1
    """weight of the Q term against mean-flow matching; 0 is behaviour cloning"""
    cql_alpha: float = 0.1
    """weight of E[softplus(Q(o, a') - Q(o, a))], a' uniform, in the critics' loss; 0 is none"""
    flow_ratio: float = 0.75
    """share of the batch with t = r, which is plain flow matching, 0 to 1"""
    time_alpha: float = 0.3
    """Beta distribution of the interval's ends, first shape, > 0; (1, 1) is uniform"""
    time_beta: float = 1.0
    """second shape, > 0; (1 / q, 1) is U^q, with mass at (0, 1) for q > 1, (2, 2) bell-shaped"""
    derivative: Literal["finite-difference", "jvp"] = "finite-difference"
    """du/dr by a difference quotient, OM2P's derivative-free way, or exact by torch.func.jvp"""
    delta: float = 0.01
    """step of the difference quotient; below 1e-4 it drowns in float32's rounding"""


# region networks
class StackedLinear(nn.Module):
    """A linear layer for each entry of `stack`, (N,) agents or (E, N) critics and agents.

    (*stack, B, in_dim) -> (*stack, B, out_dim), initialised as nn.Linear; missing dims broadcast.
    """

    def __init__(self, stack: tuple[int, ...], in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(*stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[-1] == 1:  # several times as fast as the product with one column
            return (x * self.weight.mT).sum(dim=-1, keepdim=True) + self.bias
        return x @ self.weight + self.bias


class Standardize(nn.Module):
    """(x - mean) / std of every input, by agent; the identity until they are set."""

    def __init__(self, num_agents: int, in_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_agents, 1, in_dim))
        self.register_buffer("std", torch.ones(num_agents, 1, in_dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def mlp(stack: tuple[int, ...], in_dim: int, hidden_dims: Sequence[int], out_dim: int, norm=False):
    """Stacked linear layers with GELU; `norm` adds layer norm, without scales that agents share."""
    layers = [Standardize(stack[-1], in_dim)]
    for width in hidden_dims:
        layers += [StackedLinear(stack, in_dim, width), nn.GELU()]
        layers += [nn.LayerNorm(width, elementwise_affine=False)] if norm else []
        in_dim = width
    return nn.Sequential(*layers, StackedLinear(stack, in_dim, out_dim))


# endregion networks
# region om2p
class MeanFlowPolicy(nn.Module):
    """The mean velocity u(x_r, r, t | o) of every agent's flow, and one-step actions with it.

    As in Geng et al. (2025), but with noise at time 0, data at 1, and u taken at the start r.
    """

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims):
        super().__init__()
        self.net = mlp((num_agents,), obs_dim + action_dim + 2, hidden_dims, action_dim)
        self.register_buffer("mask", torch.ones(num_agents, 1, action_dim), persistent=False)

    def forward(self, obs: Tensor, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """(N, B, obs_dim), (N, B, action_dim), (N, B, 1), (N, B, 1) -> u (N, B, action_dim)."""
        return self.net(torch.cat([obs, x, r, t], dim=-1))

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """noise + u(noise, 0, 1) in [-1, 1]; padding 0: (N, B, obs_dim) -> (N, B, action_dim)."""
        if noise is None:
            noise = torch.randn(*obs.shape[:-1], self.mask.shape[-1], device=obs.device)
        r, t = torch.zeros_like(noise[..., :1]), torch.ones_like(noise[..., :1])
        return self.mask * (noise + self(obs, noise, r, t)).clamp(-1, 1)


def sample_times(shape, alpha: float, beta: float, flow_ratio: float, device="cpu"):
    """Draw 0 <= r <= t <= 1, each of `shape`: OM2P's generalised timestep distribution.

    r ~ Beta(alpha, beta), t ~ 1 - Beta(alpha, beta), sorted; t = r for a share `flow_ratio`.
    """
    alpha, beta = (torch.full((), float(value), device=device) for value in (alpha, beta))
    draws = torch.distributions.Beta(alpha, beta, validate_args=False).sample((2, *shape))
    r, t = torch.minimum(draws[0], 1 - draws[1]), torch.maximum(draws[0], 1 - draws[1])
    return r, torch.where(torch.rand(shape, device=device) < flow_ratio, r, t)


def mean_flow_loss(policy, obs, action, noise, r, t, delta=0.01, derivative="finite-difference"):
    """Mean-flow matching, || u(x_r, r, t) - sg[v + (t - r) du/dr] ||^2 (Geng et al., 2025).

    du/dr follows the path: r moves at speed 1, x at v, and t stands still. OM2P estimates it by a
    difference quotient, whose second value of u is a step delta further. Shapes as in `forward`;
    the loss is the mean over batch and action components, and the sum over agents.
    """
    x, v = (1 - r) * noise + r * action, action - noise
    u = policy(obs, x, r, t)
    with torch.no_grad():
        if derivative == "jvp":
            tangents = (v, torch.ones_like(r), torch.zeros_like(t))
            _, du_dr = torch.func.jvp(lambda *xrt: policy(obs, *xrt), (x, r, t), tangents)
        else:
            du_dr = (policy(obs, x + delta * v, r + delta, t) - u) / delta
        target = v + (t - r) * du_dr
    return F.mse_loss(u, target, reduction="none").mean(dim=(1, 2)).sum()


def policy_loss(policy, critic, batch: dict, args: Args) -> tuple[Tensor, dict]:
    """OM2P's objective, L_meanflow - q_weight E[Q(o, a_pi)] / sg(E|Q|), sum over agents.

    a_pi ends a path in one step, for half of the batch from noise, for half from x_r on the way:
    mean-flow matching lets the ends from all r move together, as u + C / (1 - r), but not one
    alone. The batch is `critic_loss`'s. Also returns L_meanflow and the mean Q, for the log.
    """
    obs, action = batch["obs"], batch["action"]
    shape = (*action.shape[:-1], 1)
    r, t = sample_times(shape, args.time_alpha, args.time_beta, args.flow_ratio, action.device)
    noise = torch.randn_like(action)
    flow = mean_flow_loss(policy, obs, action, noise, r, t, args.delta, args.derivative)
    r = torch.where(torch.rand_like(r) < 0.5, r, 0)
    x = (1 - r) * torch.randn_like(action) + r * action
    a_pi = policy.mask * (x + (1 - r) * policy(obs, x, r, torch.ones_like(r))).clamp(-1, 1)
    q = critic(obs, a_pi).mean(dim=0)  # (2, N, B) -> (N, B)
    loss = flow - args.q_weight * (q.mean(dim=-1) / q.abs().mean(dim=-1).detach()).sum()
    return loss, {"mean_flow": flow.detach(), "policy_q": q.detach().mean()}


# endregion om2p
# region critic
class Critic(nn.Module):
    """Q_i(o_i, a_i) of every agent, twice: (N, B, obs_dim), (N, B, action_dim) -> (2, N, B)."""

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims):
        super().__init__()
        self.net = mlp((2, num_agents), obs_dim + action_dim, hidden_dims, 1, norm=True)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1)).squeeze(-1)


def critic_loss(critic, target_critic, policy, batch: dict, gamma: float, aggregate=torch.mean):
    """Temporal-difference loss, sum over critics and agents, mean over the batch; and Q (2, N, B).

    y = reward + gamma (1 - done) mean_k Q'_k(o', a_pi(o')), or another aggregate, without gradient.
    The batch holds obs, next_obs (N, B, obs_dim), action (N, B, action_dim), reward, done (N, B).
    """
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], policy.act(batch["next_obs"]))
        target = batch["reward"] + gamma * (1 - batch["done"]) * aggregate(next_q, dim=0)
    q = critic(batch["obs"], batch["action"])
    return F.mse_loss(q, target.expand_as(q), reduction="none").mean(dim=-1).sum(), q


# endregion critic
# region logs
FILES = {"obs": "obs", "action": "acs", "reward": "rews", "next_obs": "next_obs", "done": "dones"}
HELD_OUT_ROWS = 10_000  # that an evaluation takes at most, evenly spaced


class Team(nn.Module):
    """A mean-flow policy that observes and acts in the log's own units; what policy.pt holds.

    Inside, observations have mean 0 and standard deviation 1, and actions reach from -1 to 1. The
    statistics are buffers (N, 1, dim); `action_half` is 0 where an action is padding or constant.
    `obs_dims`, `action_dims` (N,) are each agent's sizes without padding.
    """

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims):
        super().__init__()
        self.policy = MeanFlowPolicy(num_agents, obs_dim, action_dim, hidden_dims)
        widths = {"obs_mean": obs_dim, "obs_sd": obs_dim}
        widths |= {"action_mid": action_dim, "action_half": action_dim}  # middle, half of the range
        for name, width in widths.items():
            self.register_buffer(name, torch.zeros(num_agents, 1, width))
        for name in ("obs_dims", "action_dims"):
            self.register_buffer(name, torch.zeros(num_agents, dtype=torch.long))

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions within the log's limits: (N, B, obs_dim) -> (N, B, action_dim), in its units.

        Where an agent has fewer components than the largest, the rest is 0.
        """
        action = self.policy.act((obs - self.obs_mean) / self.obs_sd, noise)
        return self.action_mid + self.action_half * action

    def fit(self, data: dict) -> None:
        """Take the agents' sizes, and the statistics of obs and action, from what to train on."""
        self.obs_dims.copy_(data["obs_dims"])
        self.action_dims.copy_(data["action_dims"])
        sd, mean = torch.std_mean(data["obs"].double(), dim=1, keepdim=True)
        low, high = data["action"].double().aminmax(dim=1, keepdim=True)
        self.obs_mean.copy_(mean)
        self.obs_sd.copy_(sd.masked_fill(sd <= 1e-6 * mean.abs(), 1))  # of what never changes
        self.action_mid.copy_((high + low) / 2)
        self.action_half.copy_((high - low) / 2)
        self.policy.mask.copy_(self.action_half > 0)

    def normalize(self, data: dict) -> dict:
        """A log's arrays, with observations and actions as the networks have them."""
        scaled = {key: (data[key] - self.obs_mean) / self.obs_sd for key in ("obs", "next_obs")}
        half = self.action_half.masked_fill(self.action_half == 0, 1)
        scaled |= {"action": (data["action"] - self.action_mid) / half}
        return {key: scaled.get(key, data[key]) for key in FILES}


@contextmanager
def fail_as(message: str) -> Iterator[None]:
    """Let whatever fails in this block end the program with one line."""
    try:
        yield
    except Exception as problem:
        raise SystemExit(f"error: {message}: {problem}".splitlines()[0]) from None


def read_array(path: Path, length: int | None, width: int, low: float, high: float) -> Tensor:
    """One .npy file of numbers from low to high as float32, (length, width)."""
    with fail_as(f"{path} cannot be used"), path.open("rb") as file:
        values = torch.from_numpy(np.lib.format.read_array(file).astype(np.float32))
        values = values[:, None] if values.ndim == 1 else values
        if values.shape != (length or max(len(values), 1), width):
            raise ValueError(f"its shape is {tuple(values.shape)}, not {(length or 'T>0', width)}")
        if not ((low <= values) & (values <= high)).all():
            raise ValueError(f"it holds NaN or numbers outside {low} to {high}")
    return values


def load_team(run_dir, seed: int | None = None) -> Team:
    """The trained team of a run directory; in a run of several seeds that of `seed`, or the first.

    Raises ValueError if it has no such seed.
    """
    state = torch.load(Path(run_dir, "policy.pt"), map_location="cpu", weights_only=True)
    settings = json.loads(Path(run_dir, "args.json").read_text())
    count, first = settings["num_seeds"], settings["seed"]
    k = 0 if seed is None or count == 1 else seed - first
    if not 0 <= k < count:
        raise ValueError(f"seed {seed} is not one of {first} to {first + count - 1}")
    state = {key: values.chunk(count)[k] for key, values in state.items()}
    num_agents, _, obs_dim = state["obs_mean"].shape
    team = Team(num_agents, obs_dim, state["action_mid"].shape[-1], settings["hidden_dims"])
    team.load_state_dict(state)
    return team.requires_grad_(False)


def load_log(folder: Path) -> dict:
    """Read {obs,acs,rews,next_obs,dones}_{i}.npy, one of each for every agent i = 0, 1, ...

    Returns float32 tensors in the log's units, smaller agents padded with zeros: obs, next_obs
    (N, T, obs_dim), action (N, T, action_dim), reward, done (N, T); and obs_dims, action_dims (N,),
    the agents' own sizes. Bad files end the program.
    """
    pattern = re.compile(rf"(?:{'|'.join(FILES.values())})_([0-9]+)\.npy")
    agents = [int(match[1]) for x in folder.glob("*.npy") if (match := pattern.fullmatch(x.name))]
    if not agents:
        raise SystemExit(f"error: there is no log in {folder}: obs_0.npy, acs_0.npy and so on")
    log, length = {key: [] for key in FILES}, None
    for i, (key, name) in product(range(max(agents) + 1), FILES.items()):
        path = folder / f"{name}_{i}.npy"
        with fail_as(f"{path} cannot be used"):
            width = 1 if key in ("reward", "done") else (*np.load(path, "r").shape, 1)[1]
        width = log["obs"][i].shape[1] if key == "next_obs" else width
        limits = (0, 1) if key == "done" else (-3e38, 3e38)
        log[key].append(read_array(path, length, width, *limits))
        length = len(log["obs"][0])
    dims = {f"{key}_dims": [x.shape[1] for x in log[key]] for key in ("obs", "action")}
    for key, values in log.items():
        width = max(x.shape[1] for x in values)
        log[key] = torch.stack([F.pad(x, (0, width - x.shape[1])) for x in values])
    log |= {key: torch.tensor(sizes) for key, sizes in dims.items()}
    return log | {key: log[key][..., 0] for key in ("reward", "done")}


def split_log(log: dict, share: float) -> tuple[dict, dict, str]:
    """Split a log into rows to train on and rows of held-out episodes; also describe it.

    An episode ends where `done` is 1 for all agents, or the next row does not observe next_obs.
    Which ones are held out depends on their number alone: the same for all seeds and settings.
    """
    follows = (log["next_obs"][:, :-1] == log["obs"][:, 1:]).all(dim=(0, 2))
    starts = F.pad(~follows | (log["done"][:, :-1] == 1).all(dim=0), (1, 0))  # (T,)
    episode, lengths = starts.cumsum(dim=0).unique(return_inverse=True, return_counts=True)[1:]
    K, held_out = len(lengths), round(share * len(lengths))
    if not 0 < held_out < K:
        parts = f"--held-out {share} of {K} episodes is {held_out}"
        raise SystemExit(f"error: {parts}; one at least has to be held out, and one trained on")
    chosen = torch.randperm(K, generator=torch.Generator().manual_seed(0))[:held_out]
    is_out = torch.isin(episode, chosen)
    parts = [log | {key: log[key][:, rows] for key in FILES} for rows in (~is_out, is_out)]
    text = f"{K} episodes of {lengths.min()} to {lengths.max()} steps, {held_out} held out"
    return *parts, text


def stack_seeds(parts: Sequence[dict], device) -> dict:
    """The data of several seeds as those of one large team."""
    if len({(part["obs"].shape, part["action"].shape) for part in parts}) > 1:
        raise SystemExit("error: the seeds' logs differ in shape or episodes; train them singly")
    return {key: torch.cat([part[key] for part in parts]).to(device) for key in parts[0]}


# endregion logs
@torch.no_grad()
def evaluate_held_out(nets, data: dict, variance: Tensor, args: Args) -> list[dict]:
    """Figures of every seed's team on normalised held-out rows, by policy, critic, target critic.

    held_out_action_distance: squared distance of the policy's actions to the recorded ones, over
    the `variance` (N, 1, action_dim) of recorded ones, mean over components and agents; 0 for a
    copy, 2 for another action of the log, drawn at random. held_out_mean_flow, held_out_td_error:
    losses/mean_flow and losses/critic, of one seed. held_out_q_gain: how far Q of the policy's
    actions is above Q of the recorded ones, over the mean |Q| of these; mean over agents. The
    random numbers are always the same, and training's random state is left as it was.
    """
    figures, num_agents = [], len(variance) // args.num_seeds
    for first in range(0, len(variance), num_agents):
        # One seed's part of everything; agents are the third dimension from the end
        policy, *critics = map(deepcopy, nets)
        for net in (policy, *critics):
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.data = tensor.data.narrow(-3, first, num_agents)
        batch = {key: x[first : first + num_agents] for key, x in data.items()}
        obs, action = batch["obs"], batch["action"]
        with torch.random.fork_rng([action.device] if action.is_cuda else []):
            torch.manual_seed(0)
            td_error, data_q = critic_loss(*critics, policy, batch, args.gamma)
            shape = (*action.shape[:-1], 1)
            r, t = sample_times(shape, args.time_alpha, args.time_beta, args.flow_ratio, obs.device)
            noise = torch.randn_like(action)
            flow = mean_flow_loss(policy, obs, action, noise, r, t, args.delta, args.derivative)
            sampled = policy.act(obs)
        gain = (critics[0](obs, sampled) - data_q).mean(dim=(0, 2))  # (2, N, T) -> (N,)
        gain = gain / data_q.abs().mean(dim=(0, 2)).clamp(min=1e-6)
        distance = (sampled - action).square().mean(dim=1) / variance[first : first + num_agents, 0]
        distance = distance[distance.isfinite()]  # without padding and what never changes
        row = {"action_distance": distance.mean(), "mean_flow": flow, "td_error": td_error}
        row |= {"q_gain": gain.mean()}
        figures.append({f"held_out_{key}": value.item() for key, value in row.items()})
    return figures


def describe(figures: dict) -> str:
    """The held-out figures in words."""
    return (
        f"action distance {figures['held_out_action_distance']:.3f} of the variance, mean-flow "
        f"loss {figures['held_out_mean_flow']:.3f}, TD error {figures['held_out_td_error']:.3g}, "
        f"Q gain {figures['held_out_q_gain']:+.3f}"
    )


def compiled(update: Callable, on_gpu: bool) -> Iterator[dict[str, Tensor]]:
    """Make updates and yield their losses; on a GPU as one CUDA graph from the 4th one on."""
    with fail_as("--compile does not work here, --no-compile does"):
        update = torch.compile(update, options={"fallback_random": True})
        for _ in range(3):  # compiles, and allocates what stays
            yield update()
        if on_gpu:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                losses = update()
    while True:
        if on_gpu:
            graph.replay()
        yield losses if on_gpu else update()


def train(args: Args) -> tuple[Team, list[dict]]:
    """Train, and write a run directory; return the team and each seed's last row of metrics.csv."""
    for name in ("num_seeds", "num_updates", "batch_size", "eval_interval"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} must be 1 or more")
    with fail_as(f"--device {args.device} cannot be used"):
        device = torch.zeros(1, device=args.device).device
    if on_gpu := device.type == "cuda":  # a CUDA graph cannot be recorded on the default stream
        torch.cuda.set_stream(torch.cuda.Stream(device))
    torch.manual_seed(args.seed)
    seeds = range(args.seed, args.seed + args.num_seeds)
    default = Path(args.data_dir, args.task, args.quality)
    folders = [Path(args.data or default / f"seed_{seed}_data").expanduser() for seed in seeds]
    logs = {folder: split_log(load_log(folder), args.held_out) for folder in dict.fromkeys(folders)}
    dataset, held_out = (stack_seeds([logs[x][k] for x in folders], device) for k in (0, 1))
    num_agents, length, obs_dim = dataset["obs"].shape  # agents of all seeds, one large team
    if length < args.batch_size:
        raise SystemExit(f"error: --batch-size is more than the {length} transitions to train on")
    agents = torch.arange(num_agents, device=device)[:, None]
    sizes = num_agents, obs_dim, dataset["action"].shape[-1], args.hidden_dims
    team = Team(*sizes).to(device)
    team.fit(dataset)
    dataset, held_out = team.normalize(dataset), team.normalize(held_out)
    variance, policy = dataset["action"].var(dim=1, keepdim=True), team.policy
    # region update_om2p
    # Rewards of unit variance: critics need not grow to outputs in the hundreds first
    std, mean = torch.std_mean(dataset["reward"], dim=1, keepdim=True)
    dataset["reward"] /= std.maximum(mean.abs() / 100).clamp(min=1e-6)  # they may be constant
    critic = Critic(*sizes).to(device)
    target_critic = deepcopy(critic).requires_grad_(False)
    step_size = torch.tensor(args.learning_rate, device=device)  # a CUDA graph can follow it
    fast = {"fused": True, "capturable": True}
    policy_optimizer = torch.optim.Adam(policy.parameters(), step_size, **fast)
    critic_optimizer = torch.optim.Adam(critic.parameters(), step_size.clone(), **fast)
    policy_schedule = torch.optim.lr_scheduler.LinearLR(policy_optimizer, 1, 0, args.num_updates)

    def update() -> dict[str, Tensor]:
        # A batch: the same transitions for all agents of a seed
        index = torch.randint(length, (args.num_seeds, args.batch_size), device=device)
        index = index.repeat_interleave(num_agents // args.num_seeds, dim=0)  # (S, B) -> (N, B)
        batch = {key: values[agents, index] for key, values in dataset.items()}

        # Critic: one step towards the TD target, and recorded actions above uniform ones (CQL)
        critic.requires_grad_(True)
        loss, q = critic_loss(critic, target_critic, policy, batch, args.gamma)
        other = policy.mask * (2 * torch.rand_like(batch["action"]) - 1)
        loss += args.cql_alpha * F.softplus(critic(batch["obs"], other) - q).mean(dim=-1).sum()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        losses = {"critic": loss.detach(), "data_q": q.detach().mean()}

        # Policy: like the data, and up the critic, whose own gradient is not needed
        critic.requires_grad_(False)
        loss, logs = policy_loss(policy, critic, batch, args)
        policy_optimizer.zero_grad()
        loss.backward()
        policy_optimizer.step()

        # Target critic: neither it nor the critic requires gradients here
        torch._foreach_lerp_([*target_critic.parameters()], [*critic.parameters()], args.tau)
        return losses | {"policy": loss.detach(), **logs}

    parts = [policy, critic, target_critic, policy_optimizer, critic_optimizer, policy_schedule]
    # endregion update_om2p
    # The rewards' scale is the training episodes', too
    held_out["reward"] /= std.maximum(mean.abs() / 100).clamp(min=1e-6)
    held_out = {key: x[:, :: -(-x.shape[1] // HELD_OUT_ROWS)] for key, x in held_out.items()}

    # The run directory; without --resume an older one is moved aside
    script, source = Path(__file__), Path(__file__).read_bytes()
    folder = Path(args.run_dir, f"{args.task}-{args.quality}").expanduser()
    folder /= f"{script.stem}-{args.name}" if args.name else script.stem
    run_dir = folder / "-".join(["seed", *map(str, sorted({seeds[0], seeds[-1]}))])
    checkpoint, step, seconds, history = run_dir / "checkpoint.pt", 0, 0.0, []
    free = ("data", "data_dir", "run_dir", "device", "compile", "resume")  # may be others later
    settings = {key: str(value) for key, value in asdict(args).items() if key not in free}
    rngs = [torch, torch.cuda] if on_gpu else [torch]
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if changed := [key for key in settings if settings[key] != saved["settings"].get(key)]:
            raise SystemExit(f"error: {run_dir} was started with another {changed[0]}; use that")
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        for rng, state in zip(rngs, saved["rngs"], strict=False):
            rng.set_rng_state(state.cpu())
        step, seconds, history = saved["step"], saved["seconds"], saved["history"]
    elif run_dir.exists():
        run_dir.rename(folder / f"old-{run_dir.name}-{time.time_ns()}")
    with fail_as(f"{run_dir} cannot be written"):
        writer = SummaryWriter(run_dir, purge_step=step + 1)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))
        (run_dir / script.name).write_bytes(source)
    for log_folder, (*_, text) in logs.items():
        print(f"{str(log_folder)!a}: {num_agents // len(seeds)} agents, {text}")

    updates = compiled(update, on_gpu) if args.compile else iter(update, None)
    start, total = time.perf_counter() - seconds, args.num_updates
    bar = tqdm(range(step + 1, total + 1), unit="update", disable=not sys.stderr or None)
    for step, losses in zip(bar, updates, strict=False):
        policy_schedule.step()
        evaluating = step % args.eval_interval == 0 or step == total
        if step % 100 and not evaluating:
            continue
        losses = {key: value.item() for key, value in losses.items()}
        for key, value in losses.items():
            writer.add_scalar(f"losses/{key}", value, step)
        figures = evaluate_held_out(parts[:3], held_out, variance, args) if evaluating else []
        numbers = [*losses.values(), *(value for row in figures for value in row.values())]
        if not np.abs(numbers).max() < 1e8:
            raise SystemExit(f"error: diverged at update {step}; use a lower --learning-rate")
        if not evaluating:
            continue
        seconds = time.perf_counter() - start
        means = {key: np.mean([row[key] for row in figures]).item() for key in figures[0]}
        for key, value in means.items():
            writer.add_scalar(f"charts/{key}", value, step)
        writer.add_scalar("charts/updates_per_second", step / seconds, step)
        bar.clear()
        print(f"update {step:>7,}  held out: {describe(means)}")
        for seed, row in zip(seeds, figures, strict=True):
            history.append({"step": step} | row | {"seconds": seconds, "seed": seed} | losses)
        lines = [history[0].keys(), *(row.values() for row in history)]
        (run_dir / "metrics.csv").write_text("".join(f"{','.join(map(str, x))}\n" for x in lines))
        saved = {"step": step, "seconds": seconds, "history": history, "settings": settings}
        saved |= {"parts": [part.state_dict() for part in parts]}
        saved |= {"rngs": [r.get_rng_state() for r in rngs]}
        torch.save(saved, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)  # at no moment is it half written
    writer.close()

    torch.save(team.cpu().state_dict(), run_dir / "policy.pt")
    for row in (final := history[-len(seeds) :]):
        print(
            f"{str(run_dir)!a}, seed {row['seed']}: held out, {describe(row)}, "
            f"{seconds / 60:.1f} minutes"
        )
    return team, final


if __name__ == "__main__":
    train(tyro.cli(Args))

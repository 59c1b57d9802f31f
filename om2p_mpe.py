"""OM2P on the Multi-Agent Particle Environments: simple_spread, simple_tag, simple_world.

OM2P (Li et al., AAMAS 2026, arxiv.org/abs/2508.06269) trains a team of agents from recorded data.
Every agent has a mean-flow policy (Geng et al., 2025, arxiv.org/abs/2505.13447), a network that
turns noise into an action in one step. It learns to act as the data do, and is pulled towards
actions that its critic values.

    noise, action      e ~ N(0, I) and an action of the data; flow time 0 and flow time 1
    x_t                (1 - t) noise + t action, a point on the straight path between them
    v                  action - noise, the velocity on that path
    u(x_r, r, t)       mean velocity over the interval [r, t], predicted at its start x_r
    noise + u(noise, 0, 1)                            the action: one step along the whole path
    u = v + (t - r) du/dr                             what makes u a mean velocity: the target
    L = L_meanflow - q_weight E[Q(o, a_pi)] / |Q|     the policy's loss, a_pi the one-step action

Agents are stacked along the first dimension of every tensor and every parameter, and learn
independently. In shapes: N agents, B batch, E critics, K episodes, S seeds, T transitions; where
several seeds are trained at once, N counts the agents of all.

    python om2p_mpe.py --task simple_spread --quality expert --seed 0
    tensorboard --logdir runs
"""

# region imports
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import LinearLR
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# endregion imports


@dataclass
class Args:
    # region args
    # Experiment
    seed: int = 0
    """seed of networks, batches and evaluation episodes; also names the dataset, seed_<n>_data"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the networks and the whole dataset live: cpu, cuda, cuda:1"""
    run_dir: Path = Path("runs")
    """outputs go to <run-dir>/<task>-<quality>/<script>/seed-<n>/"""
    resume: bool = False
    """go on from the run's checkpoint, or start if it has none"""
    num_seeds: int = 1
    """train so many seeds at once, from --seed up, each on its own data; meant for GPUs"""
    compile: bool = torch.cuda.is_available()
    """compile the update, and on a GPU replay it as a CUDA graph; default: if there is a GPU"""
    tf32: bool = False
    """multiply matrices in TF32 where the GPU can: faster, with three decimal digits"""

    # Data and evaluation
    quality: Literal[
        "expert", "medium", "medium-replay", "random", "medium-expert", "random-medium"
    ] = "expert"
    """the behaviour in the data; the last two are mixtures, 9:1"""
    data_dir: Path = Path("data")
    """folder of the datasets, <data-dir>/<task>/<quality>/seed_<n>_data/"""
    timeout_done: bool = False
    """critics take an episode's last step as terminal; in the public MPE data `done` is always 0"""
    # endregion args
    # region args_mpe
    task: Literal["simple_spread", "simple_tag", "simple_world"] = "simple_spread"
    """the task"""
    eval_interval: int = 500
    """updates between evaluations, each with a checkpoint, 1 or more"""
    eval_episodes: int = 100
    """episodes per evaluation, always from the same initial states, 1 or more"""
    # endregion args_mpe

    # OM2P
    # region args_training
    num_updates: int = 4_000
    """gradient steps, 1 or more"""
    batch_size: int = 128
    """transitions of every agent in an update, 1 or more"""
    hidden_dims: tuple[int, ...] = (128, 128)
    """widths of the networks' hidden layers"""
    learning_rate: float = 5e-3
    """Adam's step size, 0 or more; the policy's goes down to 0 over the run, linearly"""
    # endregion args_training
    # region args_critic
    gamma: float = 0.95
    """discount factor, 0 to 1"""
    tau: float = 0.005
    """update rate of target networks, 0 to 1"""
    # endregion args_critic
    q_weight: float = 8.0
    """weight of the Q term against mean-flow matching, 0 or more; 0 is behaviour cloning"""
    flow_ratio: float = 0.5
    """share of the batch with t = r, which is plain flow matching, 0 to 1"""
    # region args_om2p
    time_alpha: float = 0.3
    """Beta distribution of the interval's ends, first shape, > 0; (1, 1) is uniform"""
    time_beta: float = 1.0
    """second shape, > 0; (1 / q, 1) is U^q, with mass at (0, 1) for q > 1, (2, 2) bell-shaped"""
    derivative: Literal["finite-difference", "jvp"] = "finite-difference"
    """du/dr by a difference quotient, OM2P's derivative-free way, or exact by torch.func.jvp"""
    delta: float = 0.1
    """step of the difference quotient, 1e-6 to 0.5; below 1e-4 it drowns in float32's rounding"""
    # endregion args_om2p


# region networks
class StackedLinear(nn.Module):
    """A linear layer for each entry of `stack`, (N,) agents or (E, N) critics and agents.

    (*stack, B, in_dim) -> (*stack, B, out_dim); leading dimensions that the input lacks broadcast.
    Initialised as nn.Linear is.
    """

    def __init__(self, stack: tuple[int, ...], in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(*stack, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def mlp(
    stack: tuple[int, ...], in_dim: int, hidden_dims: Sequence[int], out_dim: int, layer_norm=False
) -> nn.Sequential:
    """Stacked linear layers with GELU between them, and layer norm after each GELU if asked for.

    The norm has no scale and shift of its own: the linear layer behind it has them already, and a
    shared one would couple the agents.
    """
    layers = []
    for width in hidden_dims:
        layers += [StackedLinear(stack, in_dim, width), nn.GELU()]
        layers += [nn.LayerNorm(width, elementwise_affine=False)] if layer_norm else []
        in_dim = width
    return nn.Sequential(*layers, StackedLinear(stack, in_dim, out_dim))


def squared_error(
    x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """|| x - y ||^2 of actions (N, B, action_dim): mean over batch and components, sum over agents.

    Components that only pad an agent's action, in teams whose agents have different numbers of
    them, count for nothing: they are 0 in the mask (action_dim,) or (N, 1, action_dim), others 1.
    """
    error = F.mse_loss(x, y, reduction="none").mean(dim=-2, keepdim=True)  # (N, 1, action_dim)
    mask = torch.ones_like(error) if mask is None else mask
    return ((mask * error).sum(dim=-1) / mask.sum(dim=-1)).sum()


class Critic(nn.Module):
    """Q_i(o_i, a_i) of every agent, twice: (N, B, obs_dim), (N, B, action_dim) -> (2, N, B).

    Components of actions that are padding, 0 in `mask` as in `squared_error`, are not looked at.
    """

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims):
        super().__init__()
        self.net = mlp((2, num_agents), obs_dim + action_dim, hidden_dims, 1, layer_norm=True)
        self.register_buffer("mask", torch.ones(action_dim), persistent=False)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([obs, self.mask * action], dim=-1)).squeeze(-1)


# endregion networks


# region td
def critic_loss(
    critic: nn.Module,
    target_critic: nn.Module,
    policy: nn.Module,
    batch: dict,
    gamma: float,
    aggregate: Callable = torch.mean,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Temporal-difference loss, sum over critics and agents, mean over the batch; and Q (2, N, B).

    y = reward + gamma (1 - done) mean_k Q'_k(o', a_pi(o')), without gradient; aggregate=torch.amin
    takes the smaller critic's value (TD3). The batch holds obs, next_obs (N, B, obs_dim), action
    (N, B, action_dim), reward and done (N, B).
    """
    with torch.no_grad():
        next_q = target_critic(batch["next_obs"], policy.act(batch["next_obs"]))
        target = batch["reward"] + gamma * (1 - batch["done"]) * aggregate(next_q, dim=0)
    q = critic(batch["obs"], batch["action"])
    return F.mse_loss(q, target.expand_as(q), reduction="none").mean(dim=-1).sum(), q


# endregion td


# region om2p
class MeanFlowPolicy(nn.Module):
    """The mean velocity u(x_r, r, t | o) of every agent's flow, and one-step actions with it.

    As in Geng et al. (2025), but with noise at time 0, data at 1, and u taken at the start r.
    """

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims):
        super().__init__()
        self.action_dim = action_dim
        self.net = mlp((num_agents,), obs_dim + action_dim + 2, hidden_dims, action_dim)
        self.register_buffer("mask", torch.ones(action_dim), persistent=False)

    def forward(
        self, obs: torch.Tensor, x: torch.Tensor, r: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """(N, B, obs_dim), (N, B, action_dim), (N, B, 1), (N, B, 1) -> u (N, B, action_dim)."""
        return self.net(torch.cat([obs, self.mask * x, r, t], dim=-1))

    def act(self, obs: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """noise + u(noise, 0, 1), clipped to [-1, 1]: (N, B, obs_dim) -> (N, B, action_dim)."""
        if noise is None:
            noise = torch.randn(*obs.shape[:-1], self.action_dim, device=obs.device)
        r, t = torch.zeros_like(noise[..., :1]), torch.ones_like(noise[..., :1])
        return (noise + self(obs, noise, r, t)).clamp(-1, 1)


def sample_times(
    shape: tuple[int, ...], alpha: float, beta: float, flow_ratio: float, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw 0 <= r <= t <= 1, each of `shape`: OM2P's generalised timestep distribution.

    r ~ Beta(alpha, beta), t ~ 1 - Beta(alpha, beta), sorted; t = r for a share `flow_ratio`.
    """
    alpha, beta = (torch.full((), float(value), device=device) for value in (alpha, beta))
    draws = torch.distributions.Beta(alpha, beta, validate_args=False).sample((2, *shape))
    r, t = torch.minimum(draws[0], 1 - draws[1]), torch.maximum(draws[0], 1 - draws[1])
    return r, torch.where(torch.rand(shape, device=device) < flow_ratio, r, t)


def mean_flow_loss(
    policy: nn.Module,
    obs: torch.Tensor,
    action: torch.Tensor,
    noise: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor,
    delta: float = 0.1,
    derivative: str = "finite-difference",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean-flow matching, || u(x_r, r, t) - sg[v + (t - r) du/dr] ||^2 (Geng et al., 2025).

    The derivative runs along the path: r moves at speed 1 and x with it at v, while t stands still.
    OM2P's derivative-free estimate is the difference of u and u', its value a step delta further,
    over delta. With T = t - r, u then has to be (delta v + T u') / (delta + T), and an error of u
    alone is pulled back 1 + T / delta times as hard. Shapes as in `forward`, mean and mask as in
    `squared_error`.
    """
    x, v = (1 - r) * noise + r * action, action - noise
    u = policy(obs, x, r, t)
    with torch.no_grad():
        if derivative == "jvp":
            tangents = (v, torch.ones_like(r), torch.zeros_like(t))
            _, du_dr = torch.func.jvp(lambda *x_r_t: policy(obs, *x_r_t), (x, r, t), tangents)
        else:
            du_dr = (policy(obs, x + delta * v, r + delta, t) - u) / delta
        target = v + (t - r) * du_dr
    return squared_error(u, target, mask)


def policy_loss(
    policy: nn.Module, critic: nn.Module, batch: dict, args: Args
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """OM2P's objective, L_meanflow - q_weight E[Q(o, a_pi)] / sg(E|Q|), sum over agents.

    The batch is `critic_loss`'s. Also returns L_meanflow and the mean Q of a_pi, for the log.
    """
    obs, action = batch["obs"], batch["action"]
    r, t = sample_times(
        (*action.shape[:-1], 1), args.time_alpha, args.time_beta, args.flow_ratio, action.device
    )
    noise = torch.randn_like(action)
    settings = args.delta, args.derivative, policy.mask
    flow = mean_flow_loss(policy, obs, action, noise, r, t, *settings)
    q = critic(obs, policy.act(obs)).mean(dim=0)  # (2, N, B) -> (N, B)
    q_term = (q.mean(dim=-1) / q.abs().mean(dim=-1).detach()).sum()
    loss = flow - args.q_weight * q_term
    return loss, {"mean_flow": flow.detach(), "policy_q": q.detach().mean()}


# endregion om2p


# region stop
def stop(message: str, problem: Exception | None = None) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    reason = "" if problem is None else f": {str(problem) or type(problem).__name__}"
    raise SystemExit(f"error: {message}{reason}".splitlines()[0])


# endregion stop


# region ranges
RANGES = {  # of the settings, ends included; a script adds its own
    "seed": (0, 2**31),
    "num_seeds": (1, 1_000),
    "eval_interval": (1, math.inf),
    "eval_episodes": (1, 1_000_000),
    "num_updates": (1, math.inf),
    "batch_size": (1, math.inf),
    "hidden_dims": (1, 20_000),
    "learning_rate": (0, math.inf),
}
# endregion ranges

RANGES |= {"gamma": (0, 1), "tau": (0, 1), "q_weight": (0, math.inf), "flow_ratio": (0, 1)}
RANGES |= {"time_alpha": (1e-3, 1e3), "time_beta": (1e-3, 1e3), "delta": (1e-6, 0.5)}


# region dataset
FILES = {"obs": "obs", "action": "acs", "reward": "rews", "next_obs": "next_obs", "done": "dones"}
MIXTURES = {  # the first 90 % of one dataset, then the first 10 % of the other; OM2P's release
    "medium-expert": (("medium", 0.9), ("expert", 0.1)),
    "random-medium": (("random", 0.9), ("medium", 0.1)),
}


def make_dataset(data_dir: Path, task: str, quality: str, seed: int, collector: str) -> None:
    """Have the repository's collector make a dataset that is missing, or say how to get it."""
    missing = f"there are no {task} {quality} data, seed {seed}, in {data_dir}"
    options = ["--task", task, "--quality", quality, "--seed", str(seed)]
    here = Path(__file__).resolve().parent
    for path in (here / "data" / collector, here.parent / "data" / collector):
        if path.is_file():
            print(f"{missing}; making them")
            words = [sys.executable, path, *options, "--data-dir", data_dir]
            try:
                failed = subprocess.run(words).returncode
            except KeyboardInterrupt:
                stop("stopped before the data were there")
            if failed and not (data_dir / task / quality / f"seed_{seed}_data").is_dir():
                stop(f"data/{collector} could not make the {quality} data")
            return  # made here, or by another process in the meantime
    stop(
        f"{missing}: make them by `python data/{collector} {' '.join(options)}` or get the public "
        f"ones by `bash data/download.sh {task} {quality} {seed}`"
    )


def read_array(path: Path, length: int | None, width: int | None) -> np.ndarray:
    """Map one .npy file and check it: (length, width); without width (length,) or (length, 1)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise ValueError("it is not an array of numbers")
    except Exception as problem:
        stop(f"{path} cannot be read", problem)
    if width is None and array.shape[1:] == (1,):
        array = array[:, 0]
    expected = (array.shape[0] if length is None and array.ndim else length,)  # free at first
    expected += () if width is None else (width,)
    if array.shape != expected:
        stop(f"{path} has shape {array.shape}; expected {expected}")
    return array


def load_dataset(data_dir: Path, task: str, quality: str, seed: int, env, device="cpu") -> dict:
    """Read OMAR's {obs,acs,rews,next_obs,dones}_{i}.npy, one of each for every agent.

    Returns float32 tensors on `device`: obs, next_obs (N, T, obs_dim), action (N, T, action_dim),
    reward, done (N, T); agents of smaller dimensions are padded with zeros. Ends the program with a
    line that names the file if one is missing, unreadable, misshapen, or holds NaN or infinities.
    """
    widths = {"obs": env.obs_dims, "next_obs": env.obs_dims, "action": env.action_dims}
    folders, sizes = [], []  # a mixture has two, of which it takes the first rows
    for part, share in MIXTURES.get(quality, ((quality, 1.0),)):
        folders.append(Path(data_dir) / task / part / f"seed_{seed}_data")
        if not folders[-1].is_dir():
            make_dataset(data_dir, task, part, seed, env.collector)
        if (folders[-1] / f"obs_{env.num_agents}.npy").exists():
            stop(f"{folders[-1]} holds more than the {env.num_agents} agents of {task}")
        length = len(read_array(folders[-1] / "obs_0.npy", None, env.obs_dims[0]))
        sizes.append((length, round(share * length)))
    shape = env.num_agents, sum(size for _, size in sizes)
    dataset = {
        key: torch.zeros(*shape, max(widths[key])) if key in widths else torch.zeros(shape)
        for key in FILES
    }
    for i, (key, name) in product(range(env.num_agents), FILES.items()):
        column, width = dataset[key][i], widths[key][i] if key in widths else None
        for folder, (length, size) in zip(folders, sizes, strict=True):
            path = folder / f"{name}_{i}.npy"
            values = column[:size] if width is None else column[:size, :width]
            column = column[size:]
            for first in range(0, size, 20_000):  # in pieces, each with a map of its own: no
                piece = values[first : first + 20_000]  # more of the file stays in memory
                rows = read_array(path, length, width)[first : first + 20_000]
                with np.errstate(over="ignore"):  # to infinity, which is refused
                    piece.copy_(torch.from_numpy(rows[: len(piece)].astype(np.float32)))
                if not piece.isfinite().all():
                    stop(f"{path} holds NaN or infinite values")
                if key == "action" and (piece.abs() > 1.001).any():
                    stop(f"{path} holds actions outside [-1, 1]")
                if key == "done" and ((piece < 0) | (piece > 1)).any():
                    stop(f"{path} holds numbers outside [0, 1]")
    return {key: values.to(device) for key, values in dataset.items()}


def sample(dataset: dict, batch_size: int, num_seeds: int = 1) -> dict:
    """Draw B transitions, the same ones for all agents of a seed: (N, T, ...) -> (N, B, ...)."""
    (num_agents, num_transitions), device = dataset["obs"].shape[:2], dataset["obs"].device
    index = torch.randint(num_transitions, (num_seeds, batch_size), device=device)
    index = index.repeat_interleave(num_agents // num_seeds, dim=0)  # (N, B)
    agents = torch.arange(num_agents, device=device)[:, None]
    return {key: values[agents, index] for key, values in dataset.items()}


# endregion dataset


# region mpe
LEARNERS = 3  # three agents are trained in every task; in tag and world a fourth is the prey
SOLID, FOOD, FOREST = 0.2, 0.03, 0.3  # radii of the landmarks in tag and world
LANDMARK_SIZES = {
    "simple_spread": (0.05, 0.05, 0.05),  # the targets, which nobody bumps into
    "simple_tag": (SOLID, SOLID),
    "simple_world": (SOLID, FOOD, FOOD, FOREST, FOREST),
}
PUBLIC_RETURNS = {  # mean returns of the public data, five seeds; OMAR (ICML 2022)
    "simple_spread": {"expert": 516.8, "medium": 259.9, "medium-replay": 194.2, "random": 159.8},
    "simple_tag": {"expert": 185.6, "medium": 88.7, "medium-replay": 14.2, "random": -4.1},
    "simple_world": {"expert": 79.5, "medium": 43.3, "medium-replay": 3.5, "random": -6.8},
}


def normalized_score(task: str, returns):
    """Score on the field's scale: 0 for the public random data, 100 for its expert data."""
    low, high = PUBLIC_RETURNS[task]["random"], PUBLIC_RETURNS[task]["expert"]
    return 100 * (returns - low) / (high - low)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distances between two sets of points, (K, A, 2) and (K, B, 2) -> (K, A, B)."""
    delta = a[:, :, None] - b[:, None]
    return np.sqrt(np.einsum("kabd,kabd->kab", delta, delta))


class MPE:
    """The Multi-Agent Particle Environments of OMAR's fork, K episodes at once.

    Three agents learn: in simple_spread they cover three targets, in simple_tag and simple_world
    they hunt a faster prey that `prey_policy(obs (1, K, D)) -> (1, K, 2)` steers. An action is a
    2-D force in [-1, 1]; a step lasts 0.1, an episode 25 steps. The state: `pos`, `vel` (K, A, 2),
    the prey last, and `landmarks` (K, L, 2): targets, or obstacles, food and forests in this order.

    Source: github.com/ling-pan/OMAR, multiagent-particle-envs. Its rewards, its forces (9 and 16
    times the action for hunters and prey) and its order (velocity first, then position) differ from
    PettingZoo's mpe2, so returns of the two cannot be compared.
    """

    horizon, dt, damping, stiffness, softness = 25, 0.1, 0.25, 100.0, 1e-3
    num_agents, action_dims, collector = LEARNERS, (2,) * LEARNERS, "collect_mpe.py"

    def __init__(self, task: str, num_episodes: int, seed=0, prey_policy=None):
        self.task, self.num_episodes, self.prey_policy = task, num_episodes, prey_policy
        self.rng = np.random.default_rng(seed)
        self.landmark_size = np.array(LANDMARK_SIZES[task])
        if task == "simple_spread":
            self.size, self.gain, self.max_speed = np.full((3, LEARNERS), [[0.15], [5.0], [np.inf]])
        else:
            prey_size = 0.05 if task == "simple_tag" else 0.045
            self.size = np.array([0.075] * LEARNERS + [prey_size])
            self.gain = np.array([9.0] * LEARNERS + [16.0])
            self.max_speed = np.array([1.0] * LEARNERS + [1.3])
        solid = self.landmark_size == SOLID
        self.body_size = np.concatenate([self.size, self.landmark_size[solid]])
        self.solid = np.flatnonzero(solid)
        self.forest = np.flatnonzero(self.landmark_size == FOREST)
        self.obs_dims = (self.reset().shape[-1],) * LEARNERS

    def reset(self, seed: int | Sequence[int] | None = None) -> np.ndarray:
        """Place everything uniformly at random, at rest; `seed` restarts the random numbers.

        Returns the learners' observations (N, K, obs_dim), float32.
        """
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        K, bound = self.num_episodes, 1.0 if self.task == "simple_spread" else 0.9
        self.pos = self.rng.uniform(-1, 1, (K, len(self.size), 2))
        self.vel = np.zeros_like(self.pos)
        self.landmarks = self.rng.uniform(-bound, bound, (K, len(self.landmark_size), 2))
        return self.observe(range(LEARNERS))

    def observe(self, agents) -> np.ndarray:
        """Observations of the agents with these indices, (len(agents), K, obs_dim), float32.

        Own velocity and position; landmarks, then the other agents, relative to oneself; in
        simple_spread four zeros (a silent channel); for hunters the prey's velocity; in
        simple_world +1 or -1 for each forest: inside or not.
        """
        K, everything = self.num_episodes, []
        for i in agents:
            own = self.pos[:, i, None]
            others = [j for j in range(len(self.size)) if j != i]
            parts = [self.vel[:, i], own, self.landmarks - own, self.pos[:, others] - own]
            if self.task == "simple_spread":
                parts += [np.zeros((K, 4))]
            elif i < LEARNERS:
                parts += [self.vel[:, LEARNERS]]
            if len(self.forest):
                depth = self.size[i] + FOREST - distance(own, self.landmarks[:, self.forest])
                parts += [np.where(depth > 0, 1.0, -1.0)]
            everything.append(np.concatenate([part.reshape(K, -1) for part in parts], axis=-1))
        return np.stack(everything).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance one step under `action` (N, K, 2); (A, K, 2) where no policy steers the prey.

        Returns the next observations (N, K, obs_dim) and each learner's reward (N, K).
        """
        if self.prey_policy is not None:
            action = np.concatenate([action, self.prey_policy(self.observe([LEARNERS]))])
        force = action.transpose(1, 0, 2) * self.gain[:, None] + self.contact_force()
        self.vel = self.vel * (1 - self.damping) + force * self.dt
        speed = np.sqrt((self.vel**2).sum(axis=-1, keepdims=True))
        limit = self.max_speed[:, None]
        self.vel = self.vel * np.minimum(1, limit / np.maximum(speed, 1e-12))
        self.pos = self.pos + self.vel * self.dt
        return self.observe(range(LEARNERS)), self.reward()

    def contact_force(self) -> np.ndarray:
        """Soft repulsion of overlapping bodies, (K, A, 2): a softplus of the overlap, times 100."""
        bodies = np.concatenate([self.pos, self.landmarks[:, self.solid]], axis=1)
        dist = distance(self.pos, bodies)
        overlap = (self.size[:, None] + self.body_size - dist) / self.softness
        push = self.stiffness * self.softness * np.logaddexp(0, overlap)
        push = np.divide(push, dist, out=np.zeros_like(dist), where=dist > 0)  # not on oneself
        return np.einsum("kab,kabd->kad", push, self.pos[:, :, None] - bodies[:, None])

    def reward(self) -> np.ndarray:
        """Rewards (N, K): closeness to the targets less collisions, or contacts with the prey."""
        team = self.pos[:, :LEARNERS]
        if self.task == "simple_spread":
            nearest = distance(team, self.landmarks).min(axis=1)  # (K, L), over the agents
            covered = np.minimum(1 / np.maximum(nearest, 1e-12), 10).sum(axis=-1)
            bumps = (distance(team, team) < 2 * self.size[0]).sum(axis=-1) - 1
            return covered - 5.0 * bumps.T
        gap = distance(team, self.pos[:, LEARNERS:])[..., 0]
        caught = (gap < self.size[0] + self.size[LEARNERS]).sum(axis=-1)
        shared = (10 if self.task == "simple_tag" else 5) * caught - 0.1 * gap.sum(axis=-1)
        return np.tile(shared, (LEARNERS, 1))


def find_prey(task: str, data_dir: Path):
    """The prey in data_dir/task, a function (1, K, obs_dim) -> (1, K, 2); None for simple_spread.

    OMAR's `pretrained_adv_model.pt` if it is there, its batch norm folded into the first layer;
    else this project's fit of it, `prey.npz`. Both are ReLU networks with a tanh at the end.
    """
    if task == "simple_spread":
        return None
    paths = [data_dir / task / name for name in ("pretrained_adv_model.pt", "prey.npz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        stop(
            f"{data_dir / task} holds no prey, which {task} needs: "
            f"run `python data/{MPE.collector} --task {task}` or `bash data/download.sh {task}`"
        )
    return load_prey(path, MPE(task, 1).observe([LEARNERS]).shape[-1])


def load_prey(path: Path, obs_dim: int):
    """One prey file as `find_prey` returns it; see there."""
    try:
        if path.suffix == ".pt":
            agents = torch.load(path, map_location="cpu", weights_only=True)["agent_params"]
            net = {key: value.double().numpy() for key, value in agents[-1]["policy"].items()}
            layers = [(net[f"fc{k}.weight"].T, net[f"fc{k}.bias"]) for k in (1, 2, 3)]
            scale = net["in_fn.weight"] / np.sqrt(net["in_fn.running_var"] + 1e-5)
            shift = net["in_fn.bias"] - net["in_fn.running_mean"] * scale
            weight, bias = layers[0]
            layers[0] = (scale[:, None] * weight, bias + shift @ weight)
        else:
            with np.load(path, allow_pickle=False) as net:
                layers = [(net[f"weight_{k}"], net[f"bias_{k}"]) for k in range(3)]
        layers = [(weight.astype(np.float32), bias.astype(np.float32)) for weight, bias in layers]

        def prey_policy(obs: np.ndarray) -> np.ndarray:
            for weight, bias in layers[:-1]:
                obs = np.maximum(obs @ weight + bias, 0)
            weight, bias = layers[-1]
            return np.tanh(obs @ weight + bias)

        action = prey_policy(np.zeros((1, 1, obs_dim), np.float32))
        if not np.isfinite(action.reshape(1, 1, 2)).all():
            raise ValueError("its actions are not finite")
    except Exception as problem:
        stop(f"{path} cannot be used as a prey", problem)
    return prey_policy


# endregion mpe


# region evaluate
@torch.no_grad()
def evaluate(policy, envs: Sequence, seeds: Sequence[int] = (0,), device="cpu") -> np.ndarray:
    """Play K episodes for each seed; returns (S, K), sum over steps and mean over a seed's agents.

    `envs` holds one environment for each seed, the policy the agents of all. Initial states depend
    on the seeds alone and are none that a collector records, noise depends on the first seed, and
    training's random state is left as it was.
    """
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seeds[0])
        starts = [env.reset((seed, 0, 1)) for env, seed in zip(envs, seeds, strict=True)]
        obs = np.concatenate(starts)
        returns = 0.0
        for _ in range(envs[0].horizon):
            action = policy.act(torch.from_numpy(obs).to(device)).cpu().numpy()
            parts = np.split(action, len(envs))
            steps = [env.step(part) for env, part in zip(envs, parts, strict=True)]
            obs = np.concatenate([obs for obs, _ in steps])
            returns = returns + np.stack([reward.mean(axis=0) for _, reward in steps])
    return returns


# endregion evaluate


# region compile
def adam(net: nn.Module, learning_rate: float, device="cpu") -> torch.optim.Adam:
    """Adam in one fused kernel; its step size is a tensor, which a CUDA graph can follow."""
    step_size = torch.tensor(learning_rate, device=device)
    return torch.optim.Adam(net.parameters(), step_size, fused=True, capturable=True)


def compiled(update: Callable, states: dict, device: str) -> Callable:
    """The update by torch.compile; on a GPU also captured as one CUDA graph, which is replayed.

    Random numbers are those of the plain update, and so are the losses, but for rounding. If one
    of the first calls fails, in which all compiling and capturing happens, `states`, what the
    update changes, are put back as they were before it, and the plain update runs from then on.
    """
    fast = torch.compile(update, options={"fallback_random": True})
    on_gpu = device.startswith("cuda")
    stream = torch.cuda.Stream(device) if on_gpu else None
    graph, losses, calls = None, {}, 0

    def attempt() -> dict[str, torch.Tensor]:
        nonlocal graph, losses
        if on_gpu and graph is None and calls > 3:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
                losses = fast()
        if graph is not None:
            graph.replay()
            return losses
        if not on_gpu:
            return fast()
        before = torch.cuda.current_stream(device)
        stream.wait_stream(before)
        with torch.cuda.stream(stream):  # the stream of the capture, which must find all compiled
            losses = fast()
        before.wait_stream(stream)
        return losses

    def step() -> dict[str, torch.Tensor]:
        nonlocal fast, graph, calls
        calls += 1
        if fast is update:
            return update()
        if calls > 4:
            return attempt()
        saved = deepcopy({name: part.state_dict() for name, part in states.items()})
        rng, place = torch.get_rng_state(), torch.cuda.current_stream(device) if on_gpu else None
        cuda_rng = torch.cuda.get_rng_state(device) if on_gpu else None
        try:
            return attempt()
        except Exception as problem:
            cause = problem.__context__ or problem  # what a failing capture hides behind its own
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        print(f"warning: going on without --compile, which fails: {reason}", file=sys.stderr)
        fast, graph = update, None
        try:
            if on_gpu:
                torch.cuda.set_stream(place)
                torch.cuda.synchronize(device)
                torch.cuda.set_rng_state(cuda_rng, device)
            torch.set_rng_state(rng)
            for name, part in states.items():
                part.load_state_dict(saved[name])
            return update()
        except Exception as problem:  # a failed capture may leave a GPU unusable to its process
            stop("--compile has failed here: run with --no-compile", problem)

    return step


# endregion compile


# region write
FREE = {"run_dir", "data_dir", "device", "resume", "compile", "tf32"}  # may change on resuming


def write(path: Path, save: Callable, state, keep: bool = False) -> None:
    """Write a file by save(state, file); a full disk or an interrupt leaves the old one whole.

    With `keep` the file that was there before stays, as <name>-previous.<suffix>.
    """
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    save(state, buffer)
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_stem(f"{path.stem}-previous"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_table(rows: list[dict], file) -> None:
    """Write rows with the same keys as csv into a binary file."""
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    file.write("".join(f"{line}\n" for line in lines).encode())


def save_json(values: dict, file) -> None:
    """Write a dictionary as JSON into a binary file."""
    file.write(json.dumps(values, indent=2, default=str).encode())


def save_array(values: np.ndarray, file) -> None:
    """np.save with its arguments in the order that `write` has."""
    np.save(file, values)


def load_checkpoint(run_dir: Path, settings: dict[str, str], device="cpu") -> dict | None:
    """A run's newest checkpoint that is whole, its tensors on `device`; None if there is none yet.

    Ends the program if none is whole, or if the run was started with other settings.
    """
    paths = [run_dir / name for name in ("checkpoint.pt", "checkpoint-previous.pt")]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at checksums
                if archive.testzip():
                    raise ValueError("it is damaged")
            state = torch.load(path, map_location=device, weights_only=True)
            before = {key: value for key, value in state["settings"].items() if key not in FREE}
            break
        except Exception as problem:
            if path is paths[-1]:
                stop(f"{path} cannot be resumed", problem)
    else:
        return None
    for key, value in before.items():
        if value != settings.get(key):
            name = f"--{key.replace('_', '-')}"
            stop(f"{run_dir} cannot be resumed: {name} was {value}, now {settings.get(key)}")
    if path is not paths[0]:
        broken = paths[0].replace(paths[0].with_suffix(".broken"))  # not to become the previous one
        print(f"warning: {paths[0]} is broken, now {broken}; going on from {path}", file=sys.stderr)
    return state


@contextmanager
def locked(run_dirs: Sequence[Path]) -> Iterator[None]:
    """Keep a second process from training in these run directories; ends that one with a line."""
    with ExitStack() as locks:
        for run_dir in run_dirs:
            try:
                run_dir.parent.mkdir(parents=True, exist_ok=True)
                lock = FileLock(run_dir.with_name(f".{run_dir.name}.lock"), timeout=0)
                locks.enter_context(lock)
            except Timeout:
                stop(f"another process is training in {run_dir}")
            except OSError as problem:
                stop(f"{run_dir} cannot be written", problem)
        yield


def open_run(run_dir: Path, script: Path, record: dict, step: int) -> SummaryWriter:
    """Write args.json and a copy of the script; return the run's TensorBoard writer.

    What another run has left there is moved to ../old/ first. It is another's if this one does not
    resume, starts at step 0 where one has been finished, or has another group of seeds.
    """
    is_other = not record["resume"] or (step == 0 and (run_dir / "policy.pt").exists())
    with suppress(OSError, ValueError, KeyError):  # without the file it is this run's
        before = json.loads((run_dir / "args.json").read_text())
        is_other |= any(before[key] != record[key] for key in ("first_seed", "num_seeds"))
    if run_dir.exists() and is_other:
        old = run_dir.parent / "old" / f"{run_dir.name}-{time.time_ns()}"
        old.parent.mkdir(exist_ok=True)
        run_dir.rename(old)
        print(f"the previous run in {run_dir} is now {old}")
    run_dir.mkdir(exist_ok=True)
    write(run_dir / "args.json", save_json, record)
    shutil.copy(script, run_dir)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    table = "".join(f"|{key}|{value}|\n" for key, value in record.items())
    writer.add_text("settings", f"|setting|value|\n|-|-|\n{table}", step)
    return writer


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT (Ctrl-C) and SIGTERM in a list, so that training stops between two updates."""
    received, handlers = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# endregion write


def train(args: Args) -> tuple[MeanFlowPolicy, np.ndarray]:
    """Train and write a run directory for each seed; return policy and final returns (S, K)."""
    # region setup
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        values = value if isinstance(value, tuple) else (value,)
        if not all(low <= v <= high and math.isfinite(v) for v in values):
            stop(f"--{name.replace('_', '-')} is {value}; it must be from {low} to {high}")
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as problem:
        stop(f"--device {args.device} cannot be used", problem)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.manual_seed(args.seed)
    seeds = range(args.seed, args.seed + args.num_seeds)
    # endregion setup

    envs = [MPE(args.task, args.eval_episodes) for _ in seeds]
    datasets = [
        load_dataset(args.data_dir, args.task, args.quality, seed, envs[0], args.device)
        for seed in seeds
    ]
    for env in envs:
        env.prey_policy = find_prey(args.task, args.data_dir)

    # region prepare
    if len({part["obs"].shape[1] for part in datasets}) > 1:
        stop("the datasets of these seeds differ in length: train them without --num-seeds")
    dataset = datasets[0]
    if args.num_seeds > 1:  # one team of all their agents; every part's memory is freed at once
        dataset = {key: torch.cat([part.pop(key) for part in datasets]) for key in FILES}
    num_agents, num_transitions, obs_dim = dataset["obs"].shape
    action_dim = dataset["action"].shape[-1]
    if num_transitions < args.batch_size:
        stop(f"the dataset's {num_transitions} transitions are fewer than --batch-size")
    if args.timeout_done:  # an episode ends where the next row does not go on from it
        goes_on = (dataset["next_obs"][:, :-1] == dataset["obs"][:, 1:]).all(dim=-1)
        dataset["done"] = F.pad((~goes_on).float(), (0, 1), value=1.0)
        if dataset["done"].mean() > 0.5:
            stop("--timeout-done needs data in the order of time, and these are not")
    # Rewards of unit variance: critics need not grow to outputs in the hundreds first
    dataset["reward"] /= dataset["reward"].std(dim=1, keepdim=True).clamp(min=1e-6)
    # endregion prepare

    policy = MeanFlowPolicy(num_agents, obs_dim, action_dim, args.hidden_dims).to(args.device)
    # region update
    critic = Critic(num_agents, obs_dim, action_dim, args.hidden_dims).to(args.device)
    critic.mask = policy.mask
    target_critic = deepcopy(critic).requires_grad_(False)
    policy_optimizer = adam(policy, args.learning_rate, args.device)
    critic_optimizer = adam(critic, args.learning_rate, args.device)
    policy_schedule = LinearLR(policy_optimizer, 1.0, 0.0, args.num_updates)

    def update() -> dict[str, torch.Tensor]:
        batch = sample(dataset, args.batch_size, args.num_seeds)

        # Critic: one step towards the TD target
        critic.requires_grad_(True)
        loss, q = critic_loss(critic, target_critic, policy, batch, args.gamma)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        losses = {"critic": loss.detach(), "data_q": q.detach().mean()}

        # Policy: like the data, and up the critic, whose own gradient is not needed
        critic.requires_grad_(False)
        loss, parts = policy_loss(policy, critic, batch, args)
        policy_optimizer.zero_grad()
        loss.backward()
        policy_optimizer.step()
        losses |= {"policy": loss.detach(), **parts}

        # Target critic
        with torch.no_grad():
            targets, sources = (list(net.parameters()) for net in (target_critic, critic))
            torch._foreach_lerp_(targets, sources, args.tau)
        return losses

    states = {
        "policy": policy,
        "critic": critic,
        "target_critic": target_critic,
        "policy_optimizer": policy_optimizer,
        "critic_optimizer": critic_optimizer,
        "policy_schedule": policy_schedule,
    }
    # endregion update

    # region loop
    script = Path(__file__)
    folder = args.run_dir / f"{args.task}-{args.quality}" / script.stem
    run_dirs = [folder / f"seed-{seed}" for seed in seeds]
    settings = {key: str(value) for key, value in asdict(args).items()}
    step, seconds, histories, returns = 0, 0.0, [[] for _ in seeds], torch.zeros(0)
    sums, count = {}, 0  # of the losses since they were last logged
    with locked(run_dirs), stop_signals() as signals:
        # The first seed's directory has the checkpoint of all
        if args.resume and (state := load_checkpoint(run_dirs[0], settings, args.device)):
            try:
                for name, part in states.items():
                    part.load_state_dict(state["states"][name])
                progress = state["progress"]
                step, seconds, returns = (progress[key] for key in ("step", "seconds", "returns"))
                histories, sums, count = (progress[key] for key in ("histories", "sums", "count"))
                returns = returns.cpu()
                torch.set_rng_state(state["rng"].cpu())
                if args.device.startswith("cuda") and "cuda_rng" in state:
                    torch.cuda.set_rng_state(state["cuda_rng"].cpu(), args.device)
            except Exception as problem:
                stop(f"{run_dirs[0]} cannot be resumed", problem)

        def save_checkpoint() -> None:
            progress = {"step": step, "seconds": seconds, "histories": histories}
            state = {
                "progress": progress | {"returns": returns, "sums": sums, "count": count},
                "settings": settings,
                "states": {name: part.state_dict() for name, part in states.items()},
                "rng": torch.get_rng_state(),
            }
            if args.device.startswith("cuda"):
                state["cuda_rng"] = torch.cuda.get_rng_state(args.device)
            write(run_dirs[0] / "checkpoint.pt", torch.save, state, keep=True)

        def diverged(what: str) -> NoReturn:
            stop(
                f"{what} at update {step}: training has diverged; the last checkpoint is kept; "
                f"start anew with a lower --learning-rate"
            )

        writers, bar = [], None
        try:
            for seed, run_dir in zip(seeds, run_dirs, strict=True):
                record = asdict(args) | {"seed": seed, "first_seed": args.seed}
                writers.append(open_run(run_dir, script, record, step))
            bar = tqdm(total=args.num_updates, initial=step, unit="update", disable=None)
            update = compiled(update, states, args.device) if args.compile else update
            start = time.time() - seconds
            while step < args.num_updates:
                step += 1
                for key, value in update().items():
                    sums[key] = sums.get(key, 0) + value
                policy_schedule.step()
                count += 1
                seconds = time.time() - start
                evaluating = step % args.eval_interval == 0 or step == args.num_updates

                if step % 100 == 0 or evaluating:
                    losses = {key: value.item() / count for key, value in sums.items()}
                    sums, count = {}, 0
                    bar.update(step - bar.n)
                    for key, value in losses.items():
                        for writer in writers:
                            writer.add_scalar(f"losses/{key}", value, step)
                        if not abs(value) < 1e8:
                            diverged(f"losses/{key} is {value}")
                if evaluating or signals:
                    nets = [part for part in states.values() if isinstance(part, nn.Module)]
                    if not all(p.isfinite().all() for net in nets for p in net.parameters()):
                        diverged("weights are not finite")
                if evaluating:
                    returns = torch.from_numpy(evaluate(policy, envs, seeds, args.device))
                    means = returns.mean(dim=1).tolist()
                    runs = zip(run_dirs, writers, histories, means, strict=True)
                    for run_dir, writer, history, mean in runs:
                        score = normalized_score(args.task, mean)
                        row = {"step": step, "return": mean, "score": score, "seconds": seconds}
                        history.append(row | losses)
                        writer.add_scalar("charts/return", mean, step)
                        writer.add_scalar("charts/normalized_score", score, step)
                        writer.add_scalar("charts/updates_per_second", step / seconds, step)
                        write(run_dir / "metrics.csv", save_table, history)
                if evaluating or signals:
                    save_checkpoint()
                if evaluating:
                    mean = sum(means) / args.num_seeds
                    score = normalized_score(args.task, mean)
                    tqdm.write(
                        f"update {step:>7,}  return {mean:8.2f}  normalized score {score:6.1f}"
                    )
                if signals:
                    raise SystemExit(f"stopped at update {step}; --resume goes on from there")
            for k, run_dir in enumerate(run_dirs):
                weights = {key: value.cpu() for key, value in policy.state_dict().items()}
                if args.num_seeds > 1:  # along the first dimension, as the agents of one team
                    by_seed = {key: value.chunk(args.num_seeds) for key, value in weights.items()}
                    weights = {key: values[k].clone() for key, values in by_seed.items()}
                write(run_dir / "metrics.csv", save_table, histories[k])
                write(run_dir / "policy.pt", torch.save, weights)
                write(run_dir / "final_returns.npy", save_array, returns[k].numpy())
        except OSError as problem:
            stop(f"{folder} cannot be written at update {step}", problem)
        finally:
            for output in filter(None, (bar, *writers)):
                with suppress(OSError):  # of a full disk, which has been told
                    output.close()

    for seed, run_dir, history, values in zip(seeds, run_dirs, histories, returns, strict=True):
        final, best = history[-1], max(row["score"] for row in history)
        print(
            f"{args.task}-{args.quality}, seed {seed}: final return {final['return']:.1f} "
            f"(sd {values.std(correction=0):.1f} over {len(values)} episodes), normalized score "
            f"{final['score']:.1f} (best during training {best:.1f}), {seconds / 60:.1f} minutes; "
            f"see {run_dir}"
        )
    # endregion loop
    return policy, returns.numpy()


if __name__ == "__main__":
    train(tyro.cli(Args))

"""OM2P on multi-agent MuJoCo: HalfCheetah-2x3, Ant-2x4, Hopper-3x1 and the other MaMuJoCo tasks.

OM2P (Li et al., AAMAS 2026, arxiv.org/abs/2508.06269) trains a team of agents from recorded data.
Here the team is one robot: every agent drives the joints of its own part. Every agent has a
mean-flow policy (Geng et al., 2025, arxiv.org/abs/2505.13447), a network that turns noise into
an action in one step. It learns to act like the data and to raise its critic's Q.

    noise, action      e ~ N(0, I) and an action of the data; flow time 0 and flow time 1
    x_t                (1 - t) noise + t action, a point on the straight path between them
    v                  action - noise, the velocity on that path
    u(x_r, r, t)       mean velocity over the interval [r, t], predicted at its start x_r
    noise + u(noise, 0, 1)                            the action: one step along the whole path
    u = v + (t - r) du/dr                             what makes u a mean velocity: the target
    L = L_meanflow - q_weight E[Q(o, a_pi)] / |Q|     the policy's loss; a_pi: the end of a path

Agents, those of all S seeds, are stacked along the first dimension of every tensor and parameter,
padded with zeros, and learn alone. N agents, B batch, E critics, K episodes, T transitions.
"""

import io
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
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

with redirect_stderr(io.StringIO()):  # the package's news about other environments
    from gymnasium_robotics import mamujoco_v1


@dataclass
class Args:
    task: str = "HalfCheetah-2x3"
    """<robot>-<partition>, as HalfCheetah-6x1, Ant-2x4, Hopper-3x1, Walker2d-2x3 or Swimmer-2x1"""
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
    eval_interval: int = 2_000
    """updates between evaluations, each with a checkpoint"""
    eval_episodes: int = 10
    """episodes per evaluation, always from the same initial states"""
    standardize: bool = False
    """let networks see observations with mean 0 and standard deviation 1 over the data"""
    num_updates: int = 10_000
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
    q_weight: float = 0.5
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
# region dataset
FILES = {"obs": "obs", "action": "acs", "reward": "rews", "next_obs": "next_obs", "done": "dones"}
LIMITS = {"action": (-1.001, 1.001), "done": (0, 1)}  # of others: finite in float32


@contextmanager
def fail_as(message: str) -> Iterator[None]:
    """Let whatever fails in this block end the program with one line."""
    try:
        yield
    except Exception as problem:
        raise SystemExit(f"error: {message}: {problem}".splitlines()[0]) from None


def make_dataset(folder: Path, collector: str, flags: str) -> None:
    """If a dataset is missing, have this repository's collector make it, or say how to get it."""
    for path in (root / "data" / collector for root in Path(__file__).resolve().parents):
        if path.is_file() and not folder.exists():
            print(f"there are no data in {folder}; data/{collector} makes them", flush=True)
            subprocess.run([sys.executable, path, *flags.split(), "--data-dir", folder.parents[2]])
    if not folder.is_dir():
        ways = f"`python data/{collector} {flags}`, `bash data/download.sh`"
        raise SystemExit(f"error: there are no data in {folder}: {ways} or docs/your-data.md helps")


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


def load_dataset(data_dir: Path, task: str, quality: str, seeds, env, device="cpu") -> dict:
    """Read OMAR's {obs,acs,rews,next_obs,dones}_{i}.npy, one of each for every agent i of a seed.

    Returns float32 tensors on `device`: obs, next_obs (N, T, obs_dim), action (N, T, action_dim),
    reward, done (N, T). Missing data are made, in this repository; bad files end the program.
    """
    widths = {"obs": env.obs_dims, "next_obs": env.obs_dims, "action": env.action_dims}
    dataset, length = {key: [] for key in FILES}, None
    for seed in seeds:
        folder = Path(data_dir, task, quality, f"seed_{seed}_data").expanduser()
        make_dataset(folder, env.collector, f"--task {task} --quality {quality} --seed {seed}")
        for i, (key, name) in product(range(env.num_agents), FILES.items()):
            dims, limits = widths.get(key, [1] * env.num_agents), LIMITS.get(key, (-3e38, 3e38))
            values = read_array(folder / f"{name}_{i}.npy", length, dims[i], *limits)
            values = F.pad(values, (0, max(dims) - dims[i]))
            dataset[key].append(values if key in widths else values[:, 0])
            length = len(dataset["obs"][0])
    return {key: torch.stack(values).to(device) for key, values in dataset.items()}


# endregion dataset
# region mamujoco
SCALE = {"HalfCheetah-2x3": (-284.0, 3568.8), "HalfCheetah-6x1": (-282.6, 2785.1)}  # at 0 and 100
SCALE |= {"Hopper-3x1": (18.6, 2452.0), "Ant-2x4": (-59.2, 2055.1)}
FALLING = ("Ant", "Hopper", "Walker2d")  # their -v2 tasks pay 1 for the step of the fall, too
SETTINGS = {  # what OMAR's data observe; of gymnasium's -v5 robots, for -v2's rewards and body
    "HalfCheetah-2x3": {"agent_obsk": 0, "global_categories": ()},
    "Ant": {"contact_cost_weight": 0.0, "local_categories": (("qpos", "qvel"), ("qpos",))},
    "Walker2d": {"xml_file": "walker2d.xml"},
}


def normalized_score(task: str, returns):
    """0 for the mean return of random data, 100 for OMAR's or OMIGA's expert data's; else NaN."""
    low, high = SCALE.get(task, (math.nan, math.nan))
    return 100 * (returns - low) / (high - low)


def make_env(task: str):
    """A PettingZoo ParallelEnv for <robot>-<partition>, and the steps of its longest episode."""
    robot, _, partition = task.partition("-")
    settings = {"agent_obsk": 1, **SETTINGS.get(task, {}), **SETTINGS.get(robot, {})}
    with fail_as(f"--task {task} is not <robot>-<partition> of MaMuJoCo; see docs/your-data.md"):
        env = mamujoco_v1.parallel_env(scenario=robot, agent_conf=partition, **settings)
    return env, env.single_agent_env.get_wrapper_attr("_max_episode_steps")


class MaMuJoCo:
    """Multi-agent MuJoCo by gymnasium-robotics: a team of body parts drives one robot, K episodes.

    Agents observe positions and velocities of their own joints and the torso, and positions of the
    next joints, as in OG-MARL's data; in HalfCheetah-2x3 their own joints alone, as in OMAR's.
    Actions in [-1, 1] are scaled to the robot's controls. Everybody's reward is the robot's, by the
    -v2 rules of HalfCheetah, Hopper, Walker2d and Ant, the -v5 rules of others. An episode lasts
    `horizon` steps; where the robot falls (`done`) it ends, and pays nothing more. Sources:
    robotics.farama.org/envs/MaMuJoCo; de Witt et al., 2020, arxiv.org/abs/2003.06709.
    """

    collector = "collect_mamujoco.py"

    def __init__(self, task: str, num_episodes: int, seed: int = 0):
        self.task, self.num_episodes = task, num_episodes
        self.envs, horizons = zip(*(make_env(task) for _ in range(num_episodes)), strict=True)
        self.names, self.horizon = self.envs[0].possible_agents, horizons[0]
        self.num_agents = len(self.names)
        self.boxes = [self.envs[0].action_space(name) for name in self.names]
        self.action_dims = tuple(box.shape[0] for box in self.boxes)
        self.obs_dims = tuple(self.envs[0].observation_space(x).shape[0] for x in self.names)
        self.reset(seed)

    def reset(self, seed: int | Sequence[int] | None = None) -> np.ndarray:
        """Start K episodes; `seed` restarts the random numbers. Observations (N, K, obs_dim)."""
        self.done = np.zeros(self.num_episodes, bool)
        self.obs = np.zeros((self.num_agents, self.num_episodes, max(self.obs_dims)), np.float32)
        seeds = np.random.SeedSequence(seed).generate_state(self.num_episodes)
        for k, env in enumerate(self.envs):
            obs, _ = env.reset(seed=None if seed is None else int(seeds[k]))
            self.observe(k, obs)
        return self.obs.copy()

    def observe(self, k: int, obs: dict[str, np.ndarray]) -> None:
        """Take over one episode's observations."""
        for i, name in enumerate(self.names):
            self.obs[i, k, : self.obs_dims[i]] = obs[name]

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Advance the episodes that are not over by `action` (N, K, action_dim); obs, reward."""
        reward = np.zeros((self.num_agents, self.num_episodes))
        for k in np.flatnonzero(~self.done):
            actions = {}
            for name, box, a in zip(self.names, self.boxes, action[:, k], strict=True):
                actions[name] = (box.high + box.low + (box.high - box.low) * a[: len(box.low)]) / 2
            obs, rewards, terminated, _, _ = self.envs[k].step(actions)
            self.observe(k, obs)
            self.done[k] = all(terminated.values())
            bonus = self.done[k] and self.task.startswith(FALLING)
            reward[:, k] = [rewards[name] + bonus for name in self.names]
        return self.obs.copy(), reward


# endregion mamujoco
# region evaluate
@torch.no_grad()
def evaluate(policy, envs: Sequence, seeds: Sequence[int] = (0,), device="cpu") -> np.ndarray:
    """Play K episodes in each seed's environment: returns (S, K), sums over steps, agents' mean."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seeds[0])  # training goes on with its own random numbers
        obs = np.concatenate([envs[k].reset((seed, 0, 1)) for k, seed in enumerate(seeds)])
        returns = 0.0
        for _ in range(envs[0].horizon):
            action = policy.act(torch.from_numpy(obs).to(device)).cpu().numpy()
            steps = [env.step(a) for env, a in zip(envs, np.split(action, len(envs)), strict=True)]
            obs = np.concatenate([obs for obs, _ in steps])
            returns = returns + np.stack([reward.mean(axis=0) for _, reward in steps])
    return returns


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


# endregion evaluate


def train(args: Args) -> tuple[MeanFlowPolicy, np.ndarray]:
    """Train, and write a run directory; return the policy and its final returns (S, K)."""
    # region setup_mamujoco
    for name in ("num_seeds", "num_updates", "batch_size", "eval_interval", "eval_episodes"):
        if getattr(args, name) < 1:
            raise SystemExit(f"error: --{name.replace('_', '-')} must be 1 or more")
    with fail_as(f"--device {args.device} cannot be used"):
        device = torch.zeros(1, device=args.device).device
    if on_gpu := device.type == "cuda":  # a CUDA graph cannot be recorded on the default stream
        torch.cuda.set_stream(torch.cuda.Stream(device))
    torch.manual_seed(args.seed)
    seeds = range(args.seed, args.seed + args.num_seeds)
    envs = [MaMuJoCo(args.task, args.eval_episodes) for _ in seeds]
    dataset = load_dataset(args.data_dir, args.task, args.quality, seeds, envs[0], device)
    num_agents, length, obs_dim = dataset["obs"].shape  # agents of all seeds, one large team
    agents = torch.arange(num_agents, device=device)[:, None]
    sizes = num_agents, obs_dim, dataset["action"].shape[-1], args.hidden_dims
    # endregion setup_mamujoco
    policy = MeanFlowPolicy(*sizes).to(device)
    for i, width in enumerate(envs[0].action_dims * args.num_seeds):
        policy.mask[i, :, width:] = 0
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
    # region loop
    if args.standardize:
        std, mean = torch.std_mean(dataset["obs"], dim=1, keepdim=True)
        for net in nn.ModuleList(x for x in parts if isinstance(x, nn.Module)).modules():
            if isinstance(net, Standardize):  # observations are the first of its inputs
                net.mean[..., :obs_dim], net.std[..., :obs_dim] = mean, std.clamp(min=1e-3)
    script, source = Path(__file__), Path(__file__).read_bytes()
    folder = Path(args.run_dir, f"{args.task}-{args.quality}").expanduser()
    folder /= f"{script.stem}-{args.name}" if args.name else script.stem
    run_dir = folder / "-".join(["seed", *map(str, sorted({seeds[0], seeds[-1]}))])
    checkpoint, step, seconds, history = run_dir / "checkpoint.pt", 0, 0.0, []
    free = ("data_dir", "run_dir", "device", "compile", "resume")  # may be others when resuming
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
        returns = saved["returns"].cpu().numpy()
    elif run_dir.exists():
        run_dir.rename(folder / f"old-{run_dir.name}-{time.time_ns()}")
    with fail_as(f"{run_dir} cannot be written"):
        writer = SummaryWriter(run_dir, purge_step=step + 1)
        (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=2, default=str))
        (run_dir / script.name).write_bytes(source)
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
        returns = evaluate(policy, envs, seeds, device) if evaluating else np.zeros(1)
        if not np.abs([*losses.values(), *returns.flat]).max() < 1e8:
            raise SystemExit(f"error: diverged at update {step}; use a lower --learning-rate")
        if not evaluating:
            continue
        seconds, mean = time.perf_counter() - start, returns.mean()
        score = normalized_score(args.task, mean)
        writer.add_scalar("charts/return", mean, step)
        writer.add_scalar("charts/normalized_score", score, step)
        writer.add_scalar("charts/updates_per_second", step / seconds, step)
        bar.clear()
        print(f"update {step:>7,}  return {mean:8.2f}  normalized score {score:6.1f}")
        for seed, mean in zip(seeds, returns.mean(axis=1).tolist(), strict=True):
            row = {"step": step, "return": mean, "score": normalized_score(args.task, mean)}
            history.append(row | {"seconds": seconds, "seed": seed} | losses)
        lines = [history[0].keys(), *(row.values() for row in history)]
        (run_dir / "metrics.csv").write_text("".join(f"{','.join(map(str, x))}\n" for x in lines))
        saved = {"step": step, "seconds": seconds, "history": history, "settings": settings}
        saved |= {"parts": [part.state_dict() for part in parts]}
        saved |= {"rngs": [r.get_rng_state() for r in rngs], "returns": torch.from_numpy(returns)}
        torch.save(saved, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)  # at no moment is it half written
    writer.close()
    torch.save(policy.cpu().state_dict(), run_dir / "policy.pt")
    np.save(run_dir / "final_returns.npy", returns if args.num_seeds > 1 else returns[0])
    for seed, values in zip(seeds, returns, strict=True):
        scores = [row["score"] for row in history if row["seed"] == seed]
        print(
            f"{str(run_dir)!a}, seed {seed}: final return {values.mean():.1f} (sd "
            f"{values.std():.1f} over {len(values)} episodes), normalized score {scores[-1]:.1f} "
            f"(best during training {max(scores):.1f}), {seconds / 60:.1f} minutes"
        )
    # endregion loop
    return policy, returns


if __name__ == "__main__":
    train(tyro.cli(Args))

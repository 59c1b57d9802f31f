"""Make the MPE datasets of the offline multi-agent benchmark: OMAR's recipe, OMAR's files.

OMAR (Pan et al., ICML 2022) recorded multi-agent TD3 at three stages: untrained (`random`: uniform
actions), partly trained (`medium`) and trained (`expert`), with Gaussian exploration noise of 0.1;
`medium-replay` is the replay buffer of the training up to `medium`. This script does the same with
the behaviour policies in `data/behavior/`, which it can also train again; in place of a replay
buffer it rolls out snapshots taken evenly over the training up to `medium`.

    python data/collect_mpe.py --task simple_spread --quality expert --seed 0
    python data/collect_mpe.py --task simple_spread --train

A dataset goes to data/<task>/<quality>/seed_<seed>_data/ as {obs,acs,rews,next_obs,dones}_{i}.npy,
float32, episodes of 25 rows one after the other, `dones` all zero as in the public data, with a
card in `card.json`. The same seed gives the same bytes on the same platform.
"""

import json
import math
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

BEHAVIOR_DIR = Path(__file__).resolve().parent / "behavior"


@dataclass
class Args:
    task: Literal["simple_spread", "simple_tag", "simple_world"] = "simple_spread"
    """the task"""
    quality: Literal["random", "medium-replay", "medium", "expert"] = "expert"
    """whose behaviour is recorded"""
    seed: int = 0
    """seed of initial states and noise, 0 or more; part of the dataset's path"""
    num_transitions: int = 100_000
    """transitions of every agent, a multiple of 25; the public data have 1,000,000"""
    noise: float = 0.1
    """standard deviation of the exploration noise on actions in [-1, 1], 0 to 1"""
    data_dir: Path = Path(__file__).resolve().parent
    """folder of the datasets"""
    train: bool = False
    """train the task's behaviour policies again, replacing data/behavior/<task>.npz; no dataset"""
    train_steps: int = 2_000_000
    """environment steps after which --train gives up, unless it reaches the public expert first"""


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


# region stop
def stop(message: str, problem: Exception | None = None) -> NoReturn:
    """End the program with one line on stderr and exit status 1."""
    reason = "" if problem is None else f": {str(problem) or type(problem).__name__}"
    raise SystemExit(f"error: {message}{reason}".splitlines()[0])


# endregion stop


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


# region behavior
class Behavior(nn.Module):
    """A team of deterministic policies, a_i = tanh(net_i(o_i)), and exploration noise on them."""

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims=(128, 128)):
        super().__init__()
        self.net = mlp((num_agents,), obs_dim, hidden_dims, action_dim)

    def act(self, obs: torch.Tensor, noise_sd: float = 0.0) -> torch.Tensor:
        """(N, B, obs_dim) -> actions (N, B, action_dim) in [-1, 1]."""
        action = self.net(obs).tanh()
        return (action + noise_sd * torch.randn_like(action)).clamp(-1, 1)


def load_behavior(task: str, quality: str, env) -> list[Behavior | None]:
    """The policies whose roll-outs make up a dataset, in the order of training; None is random.

    data/behavior/<task>.npz holds `replay_<k>`, `medium_<k>` and `expert_<k>`: parameter k, weights
    and biases in turn, of that stage's snapshots, (snapshots, N, ...) in float16, and in
    `<stage>_step` the environment steps that they were trained for.
    """
    if quality == "random":
        return [None]
    stage, path, policies = quality.removeprefix("medium-"), BEHAVIOR_DIR / f"{task}.npz", []
    try:
        with np.load(path, allow_pickle=False) as file:
            parameters = [torch.from_numpy(file[f"{stage}_{k}"]).float() for k in range(6)]
        for snapshot in zip(*parameters, strict=True):
            policies.append(Behavior(env.num_agents, max(env.obs_dims), max(env.action_dims)))
            keys = policies[-1].state_dict()
            policies[-1].load_state_dict(dict(zip(keys, snapshot, strict=True)))
    except Exception as problem:
        stop(f"{path} cannot be read; --train makes one", problem)
    return policies


def write_dataset(args: Args, facts: dict, write_files: Callable[[Path], np.ndarray]) -> dict:
    """Have the files of one dataset written and return its card, which stands beside them.

    `write_files` writes them into a temporary folder and returns the episodes' returns; a
    collection that is stopped leaves nothing behind.
    """
    folder = args.data_dir / args.task / args.quality / f"seed_{args.seed}_data"
    if folder.exists():
        stop(f"{folder} is there already, and is left as it is; --data-dir can name another place")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        returns = write_files(temporary)
        card = {
            "dataset": f"{args.task}, {args.quality}, seed {args.seed}",
            **facts,
            "transitions": args.num_transitions,
            "episodes": len(returns),
            "return mean": round(float(returns.mean()), 2),
            "return sd": round(float(returns.std()), 2),
            "public data's return mean": PUBLIC_RETURNS.get(args.task, {}).get(args.quality),
            "command": f"python data/{Path(__file__).name} --task {args.task} "
            f"--quality {args.quality} --seed {args.seed} "
            f"--num-transitions {args.num_transitions} --noise {args.noise}",
            "versions": f"torch {torch.__version__}, numpy {np.__version__}",
        }
        (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as problem:
        stop(f"{folder} cannot be written", problem)
    except KeyboardInterrupt:
        raise SystemExit("stopped; no dataset was written") from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
    return card


def describe(args: Args, policies: list) -> str:
    """Who acts in a dataset, for its card."""
    if policies == [None]:
        return "uniformly random actions"
    snapshots = f"{len(policies)} snapshots" if policies[1:] else "one snapshot"
    return f"{snapshots} of MATD3, exploration noise {args.noise}"


def check_behavior_dir() -> None:
    """End the program before a long training if its result could not be saved."""
    try:
        BEHAVIOR_DIR.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=BEHAVIOR_DIR).close()
    except OSError as problem:
        stop(f"{BEHAVIOR_DIR} cannot be written", problem)


def save_behavior(task: str, snapshots: list[Behavior], stages: dict, interval: int) -> Path:
    """Write data/behavior/<task>.npz; `stages` holds the indices of each stage's snapshots."""
    arrays = {}
    for stage, chosen in stages.items():
        columns = zip(*(snapshots[c].state_dict().values() for c in chosen), strict=True)
        for k, column in enumerate(columns):
            arrays[f"{stage}_{k}"] = torch.stack(column).half().numpy()
        arrays[f"{stage}_step"] = interval * np.array(chosen)
    path = BEHAVIOR_DIR / f"{task}.npz"
    np.savez_compressed(path.with_suffix(".tmp.npz"), **arrays)
    path.with_suffix(".tmp.npz").replace(path)
    return path


# endregion behavior


@torch.no_grad()
def roll_out(env: MPE, policy: Behavior | None, noise_sd: float) -> dict[str, np.ndarray]:
    """Play one batch of episodes; a policy of None acts uniformly at random.

    Returns float32 arrays (N, K * 25, ...), episode after episode, under OMAR's file names.
    """
    obs, rows = env.reset(), []
    for _ in range(env.horizon):
        if policy is None:
            action = 2 * torch.rand(env.num_agents, env.num_episodes, 2) - 1
        else:
            action = policy.act(torch.from_numpy(obs), noise_sd)
        next_obs, reward = env.step(action.numpy())
        rows.append((obs, action.numpy(), reward, next_obs, np.zeros_like(reward)))
        obs = next_obs
    columns = [np.stack(column, axis=2) for column in zip(*rows, strict=True)]  # (N, K, 25, ...)
    return {
        name: column.reshape(len(column), -1, *column.shape[3:]).astype(np.float32, copy=False)
        for name, column in zip(("obs", "acs", "rews", "next_obs", "dones"), columns, strict=True)
    }


def episode_returns(reward: np.ndarray) -> np.ndarray:
    """Undiscounted return of every episode, mean over agents: (N, K * 25) -> (K,)."""
    return reward.reshape(len(reward), -1, MPE.horizon).sum(axis=-1).mean(axis=0)


def check_args(args: Args) -> None:
    """End the program with one line about the first setting out of range."""
    for name, value, low, step in (
        ("seed", args.seed, 0, 1),
        ("num-transitions", args.num_transitions, MPE.horizon, MPE.horizon),
        ("train-steps", args.train_steps, 2_500, 2_500),
    ):
        if not low <= value < 2**31 or value % step:
            stop(f"--{name} is {value}; it must be a multiple of {step}, {low} or more")
    if not 0 <= args.noise <= 1:
        stop(f"--noise is {args.noise}; it must be from 0 to 1")


def install_prey(task: str, data_dir: Path) -> str:
    """Put this project's prey into data_dir/task unless a prey is there; say which one it is."""
    if task == "simple_spread":
        return "none"
    folder = data_dir / task
    if (folder / "pretrained_adv_model.pt").is_file():
        return "OMAR's, pretrained_adv_model.pt"
    if not (folder / "prey.npz").is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(BEHAVIOR_DIR / f"{task}_prey.npz", folder / "prey.npz.tmp")
            (folder / "prey.npz.tmp").replace(folder / "prey.npz")
        except OSError as problem:
            stop(f"the prey of {task} cannot be copied to {folder}", problem)
    return "this project's fit of OMAR's, prey.npz"


def write_files(folder: Path, args: Args, policies: list, prey_policy) -> np.ndarray:
    """Roll the policies out for equal shares of the episodes into OMAR's files; return returns."""
    torch.manual_seed(args.seed)
    num_episodes = args.num_transitions // MPE.horizon
    shares = np.diff(np.linspace(0, num_episodes, len(policies) + 1).astype(int))
    parts = [  # of at most 4,000 episodes, which keeps memory low
        (policy, min(4_000, share - start))
        for policy, share in zip(policies, shares, strict=True)
        for start in range(0, share, 4_000)
    ]
    chunks = []
    for k, (policy, size) in enumerate(tqdm(parts, desc="roll-outs", disable=None)):
        env = MPE(args.task, size, (args.seed, k), prey_policy)
        chunks.append(roll_out(env, policy, args.noise))
    for name in chunks[0]:
        for i in range(MPE.num_agents):
            np.save(
                folder / f"{name}_{i}.npy", np.concatenate([chunk[name][i] for chunk in chunks])
            )
    return np.concatenate([episode_returns(chunk["rews"]) for chunk in chunks])


def collect(args: Args) -> dict:
    """Write one dataset and return its card."""
    check_args(args)
    prey = install_prey(args.task, args.data_dir)
    prey_policy = find_prey(args.task, args.data_dir)
    policies = load_behavior(args.task, args.quality, MPE(args.task, 1))
    facts = {"behaviour": describe(args, policies), "prey": prey}
    return write_dataset(
        args, facts, lambda folder: write_files(folder, args, policies, prey_policy)
    )


def train_behavior(args: Args) -> None:
    """Train a team by MATD3 until it reaches the public expert's return, and save its stages.

    Every agent's twin critics see all observations and actions (MATD3: Ackermann et al., 2019; TD3:
    Fujimoto et al., 2018, here without delayed policy updates). A penalty on the squared pre-tanh
    outputs keeps actions from saturating, which ends learning in simple_spread; batches come from
    recent transitions, explored with twice the noise, which halves the time it takes. Saved, as
    `load_behavior` reads it: the first policy to reach the public expert's return, on the way the
    one nearest to the public medium's, and up to 12 from the start to that medium, evenly apart.
    """
    check_args(args)
    check_behavior_dir()
    torch.manual_seed(args.seed)
    num_envs, batch_size, gamma, tau, reward_scale = 100, 512, 0.95, 0.01, 0.1
    warm_up, recent, check_interval = 20_000, 300_000, 5_000
    install_prey(args.task, args.data_dir)
    prey_policy = find_prey(args.task, args.data_dir)
    env = MPE(args.task, num_envs, args.seed, prey_policy)
    check_env = MPE(args.task, 1_000, args.seed + 1, prey_policy)
    N, obs_dim, action_dim = env.num_agents, env.obs_dims[0], env.action_dims[0]
    policy = Behavior(N, obs_dim, action_dim)
    critic = Critic(N, N * obs_dim, N * action_dim, (128, 128))
    target_policy, target_critic = deepcopy(policy), deepcopy(critic)
    policy_optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    own = torch.eye(N, dtype=torch.bool)[:, :, None, None]

    def joint(x: torch.Tensor) -> torch.Tensor:
        """Everybody sees everything: (N, B, dim) -> (N, B, N * dim)."""
        return x.transpose(0, 1).flatten(1).expand(N, -1, -1)

    def update(size: int) -> None:
        index = torch.randint(max(0, size - recent), size, (batch_size,))
        obs, action, reward, next_obs, _ = (values[:, index] for values in buffer.values())
        with torch.no_grad():
            next_action = target_policy.act(next_obs)
            smoothing = (0.1 * torch.randn_like(next_action)).clamp(-0.5, 0.5)
            next_action = (next_action + smoothing).clamp(-1, 1)
            next_q = target_critic(joint(next_obs), joint(next_action)).amin(dim=0)
            target = reward_scale * reward + gamma * next_q
        q = critic(joint(obs), joint(action))
        critic_optimizer.zero_grad()
        F.mse_loss(q, target.expand_as(q), reduction="none").mean(dim=-1).sum().backward()
        critic_optimizer.step()

        logits = policy.net(obs)
        mixed = torch.where(own, logits.tanh(), action)  # (N, N, B, 2): own new, others' recorded
        q = critic(joint(obs), mixed.transpose(1, 2).flatten(2))[0]
        policy_optimizer.zero_grad()
        (0.004 * logits.square().mean(dim=-1) - q).mean(dim=-1).sum().backward()
        policy_optimizer.step()

        with torch.no_grad():
            for slow, fast in ((target_policy, policy), (target_critic, critic)):
                for target, source in zip(slow.parameters(), fast.parameters(), strict=True):
                    target.lerp_(source, tau)

    medium, expert = (PUBLIC_RETURNS[args.task][quality] for quality in ("medium", "expert"))
    buffer, snapshots, returns, step = {}, [], [], 0
    with tqdm(total=args.train_steps, unit="step", unit_scale=True, desc=args.task) as bar:
        while not returns or returns[-1] < expert:
            if step >= args.train_steps:
                stop(f"the public expert's return, {expert}, was not reached; nothing is saved")
            if step % check_interval == 0:
                snapshots.append(deepcopy(policy).half().float())  # as it will be stored
                data = roll_out(check_env, snapshots[-1], args.noise)
                returns.append(float(episode_returns(data["rews"]).mean()))
                bar.set_postfix_str(f"return {returns[-1]:.1f}")
            explorer = policy if step >= warm_up else None
            for name, column in roll_out(env, explorer, 2 * args.noise).items():
                if name not in buffer:
                    buffer[name] = torch.empty(N, args.train_steps, *column.shape[2:])
                buffer[name][:, step : step + column.shape[1]] = torch.from_numpy(column)
            step += num_envs * env.horizon
            for _ in range(2 * env.horizon):  # two updates for every 100 transitions
                update(step)
            bar.update(num_envs * env.horizon)

    reached = int(np.argmax(np.array(returns) >= medium))
    middle = min(range(reached + 1), key=lambda k: abs(returns[k] - medium))
    stages = {
        "replay": sorted({round(k) for k in np.linspace(0, middle, 12)}),
        "medium": [middle],
        "expert": [len(returns) - 1],
    }
    path = save_behavior(args.task, snapshots, stages, check_interval)
    print(f"{path}: medium {returns[middle]:.1f}, expert {returns[-1]:.1f}, {step:,} steps")


def main(args: Args) -> None:
    """Train behaviour policies, or write a dataset and print its card."""
    try:
        if args.train:
            train_behavior(args)
            return
        for key, value in collect(args).items():
            print(f"{key:>26}: {value}")
    except KeyboardInterrupt:
        more = "; no behaviour policies were saved" if args.train else ""
        raise SystemExit(f"stopped{more}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    torch.set_num_threads(1)  # small networks gain nothing from more, and sums keep their order
    main(tyro.cli(Args))

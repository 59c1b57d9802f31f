"""Make multi-agent MuJoCo datasets: OMAR's recipe and OMAR's files, for any task of MaMuJoCo.

OMAR (Pan et al., ICML 2022) recorded multi-agent TD3 at three stages: untrained (`random`: uniform
actions), partly trained (`medium`) and trained (`expert`), with Gaussian exploration noise of 0.1;
`medium-replay` is the replay buffer of a training that goes up to `medium`. This script does the
same with the behaviour policies in `data/behavior/`, and trains those of any other task; in place
of a replay buffer it rolls out snapshots taken evenly over the first part of the training.

    python data/collect_mamujoco.py --task HalfCheetah-2x3 --quality expert --seed 0
    python data/collect_mamujoco.py --task Hopper-3x1 --train

A dataset goes to data/<task>/<quality>/seed_<seed>_data/ as {obs,acs,rews,next_obs,dones}_{i}.npy,
float32, one episode after the other, with a card in `card.json`. `dones` is 1 where the robot fell,
not where time ran out. The same seed gives the same bytes on the same platform.
"""

import io
import json
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

with redirect_stderr(io.StringIO()):  # the package's news about other environments
    from gymnasium_robotics import mamujoco_v1

BEHAVIOR_DIR = Path(__file__).resolve().parent / "behavior"
WARM_UP = 10_000  # transitions before training
CHECK_INTERVAL = 2_500  # from snapshot to snapshot


@dataclass
class Args:
    task: str = "HalfCheetah-2x3"
    """<robot>-<partition> of MaMuJoCo"""
    quality: Literal["random", "medium-replay", "medium", "expert"] = "expert"
    """whose behaviour is recorded"""
    seed: int = 0
    """seed of initial states and noise, 0 or more; part of the dataset's path"""
    num_transitions: int = 100_000
    """transitions of every agent; the public data have 1,000,000"""
    noise: float = 0.1
    """standard deviation of the exploration noise on actions in [-1, 1], 0 to 1"""
    data_dir: Path = Path(__file__).resolve().parent
    """folder of the datasets"""
    train: bool = False
    """train the task's behaviour policies, or go on with it, and put them into data/behavior/"""
    train_steps: int = 500_000
    """transitions after which --train ends, unless it reaches the public expert's return first"""


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


# region mamujoco
PUBLIC_RETURNS = {  # ends of the scale: OMAR (ICML 2022); the middle: OG-MARL's card of one seed
    "HalfCheetah-2x3": {
        "expert": 3568.8,
        "medium": 1568.9,
        "medium-replay": 423.5,
        "random": -284.0,
    },
}
FALLING = ("Ant", "Hopper", "Walker2d")  # their -v2 tasks pay 1 for the step of the fall, too
SETTINGS = {  # of gymnasium's -v5 robots, for the rewards and the body of -v2
    "Ant": {"contact_cost_weight": 0.0},
    "Walker2d": {"xml_file": "walker2d.xml"},
}


def normalized_score(task: str, returns):
    """Score on the field's scale: 0 for the public random data, 100 for its expert data.

    NaN for tasks without public data; give them a scale by a line in PUBLIC_RETURNS.
    """
    scale = PUBLIC_RETURNS.get(task, {"random": math.nan, "expert": math.nan})
    return 100 * (returns - scale["random"]) / (scale["expert"] - scale["random"])


class MaMuJoCo:
    """Multi-agent MuJoCo by gymnasium-robotics: a team of body parts drives one robot, K episodes.

    A task is <robot>-<partition>, any that MaMuJoCo has. Agents observe positions and velocities
    of their own joints alone (agent_obsk=0, no global categories), as in the public data; actions
    in [-1, 1] are scaled to the robot's controls; everybody's reward is the robot's, by the rules
    of the -v2 tasks for HalfCheetah, Hopper, Walker2d and Ant, of -v5 for others. Observations of
    smaller agents are padded with zeros, and what they do beyond their own action components is
    ignored. An episode lasts `horizon` steps; where the robot falls (`done`) it ends, and pays
    nothing more.

    Source: robotics.farama.org/envs/MaMuJoCo; de Witt et al. (2020), arxiv.org/abs/2003.06709.
    """

    collector = "collect_mamujoco.py"

    def __init__(self, task: str, num_episodes: int, seed: int = 0):
        self.task, self.num_episodes = task, num_episodes
        self.robot, _, partition = task.partition("-")
        settings = {"agent_obsk": 0, "global_categories": (), **SETTINGS.get(self.robot, {})}
        try:
            self.envs = [
                mamujoco_v1.parallel_env(scenario=self.robot, agent_conf=partition, **settings)
                for _ in range(num_episodes)
            ]
        except Exception as problem:
            stop(f"--task {task} is not <robot>-<partition> of MaMuJoCo", problem)
        version = tuple(int(number) for number in mujoco.__version__.split(".")[:2])
        if self.robot in ("Ant", "Hopper") and version >= (3, 5):
            print(
                f"warning: with MuJoCo {mujoco.__version__} {self.robot} does not move as in data "
                f"made with MuJoCo before 3.5: pip install 'mujoco>=3.3,<3.5'",
                file=sys.stderr,
            )
        self.names = self.envs[0].possible_agents
        self.num_agents = len(self.names)
        self.obs_dims, self.action_dims = (
            tuple(spaces[name].shape[0] for name in self.names)
            for spaces in (self.envs[0].observation_spaces, self.envs[0].action_spaces)
        )
        self.action_scale = self.envs[0].action_spaces[self.names[0]].high[0]
        self.horizon = self.envs[0].single_agent_env.get_wrapper_attr("_max_episode_steps")
        self.reset(seed)

    @property
    def action_mask(self) -> torch.Tensor:
        """1 for the agents' own action components, 0 for padding: (N, 1, action_dim)."""
        dims = torch.tensor(self.action_dims)
        return (torch.arange(max(self.action_dims)) < dims[:, None, None]).float()

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
        """Advance by `action` (N, K, action_dim) the episodes that are not over.

        Returns the next observations (N, K, obs_dim), float32, and each agent's reward (N, K).
        """
        reward = np.zeros(self.num_episodes)
        for k in np.flatnonzero(~self.done):
            own = {
                name: self.action_scale * action[i, k, : self.action_dims[i]]
                for i, name in enumerate(self.names)
            }
            obs, rewards, terminated, _, _ = self.envs[k].step(own)
            self.observe(k, obs)
            self.done[k] = terminated[self.names[0]]
            reward[k] = rewards[self.names[0]] + (self.done[k] and self.robot in FALLING)
        return self.obs.copy(), np.tile(reward, (self.num_agents, 1))


# endregion mamujoco


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
def roll_out(env: MaMuJoCo, policy: Behavior | None, noise_sd: float) -> dict[str, np.ndarray]:
    """Play K episodes to their end; a policy of None acts uniformly at random.

    Returns float32 arrays (N, rows, ...) under OMAR's file names, one episode after the other, and
    as `lengths` (K,) how many rows each has.
    """
    obs, rows, lengths = env.reset(), [], np.zeros(env.num_episodes, int)
    while not env.done.all() and len(rows) < env.horizon:
        lengths += ~env.done
        action = act(env, policy, obs, noise_sd)
        next_obs, reward = env.step(action)
        rows.append((obs, action, reward, next_obs, np.tile(env.done, (env.num_agents, 1))))
        obs = next_obs
    alive = np.arange(len(rows)) < lengths[:, None]  # (K, steps)
    columns = [np.stack(column, axis=2) for column in zip(*rows, strict=True)]  # (N, K, steps, ...)
    names = ("obs", "acs", "rews", "next_obs", "dones")
    data = {
        name: column[:, alive].astype(np.float32, copy=False)
        for name, column in zip(names, columns, strict=True)
    }
    return data | {"lengths": lengths}


@torch.no_grad()
def act(env: MaMuJoCo, policy: Behavior | None, obs: np.ndarray, noise_sd: float) -> np.ndarray:
    """The team's actions (N, K, action_dim), 0 where they are padding."""
    if policy is None:
        action = 2 * torch.rand(env.num_agents, env.num_episodes, max(env.action_dims)) - 1
    else:
        action = policy.act(torch.from_numpy(obs), noise_sd)
    return (env.action_mask * action).numpy()


def episode_returns(data: dict[str, np.ndarray]) -> np.ndarray:
    """Undiscounted return of every episode of a roll-out, (K,)."""
    return np.add.reduceat(data["rews"][0], np.cumsum(data["lengths"]) - data["lengths"])


def check_args(args: Args) -> None:
    """End the program with one line about the first setting out of range."""
    for name, value, low in (
        ("seed", args.seed, 0),
        ("num-transitions", args.num_transitions, 1),
        ("train-steps", args.train_steps, WARM_UP),
    ):
        if not low <= value < 2**31:
            stop(f"--{name} is {value}; it must be {low} or more")
    if not 0 <= args.noise <= 1:
        stop(f"--noise is {args.noise}; it must be from 0 to 1")


def write_files(folder: Path, args: Args, policies: list, env: MaMuJoCo) -> np.ndarray:
    """Roll the policies out for equal shares of the rows into OMAR's files; return the returns.

    A share's last episode may be cut off where the share ends; only whole ones have a return.
    """
    torch.manual_seed(args.seed)
    env.reset(args.seed)
    ends = np.linspace(0, args.num_transitions, len(policies) + 1).astype(int)[1:]
    parts, returns, size = [], [], 0
    with tqdm(total=args.num_transitions, unit="row", unit_scale=True, disable=None) as bar:
        for policy, end in zip(policies, ends, strict=True):
            while size < end:
                data = roll_out(env, policy, args.noise)
                whole = np.cumsum(data["lengths"]) <= end - size
                returns.append(episode_returns(data)[whole])
                del data["lengths"]
                parts.append({name: column[:, : end - size] for name, column in data.items()})
                bar.update(parts[-1]["rews"].shape[1])
                size += parts[-1]["rews"].shape[1]
    widths = {"obs": env.obs_dims, "next_obs": env.obs_dims, "acs": env.action_dims}
    for name in parts[0]:
        for i in range(env.num_agents):
            column = np.concatenate([part[name][i] for part in parts])
            own = column[:, : widths[name][i]] if name in widths else column
            np.save(folder / f"{name}_{i}.npy", own)
    returns = np.concatenate(returns)
    if not len(returns):
        stop(f"--num-transitions {args.num_transitions} is less than one episode")
    return returns


def collect(args: Args) -> dict:
    """Write one dataset and return its card."""
    check_args(args)
    env = MaMuJoCo(args.task, 10)
    policies = load_behavior(args.task, args.quality, env)
    facts = {"behaviour": describe(args, policies)}
    return write_dataset(args, facts, lambda folder: write_files(folder, args, policies, env))


def states(env: MaMuJoCo) -> np.ndarray:
    """What the robots' own environments observe, (K, state_dim)."""
    return np.stack([part.state() for part in env.envs]).astype(np.float32)


def train_behavior(args: Args) -> None:
    """Train a team by MATD3 up to the public expert's return or --train-steps, and save stages.

    Every agent's policy sees its own observation; the twin critics, one pair for the team, whose
    reward is shared, see the robot's state and all actions (MATD3: Ackermann et al., 2019; TD3:
    Fujimoto et al., 2018). Exploration noise is twice the recorded one, and a small penalty on the
    squared pre-tanh outputs keeps actions from saturating. The training is saved on the way, and a
    stopped one goes on from there.

    Saved, as `load_behavior` reads it: as expert the best policy; as medium the one on the way
    nearest to the public medium's return or, without public data, to half of the way from random
    to the best; and up to 12, evenly apart, from the start to where their mean return is nearest to
    the public medium-replay's, or to medium.
    """
    check_args(args)
    check_behavior_dir()
    torch.manual_seed(args.seed)
    num_envs, batch_size, gamma, tau, reward_scale = 10, 256, 0.99, 0.005, 0.1
    env, check_env = (MaMuJoCo(args.task, num_envs, args.seed + k) for k in (0, 1))
    N, obs_dim, action_dim = env.num_agents, max(env.obs_dims), max(env.action_dims)
    policy = Behavior(N, obs_dim, action_dim)
    state_dim = states(env).shape[1]
    critic = Critic(1, state_dim, N * action_dim, (256, 256))
    target_policy, target_critic = deepcopy(policy), deepcopy(critic)
    policy_optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    mask = env.action_mask
    T = args.train_steps + num_envs
    buffer = {
        "obs": torch.zeros(T, N, obs_dim),
        "next_obs": torch.zeros(T, N, obs_dim),
        "state": torch.zeros(T, state_dim),
        "next_state": torch.zeros(T, state_dim),
        "action": torch.zeros(T, N, action_dim),
        "reward": torch.zeros(T),
        "done": torch.zeros(T),
    }

    def joint(action: torch.Tensor) -> torch.Tensor:
        """Everybody's action for one critic: (N, B, action_dim) -> (1, B, N * action_dim)."""
        return action.transpose(0, 1).flatten(1)[None]

    def update(size: int, with_policy: bool) -> None:
        index = torch.randint(size, (batch_size,))
        batch = {name: values[index] for name, values in buffer.items()}
        obs, next_obs, action = (batch[k].transpose(0, 1) for k in ("obs", "next_obs", "action"))
        with torch.no_grad():
            next_action = target_policy.act(next_obs)
            smoothing = (0.2 * torch.randn_like(next_action)).clamp(-0.5, 0.5)
            next_action = mask * (next_action + smoothing).clamp(-1, 1)
            next_q = target_critic(batch["next_state"][None], joint(next_action)).amin(dim=0)
            target = reward_scale * batch["reward"] + gamma * (1 - batch["done"]) * next_q
        q = critic(batch["state"][None], joint(action))
        critic_optimizer.zero_grad()
        F.mse_loss(q, target.expand_as(q), reduction="none").mean(dim=-1).sum().backward()
        critic_optimizer.step()
        if not with_policy:
            return
        logits = mask * policy.net(obs)
        critic.requires_grad_(False)
        q = critic(batch["state"][None], joint(logits.tanh()))[0]
        policy_optimizer.zero_grad()
        (0.001 * logits.square().mean() - q.mean()).backward()
        policy_optimizer.step()
        critic.requires_grad_(True)
        with torch.no_grad():
            for slow, fast in ((target_policy, policy), (target_critic, critic)):
                torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), tau)

    public = PUBLIC_RETURNS.get(args.task, {})
    goal, snapshots, returns, step, updates = public.get("expert", math.inf), [], [], 0, 0
    modules = {
        "policy": policy,
        "critic": critic,
        "target_policy": target_policy,
        "target_critic": target_critic,
        "policy_optimizer": policy_optimizer,
        "critic_optimizer": critic_optimizer,
    }
    path = BEHAVIOR_DIR / f"{args.task}.training.pt"
    settings = {"seed": args.seed, "noise": args.noise, "train-steps": args.train_steps}
    if path.exists():
        try:
            state = torch.load(path, weights_only=True)
            for name, value in settings.items():
                if state["settings"][name] != value:
                    raise ValueError(f"--{name} was {state['settings'][name]}, now {value}")
            for name, module in modules.items():
                module.load_state_dict(state[name])
            step, updates, returns = state["step"], state["updates"], state["returns"]
            for weights in state["snapshots"]:
                snapshots.append(deepcopy(policy))
                snapshots[-1].load_state_dict(weights)
            for name, values in buffer.items():
                values[:step] = state["buffer"][name]
            torch.set_rng_state(state["rng"])
        except Exception as problem:
            stop(f"{path} cannot be gone on from, remove it to begin anew", problem)

    obs, t = env.reset((args.seed, step)), 0
    with tqdm(total=args.train_steps, initial=step, unit="step", unit_scale=True) as bar:
        while step < args.train_steps and max(returns, default=-math.inf) < goal:
            if step >= CHECK_INTERVAL * len(returns):
                snapshots.append(deepcopy(policy).half().float())  # as it will be stored
                data = roll_out(check_env, snapshots[-1], args.noise)
                returns.append(float(episode_returns(data).mean()))
                bar.set_postfix_str(f"return {returns[-1]:.1f}")
                if len(returns) % 4 == 0:
                    state = {name: module.state_dict() for name, module in modules.items()}
                    state |= {"step": step, "updates": updates, "returns": returns}
                    state["snapshots"] = [snapshot.state_dict() for snapshot in snapshots]
                    state["buffer"] = {
                        name: values[:step].clone() for name, values in buffer.items()
                    }
                    state |= {"rng": torch.get_rng_state(), "settings": settings}
                    torch.save(state, path.with_suffix(".tmp"))
                    path.with_suffix(".tmp").replace(path)
            alive = np.flatnonzero(~env.done)
            rows, state = slice(step, step + len(alive)), states(env)
            action = act(env, policy if step >= WARM_UP else None, obs, 2 * args.noise)
            next_obs, reward = env.step(action)
            for name, values in (
                ("obs", obs[:, alive].swapaxes(0, 1)),
                ("next_obs", next_obs[:, alive].swapaxes(0, 1)),
                ("state", state[alive]),
                ("next_state", states(env)[alive]),
                ("action", action[:, alive].swapaxes(0, 1)),
                ("reward", reward[0, alive]),
                ("done", env.done[alive]),
            ):
                buffer[name][rows] = torch.from_numpy(values)
            obs, t, step = next_obs, t + 1, step + len(alive)
            if env.done.all() or t == env.horizon:
                obs, t = env.reset(), 0
            while updates < (step - WARM_UP) / 2:  # one update for two transitions
                update(step, with_policy=updates % 2 == 0)
                updates += 1
            bar.update(step - bar.n)

    returns = np.array(returns)
    random = float(episode_returns(roll_out(check_env, None, 0.0)).mean())
    best = int(np.argmax(returns))
    half = public.get("medium", (random + returns[best]) / 2)
    reached = int(np.argmax(returns >= half))
    middle = min(range(reached + 1), key=lambda k: abs(returns[k] - half))
    means = np.cumsum(returns) / np.arange(1, len(returns) + 1)
    last = middle
    if "medium-replay" in public:
        last = int(np.argmin(np.abs(means[: best + 1] - public["medium-replay"])))
    stages = {
        "replay": sorted({round(k) for k in np.linspace(0, last, 12)}),
        "medium": [middle],
        "expert": [best],
    }
    saved = save_behavior(args.task, snapshots, stages, CHECK_INTERVAL)
    path.unlink(missing_ok=True)
    print(
        f"{saved}: random {random:.1f}, replay {returns[stages['replay']].mean():.1f}, "
        f"medium {returns[middle]:.1f}, expert {returns[best]:.1f}, {step:,} steps"
    )


def main(args: Args) -> None:
    """Train behaviour policies, or write a dataset and print its card."""
    try:
        if args.train:
            train_behavior(args)
            return
        for key, value in collect(args).items():
            print(f"{key:>26}: {value}")
    except KeyboardInterrupt:
        more = "; the same command goes on from the last save" if args.train else ""
        raise SystemExit(f"stopped{more}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    torch.set_num_threads(1)  # small networks gain nothing from more, and sums keep their order
    main(tyro.cli(Args))

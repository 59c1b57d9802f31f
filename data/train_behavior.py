"""Train the behaviour policies of a task by MATD3, and save the stages that datasets are made of.

The critics see everything and the policies their own observation (MATD3: Ackermann et al., 2019;
TD3: Fujimoto et al., 2018). In the particle tasks every agent has twin critics of its own; in
MuJoCo the team, whose reward is shared, has one pair, which sees the robot's state. Exploration
noise is twice the recorded one, which takes half the time. A penalty on the squared pre-tanh
outputs keeps actions from saturating, which ends learning in simple_spread. What is checked and
saved are the target policies, whose returns fluctuate less.

    python data/train_behavior.py --task simple_tag

ends at the return of GOALS or after --train-steps, and writes runs/behavior/simple_tag.npz; the
collectors use data/behavior/simple_tag.npz. Tasks without public data, as simple_spread-5, end
after --train-steps. The training is saved on the way, and a stopped one goes on from there.
"""

import math
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from card import PUBLIC_RETURNS
from collect_mpe import Behavior, find_prey, roll_out
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mpe import MPE, Critic, fail_as

ROOT = Path(__file__).resolve().parents[1]
SAVE_INTERVAL = 4  # checks
GOALS = {task: means["expert"] for task, means in PUBLIC_RETURNS.items()}  # returns to stop at
GOALS["Ant-2x4"] = 2_600.0  # that of the public data walks slowly


@dataclass
class Args:
    task: str = "simple_tag"
    """a particle task, as simple_tag or simple_spread-5, or <robot>-<partition> of MaMuJoCo"""
    seed: int = 0
    """seed of networks, initial states and noise, 0 or more"""
    noise: float = 0.1
    """standard deviation of the noise in the recorded data, 0 to 1; exploration has twice that"""
    train_steps: int = 2_000_000
    """environment steps at most"""
    out: Path | None = None
    """file to write; by default runs/behavior/<task>.npz of the repository"""
    data_dir: Path = ROOT / "data"
    """folder with <task>/prey.npz, which is made if it is missing"""


@dataclass
class Settings:
    """Of a suite: here of the particle tasks."""

    num_envs: int = 100
    check_episodes: int = 1_000
    check_interval: int = 5_000
    warm_up: int = 20_000  # steps of random actions
    first_update: int = 0
    steps_per_update: int = 50
    policy_delay: int = 1  # critic updates for one of the policy
    recent: int = 300_000  # transitions that batches come from
    batch_size: int = 512
    hidden_dims: tuple[int, int] = (128, 128)
    gamma: float = 0.95
    tau: float = 0.01
    smoothing: float = 0.1
    penalty: float = 0.004


MUJOCO = Settings(
    num_envs=16,
    check_episodes=30,
    check_interval=20_000,
    warm_up=10_000,
    first_update=10_000,
    steps_per_update=8,  # a step costs little beside an update
    policy_delay=2,
    recent=2_000_000,
    batch_size=256,
    hidden_dims=(256, 256),
    gamma=0.99,
    tau=0.005,
    smoothing=0.2,
    penalty=0.001,
)


def is_particles(task: str) -> bool:
    """Whether a task's name is one of the particle environments', or would be."""
    return task.startswith("simple_")


def make_envs(args: Args, settings: Settings) -> tuple:
    """The environments to train in and to check in."""
    sizes, seeds = (settings.num_envs, settings.check_episodes), (args.seed, args.seed + 1)
    if is_particles(args.task):
        envs = tuple(MPE(args.task, *pair) for pair in zip(sizes, seeds, strict=True))
        for env in envs:
            env.prey_policy, _ = find_prey(args.task, args.data_dir)
        return envs
    from om2p_mamujoco import MaMuJoCo

    return tuple(MaMuJoCo(args.task, *pair) for pair in zip(sizes, seeds, strict=True))


def joint(x: Tensor) -> Tensor:
    """What all agents see or do, side by side: (N, B, dim) -> (B, N * dim)."""
    return x.transpose(0, 1).flatten(1)


def mean_return(env, policy: Behavior | None, noise: float) -> float:
    """Mean over the episodes of a roll-out, and over agents."""
    reward = roll_out(env, policy, noise)["reward"]
    return float(reward.mean(axis=0, dtype=float).sum() / env.num_episodes)


def choose_stages(returns: np.ndarray, random: float, public: dict, by_mean: bool) -> dict:
    """Which of the snapshots, whose returns are given, make up replay, medium and expert.

    expert: the best; medium: the one on the way that is nearest to the public medium's return or,
    without public data, to half of the way from random to the best. replay: up to 12, evenly apart,
    from the start to medium, or `by_mean` to where their mean is nearest to the public replay's.
    """
    best = int(np.argmax(returns))
    half = public.get("medium", (random + returns[best]) / 2)
    reached = int(np.argmax(returns >= half)) if returns[best] >= half else best
    last = middle = int(np.argmin(np.abs(returns[: reached + 1] - half)))
    if by_mean and public:
        means = np.cumsum(returns) / np.arange(1, len(returns) + 1)
        last = int(np.argmin(np.abs(means[: best + 1] - public["medium-replay"])))
    replay = sorted({round(k) for k in np.linspace(0, last, 12)})
    return {"replay": replay, "medium": [middle], "expert": [best]}


def train(args: Args) -> Path:
    """Train, save the stages as `collect_mpe.load_behavior` reads them, and return the file."""
    is_mpe = is_particles(args.task)
    settings, public = Settings() if is_mpe else MUJOCO, PUBLIC_RETURNS.get(args.task, {})
    total, goal = args.train_steps, GOALS.get(args.task, math.inf)
    if args.seed < 0 or not 0 <= args.noise <= 1 or total < settings.check_interval:
        least = settings.check_interval
        raise SystemExit(
            f"error: --seed >= 0, 0 <= --noise <= 1, --train-steps >= {least} must hold"
        )
    out = args.out or ROOT / "runs" / "behavior" / f"{args.task}.npz"
    saved = out.with_suffix(".training.pt")
    with fail_as(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    env, check_env = make_envs(args, settings)
    if not public:
        print(f"no public return of {args.task} to stop at: {total:,} steps", flush=True)
    N, obs_dim, action_dim = env.num_agents, max(env.obs_dims), max(env.action_dims)
    mask = torch.zeros(N, 1, action_dim)  # 0 where an agent's action is padding
    for i, width in enumerate(env.action_dims):
        mask[i, :, :width] = 1

    def get_state(obs: np.ndarray) -> np.ndarray:
        """What critics see, (K, state_dim)."""
        if is_mpe:
            return joint(torch.from_numpy(obs)).numpy()
        return np.stack([part.state() for part in env.envs]).astype(np.float32)

    state_dim = get_state(env.reset(args.seed)).shape[1]
    M = N if is_mpe else 1  # pairs of critics, each of which changes its own agents' actions
    own = torch.eye(N, dtype=torch.bool) if is_mpe else torch.ones(1, N, dtype=torch.bool)
    policy = Behavior(N, obs_dim, action_dim)
    critic = Critic(M, state_dim, N * action_dim, settings.hidden_dims)
    target_policy, target_critic = deepcopy(policy), deepcopy(critic)
    policy_optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    capacity = min(settings.recent, total + settings.num_envs)
    shapes = {"obs": (N, obs_dim), "next_obs": (N, obs_dim), "action": (N, action_dim)}
    shapes |= {"state": (state_dim,), "next_state": (state_dim,), "reward": (M,), "done": ()}
    buffer = {key: torch.zeros(capacity, *shape) for key, shape in shapes.items()}

    def update(with_policy: bool) -> None:
        index = torch.randint(min(step, capacity), (settings.batch_size,))
        batch = {key: values[index] for key, values in buffer.items()}
        obs, next_obs, action = (batch[k].transpose(0, 1) for k in ("obs", "next_obs", "action"))
        state, next_state = (batch[k].expand(M, -1, -1) for k in ("state", "next_state"))
        with torch.no_grad():
            next_action = target_policy.act(next_obs)
            smoothing = settings.smoothing * torch.randn_like(next_action)
            next_action = mask * (next_action + smoothing.clamp(-0.5, 0.5)).clamp(-1, 1)
            next_q = target_critic(next_state, joint(next_action).expand(M, -1, -1)).amin(dim=0)
            target = 0.1 * batch["reward"].T + settings.gamma * (1 - batch["done"]) * next_q
        q = critic(state, joint(action).expand(M, -1, -1))
        critic_optimizer.zero_grad()
        F.mse_loss(q, target.expand_as(q), reduction="none").mean(dim=-1).sum().backward()
        critic_optimizer.step()
        if not with_policy:
            return
        logits = mask * policy.net(obs)
        mixed = torch.where(own[..., None, None], logits.tanh(), action)  # (M, N, B, action_dim)
        critic.requires_grad_(False)
        q = critic(state, mixed.transpose(1, 2).flatten(2))[0].mean(dim=-1).sum()
        policy_optimizer.zero_grad()
        (settings.penalty * M / N * logits.square().mean(dim=(1, 2)).sum() - q).backward()
        policy_optimizer.step()
        critic.requires_grad_(True)
        with torch.no_grad():
            for slow, fast in ((target_policy, policy), (target_critic, critic)):
                slow, fast = list(slow.parameters()), list(fast.parameters())
                torch._foreach_lerp_(slow, fast, settings.tau)

    step, updates, returns, snapshots = 0, 0, [], []
    parts = [policy, critic, target_policy, target_critic, policy_optimizer, critic_optimizer]
    fixed = {
        key: str(value) for key, value in asdict(args).items() if key not in ("out", "data_dir")
    }
    if saved.exists():
        with fail_as(f"{saved} is of another training, remove it to begin anew"):
            state = torch.load(saved, weights_only=True)
            if state["fixed"] != fixed:
                raise ValueError(f"with {state['fixed']}")
            for part, values in zip(parts, state["parts"], strict=True):
                part.load_state_dict(values)
            for key, values in state["buffer"].items():
                buffer[key][: len(values)] = values
            for weights in state["snapshots"]:
                snapshots.append(Behavior(N, obs_dim, action_dim))
                snapshots[-1].load_state_dict(weights)
            step, updates, returns = state["step"], state["updates"], state["returns"]
            torch.set_rng_state(state["rng"])

    def save() -> None:
        state = {"fixed": fixed, "parts": [part.state_dict() for part in parts]}
        state |= {"step": step, "updates": updates, "returns": returns}
        state |= {"snapshots": [x.state_dict() for x in snapshots], "rng": torch.get_rng_state()}
        state["buffer"] = {key: values[:step].clone() for key, values in buffer.items()}
        torch.save(state, saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").replace(saved)

    obs, t, never = env.reset((args.seed, step)), 0, np.zeros(env.num_episodes, bool)
    bar = tqdm(total=total, initial=step, unit="step", unit_scale=True, disable=None)
    while step < total and max(returns, default=-math.inf) < goal:
        if step >= settings.check_interval * len(returns):
            snapshots.append(deepcopy(target_policy).half().float())  # as it will be stored
            returns.append(mean_return(check_env, snapshots[-1], args.noise))
            bar.set_postfix_str(f"return {returns[-1]:.1f}")
            if len(returns) % SAVE_INTERVAL == 0:
                save()
        alive = np.flatnonzero(~getattr(env, "done", never))
        rows, state = (step + np.arange(len(alive))) % capacity, get_state(obs)
        with torch.no_grad():
            if step < settings.warm_up:
                action = 2 * torch.rand(N, env.num_episodes, action_dim) - 1
            else:
                action = policy.act(torch.from_numpy(obs), 2 * args.noise)
        action = (mask * action).numpy()
        next_obs, reward = env.step(action)
        done = getattr(env, "done", never)
        columns = {"obs": obs, "next_obs": next_obs, "action": action, "reward": reward[:M]}
        columns = {key: values.swapaxes(0, 1) for key, values in columns.items()}
        columns |= {"state": state, "next_state": get_state(next_obs), "done": done}
        for key, values in columns.items():
            buffer[key][rows] = torch.from_numpy(values[alive]).float()
        obs, t, step = next_obs, t + 1, step + len(alive)
        if over := done.all() or t == env.horizon:
            obs, t = env.reset(), 0
        while (
            over or not is_mpe
        ) and updates * settings.steps_per_update < step - settings.first_update:
            update(with_policy=updates % settings.policy_delay == 0)
            updates += 1
        bar.update(step - bar.n)
    bar.close()

    random = mean_return(check_env, None, 0.0)
    stages, arrays = choose_stages(np.array(returns), random, public, not is_mpe), {}
    for stage, chosen in stages.items():
        weights = zip(*(snapshots[c].parameters() for c in chosen), strict=True)
        weights = [torch.stack(x).detach().half().numpy() for x in weights]
        arrays |= {f"{stage}_{k}": values for k, values in enumerate(weights)}
        arrays[f"{stage}_step"] = settings.check_interval * np.array(chosen)
    part = out.with_suffix(".tmp.npz")
    np.savez_compressed(part, **arrays)
    part.replace(out)
    saved.unlink(missing_ok=True)
    means = {stage: np.mean([returns[c] for c in chosen]) for stage, chosen in stages.items()}
    words = ", ".join(f"{stage} {mean:.1f}" for stage, mean in {"random": random, **means}.items())
    print(f"{out}: {words}, {step:,} steps; to record data with it, put it into data/behavior/")
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)  # small networks gain nothing from more
    try:
        train(tyro.cli(Args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last save") from None

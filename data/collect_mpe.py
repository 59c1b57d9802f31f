"""Make the MPE datasets of the offline multi-agent benchmark: OMAR's recipe, OMAR's files.

OMAR (Pan et al., ICML 2022) recorded multi-agent TD3 at three stages: untrained (`random`: uniform
actions), partly trained (`medium`) and trained (`expert`), with Gaussian exploration noise of 0.1;
`medium-replay` is the replay buffer of the training up to `medium`. This script does the same with
the behaviour policies in `data/behavior/`, which `data/train_behavior.py` has trained; in place of
a replay buffer it rolls out snapshots taken evenly over the training up to `medium`. The mixtures
`medium-expert` and `random-medium` are the first 90 % of one dataset, then the first 10 % of the
other, as in OM2P's release. `multi-expert` has N teams in equal shares: the expert team under each
cyclic permutation of its agents. These have the same return, by other conventions of who does what.

    python data/collect_mpe.py --task simple_spread --quality expert --seed 0

Teams of another size, as simple_spread-5, have `random` data at once; for other qualities their
behaviour is trained first, by the command that the error names.
A dataset goes to data/<task>/<quality>/seed_<seed>_data/ as {obs,acs,rews,next_obs,dones}_{i}.npy,
float32, episodes of 25 rows one after the other, `dones` all zero as in the public data, with a
card in `card.json`. The same seed gives the same bytes on the same platform.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from card import PUBLIC_RETURNS, episode_returns, find_ends, print_card
from convert_prey import read_original, write_prey
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mpe import FILES, MPE, fail_as, load_dataset, load_prey, mlp

BEHAVIOR_DIR = Path(__file__).resolve().parent / "behavior"
MIXTURES = {"medium-expert": ("medium", "expert"), "random-medium": ("random", "medium")}
Quality = Literal["random", "medium-replay", "medium", "expert", "medium-expert", "random-medium"]


@dataclass
class Args:
    task: str = "simple_spread"
    """simple_spread, simple_tag, simple_world, or simple_spread-5 with five agents and targets"""
    quality: Literal[Quality, "multi-expert"] = "expert"
    """whose behaviour is recorded"""
    seed: int = 0
    """seed of initial states and noise, 0 or more; part of the dataset's path"""
    num_transitions: int = 100_000
    """transitions of every agent, a multiple of 25; the public data have 1,000,000"""
    noise: float = 0.1
    """standard deviation of the exploration noise on actions in [-1, 1], 0 to 1"""
    data_dir: Path = Path(__file__).resolve().parent
    """folder of the datasets"""


class Behavior(nn.Module):
    """A team of deterministic policies, a_i = tanh(net_i(o_i)), and exploration noise on them."""

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims=(128, 128)):
        super().__init__()
        self.net = mlp((num_agents,), obs_dim, hidden_dims, action_dim)

    def act(self, obs: Tensor, noise_sd: float = 0.0) -> Tensor:
        """(N, B, obs_dim) -> actions (N, B, action_dim) in [-1, 1]."""
        action = self.net(obs).tanh()
        return (action + noise_sd * torch.randn_like(action)).clamp(-1, 1)


class Permuted:
    """The team whose agent i does what agent (i + shift) mod N of another team would in its place.

    The particle tasks treat their learners alike, so that both teams have the same return. (The
    prey's network does not quite, which returns do not show.)
    """

    def __init__(self, team: Behavior, shift: int, env: MPE):
        self.team, self.shift, N = team, shift, env.num_agents
        self.agents = [(role - shift) % N for role in range(N)]  # who acts as agent `role`
        others = 4 + 2 * env.landmarks.shape[1]  # where in the observations they begin
        self.columns = torch.arange(max(env.obs_dims)).repeat(N, 1)
        for role, i in enumerate(self.agents):
            roles = [other for other in range(N) if other != role]
            places = [self.agents[other] - (self.agents[other] > i) for other in roles]
            places = torch.tensor([2 * place + axis for place in places for axis in range(2)])
            self.columns[role, others : others + len(places)] = others + places

    def act(self, obs: Tensor, noise_sd: float = 0.0) -> Tensor:
        """(N, B, obs_dim) -> actions (N, B, action_dim) in [-1, 1]."""
        pairs = zip(self.agents, self.columns, strict=True)
        roles = torch.stack([obs[i][:, columns] for i, columns in pairs])
        return self.team.act(roles, noise_sd).roll(-self.shift, dims=0)


def load_behavior(task: str, quality: str, env) -> list[Behavior | Permuted | None]:
    """The policies whose roll-outs make up a dataset, in the order of training; None is random.

    data/behavior/<task>.npz holds `replay_<k>`, `medium_<k>` and `expert_<k>`: parameter k, weights
    and biases in turn, of that stage's snapshots, (snapshots, N, ...) in float16, and in
    `<stage>_step` the environment steps that they were trained for.
    """
    if quality == "random":
        return [None]
    stage, path, policies = quality.rpartition("-")[2], BEHAVIOR_DIR / f"{task}.npz", []
    remedy = f"`python data/train_behavior.py --task {task} --out {path}` makes it"
    with fail_as(f"{path} cannot be used; {remedy}"), np.load(path) as file:
        parameters = [torch.from_numpy(file[f"{stage}_{k}"]).float() for k in range(6)]
        for snapshot in zip(*parameters, strict=True):
            policies.append(Behavior(env.num_agents, max(env.obs_dims), max(env.action_dims)))
            for weights, values in zip(policies[-1].parameters(), snapshot, strict=True):
                weights.data = values
    if quality == "multi-expert":
        return [Permuted(policies[0], shift, env) for shift in range(env.num_agents)]
    return policies


def find_prey(task: str, data_dir: Path) -> tuple[Callable | None, str]:
    """The policy of the prey, data_dir/task/prey.npz, and whose it is.

    A missing one is made: of OMAR's checkpoint if it is there, else of this project's fit of it.
    """
    if task.startswith("simple_spread"):
        return None, "none"
    path, own = data_dir / task / "prey.npz", dict(np.load(BEHAVIOR_DIR / f"{task}_prey.npz"))
    original = path.with_name("pretrained_adv_model.pt")
    if not path.exists():
        write_prey(path, read_original(original) if original.is_file() else own)
    prey_policy = load_prey(path)
    with np.load(path) as file:
        is_own = all(np.array_equal(file[key], own[key]) for key in own)
    return prey_policy, "this project's fit of OMAR's" if is_own else "that of prey.npz"


@torch.no_grad()
def roll_out(env, policy: Behavior | None, noise_sd: float) -> dict[str, np.ndarray]:
    """Play K episodes to their end, which act at random if there is no policy.

    Returns float32 arrays (N, rows, ...) under `load_dataset`'s names, episode after episode.
    """
    obs, rows, alive, over = env.reset(), [], [], np.zeros(env.num_episodes, bool)
    while len(rows) < env.horizon and not over.all():
        alive.append(~over)
        if policy is None:
            action = 2 * torch.rand(env.num_agents, env.num_episodes, max(env.action_dims)) - 1
        else:
            action = policy.act(torch.from_numpy(obs), noise_sd)
        next_obs, reward = env.step(action.numpy())
        over = getattr(env, "done", over)
        rows.append((obs, action.numpy(), reward, next_obs, np.tile(over, (env.num_agents, 1))))
        obs = next_obs
    alive = np.stack(alive, axis=1)  # (K, steps)
    columns = [np.stack(column, axis=2)[:, alive] for column in zip(*rows, strict=True)]
    return {key: x.astype(np.float32, copy=False) for key, x in zip(FILES, columns, strict=True)}


def new_folder(args) -> Path:
    """Where a dataset is to be written; one that is there already is left as it is."""
    folder = args.data_dir / args.task / args.quality / f"seed_{args.seed}_data"
    if args.seed < 0:
        raise SystemExit(f"error: --seed is {args.seed}; it must be 0 or more")
    if folder.exists():
        raise SystemExit(f"error: {folder} is there already; --data-dir can name another place")
    return folder


def write_dataset(folder: Path, data: dict, card: dict) -> None:
    """Write OMAR's files of {key: (T, ...) of every agent} and the card: all of it, or nothing."""
    with fail_as(f"{folder} cannot be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
            (part := Path(place, "data")).mkdir()
            for key, agents in data.items():
                for i, values in enumerate(agents):
                    np.save(part / f"{FILES[key]}_{i}.npy", values)
            (part / "card.json").write_text(json.dumps(card, indent=2) + "\n")
            part.rename(folder)


def is_foreign(folder: Path) -> bool:
    """Whether these data are there, but not a collector's, whose cards tell the behaviour."""
    card = folder / "card.json"
    return folder.is_dir() and not (card.is_file() and '"behaviour"' in card.read_text())


def collect(args, env, record: Callable, prey: str = "none") -> dict:
    """Write one dataset and return its card; `record(policies)` rolls policies out.

    A mixture is made of roll-outs of its own, the same as its parts'. If both parts are there and
    not from here, as public data, it is made of those.
    """
    folder, names = new_folder(args), MIXTURES.get(args.quality, (args.quality,))
    if not (0 <= args.noise <= 1 and args.num_transitions > 0):
        raise SystemExit("error: --noise must be from 0 to 1, --num-transitions positive")
    if len(names) == 2 and all(
        is_foreign(folder.parents[1] / name / folder.name) for name in names
    ):
        where, actors = (args.data_dir, args.task), ["the data that are there"] * 2
        parts = [load_dataset(*where, name, [args.seed], env) for name in names]
        parts = [{key: values.numpy() for key, values in part.items()} for part in parts]
    else:
        teams = [load_behavior(args.task, name, env) for name in names]
        parts = [record(team) for team in teams]
        known = f"snapshot(s) of MATD3, exploration noise {args.noise}"
        actors = [f"{len(team)} {known}" if team[0] else "random actions" for team in teams]
        if args.quality == "multi-expert":
            actors = [f"{len(teams[0])} permutations of the agents of 1 {known}"]
    shares = (0.9, 0.1) if len(names) == 2 else (1.0,)
    sizes = [round(x * part["obs"].shape[1]) for x, part in zip(shares, parts, strict=True)]
    data = {
        key: np.concatenate([p.pop(key)[:, :n] for p, n in zip(parts, sizes, strict=True)], axis=1)
        for key in FILES
    }
    done = data["done"].any(axis=0)
    goes_on = (data["next_obs"][:, :-1] == data["obs"][:, 1:]).all(axis=(0, 2))
    ends = find_ends(done, goes_on, env.horizon)
    returns = episode_returns(data["reward"].mean(axis=0), done, ends, env.horizon)
    if not len(returns):
        raise SystemExit(f"error: --num-transitions {args.num_transitions} is less than an episode")
    card = {
        "dataset": f"{args.task}, {args.quality}, seed {args.seed}",
        "behaviour": "; ".join(
            f"{n} rows of {name}: {a}" for n, name, a in zip(sizes, names, actors, strict=True)
        ),
        "prey": prey,
        "transitions": sum(sizes),
        "episodes": len(returns),
        "return mean": round(float(returns.mean()), 2),
        "return sd": round(float(returns.std()), 2),
        "public data's return mean": PUBLIC_RETURNS.get(args.task, {}).get(args.quality),
        "command": f"python data/{env.collector} --task {args.task} --quality {args.quality} "
        f"--seed {args.seed} --num-transitions {args.num_transitions} --noise {args.noise}",
        "versions": f"torch {torch.__version__}, numpy {np.__version__}",
    }
    if args.quality == "multi-expert":  # an episode's first observations do not tell the team
        first = torch.from_numpy(data["obs"][:, :: env.horizon])
        one, two = (team.act(first) for team in teams[0][:2])
        apart = f"{(one - two).norm(dim=-1).median():.2f}"
        card["actions of two teams"] = f"{apart} apart, median over agents and first observations"
    for key, dims in (
        ("obs", env.obs_dims),
        ("next_obs", env.obs_dims),
        ("action", env.action_dims),
    ):
        data[key] = [x[:, :width] for x, width in zip(data[key], dims, strict=True)]  # no padding
    write_dataset(folder, data, card)
    return card


def collect_mpe(args: Args) -> dict:
    """Write one dataset and return its card."""
    if args.num_transitions % MPE.horizon:
        raise SystemExit(f"error: --num-transitions must be a multiple of {MPE.horizon}")
    env = MPE(args.task, 1)
    prey_policy, prey = find_prey(args.task, args.data_dir)

    def record(policies: list) -> dict[str, np.ndarray]:
        """Equal shares of the episodes, in chunks of at most 4,000, which keeps memory low."""
        torch.manual_seed(args.seed)
        num_episodes = args.num_transitions // MPE.horizon
        shares = np.diff(np.linspace(0, num_episodes, len(policies) + 1).astype(int))
        parts = [
            (policy, min(4_000, share - start))
            for policy, share in zip(policies, shares, strict=True)
            for start in range(0, share, 4_000)
        ]
        chunks = []
        for k, (policy, size) in enumerate(tqdm(parts, desc="roll-outs", disable=None)):
            world = MPE(args.task, size, (args.seed, k), prey_policy)
            chunks.append(roll_out(world, policy, args.noise))
        return {key: np.concatenate([chunk.pop(key) for chunk in chunks], axis=1) for key in FILES}

    return collect(args, env, record, prey)


def main(collect: Callable, args) -> None:
    """Make a dataset and print its card."""
    torch.set_num_threads(1)  # small networks gain nothing from more, and sums keep their order
    try:
        print_card(collect(args))
    except KeyboardInterrupt:
        raise SystemExit("stopped; no dataset was written") from None


if __name__ == "__main__":
    main(collect_mpe, tyro.cli(Args))

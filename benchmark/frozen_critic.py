"""Train policies by one and the same frozen critic: what each method's policy makes of it.

    python benchmark/frozen_critic.py

On random data of simple_spread all recorded behaviour is equally poor, and a policy is as good as
it follows its critic. MA-TD3+BC is trained there. Its critic then stands still, and each method's
policy learns from it by its own loss. Writes every team's score to
benchmark/results/frozen_critic.csv, and that of the best of 64 uniform actions by the critic. Its
column `linear` is a share of the variance of the mean action over recorded observations: what a
linear function of the observation explains. For the critic it is that of its gradient at action 0.
Finished runs are not run again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from efficiency import load_script  # noqa: E402
from run import METHODS, write_table  # noqa: E402

from om2p_mpe import MPE, Critic, evaluate, normalized_score  # noqa: E402

TASK, QUALITY, HIDDEN_DIMS = "simple_spread", "random", (128, 128)


@dataclass
class Args:
    methods: tuple[str, ...] = (
        "td3_bc",
        "om2p --cql-alpha 0",
        "om2p --cql-alpha 0 --q-weight 8",
        "om2p --cql-alpha 0 --q-weight 128",
        "diffusion_ql",
        "flow_ql",
        "fql",
    )
    """scripts, with settings; OM2P without its conservative term, which would move the critic"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of data, critic and policy"""
    num_updates: int = 4_000
    """of the critic, and of every policy"""
    episodes: int = 1_000
    """evaluation episodes of each"""
    data_dir: Path = Path("data")
    """folder of the datasets"""
    run_dir: Path = Path("runs/benchmark/frozen_critic")
    """where the runs are"""


class Greedy:
    """The best by a critic of `samples` uniform actions."""

    def __init__(self, critic: Critic, samples: int = 64):
        self.critic, self.samples = critic, samples

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(N, B, obs_dim) -> actions in [-1, 1], (N, B, action_dim)."""
        action = 2 * torch.rand(*obs.shape[:-1], self.samples, 2) - 1  # (N, B, samples, 2)
        many = obs.repeat_interleave(self.samples, dim=1)
        q = self.critic(many, action.flatten(1, 2)).mean(dim=0).unflatten(1, (-1, self.samples))
        best = q.argmax(dim=-1)[..., None, None].expand(-1, -1, 1, 2)
        return action.gather(2, best).squeeze(2)


def freeze(module, critic: Critic) -> None:
    """Give a script this critic, and losses of critics without gradient."""

    def still(critic, target_critic, policy, batch, *_):
        q = critic(batch["obs"], batch["action"])
        return 0 * q.sum(), q

    module.Critic = lambda *_: critic
    module.critic_loss = still
    module.conservative_term = lambda critic, policy, batch, q, args: 0 * q.sum()


def linear_share(obs: torch.Tensor, values: torch.Tensor) -> float:
    """R^2 of a linear regression of values (N, B, D) on obs (N, B, obs_dim), mean over N and D."""
    x = torch.cat([obs, torch.ones_like(obs[..., :1])], dim=-1).double()
    values = values.double()
    residual = values - x @ (torch.linalg.pinv(x) @ values)
    return float((1 - residual.var(dim=1) / values.var(dim=1)).mean())


def main(args: Args) -> None:
    """Train and measure all, one after another."""
    for method in args.methods:
        if method.split()[0] not in METHODS:
            raise SystemExit(f"error: --methods has {method}; scripts are {', '.join(METHODS)}")
    torch.set_num_threads(1)
    env, rows = MPE(TASK, args.episodes), []
    for seed in args.seeds:
        settings = {"task": TASK, "quality": QUALITY, "seed": seed, "num_updates": args.num_updates}
        settings |= {"device": "cpu", "compile": False, "resume": True, "hidden_dims": HIDDEN_DIMS}
        settings |= {"data_dir": args.data_dir, "run_dir": args.run_dir}
        module = load_script("td3_bc")
        module.train(module.Args(**settings, name="critic"))
        run = args.run_dir / f"{TASK}-{QUALITY}" / "td3_bc_mpe-critic" / f"seed-{seed}"
        weights = torch.load(run / "checkpoint.pt", weights_only=True)["parts"][1]
        obs = module.load_dataset(args.data_dir, TASK, QUALITY, [seed], env)["obs"]
        obs = obs[:, torch.randperm(obs.shape[1])[:10_000]]
        critic = Critic(env.num_agents, obs.shape[-1], 2, HIDDEN_DIMS)
        critic.load_state_dict(weights)

        def add(method: str, policy, values: torch.Tensor, seed=seed, obs=obs) -> None:
            score = normalized_score(TASK, evaluate(policy, [env], [seed]).mean())
            row = {"method": method, "seed": seed, "score": round(float(score), 2)}
            rows.append(row | {"linear": round(linear_share(obs, values), 3)})

        action = torch.zeros(*obs.shape[:-1], 2, requires_grad=True)
        (gradient,) = torch.autograd.grad(critic(obs, action).sum(), action)
        add("critic", Greedy(critic), gradient)

        for method in args.methods:
            name, *options = method.split()
            module = load_script(name)
            freeze(module, critic)
            run_name = "-".join(["frozen", *options]).replace("--", "")
            default = module.Args(**settings, name=run_name)
            policy, _ = module.train(tyro.cli(module.Args, args=options, default=default))
            with torch.no_grad():
                many = torch.stack([policy.act(obs) for _ in range(32)])
            add(method, policy, many.mean(dim=0))
            for key, value in weights.items():
                assert critic.state_dict()[key].equal(value), f"{method} has moved the critic"
    write_table(ROOT / "benchmark" / "results" / "frozen_critic.csv", rows)


if __name__ == "__main__":
    main(tyro.cli(Args))

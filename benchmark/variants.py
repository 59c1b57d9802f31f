"""OM2P with one of its choices made otherwise, and rivals with one of OM2P's; no baselines.

    python benchmark/variants.py --task simple_spread --quality medium --variant released

no-derivative      the target is v for every interval: no du/dr, plain flow matching
q-at-noise         the Q term's actions are those from noise, r = 0, alone, as in the paper
released           loss and action of the authors' release (docs/algorithm.md, differences 1 and 2),
                   and the Q term at noise; times and everything else are as here
penalty            the squared distance of actions to the box [-1, 1] is added to the policy's loss
smaller-q          the TD target takes the smaller critic's value, as in TD3, not the mean of both
two-networks       to u is added (t - r) w(o), where w sees the observation alone
conservative       the critics' loss gets the term of OMAR's and DOM2's, ten uniform actions and the
                   policy's own, with its weight there; for --cql-alpha 0
cql                for other methods, as --method fql: the critics' loss gets OM2P's conservative
                   term, one uniform action with OM2P's weight

Two more, whose cost alone is measured, by benchmark/efficiency.py: layers agent by agent, and du/dr
from the batch's Jacobian.
"""

import importlib
import sys
from dataclasses import dataclass, make_dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]
import dom2_mpe  # noqa: E402

import om2p_mpe  # noqa: E402
from om2p_mpe import MeanFlowPolicy  # noqa: E402

om2p_policy_loss, om2p_critic_loss = om2p_mpe.policy_loss, om2p_mpe.critic_loss


METHODS = ("om2p", "td3_bc", "diffusion_ql", "flow_ql", "fql")
OF_OM2P = ("no-derivative", "q-at-noise", "released", "penalty", "smaller-q", "conservative")
OF_OM2P += ("two-networks",)


@dataclass
class Choice:
    method: Literal[METHODS] = "om2p"
    """whose script is changed; its other flags follow"""
    variant: Literal[(*OF_OM2P, "cql")] = "released"
    """what is made otherwise"""


def squared_error(u, target):
    """Mean over batch and action components, sum over agents."""
    return F.mse_loss(u, target, reduction="none").mean(dim=(1, 2)).sum()


def no_derivative_loss(policy, obs, action, noise, r, t, *_):
    """|| u(x_r, r, t) - v ||^2, arguments and scale as `mean_flow_loss`."""
    x, v = (1 - r) * noise + r * action, action - noise
    return squared_error(policy(obs, x, r, t), v)


def released_loss(policy, obs, action, noise, r, t, *_):
    """The release's loss: x at the interval's end, and a difference quotient with step 1e-12.

    In float32 the quotient is zero, since the step vanishes next to x and t.
    """
    x, v, step = (1 - t) * noise + t * action, action - noise, 1e-12
    u = policy(obs, x, r, t)
    with torch.no_grad():
        du_dt = (policy(obs, x + step * v, r, t + step) - u) / step
        target = v - (r - t) * du_dt
    return squared_error(u, target)


def q_at_noise_loss(policy, critic, batch, args):
    """OM2P's loss with the actions that the policy plays in the Q term."""
    flow, parts = om2p_policy_loss(policy, critic, batch, replace(args, q_weight=0.0))
    q = critic(batch["obs"], policy.act(batch["obs"])).mean(dim=0)
    q_term = (q.mean(dim=-1) / q.abs().mean(dim=-1).detach()).sum()
    return flow - args.q_weight * q_term, parts


class ReleasedPolicy(MeanFlowPolicy):
    """A mean-flow policy that acts as the release does: u(noise, 0, 1), without the noise."""

    def act(self, obs, noise=None):
        """(N, B, obs_dim) -> (N, B, action_dim)."""
        if noise is None:
            noise = torch.randn(*obs.shape[:-1], self.mask.shape[-1], device=obs.device)
        r, t = torch.zeros_like(noise[..., :1]), torch.ones_like(noise[..., :1])
        return self.mask * self(obs, noise, r, t).clamp(-1, 1)


class FreePolicy(MeanFlowPolicy):
    """A mean-flow policy that keeps the end of the last path before the clip, as `free`."""

    def forward(self, obs, x, r, t):
        """Shapes as in `MeanFlowPolicy`."""
        u = super().forward(obs, x, r, t)
        self.free = x + (1 - r) * u
        return u


class TwoNetworks(MeanFlowPolicy):
    """u(x_r, r, t | o) + (t - r) w(o): a second network, half as wide, sees observations alone.

    It is the critic's to use: where r = t, and u is the data's velocity, it has no part.
    """

    def __init__(self, num_agents: int, obs_dim: int, action_dim: int, hidden_dims):
        super().__init__(num_agents, obs_dim, action_dim, hidden_dims)
        half = [width // 2 for width in hidden_dims]
        self.shift = om2p_mpe.mlp((num_agents,), obs_dim, half, action_dim)

    def forward(self, obs, x, r, t):
        """Shapes as in `MeanFlowPolicy`."""
        return super().forward(obs, x, r, t) + (t - r) * self.shift(obs)


def penalty_loss(policy, critic, batch, args):
    """OM2P's loss plus the squared distance to the box, mean over the batch, sum over agents."""
    loss, parts = om2p_policy_loss(policy, critic, batch, args)
    penalty = squared_error(policy.free, policy.free.clamp(-1, 1))
    return loss + penalty, parts | {"penalty": penalty.detach()}


def conservative_critic_loss(critic, target_critic, policy, batch, gamma):
    """OM2P's loss of the critics, and recorded actions above uniform ones; and Q."""
    rival = dom2_mpe.Args()
    loss, q = om2p_critic_loss(critic, target_critic, policy, batch, gamma)
    gap = dom2_mpe.conservative_term(critic, policy, batch, q, rival)
    return loss + rival.cql_alpha * gap, q


def cql_critic_loss(critic_loss, critic, target_critic, policy, batch, *options):
    """A method's loss of the critics, and OM2P's conservative term; and Q."""
    loss, q = critic_loss(critic, target_critic, policy, batch, *options)
    other = critic(batch["obs"], policy.mask * (2 * torch.rand_like(batch["action"]) - 1))
    return loss + om2p_mpe.Args().cql_alpha * F.softplus(other - q).mean(dim=-1).sum(), q


CHANGES = {
    "no-derivative": {"mean_flow_loss": no_derivative_loss},
    "q-at-noise": {"policy_loss": q_at_noise_loss},
    "released": {
        "mean_flow_loss": released_loss,
        "MeanFlowPolicy": ReleasedPolicy,
        "policy_loss": q_at_noise_loss,
    },
    "penalty": {"policy_loss": penalty_loss, "MeanFlowPolicy": FreePolicy},
    "smaller-q": {"critic_loss": partial(om2p_mpe.critic_loss, aggregate=torch.amin)},
    "conservative": {"critic_loss": conservative_critic_loss},
    "two-networks": {"MeanFlowPolicy": TwoNetworks},
}


class SeparateLinear(nn.Module):
    """`StackedLinear` of one agent as nn.Linear layers: one, or one for each of two critics."""

    def __init__(self, stack: tuple[int, ...], in_dim: int, out_dim: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_dim, out_dim) for _ in range(np.prod(stack)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, B, in_dim) or (2, 1, B, in_dim) -> (1, B, out_dim) or (2, 1, B, out_dim)."""
        if len(self.layers) == 1:
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


def parse(line: list[str]) -> tuple:
    """The script of the method that a command line names, and all settings, with the variant."""
    words = dict(pairwise(" ".join(line).replace("=", " ").split()))
    method = {name: name for name in METHODS}.get(words.get("--method"), "om2p")
    script = importlib.import_module(f"{method}_mpe")
    args = tyro.cli(make_dataclass("Args", [], bases=(Choice, script.Args)), args=line)
    if (method == "om2p") != (args.variant in OF_OM2P):
        raise SystemExit("error: --variant cql is for all methods but om2p, the others for om2p")
    return script, args


def main() -> None:
    """Train the method that is named, changed."""
    script, args = parse(sys.argv[1:])
    cql = {"critic_loss": partial(cql_critic_loss, script.critic_loss)}
    for name, value in CHANGES.get(args.variant, cql).items():
        setattr(script, name, value)
    script.__file__ = __file__  # names the run directory, and is what is copied there
    script.train(args)


if __name__ == "__main__":
    main()

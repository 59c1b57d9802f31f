"""OM2P with other ways to keep actions inside the box [-1, 1], for comparison with the script's.

    python benchmark/box.py --task simple_spread --quality medium --box penalty

The script clips the one-step action: outside the box only mean-flow matching has a gradient.
`penalty` adds the squared distance to the box to the policy's loss; `straight-through` lets the
Q term's gradient pass the clip as if it were not there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import om2p_mpe


@dataclass
class Args(om2p_mpe.Args):
    box: Literal["clip", "penalty", "straight-through"] = "clip"
    """what happens to an action outside [-1, 1] in the Q term"""


class Policy(nn.Module):
    """A mean-flow policy whose `act` treats the box in another way; keeps the unclipped action."""

    def __init__(self, policy: om2p_mpe.MeanFlowPolicy, box: str):
        super().__init__()
        self.policy, self.box = policy, box

    def forward(self, obs, x, r, t):
        """As the policy's."""
        return self.policy(obs, x, r, t)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """(N, B, obs_dim) -> clipped actions (N, B, action_dim)."""
        noise = torch.randn(*obs.shape[:-1], self.policy.action_dim, device=obs.device)
        r, t = torch.zeros_like(noise[..., :1]), torch.ones_like(noise[..., :1])
        self.free = noise + self.policy(obs, noise, r, t)
        clipped = self.free.clamp(-1, 1)
        if self.box == "straight-through":
            return self.free + (clipped - self.free).detach()
        return clipped


def policy_loss(policy, critic, batch, args):
    """OM2P's loss with args.box; the share of actions outside the box is logged as policy_q."""
    wrapped = Policy(policy, args.box)
    loss, flow, _ = om2p_loss(wrapped, critic, batch, args)
    excess = wrapped.free - wrapped.free.clamp(-1, 1)
    if args.box == "penalty":
        loss = loss + excess.square().mean(dim=(-2, -1)).sum()
    return loss, flow, (excess != 0).float().mean()


om2p_loss = om2p_mpe.policy_loss

if __name__ == "__main__":
    om2p_mpe.policy_loss = policy_loss
    om2p_mpe.__file__ = __file__  # names the run directory, and is what is copied there
    om2p_mpe.train(tyro.cli(Args))

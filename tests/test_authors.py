"""Losses against the authors' own code on the same weights, batch and draws, in float64.

tests/fixtures/authors.json has what that code computes, agent by agent, and where it is from;
benchmark/authors.py made it. Networks have the authors' activations and norms here. What else
differs on purpose stands beside the comparison, and in docs/baselines.md.
"""

import importlib
import math
from unittest.mock import patch

import diffusion_ql_mpe as diffusion_ql
import fql_mpe as fql
import made_up
import pytest
import td3_bc_mpe as td3_bc
import torch
import torch.nn.functional as F
from made_up import OBS_DIM, Q_WEIGHT, D, J, N, draws, feed, fill, make_batch, norms, same, theirs
from torch import nn

pytestmark = pytest.mark.usefixtures("double")


def make_networks(policy_class, widths, activation, norm=None):
    """A policy, its slow copy, and such a pair of critics."""
    for name in ("policy", "target_policy"):
        yield fill(policy_class(N, OBS_DIM, D, widths), name, activation)
    names = "critic", "target_critic"
    yield [fill(td3_bc.Critic(N, OBS_DIM, D, widths), x, activation, norm) for x in names]


def check_critics(name, policy, critics, aggregate=torch.amin, scale=1.0, term=lambda q: 0):
    """Targets, losses and gradients; `scale` is ours by the authors', `term` is added to ours.

    `Critic` and `critic_loss` are the same in every script (test_regions.py).
    """
    with patch.object(F, "mse_loss", wraps=F.mse_loss) as mse_loss:
        loss, q = td3_bc.critic_loss(*critics, policy, make_batch(), made_up.GAMMA, aggregate)
    same(mse_loss.call_args.args[1][0], theirs(name, "target"))
    loss = loss + term(q)
    same(loss, scale * theirs(name, "critic").sum())
    loss.backward()
    same(norms(critics[0].net), scale * theirs(name, "critic_grad"))


def check_policy(name, policy, loss, data):
    """The policy's loss and gradient, and the part of the loss that holds it to actions."""
    same(loss, theirs(name, "policy").sum())
    same(data, theirs(name, "data").sum())
    loss.backward()
    same(norms(policy.net), theirs(name, "policy_grad"))


def test_td3_bc():
    """Without the noise on the authors' target action."""
    policy, slow, critics = make_networks(td3_bc.DeterministicPolicy, (256, 256), nn.ReLU())
    check_critics("td3_bc", slow, critics)
    args = td3_bc.Args(q_weight=Q_WEIGHT)
    loss, logs = td3_bc.policy_loss(policy, critics[0], make_batch(), args)
    check_policy("td3_bc", policy, loss, logs["clone"])


def test_diffusion_ql():
    """The step's embedding is the same; the authors' network behind it is given as a table."""
    policy, slow, critics = make_networks(diffusion_ql.DiffusionPolicy, (256,) * 3, nn.Mish())
    for net, name in ((policy, "policy_embedding"), (slow, "target_policy_embedding")):
        same(net.embedding, theirs("diffusion_ql", "embedding")[0])
        net.embedding = theirs("diffusion_ql", name)[0]
    start, chain = draws("start", 2), draws("chain", 11)
    with feed(torch, randn=start[:1], randn_like=chain[:5]):
        check_critics("diffusion_ql", slow, critics)
    args = diffusion_ql.Args(q_weight=Q_WEIGHT)
    other = {"randint": [made_up.steps(5)], "rand_like": [torch.tensor([0.25, 0.75])]}
    with feed(torch, randn=start[1:], randn_like=chain[5:], **other):
        loss, logs = diffusion_ql.policy_loss(policy, critics[0], make_batch(), args)
    check_policy("diffusion_ql", policy, loss, logs["diffusion"])


def test_fql():
    """The authors average over critics, and weigh the distillation by 1 / q_weight, not Q."""
    gelu, norm = nn.GELU("tanh"), nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)
    policy, _, critics = make_networks(fql.OneStepPolicy, (16, 16), gelu, norm)
    fill(policy.flow, "flow", gelu)
    normal, args = draws("normal", 2), fql.Args(q_weight=Q_WEIGHT)
    with feed(torch, randn=normal[:1]):
        check_critics("fql", policy, critics, torch.mean, scale=2.0)
    with feed(torch, randn_like=normal, rand_like=[made_up.times()]):
        loss, logs = fql.policy_loss(policy, critics[0], make_batch(), args)
    flow, distill, q = (theirs("fql", f"{key}_loss") for key in ("bc_flow", "distill", "q"))
    same(logs["flow"], flow.sum())
    same(logs["distill"], distill.sum())
    same(loss, (flow + distill + Q_WEIGHT * q).sum())
    loss.backward()
    same(norms(policy.flow.net), theirs("fql", "flow_grad"))
    same(norms(policy.net), Q_WEIGHT * theirs("fql", "policy_grad"))


@pytest.mark.parametrize("name", ["omar_mpe", "omar_mamujoco"])
def test_omar(name):
    """The search and uniform actions; on MuJoCo no search, and the policy's actions as well.

    Of the particle environments' conservative term the authors' is larger by a constant.
    """
    module, mpe = importlib.import_module(name), name == "omar_mpe"
    policy, slow, critics = make_networks(module.DeterministicPolicy, (16, 16), nn.ReLU())
    args = module.Args(omar_coe=made_up.OMAR_COE if mpe else 0.0, cql_samples=J)
    own, constant = ([], D * math.log(2)) if mpe else ([torch.stack(draws("own", 2, J))], 0.0)

    def term(q):
        with feed(torch, randn=own), feed(torch.Tensor, uniform_=[made_up.uniform()]):
            gap = module.conservative_term(critics[0], policy, make_batch(), q, args)
        same(gap + 2 * N * constant, (theirs(name, "critic") - theirs(name, "td")).sum())
        return gap + 2 * N * constant

    check_critics(name, slow, critics, term=term)
    with feed(torch, randn=draws("search", 3, J) if mpe else []):
        loss, logs = module.policy_loss(policy, critics[0], make_batch(), args)
    check_policy(name, policy, loss, logs["mimic"])

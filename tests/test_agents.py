"""Agents are the leading dimension and learn independently."""

from copy import deepcopy

import numpy as np
import pytest
import torch

import om2p_mpe
from om2p_mpe import Args, Critic, MeanFlowPolicy, critic_loss, policy_loss

N, B, OBS_DIM, ACTION_DIM = 3, 32, 5, 2


def make_batch(seed: int = 0) -> dict:
    """Random transitions, some of them terminal."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, N, B, OBS_DIM)
    done = (torch.rand(N, B) < 0.2).float()
    action, reward = 2 * torch.rand(N, B, ACTION_DIM) - 1, torch.randn(N, B)
    return {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "done": done}


def make_networks():
    """Policy, critic and target critic of different random weights."""
    torch.manual_seed(1)
    sizes = N, OBS_DIM, ACTION_DIM, (16, 16)
    return MeanFlowPolicy(*sizes), Critic(*sizes), Critic(*sizes)


def slice_agent(module, i: int):
    """Agent i's parameters as a module of one agent."""
    single = deepcopy(module)
    for tensor in (*single.parameters(), *single.buffers()):
        tensor.data = tensor.data.narrow(-3, i, 1).clone()  # (..., N, in, out)
    return single


def train_networks(policy, critic, target_critic, batch):
    """Five Adam steps with the script's own losses, as its `update` takes them."""
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    policy_optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    for _ in range(5):
        critic_optimizer.zero_grad()
        critic_loss(critic, target_critic, policy, batch, 0.95)[0].backward()
        critic_optimizer.step()
        policy_optimizer.zero_grad()
        policy_loss(policy, critic, batch, Args())[0].backward()
        policy_optimizer.step()


def share_draws(monkeypatch):
    """Start random numbers that are the same for every agent, so that one agent alone has them."""
    rng = np.random.default_rng(2)

    def normal(*shape, **_):
        return torch.from_numpy(rng.normal(size=shape[-2:])).expand(shape)

    def times(shape, *_):
        draws = torch.from_numpy(rng.uniform(size=(2, *shape[-2:])))
        return (time.expand(shape) for time in draws.sort(dim=0).values)

    monkeypatch.setattr(torch, "randn", normal)
    monkeypatch.setattr(torch, "randn_like", lambda x: normal(*x.shape))
    monkeypatch.setattr(torch, "rand_like", lambda x: next(times(x.shape)))
    monkeypatch.setattr(om2p_mpe, "sample_times", times)


def test_forward_equals_single_agents():
    """Each agent's outputs are those of its own slice of the weights."""
    (policy, critic, _), batch = make_networks(), make_batch()
    inputs = batch["obs"], batch["action"], *torch.rand(2, N, B, 1)
    u, q = policy(*inputs), critic(*inputs[:2])
    assert (u.shape, q.shape) == ((N, B, ACTION_DIM), (2, N, B))
    for i in range(N):
        own = [value[i : i + 1] for value in inputs]
        torch.testing.assert_close(u[i : i + 1], slice_agent(policy, i)(*own))
        torch.testing.assert_close(q[:, i : i + 1], slice_agent(critic, i)(*own[:2]))


def test_forward_by_hand():
    """A stacked layer is x W + b of each agent; hidden ones go through GELU, then layer norm."""
    net = om2p_mpe.mlp((N,), 4, (8,), 2, norm=True).double()
    weights, x = list(net.parameters()), torch.randn(N, B, 4, dtype=torch.float64)
    for i in range(N):
        hidden = torch.nn.functional.gelu(x[i] @ weights[0][i] + weights[1][i])
        hidden -= hidden.mean(dim=-1, keepdim=True)
        hidden = hidden / (hidden.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(net(x)[i], hidden @ weights[2][i] + weights[3][i])


def test_training_equals_single_agents(monkeypatch):
    """Five Adam steps on all agents at once are five Adam steps on each agent alone."""
    networks = [network.double() for network in make_networks()]
    batch = {key: value.double() for key, value in make_batch().items()}
    singles = [[slice_agent(network, i) for network in networks] for i in range(N)]
    share_draws(monkeypatch)
    train_networks(*networks, batch)
    for i, single in enumerate(singles):
        share_draws(monkeypatch)
        train_networks(*single, {key: value[i : i + 1] for key, value in batch.items()})
        for stacked, alone in zip(networks, single, strict=True):
            for a, b in zip(slice_agent(stacked, i).parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["critic", "policy"])
def test_agents_do_not_couple(loss):
    """Other data for one agent change its own gradient and leave the others' exactly as it was."""

    def gradients(batch):
        policy, critic, target_critic = make_networks()
        network = {"critic": critic, "policy": policy}[loss]
        td, _ = critic_loss(critic, target_critic, policy, batch, 0.95)
        (td if loss == "critic" else policy_loss(policy, critic, batch, Args())[0]).backward()
        return [parameter.grad.movedim(-3, 0) for parameter in network.parameters()]  # (N, ...)

    batch, other = make_batch(), make_batch(seed=9)
    before = gradients(batch)
    changed = {key: torch.cat([other[key][:1], value[1:]]) for key, value in batch.items()}
    for a, b in zip(before, gradients(changed), strict=True):
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1:], b[1:])


def test_all_networks_start_different():
    """No two agents, and no two of the twin critics, start with the same weights."""
    policy, critic, _ = make_networks()
    for parameter in (*policy.parameters(), *critic.parameters()):
        each = parameter.flatten(0, -3)  # (N, ...) or (2 N, ...)
        assert len(each.unique(dim=0)) == len(each) >= N

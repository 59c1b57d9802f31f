"""Agents are the leading dimension and learn independently."""

import itertools
from copy import deepcopy

import pytest
import torch

import om2p_mpe
from om2p_mpe import Args, Critic, MeanFlowPolicy, critic_loss, policy_loss

N, B, OBS_DIM, ACTION_DIM, HIDDEN_DIMS = 3, 32, 5, 2, (16, 16)


def make_batch(seed: int = 0) -> dict:
    """Random transitions, some of them terminal."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, N, B, OBS_DIM)
    done = (torch.rand(N, B) < 0.2).float()
    action, reward = 2 * torch.rand(N, B, ACTION_DIM) - 1, torch.randn(N, B)
    return {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "done": done}


def make_networks(num_agents: int = N):
    """Policy, critic and target critic of different random weights."""
    torch.manual_seed(1)
    policy = MeanFlowPolicy(num_agents, OBS_DIM, ACTION_DIM, HIDDEN_DIMS)
    return policy, *(Critic(num_agents, OBS_DIM, ACTION_DIM, HIDDEN_DIMS) for _ in range(2))


def slice_agent(module, i: int):
    """Agent i's parameters as a module of one agent."""
    single = deepcopy(module)
    for parameter in single.parameters():
        parameter.data = parameter.data.narrow(-3, i, 1).clone()  # (..., N, in, out)
    return single


def train_networks(policy, critic, target_critic, batch, updates=5):
    """Five Adam steps with the script's own losses, as its `update` takes them."""
    critic_optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    policy_optimizer = torch.optim.Adam(policy.parameters(), 1e-3)
    for _ in range(updates):
        critic_optimizer.zero_grad()
        critic_loss(critic, target_critic, policy, batch, 0.95)[0].backward()
        critic_optimizer.step()
        policy_optimizer.zero_grad()
        policy_loss(policy, critic, batch, Args())[0].backward()
        policy_optimizer.step()


def share_draws(monkeypatch):
    """Start random numbers that are the same for every agent, so that one agent alone has them."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape, **_):
        draws = torch.empty(shape[-2:], dtype=torch.float64)
        return draws.normal_(generator=generator).expand(shape)

    def times(shape, *_):
        draws = torch.empty(2, *shape[-2:], dtype=torch.float64).uniform_(generator=generator)
        return tuple(time.expand(shape) for time in draws.sort(dim=0).values)

    monkeypatch.setattr(torch, "randn", normal)
    monkeypatch.setattr(torch, "randn_like", lambda x: normal(*x.shape))
    monkeypatch.setattr(om2p_mpe, "sample_times", times)


def test_forward_equals_single_agents():
    """Each agent's outputs are those of its own slice of the weights, and no two are alike."""
    policy, critic, _ = make_networks()
    batch = make_batch()
    r, t = torch.rand(2, N, B, 1)
    u = policy(batch["obs"], batch["action"], r, t)
    q = critic(batch["obs"], batch["action"])
    assert (u.shape, q.shape) == ((N, B, ACTION_DIM), (2, N, B))
    for i in range(N):
        own = slice(i, i + 1)
        obs, action = batch["obs"][own], batch["action"][own]
        single_u = slice_agent(policy, i)(obs, action, r[own], t[own])
        single_q = slice_agent(critic, i)(obs, action)
        torch.testing.assert_close(u[own], single_u)
        torch.testing.assert_close(q[:, own], single_q)
        other = (i + 1) % N
        assert (slice_agent(policy, other)(obs, action, r[own], t[own]) - u[own]).abs().max() > 0.1


def test_forward_by_hand():
    """A stacked layer is x W + b of each agent; hidden ones go through GELU, then layer norm."""
    net = om2p_mpe.mlp((N,), 4, (8,), 2, layer_norm=True).double()
    weights = list(net.parameters())
    x = torch.randn(N, B, 4, dtype=torch.float64)
    for i in range(N):
        hidden = torch.nn.functional.gelu(x[i] @ weights[0][i] + weights[1][i])
        centred = hidden - hidden.mean(dim=-1, keepdim=True)
        hidden = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(net(x)[i], hidden @ weights[2][i] + weights[3][i])


def test_training_equals_single_agents(monkeypatch):
    """Five Adam steps on all agents at once are five Adam steps on each agent alone."""
    networks = [network.double() for network in make_networks()]
    batch = {key: value.double() for key, value in make_batch().items()}
    singles = [[slice_agent(network, i) for network in networks] for i in range(N)]
    start = deepcopy(networks)
    share_draws(monkeypatch)
    train_networks(*networks, batch)
    for i, single in enumerate(singles):
        share_draws(monkeypatch)
        train_networks(*single, {key: value[i : i + 1] for key, value in batch.items()})
        for stacked, alone in zip(networks, single, strict=True):
            for a, b in zip(slice_agent(stacked, i).parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    for network, old in zip(networks[:2], start[:2], strict=True):
        moved = zip(network.parameters(), old.parameters(), strict=True)
        assert all((a - b).abs().max() > 1e-3 for a, b in moved)


@pytest.mark.parametrize("loss", ["critic", "policy"])
def test_agents_do_not_couple(loss):
    """Other data for one agent change its own gradient and leave the others' exactly as it was."""

    def gradients(batch):
        policy, critic, target_critic = make_networks()
        torch.manual_seed(3)
        if loss == "critic":
            critic_loss(critic, target_critic, policy, batch, 0.95)[0].backward()
            return [parameter.grad for parameter in critic.parameters()]
        policy_loss(policy, critic, batch, Args(q_weight=10.0))[0].backward()
        return [parameter.grad for parameter in policy.parameters()]

    batch = make_batch()
    before = gradients(batch)
    for i in range(N):
        changed = {key: value.clone() for key, value in batch.items()}
        for key, value in make_batch(seed=9).items():
            changed[key][i] = value[i]
        others = [k for k in range(N) if k != i]
        for a, b in zip(before, gradients(changed), strict=True):
            a, b = a.movedim(-3, 0), b.movedim(-3, 0)
            assert torch.equal(a[others], b[others])
            assert not torch.equal(a[i], b[i])


def test_all_networks_start_different():
    """No two agents, and no two of the twin critics, start with the same weights."""
    policy, critic, _ = make_networks()
    for module in (policy, critic):
        for parameter in module.parameters():
            slices = parameter.flatten(0, -3).flatten(1)
            assert len(slices) == (N if module is policy else 2 * N)
            for a, b in itertools.combinations(slices, 2):
                assert not torch.isclose(a, b).all()

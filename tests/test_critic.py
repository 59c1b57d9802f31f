"""Temporal-difference targets and the Q term of the policy's loss."""

from types import SimpleNamespace

import pytest
import torch

from om2p_mpe import Args, Critic, MeanFlowPolicy, critic_loss, policy_loss

N, B, GAMMA = 2, 4, 0.9


def make_batch() -> dict:
    """Random transitions, every other one terminal; observations and actions of two numbers."""
    torch.manual_seed(0)
    obs, next_obs = torch.randn(2, N, B, 2)
    action, reward = 2 * torch.rand(N, B, 2) - 1, torch.randn(N, B)
    done = torch.tensor([0.0, 1.0]).repeat(N, B // 2)
    return {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "done": done}


def make_critic(obs, action):
    """A hand-made pair of critics: (N, B, 2), (N, B, 2) -> (2, N, B)."""
    return torch.stack([obs[..., 0] + 2 * action[..., 1], 3 * obs[..., 1] - action[..., 0]])


@pytest.mark.parametrize("options", [(), (torch.amin,)], ids=["mean", "amin"])
def test_target_by_hand(options):
    """y = r + gamma (1 - done) agg_k Q'_k(o', a'); batch mean, sum over critics and agents."""
    batch = make_batch()
    policy = SimpleNamespace(act=lambda obs: obs.tanh())
    q = torch.tensor([0.5, -1.0]).view(2, 1, 1).expand(2, N, B)
    loss, found = critic_loss(lambda *_: q, make_critic, policy, batch, GAMMA, *options)
    assert found is q
    expected = 0.0
    for i in range(N):
        for k in range(B):
            o = batch["next_obs"][i, k]
            a = o.tanh()
            next_q = o[0] + 2 * a[1], 3 * o[1] - a[0]
            value = min(next_q) if options else sum(next_q) / 2
            y = batch["reward"][i, k] + (0.0 if k % 2 else GAMMA * value)
            expected += ((0.5 - y) ** 2 + (-1.0 - y) ** 2) / B
    torch.testing.assert_close(loss, expected)


def test_only_the_critic_gets_a_gradient():
    """Neither the target critic nor the policy is moved by the critic's loss."""
    batch = make_batch()
    policy, critic = MeanFlowPolicy(N, 2, 2, (16,)), Critic(N, 2, 2, (16,))
    target_critic = Critic(N, 2, 2, (16,))
    critic_loss(critic, target_critic, policy, batch, GAMMA)[0].backward()
    assert all(parameter.grad is None for parameter in target_critic.parameters())
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in critic.parameters())


def policy_gradient(critic, q_weight: float) -> torch.Tensor:
    """Gradient of policy_loss, one long vector, with always the same draws."""
    torch.manual_seed(1)
    policy = MeanFlowPolicy(N, 2, 2, (16,))
    policy_loss(policy, critic, make_batch(), Args(q_weight=q_weight))[0].backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def test_q_term_is_normalised():
    """The scale of Q does not change the policy's gradient, its sign and its weight do."""
    flow, gradient = policy_gradient(make_critic, 0.0), policy_gradient(make_critic, 2.0)
    scaled = policy_gradient(lambda *inputs: 100 * make_critic(*inputs), 2.0)
    torch.testing.assert_close(scaled, gradient, rtol=1e-4, atol=1e-6)
    assert (gradient - flow).norm() > 0.1 * flow.norm()
    doubled = policy_gradient(make_critic, 4.0)
    torch.testing.assert_close(doubled - flow, 2 * (gradient - flow), rtol=1e-3, atol=1e-5)
    negated = policy_gradient(lambda *inputs: -make_critic(*inputs), 2.0)
    torch.testing.assert_close(negated - flow, flow - gradient, rtol=1e-3, atol=1e-5)


def test_q_term_acts_along_the_path():
    """a_pi = x_r + (1 - r) u(x_r, r, 1), clipped: from noise for half of the batch, or on the way.

    A policy whose u leads from x_r to 3 r shows which r it was asked for. It has one action number.
    """
    torch.manual_seed(1)
    policy = MeanFlowPolicy(1, 2, 2, (16,))
    policy.mask[..., 1] = 0
    inputs, seen = [], []

    def u(obs, x, r, t):
        inputs.append((x, r, t))
        return (3 * r - x) / (1 - r)

    policy.forward = u
    action = torch.full((1, 4_000, 2), 10.0)  # far from any noise: x shows the share of it
    batch = {"obs": torch.zeros(1, 4_000, 2), "action": action}

    def critic(_, action):
        seen.append(action)
        return torch.ones(2, *action.shape[:-1])

    policy_loss(policy, critic, batch, Args(flow_ratio=0.5))
    x, r, t = inputs[-1]
    assert (t == 1).all()
    assert (seen[0][..., 1] == 0).all()
    torch.testing.assert_close(seen[0][..., :1], (3 * r).clamp(max=1))
    noise = (x - 10 * r) / (1 - r)
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert (r == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    flow_x, flow_r, _ = inputs[0]  # the others are the flow loss's, with other noise
    assert (r[r > 0][:, None] == flow_r.flatten()).any(dim=1).all()
    assert ((noise - (flow_x - 10 * flow_r) / (1 - flow_r)).abs() > 1e-3).float().mean() > 0.99


def test_policy_loss_by_hand():
    """L = L_meanflow - q_weight sum_i E[Q_i] / sg(E|Q_i|), Q the mean of the two critics."""
    torch.manual_seed(1)
    policy, batch = MeanFlowPolicy(N, 2, 2, (16,)), make_batch()
    values = torch.linspace(-1, 2, 2 * N * B).view(2, N, B)
    scale = torch.ones((), requires_grad=True)
    loss, parts = policy_loss(policy, lambda *_: scale * values, batch, Args(q_weight=3.0))
    q = (values[0] + values[1]) / 2
    expected = sum(agent.sum() / agent.abs().sum() for agent in q)
    torch.testing.assert_close(parts["policy_q"], values.mean())
    torch.testing.assert_close(loss, parts["mean_flow"] - 3.0 * expected)
    loss.backward()
    torch.testing.assert_close(scale.grad, -3.0 * expected)  # zero without sg

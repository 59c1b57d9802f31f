"""The mean-flow objective: its target, its derivative, what solves it, and the times it draws."""

import math

import pytest
import torch

import om2p_mpe
from om2p_mpe import MeanFlowPolicy, mean_flow_loss, sample_times

EXACT = [{"derivative": "jvp"}, {"derivative": "finite-difference", "delta": 1e-6}]
BOTH = pytest.mark.parametrize("options", EXACT, ids=lambda options: options["derivative"])


def make_batch(N=3, B=64, dim=2, dtype=torch.float64, largest=1.0):
    """Random obs, action, noise, r <= t with r below `largest`; obs is as wide as action."""
    torch.manual_seed(0)
    obs, noise = torch.randn(2, N, B, dim, dtype=dtype)
    action = 2 * torch.rand(N, B, dim, dtype=dtype) - 1
    r, t = torch.rand(2, N, B, 1, dtype=dtype).sort(dim=0).values
    return obs, action, noise, largest * r, t


def hand_made_u(obs, x, r, t):
    """A smooth velocity field whose partial derivatives are easy to write down."""
    return t * x.sin() + r**2 * obs * x.flip(-1)


def hand_made_derivative(obs, x, v, r, t):
    """v . grad_x u + d_r u of `hand_made_u`, by hand."""
    return t * x.cos() * v + r**2 * obs * v.flip(-1) + 2 * r * obs * x.flip(-1)


def target_of(u, obs, action, noise, r, t, **options):
    """The target that mean_flow_loss regresses u on, read off the gradient 2 (u - target) / Bd."""
    x, shift = (1 - r) * noise + r * action, torch.zeros_like(action, requires_grad=True)
    batch = obs, action, noise, r, t
    mean_flow_loss(lambda *inputs: u(*inputs) + shift, *batch, **options).backward()
    return (u(obs, x, r, t) - shift.grad * action[0].numel() / 2).detach()


@BOTH
def test_loss_is_the_formula(options):
    """The loss is the formula written out: sum over agents, mean over batch and dimensions."""
    obs, action, noise, r, t = batch = make_batch()
    v = action - noise

    def formula(time, sign):
        x = (1 - time) * noise + time * action
        target = v + sign * (t - r) * hand_made_derivative(obs, x, v, r, t)
        error = (hand_made_u(obs, x, r, t) - target) ** 2
        return sum(agent.sum() / agent.numel() for agent in error)

    loss = mean_flow_loss(hand_made_u, *batch, **options)
    torch.testing.assert_close(loss, formula(r, +1), rtol=1e-4, atol=0)
    assert abs(loss - formula(r, -1)) > 0.05 * loss  # v - (t - r) du/dr
    assert abs(loss - formula(t, +1)) > 0.05 * loss  # x at t


@BOTH
def test_target_is_v_where_times_are_equal(options):
    """At t = r mean-flow matching is plain flow matching."""
    obs, action, noise, r, _ = make_batch()
    target = target_of(hand_made_u, obs, action, noise, r, r, **options)
    torch.testing.assert_close(target, action - noise)


@BOTH
def test_no_gradient_through_target(options):
    """The gradient of a scaled field is the mean of 2 (u - target) f, the target a constant."""
    obs, action, noise, r, t = batch = make_batch()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    mean_flow_loss(lambda *inputs: scale * hand_made_u(*inputs), *batch, **options).backward()
    f = hand_made_u(obs, (1 - r) * noise + r * action, r, t)
    target = target_of(lambda *inputs: 1.5 * hand_made_u(*inputs), *batch, **options)
    expected = (2 * (1.5 * f - target) * f).mean(dim=(-2, -1)).sum()
    torch.testing.assert_close(scale.grad, expected, rtol=1e-6, atol=0)


def test_difference_quotient_is_the_jvp():
    """On a random network in float64 the difference quotient tends to torch.func.jvp's du/dr."""
    obs, action, noise, r, t = batch = make_batch()
    policy = MeanFlowPolicy(3, 2, 2, (64, 64)).double()
    x, v = (1 - r) * noise + r * action, action - noise
    tangents = (torch.zeros_like(obs), v, torch.ones_like(r), torch.zeros_like(t))
    _, du_dr = torch.func.jvp(policy, (obs, x, r, t), tangents)
    exact = v + (t - r) * du_dr
    assert (exact - v).norm() > 0.01 * v.norm()  # it matters
    for options in EXACT:
        assert (target_of(policy, *batch, **options) - exact).norm() < 1e-5 * (exact - v).norm()


def test_difference_quotient_of_a_long_step():
    """With a delta of 0.1 the derivative is the quotient of just that step along the path."""
    obs, action, noise, r, t = batch = make_batch()
    x, v, delta = (1 - r) * noise + r * action, action - noise, 0.1
    after, u = hand_made_u(obs, x + delta * v, r + delta, t), hand_made_u(obs, x, r, t)
    expected = v + (t - r) * (after - u) / delta
    torch.testing.assert_close(target_of(hand_made_u, *batch, delta=delta), expected)


@pytest.mark.parametrize(("delta", "error"), [(0.1, 0.1), (om2p_mpe.Args.delta, 0.02)])
def test_difference_quotient_in_float32(delta, error):
    """In float32 it is near the derivative, at the script's default delta too."""
    obs, action, noise, r, t = make_batch(dtype=torch.float32)
    r = 0.1 + 0.8 * r
    batch = obs, action, noise, r, torch.maximum(r, t)
    policy = MeanFlowPolicy(3, 2, 2, (64, 64))
    exact = target_of(policy, *batch, derivative="jvp")
    term = (exact - (action - noise)).norm()  # (t - r) du/dr
    assert 0 < (target_of(policy, *batch, delta=delta) - exact).norm() < error * term


class OnePointFlow(MeanFlowPolicy):
    """The exact mean flow of data that hold one action only: straight lines to it."""

    point = torch.tensor([0.3, -0.6], dtype=torch.float64)

    def forward(self, obs, x, r, t):
        return (self.point - x) / (1 - r)


@BOTH
def test_one_point_flow_is_exact(options):
    """The exact mean flow of a single action has no loss, and one step from any noise hits it."""
    policy = OnePointFlow(3, 2, 2, ())
    obs, action, noise, r, t = make_batch(largest=0.9)
    point = policy.point.expand_as(action)
    assert mean_flow_loss(policy, obs, point, noise, r, t, **options) < 1e-12
    assert mean_flow_loss(policy, obs, action, noise, r, t, **options) > 0.1  # other data
    torch.testing.assert_close(policy.act(obs, noise), point)


@BOTH
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.4), (0.3, 0.8), (0.6, 1.0)])
def test_gaussian_flow_is_stationary(options, times):
    """For actions N(m, sd^2) the exact mean flow leaves no gradient in any affine direction.

    x_s ~ N(s m, var(s)) with var(s) = (1 - s)^2 + (s sd)^2, and the flow of the marginal velocity
    maps x_r to t m + sqrt(var(t) / var(r)) (x_r - r m). The residual is affine in (noise, action),
    so that the four points of a two-point Gauss-Hermite rule give exact expectations.
    """
    mean, sd = 0.3, 0.6
    signs = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]], dtype=torch.float64)
    noise, action = signs[None, :, :1], mean + sd * signs[None, :, 1:]
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def deviation(s):
        return ((1 - s) ** 2 + (s * sd) ** 2).sqrt()

    def policy(obs, x, r, t):
        x_t = t * mean + deviation(t) / deviation(r) * (x - r * mean)
        return (x_t - x) / (t - r) + weights[0] + weights[1] * x

    r, t = (torch.full_like(noise, time) for time in times)
    loss = mean_flow_loss(policy, None, action, noise, r, t, **options)
    loss.backward()
    assert loss > 1e-3
    assert weights.grad.abs().max() < 1e-5


@pytest.mark.parametrize("derivative", ["finite-difference", "jvp"])
def test_training_finds_the_only_action(derivative):
    """A small network trained on a single action per agent lands there in one step."""
    torch.manual_seed(0)
    N, B = 2, 64
    policy = MeanFlowPolicy(N, 1, 2, (64, 64))
    optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
    point = torch.tensor([[[0.5, -0.7]], [[-0.2, 0.1]]])
    for _ in range(300):
        times, noise = sample_times((N, B, 1), 0.3, 1.0, 0.25), torch.randn(N, B, 2)
        batch = torch.zeros(N, B, 1), point.expand_as(noise), noise, *times
        loss = mean_flow_loss(policy, *batch, derivative=derivative)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = policy.act(torch.zeros(N, 1000, 1)).detach() - point
    assert error.norm(dim=-1).mean() < 0.15


@pytest.mark.parametrize("shapes", [(1, 1), (2.0, 2.0), (0.3, 1.0)])
@pytest.mark.parametrize("flow_ratio", [0.0, 0.25, 1.0])
def test_times_are_ordered(shapes, flow_ratio):
    """0 <= r <= t <= 1, of the asked shape, and t = r for the asked share of the draws."""
    torch.manual_seed(0)
    r, t = sample_times((3, 10_000, 1), *shapes, flow_ratio)
    assert r.shape == t.shape == (3, 10_000, 1)
    assert (r >= 0).all()
    assert (r <= t).all()
    assert (t <= 1).all()
    error = 4 * math.sqrt(flow_ratio * (1 - flow_ratio) / r.numel()) + 1e-4
    assert abs((r == t).double().mean() - flow_ratio) <= error


def test_times_near_what_acting_uses():
    """Beta(0.3, 1) puts 25 % of (r, t) within 0.1 of (0, 1), which acting uses; uniform 2 %."""
    torch.manual_seed(0)
    for alpha, share in ((0.3, 0.1**0.3 * 0.1**0.3), (1.0, 2 * 0.1 * 0.1)):
        r, t = sample_times((100_000,), alpha, 1.0, 0.0)
        assert abs(((r < 0.1) & (t > 0.9)).double().mean() - share) < 0.01

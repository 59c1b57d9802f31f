"""How the baselines' policies act: noise schedules, samplers against closed forms, networks.

Where data are Gaussian, what solves the matching problem exactly takes the place of the networks:
a sampler is then a linear recursion, which can be written down.
"""

import math
from itertools import accumulate
from operator import mul

import diffusion_ql_mpe as diffusion_ql
import dom2_mpe as dom2
import flow_ql_mpe as flow_ql
import pytest
import torch
from conftest import POLICIES, make_policy

N, B, OBS_DIM, D = 2, 4, 3, 2
M, S = torch.tensor([0.2, -0.1]).double(), torch.tensor([0.1, 0.15]).double()  # the data's
GENERATIVE = ("diffusion_ql", "dom2", "flow_ql", "fql")


def vp_schedule(K):
    """beta_k and the product of 1 - beta up to k, k = 1..K, of Diffusion-QL's schedule; lists."""
    alpha = [math.exp(-0.1 / K - 0.5 * (10 - 0.1) * (2 * k - 1) / K**2) for k in range(1, K + 1)]
    return [1 - a for a in alpha], list(accumulate(alpha, mul))


def vp(t):
    """alpha_t and sigma_t of the VP-SDE with beta from 0.1 to 20: alpha^2 = exp(-int_0^t beta)."""
    alpha = torch.as_tensor(-(0.1 * t + (20 - 0.1) * t**2 / 2) / 2).exp()
    return alpha, (1 - alpha**2).sqrt()


def posterior(K, k):
    """Weights of x_0 and x_k, and the deviation, of q(x_k-1 | x_k, x_0) (Ho et al., 2020)."""
    beta, abar = vp_schedule(K)
    before = abar[k - 1] if k else 1.0
    x0_weight = math.sqrt(before) * beta[k] / (1 - abar[k])
    x_weight = math.sqrt(1 - beta[k]) * (1 - before) / (1 - abar[k])
    return x0_weight, x_weight, math.sqrt((1 - before) / (1 - abar[k]) * beta[k])


@pytest.mark.parametrize("K", [1, 5, 50])
def test_diffusion_ql_schedule(K, double):
    """Noise and posterior of every step; the posterior leaves q(x_k-1) as it is, for every x_0."""
    policy, (_, abar) = diffusion_ql.DiffusionPolicy(N, OBS_DIM, D, (), K), vp_schedule(K)
    assert policy.abar.tolist() == pytest.approx(abar, rel=1e-9)
    assert abar[-1] == pytest.approx(math.exp(-5.05))  # the same noise at the end for every K
    for k, before in enumerate([1.0, *abar[:-1]]):
        x0_weight, x_weight, deviation = weights = policy.posterior[:, k].tolist()
        assert weights == pytest.approx(posterior(K, k), rel=1e-9, abs=1e-12)
        assert x0_weight + x_weight * math.sqrt(abar[k]) == pytest.approx(math.sqrt(before))
        assert x_weight**2 * (1 - abar[k]) + deviation**2 == pytest.approx(1 - before, abs=1e-12)


# Samplers, with what is exact for data N(M, S^2) in the place of their networks


def exact_noise(alpha, sigma, x):
    """E[e | x] for x = alpha action + sigma e: the regression of e on x."""
    return sigma / ((alpha * S) ** 2 + sigma**2) * (x - alpha * M)


def exact_velocity(obs, x, t):
    """E[action - noise | x] for x = (1 - t) noise + t action."""
    return M + (t * S**2 - (1 - t)) / ((t * S) ** 2 + (1 - t) ** 2) * (x - t * M)


def make_exact(name, steps, shift=(0.0, 0.0)):
    """A policy whose network is exact, but for shift[0] + shift[1] x."""
    module = {"diffusion_ql": diffusion_ql, "dom2": dom2, "flow_ql": flow_ql}[name]
    policy = getattr(module, POLICIES[name])(N, OBS_DIM, D, (4,), steps)
    abar = torch.tensor(vp_schedule(steps)[1])
    exact = {
        "diffusion_ql": lambda _, x, k: exact_noise(
            abar[k].sqrt()[..., None], (1 - abar[k]).sqrt()[..., None], x
        ),
        "dom2": lambda _, x, t: exact_noise(*vp(t), x),
        "flow_ql": exact_velocity,
    }[name]
    policy.forward = lambda obs, x, time: exact(obs, x, time) + shift[0] + shift[1] * x
    return policy


def euler(steps):
    """Mean and standard deviation of the flow's end, by the linear recursion of K Euler steps."""
    gain, offset = torch.ones(D), torch.zeros(D)
    for k in range(steps):
        t = k / steps
        slope = (t * S**2 - (1 - t)) / ((t * S) ** 2 + (1 - t) ** 2)
        offset = offset + (M + slope * (offset - t * M)) / steps
        gain = gain * (1 + slope / steps)
    return offset, gain


def dpm_solver(steps):
    """The same for the first-order DPM-Solver as Lu et al. (2022, equation 3.7) write it.

    x_s = alpha_s / alpha_t x_t - sigma_s (e^h - 1) eps, h = log(alpha_s / sigma_s) - ... of t.
    """
    gain, offset = torch.ones(D), torch.zeros(D)
    for k in range(steps):
        t, s = (1 + (0.001 - 1) * j / steps for j in (k, k + 1))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = vp(t), vp(s)
        factor = sigma_s * (alpha_s / sigma_s * sigma_t / alpha_t - 1)
        slope = sigma_t / ((alpha_t * S) ** 2 + sigma_t**2)
        offset = alpha_s / alpha_t * offset - factor * slope * (offset - alpha_t * M)
        gain = (alpha_s / alpha_t - factor * slope) * gain
    return offset, gain


def ancestral(steps):
    """The same for ancestral sampling, x_k-1 from q(x_k-1 | x_k, x_0) at x_0 = E[x_0 | x_k]."""
    abar, offset, variance = vp_schedule(steps)[1], torch.zeros(D), torch.ones(D)
    for k in reversed(range(steps)):
        slope = math.sqrt(abar[k]) * S**2 / (abar[k] * S**2 + 1 - abar[k])  # of E[x_0 | x_k]
        x0_weight, x_weight, deviation = posterior(steps, k)
        x0 = M + slope * (offset - math.sqrt(abar[k]) * M)
        offset = x0_weight * x0 + x_weight * offset
        variance = (x0_weight * slope + x_weight) ** 2 * variance + deviation**2
    return offset, variance.sqrt()


RECURSIONS = {"diffusion_ql": ancestral, "dom2": dpm_solver, "flow_ql": euler}
all_samplers = pytest.mark.parametrize("name", RECURSIONS)


@all_samplers
def test_recursions_reach_the_data(name, double):
    """What the next tests rest on: with very many steps actions are N(M, S^2), with five not."""
    mean, deviation = RECURSIONS[name](1_000)
    torch.testing.assert_close(mean, M, rtol=0, atol=1e-3)
    torch.testing.assert_close(deviation, S, rtol=0.05, atol=0)
    assert (RECURSIONS[name](5)[1] < 0.6 * S).all()


@pytest.mark.parametrize("name", ["dom2", "flow_ql"])
@pytest.mark.parametrize("steps", [1, 5, 10])
def test_deterministic_sampler_is_the_recursion(name, steps, double):
    """From given noise, action by action: offset + gain times noise."""
    noise, (offset, gain) = torch.randn(N, B, D), RECURSIONS[name](steps)
    action = make_exact(name, steps).act(torch.zeros(N, B, OBS_DIM), noise)
    torch.testing.assert_close(action, offset + gain * noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_ancestral_sampler_is_the_recursion(steps, double):
    """Mean and standard deviation of actions are those of the recursion."""
    torch.manual_seed(0)
    offset, deviation = ancestral(steps)
    action = make_exact("diffusion_ql", steps).act(torch.zeros(N, 20_000, OBS_DIM))
    tolerance = 4 * deviation / math.sqrt(20_000) + 1e-9
    assert ((action.mean(dim=1) - offset).abs() <= tolerance).all()
    assert ((action.std(dim=1) - deviation).abs() <= tolerance).all()


@all_samplers
def test_gradient_runs_back_through_all_steps(name, double):
    """A shift of every prediction: an action's gradient in it is that of difference quotients."""

    def act(shift):
        torch.manual_seed(1)
        return make_exact(name, 5, shift).act(torch.zeros(N, B, OBS_DIM))

    assert torch.autograd.gradcheck(act, torch.zeros(2, D, requires_grad=True))


@pytest.mark.parametrize("name", ["diffusion_ql", "dom2"])
def test_steps_clip_the_predicted_action(name, double):
    """A step goes towards clip((x - sigma eps) / alpha): here with eps = 0, far outside the box."""
    torch.manual_seed(0)
    seen, policy = [], make_exact(name, 2)
    policy.forward = lambda obs, x, time: seen.append(x) or torch.zeros_like(x)
    policy.act(torch.zeros(N, 5_000, OBS_DIM))
    start, then = seen
    if name == "dom2":
        (alpha_t, sigma_t), (alpha_s, sigma_s) = vp(1.0), vp(0.5005)
        action = (start / alpha_t).clamp(-1, 1)
        expected = sigma_s / sigma_t * (start - alpha_t * action) + alpha_s * action
        torch.testing.assert_close(then, expected)
    else:
        x0_weight, x_weight, deviation = posterior(2, 1)
        action = (start / math.sqrt(vp_schedule(2)[1][1])).clamp(-1, 1)
        rest = (then - x0_weight * action - x_weight * start) / deviation
        assert abs(rest.mean()) < 0.03
        assert abs(rest.std() - 1) < 0.03


# Networks as they are


def test_fql_acts_by_its_one_step_policy():
    """act is mu(o, noise), clipped; it does not ask the flow."""
    policy = make_policy("fql")
    policy.flow.forward = None
    obs, noise = torch.randn(N, B, OBS_DIM), 20 * torch.randn(N, B, D)
    assert torch.equal(policy.act(obs, noise), policy(obs, noise).clamp(-1, 1))


@pytest.mark.parametrize("name", POLICIES)
def test_actions_are_in_the_box(name):
    """Whatever the weights are, and up to its edge."""
    torch.manual_seed(0)
    policy = make_policy(name)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter *= 10
        action = policy.act(torch.randn(N, 500, OBS_DIM))
    assert action.shape == (N, 500, D)
    assert action.abs().max() == 1


@pytest.mark.parametrize("name", POLICIES)
def test_noise_is_drawn_for_every_action(name):
    """Agents with the same weights and observation act differently if they act by noise."""
    torch.manual_seed(0)
    policy, obs = make_policy(name), torch.randn(1, 1, OBS_DIM).expand(N, 500, OBS_DIM)
    for tensor in (*policy.parameters(), *policy.buffers()):
        if tensor.ndim == 3:  # (N, ...), which the buffers of a schedule are not
            tensor.data[1] = tensor.data[0]
    with torch.no_grad():
        one, two = policy.act(obs), policy.act(obs)
    differences = one[:, :-1] - one[:, 1:], one[0] - one[1], one - two
    for difference in differences:
        assert (difference.abs().mean() > 0.01) == (name in GENERATIVE)


@pytest.mark.parametrize("out_dim", [4, 5])
def test_block_of_score_network(out_dim, double):
    """SfBC's block: skip(x) + silu(second(silu(first(x)) + time(silu(embedding)))).

    Of equal widths the skip is x itself.
    """
    block, silu = dom2.Block(N, 5, out_dim, 6), torch.nn.functional.silu
    x, embedding = torch.randn(N, B, 5), torch.randn(N, B, 6)
    hidden = silu(block.first(x)) + block.time(silu(embedding))
    skip = x if out_dim == 5 else block.skip(x)
    torch.testing.assert_close(block(x, embedding), silu(block.second(hidden)) + skip)


def test_score_network(double):
    """SfBC's network: blocks down, one in the middle, blocks up, each after the skip of its level.

    The last layer takes the first block's output and the last one's; the embedding is two layers of
    the embedded observation, with SiLU, and time, without.
    """
    torch.manual_seed(0)
    net, silu = dom2.ScorePolicy(N, OBS_DIM, D, (8, 6, 4)), torch.nn.functional.silu
    obs, x, t = torch.randn(N, B, OBS_DIM), torch.randn(N, B, D), torch.rand(N, B, 1)
    waves = 2 * math.pi * t * net.frequency
    time = net.embed_time(torch.cat([waves.sin(), waves.cos()], dim=2))
    first, _, second = net.embed
    e = second(silu(first(torch.cat([silu(net.embed_obs(obs)), time], dim=2))))
    d1 = net.down[0](x, e)
    d2 = net.down[1](d1, e)
    d3 = net.down[2](d2, e)
    u3 = net.middle(d3, e)
    u2 = net.up[0](torch.cat([d3, u3], dim=2), e)
    u1 = net.up[1](torch.cat([d2, u2], dim=2), e)
    torch.testing.assert_close(net(obs, x, t), net.last(torch.cat([d1, u1], dim=2)))
    assert len(net.frequency.unique()) == 16 * N  # each agent has its own, of deviation 30
    assert 20 < net.frequency.std() < 40

"""The baselines: losses by hand, OMAR's search, DOM2's reweighting, updates, what is learned.

Hand-made policies and critics stand in for networks where a formula is checked; test_samplers.py
has the policies themselves.
"""

import importlib
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_policy, refusal
from test_samplers import vp, vp_schedule

NAMES = ("bc", "td3_bc", "omar", "diffusion_ql", "dom2", "flow_ql", "fql")
MODULES = {name: importlib.import_module(f"{name}_mpe") for name in NAMES}
bc, td3_bc, omar, diffusion_ql, dom2, flow_ql, fql = MODULES.values()
GENERATIVE = NAMES[3:]
N, B, OBS_DIM, D = 2, 4, 3, 2
POINT, MODE = torch.tensor([0.3, -0.6]), torch.tensor([0.7, 0.7])  # actions


def make_batch(batch_size=B, seed=0) -> dict:
    """Random transitions, some of them terminal."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, N, batch_size, OBS_DIM)
    done = (torch.rand(N, batch_size) < 0.2).to(obs.dtype)
    action, reward = 2 * torch.rand(N, batch_size, D) - 1, torch.randn(N, batch_size)
    return {"obs": obs, "action": action, "reward": reward, "next_obs": next_obs, "done": done}


def policy_loss(name, policy, critic, batch, **settings):
    """The policy's loss of a baseline; behaviour cloning has neither a critic nor settings."""
    if name == "bc":
        return bc.policy_loss(policy, batch)
    module = MODULES[name]
    loss, parts = module.policy_loss(policy, critic, batch, module.Args(**settings))
    assert not any(part.requires_grad for part in parts.values())
    return loss


def spy(monkeypatch, module, name):
    """Record the arguments of a function that a script calls; the list grows with every call."""
    calls, real = [], getattr(module, name)

    def watched(*inputs):
        calls.append(inputs)
        return real(*inputs)

    monkeypatch.setattr(module, name, watched)
    return calls


# Losses by hand


def twin(obs, action):
    """Two hand-made critics, (..., 3), (..., 2) -> (2, ...); now one, now the other is smaller."""
    (x, y, z), (a, b) = obs.unbind(-1), action.unbind(-1)
    return torch.stack([x + 2 * b + a * b + 0.3, 2 * y - a - b**2 + 0.5 * z + 0.6])


def first(obs, action):
    """Q_1 of the hand-made critics."""
    return twin(obs, action)[0]


def mean(obs, action):
    """The mean of both."""
    return sum(twin(obs, action)) / 2


def smaller(obs, action):
    """The smaller of both, for one observation and action."""
    return min(twin(obs, action))


def acting(theta, obs):
    """A hand-made deterministic policy: (N, B, 3) -> (N, B, 2), inside the box."""
    return (theta[0] * obs[..., :2] + theta[1]).tanh()


def predicting(theta, obs, x, time):
    """A hand-made prediction of noise or velocity, of x's shape."""
    return theta[2] * x.sin() + theta[3] * time * obs[..., :2]


def squares(one, other) -> float:
    """Squared differences: mean over the batch and the dimensions, sum over the agents."""
    total = 0.0
    for i in range(N):
        for b in range(B):
            for d in range(D):
                total += float(one[i, b, d] - other[i, b, d]) ** 2 / (B * D)
    return total


def mean_of(q, obs, action, i) -> float:
    """Mean of agent i's q(o, a) over the batch."""
    return sum(float(q(obs[i, b], action[i, b])) for b in range(B)) / B


def normalised(q, scale_q, obs, action, stopped) -> float:
    """Sum over agents of E[q(o, a)] / E|scale_q(o, stopped)|."""
    total = 0.0
    for i in range(N):
        scale = mean_of(lambda *inputs: abs(scale_q(*inputs)), obs, stopped, i)
        total += mean_of(q, obs, action, i) / scale
    return total


def check(loss_of, formula):
    """Compare a loss and its gradient in theta with `formula(theta, frozen)` and its differences.

    What the loss treats as a constant the formula computes from `frozen`, which stands still.
    """
    theta = torch.tensor([0.6, -0.3, 0.8, 0.4], requires_grad=True)
    loss = loss_of(theta)
    loss.backward()
    here = theta.detach()
    assert loss.item() == pytest.approx(formula(here, here), rel=1e-9)
    for grad, step in zip(theta.grad, 1e-5 * torch.eye(4), strict=True):
        slope = (formula(here + step, here) - formula(here - step, here)) / 2e-5
        assert float(grad) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_hand_made_critics_differ(double):
    """What the tests rest on: neither is the smaller one everywhere, and every Q has both signs."""
    batch = make_batch()
    q = twin(batch["obs"], acting(torch.tensor([0.6, -0.3]), batch["obs"]))
    for values in (q[0] - q[1], q[0], q[1], q.mean(dim=0), q.amin(dim=0)):
        for agent in values:
            assert (agent > 0.05).any()
            assert (agent < -0.05).any()


def test_bc_loss(double):
    """E || a_pi - a ||^2."""
    batch = make_batch()
    check(
        lambda theta: bc.policy_loss(
            SimpleNamespace(act=lambda obs: acting(theta, obs), mask=None), batch
        ),
        lambda theta, frozen: squares(acting(theta, batch["obs"]), batch["action"]),
    )


@pytest.mark.parametrize("q_weight", [0.0, 2.5])
def test_td3_bc_loss(q_weight, double):
    """E || a_pi - a ||^2 - q_weight E[Q_1(o, a_pi)] / sg(E|Q_1|)."""
    batch = make_batch()
    obs = batch["obs"]

    def loss_of(theta):
        policy = SimpleNamespace(act=lambda obs: acting(theta, obs), mask=None)
        return policy_loss("td3_bc", policy, twin, batch, q_weight=q_weight)

    def formula(theta, frozen):
        action, stopped = acting(theta, obs), acting(frozen, obs)
        clone = squares(action, batch["action"])
        return clone - q_weight * normalised(first, first, obs, action, stopped)

    check(loss_of, formula)


@pytest.mark.parametrize("coe", [0.0, 0.7, 1.0])
def test_omar_loss(coe, monkeypatch, double):
    """coe E || a_pi - a* ||^2 - (1 - coe) E[Q_1(o, a_pi)] + 1e-3 E[a_pi^2]; coe 0 has no a*."""
    batch = make_batch()
    obs, best = batch["obs"], batch["action"].flip(1)  # not the recorded actions
    seen = []
    monkeypatch.setattr(omar, "search", lambda *inputs: seen.append(inputs) or best)

    def loss_of(theta):
        policy = SimpleNamespace(act=lambda obs: acting(theta, obs), mask=None)
        return policy_loss("omar", policy, twin, batch, omar_coe=coe)

    def formula(theta, frozen):
        action = acting(theta, obs)
        q = sum(mean_of(first, obs, action, i) for i in range(N))
        return coe * squares(action, best) - (1 - coe) * q + 1e-3 * squares(action, 0 * action)

    check(loss_of, formula)
    if coe == 0:
        assert seen == []
        return
    ((critic, seen_obs, action, args),) = seen
    assert (critic, seen_obs, args.omar_coe) == (twin, obs, coe)
    assert not action.requires_grad
    torch.testing.assert_close(action, acting(torch.tensor([0.6, -0.3]), obs))


class Hand:
    """The hand-made prediction and action as a policy."""

    mask = None

    def __init__(self, theta):
        self.theta, self.times = theta, torch.linspace(1, 0.001, 6)  # times of DOM2's solver

    def __call__(self, obs, x, time):
        return predicting(self.theta, obs, x, time)

    def act(self, obs):
        return acting(self.theta, obs)


class HandWithSchedule(diffusion_ql.DiffusionPolicy):
    """The same with Diffusion-QL's schedule, its five steps as times 1 to 5."""

    def __init__(self, theta):
        super().__init__(N, OBS_DIM, D, ())
        self.theta = theta

    def forward(self, obs, x, k):
        return predicting(self.theta, obs, x, k[..., None] + 1)

    def act(self, obs):
        return acting(self.theta, obs)


def test_diffusion_ql_loss(monkeypatch, double):
    """E || eps - e ||^2 - q_weight E[Q_1(o, a_pi)] / sg(E|Q_2|); each agent by chance 2 and 1."""
    batch = make_batch()
    obs, action = batch["obs"], batch["action"]
    calls = spy(monkeypatch, diffusion_ql, "diffusion_loss")
    _, abar = vp_schedule(5)

    def loss_of(theta):
        return policy_loss("diffusion_ql", HandWithSchedule(theta), twin, batch, q_weight=3.0)

    def formula(theta, frozen, which):
        *_, noise, k = calls[-1]
        x, eps = torch.empty_like(action), torch.empty_like(action)
        for i in range(N):
            for b in range(B):
                signal = abar[k[i, b]]
                x[i, b] = math.sqrt(signal) * action[i, b] + math.sqrt(1 - signal) * noise[i, b]
                eps[i, b] = predicting(theta, obs[i, b], x[i, b], int(k[i, b]) + 1)
        q_term, free, stopped = 0.0, acting(theta, obs), acting(frozen, obs)
        for i, k in enumerate(which):
            scale = mean_of(lambda o, a, k=k: abs(twin(o, a)[1 - k]), obs, stopped, i)
            q_term += mean_of(lambda o, a, k=k: twin(o, a)[k], obs, free, i) / scale
        return squares(eps, noise) - 3.0 * q_term

    def which_of(theta):
        loss = float(loss_of(theta))
        choices = list(itertools.product((0, 1), repeat=N))
        errors = [abs(loss - formula(theta, theta, which)) for which in choices]
        assert min(errors) < 1e-9
        assert sorted(errors)[1] > 1e-3
        return choices[errors.index(min(errors))]

    theta = torch.tensor([0.6, -0.3, 0.8, 0.4])
    torch.manual_seed(1)
    chosen = torch.tensor([which_of(theta) for _ in range(40)])
    assert all(8 <= ones <= 32 for ones in chosen.sum(dim=0))
    found = set()
    for draws in ((0.25, 0.75), (0.75, 0.25)):
        monkeypatch.setattr(torch, "rand_like", lambda *_, draws=draws: torch.tensor(draws))
        found.add(which := which_of(theta))
        check(loss_of, lambda *thetas, which=which: formula(*thetas, which))
    assert found == {(0, 1), (1, 0)}


@pytest.mark.parametrize("q_weight", [0.0, 3.0])
def test_dom2_loss(q_weight, monkeypatch, double):
    """E || eps(x_t) - e ||^2 - q_weight E[min_k Q_k(o, a_pi)] / sg(E|min_k Q_k|)."""
    batch = make_batch()
    obs, action = batch["obs"], batch["action"]
    calls = spy(monkeypatch, dom2, "diffusion_loss")

    def formula(theta, frozen):
        *_, noise, t = calls[-1]
        eps = torch.empty_like(action)
        for i in range(N):
            for b in range(B):
                alpha, sigma = vp(float(t[i, b]))
                x = alpha * action[i, b] + sigma * noise[i, b]
                eps[i, b] = predicting(theta, obs[i, b], x, t[i, b])
        acts = acting(theta, obs), acting(frozen, obs)
        return squares(eps, noise) - q_weight * normalised(smaller, smaller, obs, *acts)

    check(lambda theta: policy_loss("dom2", Hand(theta), twin, batch, q_weight=q_weight), formula)


def velocity_error(theta, batch, noise, t) -> float:
    """Flow matching of the hand-made prediction, || v(x_t, t) - (action - noise) ||^2."""
    obs, action = batch["obs"], batch["action"]
    v = torch.empty_like(action)
    for i in range(N):
        for b in range(B):
            x = (1 - t[i, b]) * noise[i, b] + t[i, b] * action[i, b]
            v[i, b] = predicting(theta, obs[i, b], x, t[i, b])
    return squares(v, action - noise)


@pytest.mark.parametrize("q_weight", [0.0, 3.0])
def test_flow_ql_loss(q_weight, monkeypatch, double):
    """E || v(x_t) - (action - noise) ||^2 - q_weight E[Q(o, a_pi)] / sg(E|Q|), Q the mean."""
    batch = make_batch()
    obs = batch["obs"]
    calls = spy(monkeypatch, flow_ql, "flow_matching_loss")

    def formula(theta, frozen):
        *_, noise, t = calls[-1]
        q_term = normalised(mean, mean, obs, acting(theta, obs), acting(frozen, obs))
        return velocity_error(theta, batch, noise, t) - q_weight * q_term

    check(
        lambda theta: policy_loss("flow_ql", Hand(theta), twin, batch, q_weight=q_weight), formula
    )


@pytest.mark.parametrize("q_weight", [0.0, 3.0])
def test_fql_loss(q_weight, monkeypatch, double):
    """Flow matching + E || mu - sg(flow) ||^2 - q_weight E[Q(o, clip(mu))] / sg(E|Q|).

    Distillation takes the same noise for both, mu as it is, and no gradient to the flow.
    """
    batch = make_batch()
    obs = batch["obs"]
    calls, noises = spy(monkeypatch, fql, "flow_matching_loss"), []

    def mu(theta, noise):
        return 2 * theta[0] * noise + theta[1] * obs[..., :2]

    def end_of_flow(theta, noise):
        return theta[2] * noise - theta[3] * obs[..., 1:]

    class Both(Hand):
        def __init__(self, theta):
            self.theta, self.flow = theta, Hand(theta)
            self.flow.act = lambda _, noise: noises.append(noise) or end_of_flow(theta, noise)

        def __call__(self, _, noise):
            noises.append(noise)
            return mu(self.theta, noise)

    def formula(theta, frozen):
        *_, noise, t = calls[-1]
        flow = velocity_error(theta, batch, noise, t)
        action = mu(theta, noises[-1])
        distill = squares(action, end_of_flow(frozen, noises[-1]))
        assert (action.abs() > 1.01).any()
        clipped, stopped = action.clamp(-1, 1), mu(frozen, noises[-1]).clamp(-1, 1)
        return flow + distill - q_weight * normalised(mean, mean, obs, clipped, stopped)

    check(lambda theta: policy_loss("fql", Both(theta), twin, batch, q_weight=q_weight), formula)
    one, two = noises
    assert torch.equal(one, two)
    assert not torch.equal(one, calls[0][-2])


@pytest.mark.parametrize("name", GENERATIVE)
def test_draws_of_training(name, monkeypatch):
    """Noise is standard normal; times are uniform over all that acting needs, for each action.

    Acting by DOM2 needs those of its solver's steps alone.
    """
    loss = "diffusion_loss" if name in ("diffusion_ql", "dom2") else "flow_matching_loss"
    calls, batch = spy(monkeypatch, MODULES[name], loss), make_batch(20_000)
    policy_loss(name, make_policy(name, widths=(8, 4)), lambda *_: torch.ones(2, N, 20_000), batch)
    _, obs, action, noise, time = calls[0]
    assert (obs is batch["obs"], action is batch["action"]) == (True, True)
    noise = noise.double().flatten()
    assert abs(noise.mean()) < 0.015
    assert abs(noise.square().mean() - 1) < 0.02
    assert abs(noise[:-1] @ noise[1:]) / len(noise) < 0.015  # nothing is repeated
    if name in ("diffusion_ql", "dom2"):
        assert time.shape == ((N, 20_000, 1) if name == "dom2" else (N, 20_000))
        found, counts = time.unique(return_counts=True)
        steps = [0.2008, 0.4006, 0.6004, 0.8002, 1.0] if name == "dom2" else [0, 1, 2, 3, 4]
        torch.testing.assert_close(found, torch.tensor(steps), check_dtype=False)
        shares = counts / time.numel()
        torch.testing.assert_close(shares, torch.full((5,), 0.2), rtol=0, atol=0.01)
    else:
        assert time.shape == (N, 20_000, 1)
        assert time.min() >= 0
        assert time.max() <= 1
        quantiles = time.flatten().quantile(torch.linspace(0.1, 0.9, 9))
        torch.testing.assert_close(quantiles, torch.linspace(0.1, 0.9, 9), rtol=0, atol=0.015)


@pytest.mark.parametrize("name", NAMES)
def test_agents_do_not_couple(name):
    """Other data for one agent change its own gradient and leave the others' exactly as it was."""

    def gradients(batch):
        policy = make_policy(name)
        loss = policy_loss(name, policy, twin, batch)
        loss.backward()
        return [parameter.grad.movedim(-3, 0) for parameter in policy.parameters()]

    batch, other = make_batch(32), make_batch(32, seed=9)
    for i in range(N):
        changed = {key: value.clone() for key, value in batch.items()}
        for key, value in other.items():
            changed[key][i] = value[i]
        torch.manual_seed(3)
        before = gradients(batch)
        torch.manual_seed(3)
        after = gradients(changed)
        for a, b in zip(before, after, strict=True):
            assert len(a) == N
            assert torch.equal(a[1 - i], b[1 - i])
            assert not torch.equal(a[i], b[i])


# OMAR and conservative critics


def concave(obs, action):
    """Q_1 has its only maximum at `summit(obs)`; Q_2 would lead away from it."""
    q = -30 * (action - summit(obs)).square().sum(dim=-1)
    return torch.stack([q, -q])


def summit(obs):
    """The best action of `concave`, in the box."""
    return 0.8 * obs[..., :2].tanh()


def test_search_finds_the_maximum():
    """Many samples come near the maximum; the default few are never worse than the policy's."""
    torch.manual_seed(0)
    obs, action = torch.randn(N, 200, OBS_DIM), 2 * torch.rand(N, 200, D) - 1
    args = omar.Args(omar_iterations=5, omar_samples=100)
    found = omar.search(concave, obs, action, args)
    assert (found - summit(obs)).norm(dim=-1).max() < 0.25
    assert (found - summit(obs)).norm(dim=-1).mean() < 0.06

    found = omar.search(concave, obs, action, omar.Args())
    before, after = concave(obs, action)[0], concave(obs, found)[0]
    assert (after >= before).all()
    assert (after > before).float().mean() > 0.8
    assert torch.equal(found[after == before], action[after == before])
    assert (found - summit(obs)).norm(dim=-1).mean() < 0.4


def test_search_keeps_a_better_action():
    """The policy's action stays, bit for bit, where no sample is better: at the maximum itself."""
    torch.manual_seed(0)
    obs = torch.randn(N, 200, OBS_DIM)
    action = summit(obs)
    action[0] *= -1  # but not agent 0's
    found = omar.search(concave, obs, action, omar.Args())
    assert torch.equal(found[1], action[1])
    assert (found[0] != action[0]).any(dim=-1).float().mean() > 0.5


def test_search_by_hand(monkeypatch, double):
    """Action by action: the mean weighted by a softmax, the spread around it, the last's best."""
    torch.manual_seed(0)
    obs, action = torch.randn(N, B, OBS_DIM), 2 * torch.rand(N, B, D) - 1
    action[0] = 1.0  # the maximum of Q_1
    args, draws, real = omar.Args(omar_sigma=0.7), [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: draws.append(real(*a, **k)) or draws[-1])
    found = omar.search(twin, obs, action, args)
    assert [draw.shape for draw in draws] == [(10, N, B, D)] * 3
    kept = 0
    for i in range(N):
        for b in range(B):
            centre, sigma = [0.0] * D, [0.7] * D
            for draw in draws:
                samples = [
                    [max(-1.0, min(1.0, centre[d] + sigma[d] * z)) for d, z in enumerate(zs)]
                    for zs in draw[:, i, b].tolist()
                ]
                q = [float(twin(obs[i, b], torch.tensor(a))[0]) for a in samples]
                weights = [math.exp(value) / sum(map(math.exp, q)) for value in q]
                for d in range(D):
                    column = [a[d] for a in samples]
                    centre[d] = sum(w * a for w, a in zip(weights, column, strict=True))
                    sigma[d] = math.sqrt(sum((a - centre[d]) ** 2 for a in column) / 10)
            best = samples[q.index(max(q))]
            if max(q) <= twin(obs[i, b], action[i, b])[0]:
                best, kept = action[i, b].tolist(), kept + 1
            assert found[i, b].tolist() == pytest.approx(best)
    assert B <= kept < N * B


def test_search_has_no_gradient():
    """What it finds is a constant, and the networks are left without gradients."""
    policy, critic = make_policy("omar"), omar.Critic(N, OBS_DIM, D, (16,))
    obs = torch.randn(N, B, OBS_DIM)
    assert not omar.search(critic, obs, policy.act(obs), omar.Args()).requires_grad


def test_q_of_samples_is_a_loop():
    """Q of every sample, agent and observation: (E, J, N, B)."""
    torch.manual_seed(0)
    critic, J = omar.Critic(N, OBS_DIM, D, (16,)), 5
    obs, samples = torch.randn(N, B, OBS_DIM), torch.randn(J, N, B, D)
    q = omar.q_of_samples(critic, obs, samples)
    assert q.shape == (2, J, N, B)
    for j in range(J):
        torch.testing.assert_close(q[:, j], critic(obs, samples[j]))


def test_conservative_term_by_hand(monkeypatch, double):
    """log sum_j exp Q(o, a_j) - Q(o, a_data): batch mean, sum over critics and agents."""
    batch, calls = make_batch(), spy(monkeypatch, omar, "q_of_samples")
    obs, q = batch["obs"], torch.linspace(-1, 2, 2 * N * B).view(2, N, B)
    q[1] *= 3
    term = omar.conservative_term(twin, None, batch, q, omar.Args(cql_samples=7))
    ((_, _, samples),) = calls
    assert samples.shape == (7, N, B, D)
    expected = 0.0
    for e in range(2):
        for i in range(N):
            for b in range(B):
                others = [float(twin(obs[i, b], samples[j, i, b])[e]) for j in range(7)]
                gap = math.log(sum(math.exp(value) for value in others)) - float(q[e, i, b])
                expected += gap / B
    assert float(term) == pytest.approx(expected)


def test_conservative_samples_are_uniform(monkeypatch):
    """Each number of each sampled action is uniform in [-1, 1], drawn by itself."""
    batch, calls = make_batch(2_000), spy(monkeypatch, omar, "q_of_samples")
    torch.manual_seed(0)
    omar.conservative_term(twin, None, batch, torch.zeros(2, N, 2_000), omar.Args())
    samples = calls[0][-1].flatten()
    quantiles = samples.quantile(torch.linspace(0, 1, 11))
    torch.testing.assert_close(quantiles, torch.linspace(-1, 1, 11), rtol=0, atol=0.02)
    assert abs(samples[:-1] @ samples[1:]) / len(samples) < 0.01


def test_conservative_term_lowers_other_actions():
    """Steps down its gradient raise Q of the recorded action above Q of all others."""
    torch.manual_seed(0)
    critic = omar.Critic(N, OBS_DIM, D, (32,))
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    obs = torch.randn(N, 64, OBS_DIM)
    recorded, others = torch.full((N, 64, D), 0.5), 2 * torch.rand(50, N, 64, D) - 1
    batch = {"obs": obs, "action": recorded}

    def advantage():
        with torch.no_grad():
            q = omar.q_of_samples(critic, obs, others)
            return (critic(obs, recorded) - q.mean(dim=1)).mean(dim=-1)  # (E, N)

    before = advantage()
    for _ in range(60):
        term = omar.conservative_term(critic, None, batch, critic(obs, recorded), omar.Args())
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
    assert (advantage() > before + 1).all()


def test_conservative_term_with_own_actions(monkeypatch, double):
    """On MuJoCo: log sum_j exp(Q - log p), by hand from the actions drawn and their densities.

    Of agent 1's action the second number is padding, which has no density.
    """
    module = importlib.import_module("omar_mamujoco")
    batch, calls = make_batch(2_000), spy(monkeypatch, module, "q_of_samples")
    mask = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]])
    scale = torch.tensor(0.3, requires_grad=True)
    policy = SimpleNamespace(act=lambda obs: scale * obs[..., :2].tanh(), mask=mask)
    q = torch.linspace(-1, 2, 2 * N * 2_000).view(2, N, 2_000)
    args = module.Args(cql_samples=3, cql_noise=0.1)
    term = module.conservative_term(twin, policy, batch, q, args)
    ((_, obs, samples),) = calls
    assert obs is batch["obs"]
    assert not term.requires_grad  # the policy is not to be moved
    uniform, *own = samples.chunk(3)
    assert [part.shape for part in (uniform, *own)] == 3 * [(3, N, 2_000, D)]
    quantiles = uniform.flatten().quantile(torch.linspace(0, 1, 11))
    torch.testing.assert_close(quantiles, torch.linspace(-1, 1, 11), rtol=0, atol=0.03)
    means = [policy.act(batch[key]).detach() for key in ("obs", "next_obs")]
    normals = [torch.distributions.Normal(mean, 0.1) for mean in means]
    for actions, normal in zip(own, normals, strict=True):
        assert actions.abs().max() < 1
        assert abs(float((actions - normal.mean).mean())) < 0.003
        assert float((actions - normal.mean).std()) == pytest.approx(0.1, rel=0.03)
    densities = [torch.full_like(uniform, 0.5)]
    densities += [
        normal.log_prob(actions).exp() for actions, normal in zip(own, normals, strict=True)
    ]
    densities = torch.where(mask > 0, torch.cat(densities), 1.0).prod(dim=-1)
    others = twin(batch["obs"], samples).exp() / densities  # (2, J, N, B)
    expected = (others.sum(dim=1).log() - q).mean(dim=-1).sum()
    torch.testing.assert_close(term, expected)

    policy.act = lambda obs: torch.ones_like(obs[..., :2])  # at the edge of the box: none beyond
    module.conservative_term(twin, policy, batch, q, args)
    assert calls[1][-1].abs().max() == 1


# DOM2's reweighting


def make_episodes(returns, horizon=2):
    """Episodes of two agents with these returns; a row's obs is its number and goes on to the next.

    By a single agent's rewards, or by the largest or the first of an episode, the order is another.
    """
    T = horizon * len(returns)
    rows = torch.arange(T, dtype=torch.float32)
    reward = torch.tensor(returns).repeat_interleave(horizon) / horizon
    own = torch.tensor([-9.0, 5.0, 0.0]).repeat_interleave(horizon)
    reward += torch.tensor([9.0, -9.0, 3.0, -3.0, 6.0, -6.0])  # sums to 0 over each episode
    obs, last = rows.expand(N, T)[..., None], (rows % horizon == horizon - 1)[:, None]
    reward = reward + torch.stack([own, -own])
    return {"obs": obs, "reward": reward, "next_obs": obs + torch.where(last, 0.5, 1.0)}


@pytest.mark.parametrize(
    ("returns", "quantiles", "added"),
    [
        ([1.0, 5.0, 3.0], (0.5,), [2, 3, 4, 5]),
        ([5.0, 1.0, 3.0], (0.5,), [0, 1, 4, 5]),
        ([1.0, 5.0, 3.0], (0.9,), [2, 3]),
        ([1.0, 5.0, 3.0], (0.5, 0.9), [2, 3, 4, 5, 2, 3]),
        ([1.0, 5.0, 3.0], (), []),
    ],
)
def test_reweighting(returns, quantiles, added):
    """Episodes from a quantile of the returns on come once more, whole, in order, at the end."""
    dataset = make_episodes(returns)
    result = dom2.reweight(dataset, quantiles)
    expected = [0, 1, 2, 3, 4, 5, *added]
    assert result.keys() == dataset.keys()
    assert result["obs"][..., 0].tolist() == [expected] * N
    assert torch.equal(result["reward"], dataset["reward"][:, expected])


def test_reweighting_refuses_shuffled_rows():
    """Rows that do not go on from one another are no episodes."""
    dataset = make_episodes([1.0, 5.0, 3.0])
    shuffled = {key: value[:, [3, 0, 5, 1, 4, 2]] for key, value in dataset.items()}
    assert "--return-quantiles" in refusal(dom2.reweight, shuffled, (0.5,))


# Updates


@pytest.fixture(scope="module")
def data(make_data, tmp_path_factory):
    """A data folder with a tiny dataset, its actions all near one another."""
    folder = tmp_path_factory.mktemp("data")
    actions = make_data(folder)["acs"]
    for i, values in enumerate(actions):
        path = folder / f"simple_spread/expert/seed_0_data/acs_{i}.npy"
        np.save(path, 0.5 + 0.1 * values)
    return folder


def train(name, data, folder, **settings):
    """A few updates of a baseline; the run's directory."""
    settings = {"num_updates": 3, "eval_interval": 100, "eval_episodes": 2} | settings
    settings |= {"batch_size": 32, "hidden_dims": (16, 16), "device": "cpu"}
    if name == "dom2":
        settings["score_dims"] = (16, 8)
    MODULES[name].train(MODULES[name].Args(data_dir=data, run_dir=folder, **settings))
    return folder / "simple_spread-expert" / f"{name}_mpe" / "seed-0"


@pytest.mark.parametrize("name", NAMES[1:])
def test_targets(name, data, monkeypatch, tmp_path):
    """Slow copies start as copies and move by tau; the TD target takes the smaller critic's value.

    In the flow methods it takes the mean, and the policy's own actions instead of a copy's.
    """
    slow, module, seen, learned = name not in ("flow_ql", "fql"), MODULES[name], [], []
    loss_of_critic, loss_of_policy = module.critic_loss, module.policy_loss

    def copy(network):
        return [parameter.detach().clone() for parameter in network.parameters()]

    def watched_critic(critic, target_critic, policy, batch, gamma, aggregate=torch.mean):
        assert aggregate is (torch.amin if slow else torch.mean)
        assert gamma == 0.8
        seen.append([copy(network) for network in (critic, target_critic, policy)])
        return loss_of_critic(critic, target_critic, policy, batch, gamma, aggregate)

    def watched_policy(policy, *inputs):
        learned.append(copy(policy))
        return loss_of_policy(policy, *inputs)

    monkeypatch.setattr(module, "critic_loss", watched_critic)
    monkeypatch.setattr(module, "policy_loss", watched_policy)
    train(name, data, tmp_path, tau=0.25, gamma=0.8)
    assert len(seen) == len(learned) == 3
    for (_, old_target, old_actor), (critic, target, actor), policy in zip(
        seen, seen[1:], learned[1:], strict=False
    ):
        moved = [0.75 * old + 0.25 * new for old, new in zip(old_target, critic, strict=True)]
        torch.testing.assert_close(target, moved)
        moved = [0.75 * old + 0.25 * new for old, new in zip(old_actor, policy, strict=True)]
        torch.testing.assert_close(actor, moved if slow else policy)
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(old_actor, policy, strict=True))
    (critic, target, actor), *_ = seen
    assert all(torch.equal(a, b) for a, b in zip(critic, target, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(actor, learned[0], strict=True))


@pytest.mark.parametrize("name", ["omar", "dom2"])
def test_conservative_weight(name, data, tmp_path):
    """`cql_alpha` weighs the conservative term in the critics' loss: without it Q keeps the gap."""
    gaps = []
    for alpha in (0.0, 10.0):
        folder = train(name, data, tmp_path / str(alpha), num_updates=30, cql_alpha=alpha)
        names, *_, values = (folder / "metrics.csv").read_text().splitlines()
        row = dict(zip(names.split(","), values.split(","), strict=True))
        gaps.append(float(row["conservative"]))
    plain, weighted = gaps
    assert plain > 10
    assert weighted < plain - 1.5


# What is learned


CLONES = ("bc", "td3_bc", *GENERATIVE)


def two_data_sets(batch_size) -> dict:
    """Agent 0's data hold one action, POINT, agent 1's two, MODE and -MODE, equally often."""
    action = MODE * torch.randn(N, batch_size, 1).sign()
    action[0] = POINT
    obs, zeros = torch.zeros(N, batch_size, 1), torch.zeros(N, batch_size)
    return {"obs": obs, "action": action, "reward": zeros, "next_obs": obs, "done": zeros + 1}


@pytest.fixture(scope="module", params=CLONES)
def clone(request):
    """A method's name, and 2,000 actions of each agent after training without Q.

    Flow-QL asks for the number of steps in acting alone: 1 in training, to save time, and then 10,
    as many as DOM2 has.
    """
    name = request.param
    updates = {"bc": 150, "td3_bc": 150, "diffusion_ql": 600}.get(name, 400)
    torch.manual_seed(0)
    policy = make_policy(name, obs_dim=1, widths=(32, 16) if name == "dom2" else (64, 64))
    if name == "dom2":
        policy.times = torch.linspace(1, 0.001, 11)
    if name == "flow_ql":
        policy.flow_steps = 1
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    q = torch.ones(2, N, 128)
    for _ in range(updates):
        loss = policy_loss(name, policy, lambda *_: q, two_data_sets(128), q_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if name == "flow_ql":
        policy.flow_steps = 10
    with torch.no_grad():
        return name, policy.act(torch.zeros(N, 2_000, 1))


def test_one_action_is_cloned(clone):
    """Exactly by a deterministic policy, to a few hundredths by those that act by noise."""
    name, action = clone
    error = (action[0] - POINT).norm(dim=-1)
    assert error.mean() < (0.1 if name in GENERATIVE else 0.005)
    assert (error < 0.25).float().mean() > 0.95


def test_two_modes_are_kept_or_averaged(clone):
    """Generative policies keep both modes, deterministic ones act between them."""
    name, action = clone
    low, high = (((action[1] - mode).norm(dim=-1) < 0.3).float().mean() for mode in (-MODE, MODE))
    if name in GENERATIVE:
        assert min(low, high) > 0.25
        assert low + high > 0.65
    else:
        assert action[1].abs().max() < 0.25


def test_omar_finds_the_only_action():
    """No reward tells them apart: the conservative term alone makes Q highest at the data's action.

    The policy, which never sees that action, finds it by climbing and by searching.
    """
    torch.manual_seed(0)
    policy, critic = make_policy("omar", obs_dim=1, widths=(32, 32)), omar.Critic(N, 1, D, (32, 32))
    optimizers = [torch.optim.Adam(network.parameters(), 3e-3) for network in (policy, critic)]
    for _ in range(200):
        batch = two_data_sets(64)
        td, q = omar.critic_loss(critic, critic, policy, batch, 0.9, torch.amin)
        gap = omar.conservative_term(critic, policy, batch, q, omar.Args())
        losses = policy_loss("omar", policy, critic, batch), td + 5 * gap
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward(inputs=optimizer.param_groups[0]["params"])
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        action = policy.act(torch.zeros(N, 1, 1))[0]
    assert (action - POINT).norm() < 0.15

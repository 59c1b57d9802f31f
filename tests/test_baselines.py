"""The baselines: losses by hand, OMAR's search, DOM2's reweighting, updates, what is learned.

Hand-made policies and critics stand in for networks where a formula is checked; test_samplers.py
has the policies themselves.
"""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import POLICIES, make_policy
from test_samplers import GENERATIVE, vp, vp_schedule

MODULES = {name: importlib.import_module(f"{name}_mpe") for name in POLICIES}
bc, td3_bc, omar, diffusion_ql, dom2, flow_ql, fql = MODULES.values()
MATCHING = {"diffusion_ql": "diffusion_loss", "dom2": "diffusion_loss"}
MATCHING |= {"flow_ql": "flow_matching_loss", "fql": "flow_matching_loss"}
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
    return MODULES[name].policy_loss(policy, critic, batch, MODULES[name].Args(**settings))[0]


def spy(monkeypatch, module, name):
    """Record the arguments of a function that a script calls; the list grows with every call."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs: calls.append(inputs) or real(*inputs))
    return calls


def uniform_error(values):
    """How far deciles of numbers are from those of the uniform distribution in [-1, 1]."""
    quantiles = values.flatten().quantile(torch.linspace(0, 1, 11))
    return (quantiles - torch.linspace(-1, 1, 11)).abs().max()


# Losses by hand


class Twin(torch.nn.Module):
    """Two hand-made critics, (..., 3), (..., 2) -> (2, ...); now one, now the other is smaller.

    As of the real ones there are as many as its parameter is long.
    """

    def __init__(self):
        super().__init__()
        self.each = torch.nn.Parameter(torch.zeros(2))

    def forward(self, obs, action):
        (x, y, z), (a, b) = obs.unbind(-1), action.unbind(-1)
        q = torch.stack([x + 2 * b + a * b + 0.3, 2 * y - a - b**2 + 0.5 * z + 0.6])
        return q[: len(self.each)]


twin = Twin()


def acting(theta, obs):
    """A hand-made deterministic policy: (N, B, 3) -> (N, B, 2), inside the box."""
    return (theta[0] * obs[..., :2] + theta[1]).tanh()


def predicting(theta, obs, x, time):
    """A hand-made prediction of noise or velocity, of x's shape."""
    return theta[2] * x.sin() + theta[3] * time * obs[..., :2]


class Hand:
    """Both as a policy; `times` are those of DOM2's solver."""

    def __init__(self, theta):
        self.theta, self.mask, self.times = theta, 1.0, torch.linspace(1, 0.001, 6)

    def __call__(self, obs, x, time):
        return predicting(self.theta, obs, x, time)

    def act(self, obs):
        return acting(self.theta, obs)


def squares(one, other):
    """Squared differences: mean over the batch and the dimensions, sum over the agents."""
    return sum(((x - y) ** 2).mean() for x, y in zip(one, other, strict=True))


def normalised(q, scale):
    """Sum over agents of E[q] / E|scale|; q and scale (N, B)."""
    return sum(x.mean() / y.abs().mean() for x, y in zip(q, scale, strict=True))


def check(loss_of, formula):
    """Compare a loss and its gradient in theta with `formula(theta, frozen)` and its differences.

    What the loss treats as a constant the formula computes from `frozen`, which stands still.
    """
    theta = torch.tensor([0.6, -0.3, 0.8, 0.4], requires_grad=True)
    loss = loss_of(theta)
    loss.backward()
    here = theta.detach()
    assert loss.item() == pytest.approx(float(formula(here, here)), rel=1e-9)
    for grad, step in zip(theta.grad, 1e-5 * torch.eye(4), strict=True):
        slope = (formula(here + step, here) - formula(here - step, here)) / 2e-5
        assert float(grad) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def clone_error(theta, obs, action):
    """Distance of the hand-made policy to the recorded actions."""
    return squares(acting(theta, obs), action)


def ddpm_error(theta, obs, action, noise, k):
    """Noise prediction in x_k = sqrt(abar_k) action + sqrt(1 - abar_k) e; k counts from 0."""
    abar, k = torch.tensor(vp_schedule(5)[1])[k][..., None], k[..., None] + 1
    x = abar.sqrt() * action + (1 - abar).sqrt() * noise
    return squares(predicting(theta, obs, x, k), noise)


def vp_error(theta, obs, action, noise, t):
    """Noise prediction in x_t = alpha_t action + sigma_t e."""
    alpha, sigma = vp(t)
    return squares(predicting(theta, obs, alpha * action + sigma * noise, t), noise)


def velocity_error(theta, obs, action, noise, t):
    """Flow matching, || v((1 - t) noise + t action, t) - (action - noise) ||^2."""
    v = predicting(theta, obs, (1 - t) * noise + t * action, t)
    return squares(v, action - noise)


LOSSES = {  # what holds the policy to the data; which Q (2, N, B) it climbs, and divides by
    "bc": (clone_error, lambda q: 0 * q[0], lambda q: q[0]),
    "td3_bc": (clone_error, lambda q: q[0], lambda q: q[0]),
    "diffusion_ql": (
        ddpm_error,  # by chance critic 1 for agent 0 and 2 for agent 1, divided by the other's
        lambda q: torch.stack([q[0, 0], q[1, 1]]),
        lambda q: torch.stack([q[1, 0], q[0, 1]]),
    ),
    "dom2": (vp_error, lambda q: q.amin(dim=0), lambda q: q.amin(dim=0)),
    "flow_ql": (velocity_error, lambda q: sum(q) / 2, lambda q: sum(q) / 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss(name, monkeypatch, double):
    """Fidelity to the data minus q_weight E[Q(o, a_pi)] / sg(E|Q|), sum over agents."""
    batch, (error, chosen, other) = make_batch(), LOSSES[name]
    obs, calls = batch["obs"], [(None, batch["obs"], batch["action"])]
    if name in MATCHING:
        calls = spy(monkeypatch, MODULES[name], MATCHING[name])
    if name == "diffusion_ql":
        monkeypatch.setattr(torch, "rand_like", lambda _: torch.tensor([0.25, 0.75]))

    def loss_of(theta):
        policy = Hand(theta)
        if name == "diffusion_ql":
            policy = diffusion_ql.DiffusionPolicy(N, OBS_DIM, D, ())
            policy.forward = lambda obs, x, k: predicting(theta, obs, x, k[..., None] + 1)
            policy.act = Hand(theta).act
        return policy_loss(name, policy, twin, batch, q_weight=3.0)

    def formula(theta, frozen):
        q, scale = (twin(obs, acting(x, obs)) for x in (theta, frozen))
        return error(theta, *calls[-1][1:]) - 3 * normalised(chosen(q), other(scale))

    check(loss_of, formula)


@pytest.mark.parametrize("coe", [0.0, 0.7])
def test_omar_loss(coe, monkeypatch, double):
    """coe E || a_pi - a* ||^2 - (1 - coe) E[Q_1(o, a_pi)] + 1e-3 E[a_pi^2]; a* by the search."""
    batch = make_batch()
    obs, best = batch["obs"], batch["action"].flip(1)  # not the recorded actions
    monkeypatch.setattr(omar, "search", lambda *_: best)

    def formula(theta, frozen):
        action = acting(theta, obs)
        q = sum(agent.mean() for agent in twin(obs, action)[0])
        return coe * squares(action, best) - (1 - coe) * q + 1e-3 * squares(action, 0 * action)

    check(lambda theta: policy_loss("omar", Hand(theta), twin, batch, omar_coe=coe), formula)


def test_fql_loss(monkeypatch, double):
    """Flow matching + E || mu - sg(flow) ||^2 - q_weight E[Q(o, clip(mu))] / sg(E|Q|).

    Distillation takes the same noise for both, mu as it is, and no gradient to the flow.
    """
    batch, calls, noises = make_batch(), spy(monkeypatch, fql, "flow_matching_loss"), []
    obs = batch["obs"]

    def mu(theta, noise):
        return 2 * theta[0] * noise + theta[1] * obs[..., :2]

    def end_of_flow(theta, noise):
        return theta[2] * noise - theta[3] * obs[..., 1:]

    class Both(Hand):
        def __init__(self, theta):
            super().__init__(theta)
            self.flow = Hand(theta)
            self.flow.act = lambda _, noise: end_of_flow(theta, noise)

        def __call__(self, _, noise):
            noises.append(noise)
            return mu(self.theta, noise)

    def formula(theta, frozen):
        action, stopped = mu(theta, noises[-1]), mu(frozen, noises[-1])
        assert (action.abs() > 1.01).any()
        q, scale = (sum(twin(obs, a.clamp(-1, 1))) / 2 for a in (action, stopped))
        distill = squares(action, end_of_flow(frozen, noises[-1]))
        return velocity_error(theta, *calls[-1][1:]) + distill - 3 * normalised(q, scale)

    check(lambda theta: policy_loss("fql", Both(theta), twin, batch, q_weight=3.0), formula)
    assert not torch.equal(noises[0], calls[0][-2])


@pytest.mark.parametrize("name", GENERATIVE)
def test_draws_of_training(name, monkeypatch):
    """Noise is standard normal; times are uniform over all that acting needs, for each action.

    Acting by DOM2 needs those of its solver's steps alone.
    """
    discrete = {"diffusion_ql": range(5), "dom2": (0.2008, 0.4006, 0.6004, 0.8002, 1)}.get(name)
    calls, batch = spy(monkeypatch, MODULES[name], MATCHING[name]), make_batch(10_000)
    policy_loss(name, make_policy(name, widths=(8, 4)), lambda *_: torch.ones(2, N, 10_000), batch)
    *_, noise, time = calls[0]
    noise = noise.double().flatten()
    assert abs(noise.mean()) < 0.02
    assert abs(noise.square().mean() - 1) < 0.03
    assert abs(noise[:-1] @ noise[1:]) / len(noise) < 0.02  # nothing is repeated
    if discrete:
        found, counts = time.unique(return_counts=True)
        assert found.tolist() == pytest.approx(discrete)
        assert (counts / time.numel()).tolist() == pytest.approx([0.2] * 5, abs=0.015)
    else:
        assert uniform_error(2 * time - 1) < 0.04


@pytest.mark.parametrize("name", POLICIES)
def test_agents_do_not_couple(name):
    """Other data for one agent change its own gradient and leave the other's exactly as it was."""

    def gradients(batch):
        torch.manual_seed(3)
        policy = make_policy(name)
        policy_loss(name, policy, twin, batch).backward()
        return [parameter.grad for parameter in policy.parameters()]  # (N, ...)

    batch, other = make_batch(32), make_batch(32, seed=9)
    changed = {key: torch.stack([other[key][0], value[1]]) for key, value in batch.items()}
    for a, b in zip(gradients(batch), gradients(changed), strict=True):
        assert not torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


# OMAR and conservative critics


@pytest.mark.parametrize("module", [td3_bc, omar])
def test_first_critic(module):
    """The first alone is the first of both, as is its gradient in the action, at half the cost."""
    critic, batch = module.Critic(N, OBS_DIM, D, (8, 8)), make_batch()
    action = batch["action"].requires_grad_()
    q, both = module.first(critic)(batch["obs"], action), critic(batch["obs"], action)
    assert (q.shape, both.shape) == ((1, N, B), (2, N, B))
    torch.testing.assert_close(q[0], both[0])
    grads = [torch.autograd.grad(value.sum(), action)[0] for value in (q, both[0])]
    torch.testing.assert_close(*grads)


def test_search_by_hand(monkeypatch, double):
    """Action by action: the mean weighted by a softmax, the spread around it, the last's best."""
    batch, draws, kept, real = make_batch(), [], [], torch.randn
    obs, action, args = batch["obs"], batch["action"], omar.Args(omar_sigma=0.7)
    action[0] = 1.0  # the maximum of Q_1
    monkeypatch.setattr(torch, "randn", lambda *a, **k: draws.append(real(*a, **k)) or draws[-1])
    found = omar.search(twin, Hand(None), obs, action, args)
    for i, b in np.ndindex(N, B):
        centre, sigma = torch.zeros(D), torch.full((D,), 0.7)
        for draw in draws:
            samples = (centre + sigma * draw[:, i, b]).clamp(-1, 1)
            q = torch.stack([twin(obs[i, b], sample)[0] for sample in samples])
            centre = (q.exp() / q.exp().sum()) @ samples
            sigma = ((samples - centre) ** 2).mean(dim=0) ** 0.5
        stays = q.max() <= twin(obs[i, b], action[i, b])[0]
        torch.testing.assert_close(found[i, b], action[i, b] if stays else samples[q.argmax()])
        kept += [bool(stays)]
    assert all(kept[:B])
    assert not all(kept)


def test_conservative_term_by_hand(monkeypatch, double):
    """log sum_j exp Q(o, a_j) - Q(o, a_data), a_j uniform: batch mean, sum over critics, agents."""
    batch, calls = make_batch(500), spy(monkeypatch, omar, "q_of_samples")
    q = torch.linspace(-1, 2, 2 * N * 500).view(2, N, 500)
    term = omar.conservative_term(twin, Hand(None), batch, q, omar.Args(cql_samples=7))
    ((_, obs, samples),) = calls
    assert uniform_error(samples) < 0.04
    others = twin(obs, samples).exp().sum(dim=1).log()
    torch.testing.assert_close(term, sum((others[e] - q[e]).mean(dim=-1).sum() for e in range(2)))


def test_conservative_term_with_own_actions(monkeypatch, double):
    """On MuJoCo: log sum_j exp(Q - log p), by hand from the actions drawn and their densities.

    Of agent 1's action the second number is padding, which is 0 and has no density.
    """
    module = importlib.import_module("omar_mamujoco")
    batch, calls = make_batch(2_000), spy(monkeypatch, module, "q_of_samples")
    mask, scale = torch.tensor([[[1.0, 1]], [[1, 0]]]), torch.tensor(0.3, requires_grad=True)
    policy = SimpleNamespace(act=lambda obs: scale * mask * obs[..., :2].tanh(), mask=mask)
    q = torch.linspace(-1, 2, 2 * N * 2_000).view(2, N, 2_000)
    args = module.Args(cql_samples=3, cql_noise=0.1)
    term = module.conservative_term(twin, policy, batch, q, args)
    assert not term.requires_grad  # the policy is not to be moved
    ((_, obs, samples),) = calls
    uniform, *own = samples.chunk(3)
    assert (samples[:, 1, :, 1] == 0).all()
    densities = [torch.full_like(uniform, 0.5)]
    for key, actions in zip(("obs", "next_obs"), own, strict=True):
        normal = torch.distributions.Normal(policy.act(batch[key]).detach(), 0.1)
        assert ((actions - normal.mean)[:, 0].std() - 0.1).abs() < 0.003
        densities.append(normal.log_prob(actions).exp())
    density = torch.where(mask > 0, torch.cat(densities), 1.0).prod(dim=-1)
    others = (twin(obs, samples).exp() / density).sum(dim=1).log()  # (2, N, B)
    torch.testing.assert_close(term, (others - q).mean(dim=-1).sum())


# DOM2's reweighting


@pytest.mark.parametrize(
    ("returns", "quantiles", "added"),
    [
        ([1.0, 5.0, 3.0], (0.5,), [2, 3, 4, 5]),
        ([5.0, 1.0, 3.0], (0.9,), [0, 1]),
        ([1.0, 5.0, 3.0], (0.5, 0.9), [2, 3, 4, 5, 2, 3]),
    ],
)
def test_reweighting(returns, quantiles, added):
    """Episodes from a quantile of the returns on come once more, whole, in order, at the end.

    By one agent's rewards, or by an episode's largest or first, the order would be another.
    """
    rows, last = torch.arange(6.0), torch.tensor([0.0, 1.0] * 3)  # a row's obs is its number
    reward = torch.tensor(returns).repeat_interleave(2) / 2
    reward += torch.tensor([9.0, -9.0, 3.0, -3.0, 6.0, -6.0])  # sums to 0 over each episode
    own = torch.tensor([-9.0, 5.0, 0.0]).repeat_interleave(2)
    dataset = {"obs": rows.expand(N, 6)[..., None], "reward": torch.stack([own, -own]) + reward}
    dataset["next_obs"] = dataset["obs"] + 1 - last[:, None] / 2  # the last row's is no row's obs
    result, expected = dom2.reweight(dataset, quantiles), [0, 1, 2, 3, 4, 5, *added]
    assert result["obs"][..., 0].tolist() == [expected] * N
    assert torch.equal(result["reward"], dataset["reward"][:, expected])


# Updates


@pytest.fixture(scope="module")
def data(make_data, tmp_path_factory):
    """A data folder with a tiny dataset, its actions all near one another."""
    folder = tmp_path_factory.mktemp("data")
    for i, values in enumerate(make_data(folder, transitions=100)["acs"]):
        np.save(folder / f"simple_spread/expert/seed_0_data/acs_{i}.npy", 0.5 + 0.1 * values)
    return folder


def train(name, data, folder, **settings):
    """A few updates of a baseline; the checkpoint."""
    settings |= {"batch_size": 32, "hidden_dims": (16, 16), "device": "cpu", "eval_episodes": 1}
    settings |= {"score_dims": (16, 8)} if name == "dom2" else {}
    MODULES[name].train(MODULES[name].Args(data_dir=data, run_dir=folder, **settings))
    return torch.load(folder / f"simple_spread-expert/{name}_mpe/seed-0/checkpoint.pt")


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "bc"])
def test_targets(name, data, monkeypatch, tmp_path):
    """Slow copies start as copies and move by tau; the TD target takes the smaller critic's value.

    In the flow methods it takes the mean, and the policy's own actions instead of a copy's.
    """
    slow, module = name not in ("flow_ql", "fql"), MODULES[name]
    td, learning = (spy(monkeypatch, module, f"{part}_loss") for part in ("critic", "policy"))
    start, end = (
        train(name, data, tmp_path, num_updates=1, tau=0.25, gamma=0.8, learning_rate=rate)["parts"]
        for rate in (1e-30, 1e-2)
    )
    *_, actor, _, gamma = td[-1][:5]
    assert (gamma, td[-1][5:]) == (0.8, (torch.amin,) if slow else ())
    assert (actor is learning[-1][0]) != slow
    for source, target in ((0, 2), (1, 3)) if slow else ((1, 2),):
        new = {k: torch.lerp(v, end[source][k], 0.25) for k, v in start[source].items()}
        torch.testing.assert_close(start[source], start[target])
        torch.testing.assert_close(end[target], new)
        assert any((new[k] - v).abs().max() > 1e-3 for k, v in start[source].items())


def test_conservative_weight(data, tmp_path):
    """`cql_alpha` weighs the conservative term in the critics' loss: without it Q keeps the gap."""
    settings = {"data": data, "folder": tmp_path, "num_updates": 30}
    plain, weighted = (train("omar", cql_alpha=x, **settings)["history"][-1] for x in (0.0, 10.0))
    assert weighted["conservative"] < plain["conservative"] - 1.5


# What is learned


@pytest.mark.parametrize("name", ["bc", "td3_bc", *GENERATIVE])
def test_cloning(name):
    """Without Q one action is cloned; of two, a generative policy keeps both, others the mean.

    Agent 0's data hold one action, POINT, agent 1's two, MODE and -MODE, equally often.
    """
    torch.manual_seed(0)
    policy = make_policy(name, obs_dim=1, widths=(32, 16) if name == "dom2" else (64, 64))
    if name == "dom2":
        policy.times = torch.linspace(1, 0.001, 11)
    if name == "fql":
        policy.flow.flow_steps = 5
    updates = {"bc": 100, "td3_bc": 100, "diffusion_ql": 600}.get(name, 300)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    act, critic, obs = policy.act, torch.nn.Module(), torch.zeros(N, 128, 1)
    critic.forward = lambda *_: torch.ones(2, N, 128)
    if name != "fql":  # acting is of no use in training without Q
        policy.act = lambda obs: torch.zeros(N, 128, D) if name in GENERATIVE else act(obs)
    for _ in range(updates):
        action = torch.stack([POINT.expand(128, D), MODE * torch.randn(128, 1).sign()])
        batch = {"obs": obs, "action": action}
        loss = policy_loss(name, policy, critic, batch, q_weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        action = act(torch.zeros(N, 2_000, 1))
    error = (action[0] - POINT).norm(dim=-1)
    low, high = (((action[1] - mode).norm(dim=-1) < 0.3).float().mean() for mode in (-MODE, MODE))
    if name in GENERATIVE:
        assert error.mean() < 0.1
        assert min(low, high) > 0.25
        assert low + high > 0.65
    else:
        assert error.mean() < 0.005
        assert action[1].abs().max() < 0.25

"""What training does: repeatable, undisturbed by evaluation, and right on data with two modes."""

import csv
import shutil
import subprocess
import sys
from types import SimpleNamespace

import bc_mpe
import numpy as np
import pytest
import torch
import tyro
from conftest import refusal

import om2p_mpe
from om2p_mpe import MPE, Args, MeanFlowPolicy, evaluate, policy_loss

TINY = {"num_updates": 6, "eval_interval": 3, "eval_episodes": 4, "batch_size": 32}
TINY |= {"hidden_dims": (16, 16), "device": "cpu", "compile": False}
N, B = 2, 256  # of the tests with two modes
MODES = torch.tensor([-0.7, 0.7]).view(2, 1, 1, 1).expand(2, N, 1, 1)


@pytest.fixture
def train(make_data, tmp_path):
    """A function that trains a small team on tiny data; returns the checkpoint's networks."""
    for seed in (0, 1):
        make_data(tmp_path / "data", seed=seed)

    def run(**settings):
        run_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        places = {"data_dir": tmp_path / "data", "run_dir": run_dir}
        om2p_mpe.train(Args(**TINY | places | settings))
        return networks(run_dir)

    return run


def networks(run_dir) -> dict:
    """What the only checkpoint under a --run-dir holds: the step, and the networks' weights."""
    (path,) = run_dir.rglob("checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    names, parts = ("step", "policy", "critic", "target_critic"), [saved["step"], *saved["parts"]]
    return dict(zip(names, parts, strict=False))


def same_weights(a: dict, b: dict) -> bool:
    """Whether two runs end with equal weights, bit for bit, in every network."""
    pairs = [(a[name][key], b[name][key]) for name in a if name != "step" for key in a[name]]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("settings", [{}, {"eval_interval": 1}, {"eval_episodes": 1}])
def test_same_seed_same_weights(train, settings):
    """A seed gives the same weights, however often and long the policy is evaluated on the way."""
    assert same_weights(train(), train(**settings))


@pytest.mark.parametrize("settings", [{"num_updates": 5}, {"seed": 1}])
def test_other_weights(train, settings):
    """One update less, or another seed, ends elsewhere."""
    assert not same_weights(train(), train(**settings))


def test_two_threads_same_weights(train):
    """On the CPU the number of threads changes no bit, at the default sizes."""
    size = {"batch_size": 128, "hidden_dims": (128, 128)}
    first = train(**size)
    torch.set_num_threads(2)
    second = train(**size)
    torch.set_num_threads(1)
    assert same_weights(first, second)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_run_is_the_plain_one(make_data, tmp_path):
    """--compile draws the same numbers and takes the same steps, but for rounding.

    Of behaviour cloning, which compiles in a third of OM2P's time.
    """
    make_data(tmp_path)
    line = ["--num-updates", "6", "--hidden-dims", "16", "--data-dir", str(tmp_path), "--run-dir"]
    command = [sys.executable, bc_mpe.__file__, *line, tmp_path / "one", "--compile"]
    subprocess.run([*command, "--device", "cpu"], check=True)
    plain = ["--no-compile", "--device", "cpu"]
    bc_mpe.train(tyro.cli(bc_mpe.Args, args=[*line, str(tmp_path / "two"), *plain]))
    final = [networks(tmp_path / name)["policy"] for name in ("one", "two")]
    torch.testing.assert_close(*final, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_what_does_not_compile(first, train, monkeypatch):
    """One line says so and names --no-compile, whether compiling fails or what was compiled."""

    def fail(*_, **__):
        raise RuntimeError("no compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", fail if first else lambda update, **_: fail)
    message = refusal(lambda: train(compile=True))
    assert "--no-compile" in message
    assert message.endswith("no compiler found")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"derivative": "jvp"}, {"num_seeds": 2}])
def test_captured_run_is_the_plain_one(train, settings):
    """Replayed as a CUDA graph, the update gives the weights of the plain one, but for rounding."""
    settings = {"device": "cuda", "num_updates": 12, **settings}
    first, second = (train(compile=compile, **settings) for compile in (False, True))
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_evaluation_leaves_the_random_state():
    """Evaluating draws from its own seed alone, and puts torch's random state back."""
    env = MPE("simple_spread", 4)
    policy = MeanFlowPolicy(env.num_agents, env.obs_dims[0], 2, (16,))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = evaluate(policy, [env])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    np.testing.assert_array_equal(evaluate(policy, [env]), first)
    assert not np.array_equal(evaluate(policy, [env], [1]), first)


def test_every_seed_has_its_own_starts():
    """One team of both seeds' agents plays as each seed's half would alone, from its own starts."""
    still = SimpleNamespace(act=lambda obs: torch.zeros(*obs.shape[:-1], 2))
    both, first, second = (
        evaluate(still, [MPE("simple_spread", 4) for _ in seeds], seeds)
        for seeds in ((0, 7), (0,), (7,))
    )
    np.testing.assert_array_equal(both, np.concatenate([first, second]))
    assert not np.array_equal(first, second)


def test_batch(train, monkeypatch, tmp_path):
    """All agents of a seed learn from the same rows in an update, seeds from different ones."""
    batches, critic_loss = [], om2p_mpe.critic_loss

    def watched(critic, target_critic, policy, batch, gamma):
        batches.append(batch["obs"])
        return critic_loss(critic, target_critic, policy, batch, gamma)

    monkeypatch.setattr(om2p_mpe, "critic_loss", watched)
    train(num_seeds=2)
    folder = tmp_path / "data/simple_spread/expert"
    files = [folder / f"seed_{seed}_data/obs_{i}.npy" for seed in (0, 1) for i in range(3)]
    data = torch.stack([torch.from_numpy(np.load(file)) for file in files])  # (N, T, obs_dim)
    for obs in batches:
        index = (obs[:, :, None] == data[:, None]).all(dim=-1).float().argmax(dim=-1)  # (N, B)
        assert torch.equal(data[torch.arange(6)[:, None], index], obs)
        assert (index[:3] == index[0]).all()
        assert (index[3:] == index[3]).all()
        assert not torch.equal(index[0], index[3])


def test_policys_step_size_goes_down(train, monkeypatch):
    """Linearly, to zero after the last update; the critic's stays as it is."""
    sizes, save = [], torch.save

    def watched(saved, path):
        if "parts" in saved:
            sizes.append([part["param_groups"][0]["lr"].item() for part in saved["parts"][3:5]])
        save(saved, path)

    monkeypatch.setattr(torch, "save", watched)
    train(num_updates=4, eval_interval=1, learning_rate=0.01)
    assert np.transpose(sizes) == pytest.approx(np.array([[0.0075, 0.005, 0.0025, 0], [0.01] * 4]))


def test_target_critic_moves_by_tau(train):
    """One update moves the target critic the share tau of the way to the updated critic."""
    runs = [train(num_updates=1, tau=tau) for tau in (0.0, 0.25, 1.0)]
    start, moved, end = (run["target_critic"] for run in runs)
    for key, value in end.items():
        assert torch.equal(runs[0]["critic"][key], value)
        assert torch.equal(start[key], value) == key.endswith(("mean", "std"))
        torch.testing.assert_close(moved[key], 0.75 * start[key] + 0.25 * value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e8])
@pytest.mark.parametrize(("name", "good_calls"), [("policy_loss", 3), ("evaluate", 1)])
def test_divergence_stops_the_run(name, good_calls, value, train, monkeypatch, tmp_path):
    """A loss or a return that is too large or no number ends the run; the checkpoint stays."""
    function, calls = getattr(om2p_mpe, name), []

    def broken(*inputs):
        calls.append(None)
        result = function(*inputs)
        if len(calls) <= good_calls:
            return result
        return 0 * result + value if name == "evaluate" else (0 * result[0] + value, result[1])

    monkeypatch.setattr(om2p_mpe, name, broken)
    assert "diverged at update 6" in refusal(train)
    assert networks(tmp_path)["step"] == 3


def test_critics_loss_by_hand(train, monkeypatch, tmp_path):
    """TD loss + cql_alpha sum E[log(1 + exp(Q(o, a') - Q(o, a)))], a' uniform and 0 in padding."""
    expected, critic_loss = [], om2p_mpe.critic_loss

    def watched(critic, target_critic, policy, batch, gamma):
        loss, q = critic_loss(critic, target_critic, policy, batch, gamma)
        policy.mask[0, :, 1] = 0
        other = torch.full_like(batch["action"], -0.5)
        other[0, :, 1] = 0
        gap = critic(batch["obs"], other) - q
        expected.append(loss.item() + 2 * (1 + gap.exp()).log().mean(dim=2).sum().item())
        return loss, q

    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.25))
    monkeypatch.setattr(om2p_mpe, "critic_loss", watched)
    train(num_updates=1, cql_alpha=2.0)
    (path,) = tmp_path.rglob("metrics.csv")
    (row,) = csv.DictReader(path.open())
    assert float(row["critic"]) == pytest.approx(expected[0], rel=1e-5)


def train_policy(modes, critic, q_weight, updates, **settings):
    """Train a policy on data of two equally likely actions per agent; return 2,000 of its actions.

    `modes`: (2, N, 1, D); `critic`: a fixed function of actions, (N, B, D) -> (N, B).
    """
    torch.manual_seed(0)
    args = Args(q_weight=q_weight, **settings)
    policy = MeanFlowPolicy(N, 1, modes.shape[-1], (64, 64))
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, updates)
    for _ in range(updates):
        action = torch.where(torch.rand(N, B, 1) < 0.5, *modes)
        batch = {"obs": torch.zeros(N, B, 1), "action": action}
        loss, _ = policy_loss(policy, lambda _, a: critic(a).expand(2, N, B), batch, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return policy.act(torch.zeros(N, 2_000, 1))


def share_within(radius: float, action, point) -> torch.Tensor:
    """Share of each agent's actions that are this near to a point: (N, B, D) -> (N,)."""
    return ((action - point).norm(dim=-1) < radius).float().mean(dim=-1)


def test_both_modes_without_q():
    """Mean-flow matching alone keeps both modes, and puts little in between."""
    action = train_policy(MODES, lambda a: a[..., 0], q_weight=0.0, updates=800)
    low, high = (share_within(0.2, action, mode) for mode in MODES)
    assert (low > 0.25).all()
    assert (high > 0.25).all()
    assert (low + high > 0.55).all()


def test_better_mode_with_q():
    """With the Q term each agent picks the mode that its own critic prefers."""
    better = torch.tensor([0.7, -0.7]).view(N, 1, 1)  # one for each agent

    def critic(a):
        return (3 * a * better.sign()).tanh().sum(dim=-1)

    action = train_policy(MODES, critic, q_weight=1.0, updates=600)
    assert (share_within(0.4, action, better) > 0.8).all()


def test_q_moves_the_action_whatever_the_derivative():
    """A constant gradient of Q moves the action as far with an exact du/dr as with a coarse one.

    With the Q term at r = 0 alone an exact one would hold the action to the data.
    """
    modes, moved = torch.zeros(2, N, 1, 1), []
    for settings in ({"derivative": "jvp"}, {"delta": 0.01}, {"delta": 0.1}):
        action = train_policy(modes, lambda a: 1 + 0.1 * a[..., 0], 4.0, 400, **settings)
        moved.append(action.mean())
    assert moved[2] > 0.1
    assert all(0.6 < value / moved[2] < 1.7 for value in moved)


def test_spurious_peak_of_q():
    """A peak of Q far from all data draws actions there at a weight of 10, and none at 0.2."""
    modes = torch.tensor([[-0.7, -0.7], [0.7, 0.7]]).view(2, 1, 1, 2).expand(2, N, 1, 2)
    peak = torch.tensor([0.7, -0.7])

    def critic(a):
        return 1 + (-((a - peak) ** 2).sum(dim=-1) / (2 * 0.3**2)).exp()

    action = train_policy(modes, critic, q_weight=0.2, updates=600)
    near = share_within(0.4, action, modes[0]) + share_within(0.4, action, modes[1])
    assert (near > 0.5).all()
    assert (share_within(0.4, action, peak) < 0.05).all()
    followed = train_policy(modes, critic, q_weight=10.0, updates=100)
    assert (share_within(0.4, followed, peak) > 0.5).all()

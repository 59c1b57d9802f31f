"""What training does: repeatable, undisturbed by evaluation, and right on data with two modes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import om2p_mpe
from om2p_mpe import MPE, Args, MeanFlowPolicy, evaluate, policy_loss

TINY = {"batch_size": 32, "hidden_dims": (16, 16), "device": "cpu", "compile": False}
N, B = 2, 256  # of the tests with two modes


@pytest.fixture
def train(make_data, tmp_path):
    """A function that trains a small team on tiny data; returns the checkpoint's states."""
    for seed in (0, 1):
        make_data(tmp_path / "data", seed=seed)
    number = itertools.count()

    def run(num_updates=6, eval_interval=3, **settings):
        args = Args(
            data_dir=tmp_path / "data",
            run_dir=tmp_path / f"run-{next(number)}",
            num_updates=num_updates,
            eval_interval=eval_interval,
            eval_episodes=4,
            **{"batch_size": 32, "hidden_dims": (16, 16), "device": "cpu"}
            | {"compile": False}
            | settings,
        )
        om2p_mpe.train(args)
        return load_checkpoint(args.run_dir)["states"]

    return run


def load_checkpoint(run_dir) -> dict:
    """The only checkpoint under a --run-dir."""
    (path,) = run_dir.rglob("checkpoint.pt")
    return torch.load(path, weights_only=True)


def same_weights(a: dict, b: dict) -> bool:
    """Whether two state_dicts are equal, bit for bit."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({}, True),
        ({"eval_interval": 1}, True),
        ({"eval_interval": 100}, True),
        ({"num_updates": 5}, False),
    ],
)
def test_same_seed_same_weights(train, settings, same):
    """A seed gives the same weights, however often the policy is evaluated on the way."""
    first, second = train(), train(**settings)
    for name in ("policy", "critic", "target_critic"):
        assert same_weights(first[name], second[name]) == same


def test_two_threads_same_weights(train):
    """On the CPU the number of threads changes no bit, at the default sizes."""
    size = {"batch_size": 128, "hidden_dims": (128, 128), "num_updates": 10}
    first = train(**size)
    torch.set_num_threads(2)
    second = train(**size)
    torch.set_num_threads(1)
    for name in ("policy", "critic", "target_critic"):
        assert same_weights(first[name], second[name])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled_run_is_the_plain_one(train, tmp_path):
    """--compile draws the same numbers and takes the same steps, but for rounding.

    In a process of its own: older compilers' code changes how the whole process rounds.
    """
    first, words = train(), ["--compile", "--num-updates", "6", "--eval-interval", "3"]
    words += ["--eval-episodes", "4", "--batch-size", "32", "--hidden-dims", "16", "16"]
    words += ["--data-dir", tmp_path / "data", "--run-dir", tmp_path / "compiled"]
    command = [sys.executable, om2p_mpe.__file__, "--device", "cpu", *words]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "going on without" not in process.stderr
    second = load_checkpoint(tmp_path / "compiled")["states"]
    for name in ("policy", "critic", "target_critic"):
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-4)
    assert not same_weights(first["policy"], second["policy"])  # another rounding: it was compiled


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("where", ["critic_loss", "policy_loss", "mean_flow_loss"])
def test_what_does_not_compile_runs_plainly(call, where, train, monkeypatch, capsys):
    """One line says that --compile fails, in whatever part of an update; the run is the plain one.

    The compiled update is the plain one here, but for what does not compile. Its end raises, too,
    as that of a CUDA graph's capture does.
    """
    first, function, calls = train(), getattr(om2p_mpe, where), []

    def compile_but_fail(update, **_):
        def compiled_update():
            calls.append(None)
            monkeypatch.setattr(om2p_mpe, where, fail if len(calls) == call else function)
            try:
                return update()
            finally:
                monkeypatch.setattr(om2p_mpe, where, function)

        return compiled_update

    def fail(*args):
        function(*args)
        try:
            raise RuntimeError("no compiler found\nand much more")
        finally:
            raise ValueError("not captured")

    monkeypatch.setattr(torch, "compile", compile_but_fail)
    second = train(compile=True)
    assert len(calls) == call
    assert all(same_weights(first[name], second[name]) for name in ("policy", "critic"))
    assert "--compile, which fails: RuntimeError: no compiler found\n" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", [{}, {"derivative": "jvp"}, {"num_seeds": 2}])
def test_captured_run_is_the_plain_one(train, capsys, settings):
    """Replayed as a CUDA graph, the update gives the weights of the plain one, but for rounding."""
    settings = {"device": "cuda", "num_updates": 12, **settings}
    first, second = (train(compile=compile, **settings) for compile in (False, True))
    assert "going on without" not in capsys.readouterr().err
    for name in ("policy", "critic", "target_critic"):
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=1e-3)


def test_another_seed_gives_other_weights(train):
    """Everything random depends on the seed."""
    first, second = train(seed=0)["policy"], train(seed=1)["policy"]
    assert not any(torch.equal(first[key], second[key]) for key in first)


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

    class Still:
        def __init__(self, agents):
            self.agents = agents

        def act(self, obs):
            assert obs.shape[0] == self.agents
            return torch.zeros(*obs.shape[:-1], 2)

    def play(*seeds):
        return evaluate(Still(3 * len(seeds)), [MPE("simple_spread", 4) for _ in seeds], seeds)

    np.testing.assert_array_equal(play(0, 7), np.concatenate([play(0), play(7)]))
    assert not np.array_equal(play(0), play(7))


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_sample(num_seeds):
    """Agents of a seed get the same rows, seeds others, all values of one row; none is left out."""
    torch.manual_seed(0)
    rows, agents = torch.arange(5).float(), torch.arange(4).float()[:, None]
    dataset = {"obs": (10 * agents + rows)[..., None], "reward": 10 * agents + rows}
    batch = om2p_mpe.sample(dataset, 64, num_seeds)
    assert batch["obs"].shape == (4, 64, 1)
    assert torch.equal(batch["obs"][..., 0], batch["reward"])
    index = (batch["reward"] - 10 * agents).reshape(num_seeds, 4 // num_seeds, 64)
    assert (index == index[:, :1]).all()
    for one in index[:, 0]:
        assert set(one.tolist()) == set(range(5))
    assert num_seeds == 1 or not torch.equal(*index[:, 0])


def test_policys_step_size_goes_down(train, monkeypatch):
    """Linearly, to zero after the last update; the critic's stays as it is."""
    optimizers, step_sizes, adam, policy_loss = [], [], om2p_mpe.adam, om2p_mpe.policy_loss

    def watched_adam(*inputs):
        optimizers.append(adam(*inputs))
        return optimizers[-1]

    def watched_loss(*inputs):
        step_sizes.append([optimizer.param_groups[0]["lr"].item() for optimizer in optimizers])
        return policy_loss(*inputs)

    monkeypatch.setattr(om2p_mpe, "adam", watched_adam)
    monkeypatch.setattr(om2p_mpe, "policy_loss", watched_loss)
    train(num_updates=4, learning_rate=0.01)
    of_policy, of_critic = zip(*step_sizes, strict=True)
    assert of_policy == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert of_critic == pytest.approx([0.01] * 4)


def test_tf32_is_pytorchs_setting(train):
    """--tf32 sets how PyTorch multiplies; without it the run has full precision."""
    try:
        for tf32, precision in ((True, "high"), (False, "highest")):
            train(num_updates=1, tf32=tf32)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_timeout_done_marks_last_steps(train, monkeypatch, tmp_path):
    """With --timeout-done `done` is 1 in an episode's 25th row, and 0 elsewhere."""
    seen, real = [], om2p_mpe.critic_loss

    def watched(critic, target_critic, policy, batch, gamma):
        seen.append((batch["obs"][0], batch["done"]))
        return real(critic, target_critic, policy, batch, gamma)

    monkeypatch.setattr(om2p_mpe, "critic_loss", watched)
    train()
    assert all((done == 0).all() for _, done in seen)
    seen.clear()
    train(timeout_done=True)
    rows = torch.from_numpy(np.load(tmp_path / "data/simple_spread/expert/seed_0_data/obs_0.npy"))
    for obs, done in seen:
        index = (obs[:, None] == rows).all(dim=-1).float().argmax(dim=1)
        assert (done == (index % 25 == 24)).all()
    assert sum(done.sum() for _, done in seen) > 0


def test_target_critic_moves_by_tau(train):
    """One update moves the target critic the share tau of the way to the updated critic."""
    runs = [train(num_updates=1, tau=tau) for tau in (0.0, 0.25, 1.0)]
    start, moved, end = (run["target_critic"] for run in runs)
    assert all(same_weights(run["critic"], end) for run in runs)
    for key in start:
        assert not torch.equal(start[key], end[key])
        torch.testing.assert_close(moved[key], 0.75 * start[key] + 0.25 * end[key])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_divergence_stops_the_run(train, monkeypatch, tmp_path, value):
    """A loss that explodes or turns NaN ends the run with one line; the checkpoint stays good."""
    calls, real = [], om2p_mpe.policy_loss

    def broken(*inputs):
        calls.append(None)
        loss, parts = real(*inputs)
        return loss if len(calls) <= 3 else loss * 0 + value, parts

    monkeypatch.setattr(om2p_mpe, "policy_loss", broken)
    with pytest.raises(SystemExit) as stop:
        train()
    message = str(stop.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "update 6" in message
    checkpoint = load_checkpoint(tmp_path / "run-0")
    assert checkpoint["progress"]["step"] == 3
    assert all(value.isfinite().all() for value in checkpoint["states"]["policy"].values())


@pytest.mark.parametrize("when", ["a signal", "the end"])
def test_weights_that_are_not_numbers_are_not_saved(train, monkeypatch, tmp_path, when):
    """NaN in a gradient alone ends the run before it is evaluated or saved."""
    calls, real = [], om2p_mpe.policy_loss
    last = {"a signal": 5, "the end": 6}[when]

    def broken(policy, *inputs):
        calls.append(None)
        loss, parts = real(policy, *inputs)
        if len(calls) == last:
            if when == "a signal":
                os.kill(os.getpid(), signal.SIGTERM)
            weights = next(policy.parameters())  # sqrt has an infinite slope at 0
            loss = loss + (weights - weights.detach()).abs().sqrt().sum()
        return loss, parts

    monkeypatch.setattr(om2p_mpe, "policy_loss", broken)
    with pytest.raises(SystemExit, match=f"not finite at update {last}: training has diverged"):
        train()
    assert load_checkpoint(tmp_path / "run-0")["progress"]["step"] == 3
    assert not list(tmp_path.rglob("policy.pt"))


def train_policy(modes, critic, q_weight, updates, **settings):
    """Train a policy on data of two equally likely actions per agent; return 2,000 of its actions.

    `modes`: (2, N, 1, D); `critic`: a fixed function of actions, (N, B, D) -> (N, B).
    """
    torch.manual_seed(0)
    args = Args(q_weight=q_weight, **settings)
    policy = MeanFlowPolicy(N, 1, modes.shape[-1], (64, 64))
    optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, updates)
    obs = torch.zeros(N, B, 1)
    for _ in range(updates):
        action = torch.where(torch.rand(N, B, 1) < 0.5, *modes)
        loss, *_ = policy_loss(
            policy, lambda _, a: critic(a).expand(2, N, B), {"obs": obs, "action": action}, args
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return policy.act(torch.zeros(N, 2_000, 1))


def share_within(radius: float, action, point) -> torch.Tensor:
    """Share of each agent's actions that are this near to a point: (N, B, D) -> (N,)."""
    return ((action - point).norm(dim=-1) < radius).float().mean(dim=-1)


@pytest.mark.parametrize(("delta", "share"), [(0.01, 0.7), (0.1, 0.6)])
def test_both_modes_without_q(delta, share):
    """Mean-flow matching alone keeps both modes; a longer difference step puts more in between."""
    modes = torch.tensor([-0.7, 0.7]).view(2, 1, 1, 1).expand(2, N, 1, 1)
    action = train_policy(modes, lambda a: a[..., 0], q_weight=0.0, updates=1_000, delta=delta)
    low, high = (share_within(0.2, action, mode) for mode in modes)
    assert (low > 0.3).all()
    assert (high > 0.3).all()
    assert (low + high > share).all()


def test_better_mode_with_q():
    """With the Q term each agent picks the mode that its own critic prefers."""
    modes = torch.tensor([-0.7, 0.7]).view(2, 1, 1, 1).expand(2, N, 1, 1)
    better = torch.tensor([0.7, -0.7]).view(N, 1, 1)  # one for each agent
    action = train_policy(
        modes, lambda a: (3 * a * better.sign()).tanh().sum(dim=-1), q_weight=1.0, updates=600
    )
    assert (share_within(0.4, action, better) > 0.8).all()


def test_spurious_peak_of_q():
    """A peak that doubles Q far from all data does not draw actions there at a moderate weight.

    It would if nothing held the policy: at a weight of 10 the Q term wins.
    """
    modes = torch.tensor([[-0.7, -0.7], [0.7, 0.7]]).view(2, 1, 1, 2).expand(2, N, 1, 2)
    peak = torch.tensor([0.7, -0.7])

    def critic(a):
        return 1 + (-((a - peak) ** 2).sum(dim=-1) / (2 * 0.3**2)).exp()

    action = train_policy(modes, critic, q_weight=0.2, updates=600)
    near = share_within(0.4, action, modes[0]) + share_within(0.4, action, modes[1])
    assert (near > 0.6).all()
    assert (share_within(0.4, action, peak) < 0.05).all()
    followed = train_policy(modes, critic, q_weight=10.0, updates=200)
    assert (share_within(0.4, followed, peak) > 0.5).all()

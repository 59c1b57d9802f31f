"""The behaviour policies of datasets: what those that are tracked do, and training new ones."""

from functools import partial

import card
import collect_mpe
import numpy as np
import pytest
import torch
import train_behavior
from conftest import ROOT, refusal
from test_data import collect

import om2p_mpe


@pytest.mark.parametrize("quality", card.QUALITIES)
@pytest.mark.parametrize("task", ["simple_spread", "simple_tag", "simple_world"])
def test_returns_are_near_the_public_ones(task, quality, tmp_path):
    """400 episodes: medium within 20 %, medium-replay 15 points, expert no less than 95 %."""
    facts, files = collect(tmp_path, task, quality, 10_000)
    assert len(np.unique(files["obs_0"][::25], axis=0)) == 400  # no start is repeated
    ours, public = facts["return mean"], card.PUBLIC_RETURNS[task][quality]
    if quality == "expert":
        assert ours > 0.95 * public
    elif quality == "medium":
        assert ours == pytest.approx(public, rel=0.2)
    else:
        assert abs(ours - public) < (15 if quality == "medium-replay" else 8)


@pytest.mark.parametrize("task", ["HalfCheetah-6x1", "Hopper-3x1", "Ant-2x4"])
def test_robots_move_as_the_public_ones(task, tmp_path):
    """The expert's return is three quarters of the public expert data's, or more."""
    facts, _ = collect(tmp_path, task, "expert", 10_000)
    assert facts["return mean"] > 0.75 * card.PUBLIC_RETURNS[task]["expert"]


def test_tracked_snapshots_are_small():
    """At most 12 MB together."""
    assert sum(path.stat().st_size for path in collect_mpe.BEHAVIOR_DIR.glob("*")) < 12e6


def test_behavior_policies_explore(tmp_path):
    """Recorded actions scatter by 0.1 around the policy's own."""
    (policy,) = collect_mpe.load_behavior("simple_tag", "expert", om2p_mpe.MPE("simple_tag", 1))
    _, files = collect(tmp_path, "simple_tag", "expert", transitions=2_500)
    obs, action = (np.stack([files[f"{name}_{i}"] for i in range(3)]) for name in ("obs", "acs"))
    with torch.no_grad():
        own = policy.act(torch.from_numpy(obs)).numpy()
    assert (action - own)[np.abs(own) < 0.6].std() == pytest.approx(0.1, rel=0.1)


def test_stages():
    """medium is nearest to half of the way on the way there; replay leads up to it."""
    returns = np.array([0.0, 20.0, 45.0, 80.0, 49.0, 100.0, 90.0])
    public, choose = {"medium": 80.0, "medium-replay": 21.0}, train_behavior.choose_stages
    stages = choose(returns, 0.0, {}, by_mean=True)
    assert stages == {"replay": [0, 1, 2], "medium": [2], "expert": [5]}
    stages = choose(returns, 0.0, public, by_mean=True)
    assert stages == {"replay": [0, 1, 2], "medium": [3], "expert": [5]}
    assert choose(returns, 0.0, public, by_mean=False)["replay"] == [0, 1, 2, 3]


def test_training_resumes_and_its_policies_play(monkeypatch, tmp_path, capsys):
    """A stopped training goes on from its last save; the three stages can then be recorded."""
    settings = {"warm_up": 1_000, "first_update": 1_000, "check_interval": 250, "batch_size": 64}
    for name, value in {**settings, "num_envs": 10, "hidden_dims": (32,)}.items():
        monkeypatch.setattr(train_behavior.MUJOCO, name, value)
    calls, roll_out = [], train_behavior.roll_out

    def stop_twice(*args):
        calls.append(None)
        if len(calls) in (6, 11):
            raise KeyboardInterrupt
        return roll_out(*args)

    monkeypatch.setattr(train_behavior, "roll_out", stop_twice)
    args = train_behavior.Args("Reacher-2x1", train_steps=2_000, out=tmp_path / "Reacher-2x1.npz")
    saved, states = tmp_path / "Reacher-2x1.training.pt", []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_behavior.train(args)
        assert list(tmp_path.iterdir()) == [saved]
        states.append(torch.load(saved))
    assert [state["step"] for state in states] == [750, 1_750]
    for first, second in zip(*(state["buffer"].values() for state in states), strict=True):
        assert torch.equal(first, second[:750])
    policy, target = (states[1]["parts"][k] for k in (0, 2))
    for key, values in states[1]["snapshots"][-1].items():  # taken just before the save
        assert torch.equal(values, target[key].half().float())
        is_buffer = key.endswith(("mean", "std"))  # which never change here
        assert torch.equal(values, policy[key].half().float()) == is_buffer
    other = train_behavior.Args(**{**vars(args), "seed": 4})
    assert str(saved) in refusal(train_behavior.train, other)
    train_behavior.train(args)
    assert len(calls) == 5 + 1 + (8 - 4) + 1 + 1  # the fifth check, after a save, is done again
    assert list(tmp_path.iterdir()) == [args.out]
    assert "2,000 steps" in capsys.readouterr().out
    monkeypatch.setattr(collect_mpe, "BEHAVIOR_DIR", tmp_path)
    qualities = ("random", "medium-replay", "expert")
    means = [collect(tmp_path / "x", "Reacher-2x1", q, 2_000)[0]["return mean"] for q in qualities]
    assert means[0] < means[1] <= means[2]


@pytest.fixture
def small(monkeypatch):
    """Settings with which a particle task is trained in a moment."""
    settings = train_behavior.Settings(10, 20, 500, 500, recent=400, batch_size=32)
    monkeypatch.setattr(train_behavior, "Settings", lambda: settings)
    monkeypatch.setattr(train_behavior, "Args", partial(train_behavior.Args, train_steps=1_000))


def test_training_in_the_particle_tasks(small, tmp_path):
    """A few updates change the policies, and write the same format as the tracked files."""
    out = tmp_path / "new/simple_tag.npz"
    train_behavior.train(train_behavior.Args("simple_tag", out=out, data_dir=tmp_path))
    new, tracked = np.load(out), np.load(ROOT / "data/behavior/simple_tag.npz")
    assert {*new} == {*tracked}
    for key in tracked:
        assert (new[key].dtype, new[key].shape[1:]) == (tracked[key].dtype, tracked[key].shape[1:])
    assert new["expert_step"] in (0, 500)


def test_training_ends_at_its_goal(small, monkeypatch, tmp_path, capsys):
    """The first check that reaches it is the last one."""
    monkeypatch.setitem(train_behavior.GOALS, "simple_tag", -1e9)
    out = tmp_path / "simple_tag.npz"
    train_behavior.train(train_behavior.Args("simple_tag", out=out, data_dir=tmp_path))
    assert np.load(out)["expert_step"] == 0
    assert ", 10 steps;" in capsys.readouterr().out


def test_training_of_another_team(small, monkeypatch, tmp_path, capsys):
    """Five agents, without public returns, are trained to the last step; then they are recorded."""
    out = tmp_path / "simple_spread-5.npz"
    train_behavior.train(train_behavior.Args("simple_spread-5", out=out, data_dir=tmp_path))
    assert "no public return of simple_spread-5 to stop at: 1,000" in capsys.readouterr().out
    assert len(np.load(out)["expert_0"][0]) == 5
    monkeypatch.setattr(collect_mpe, "BEHAVIOR_DIR", tmp_path)
    facts, files = collect(tmp_path, "simple_spread-5", "expert", 250)
    assert "1 snapshot(s)" in facts["behaviour"]
    assert files["obs_4"].shape == (250, 30)


@pytest.mark.parametrize("task", ["simple_tag-5", "simple_push", "Cat-2x2"])
def test_bad_task(task, tmp_path):
    """One line names it."""
    args = train_behavior.Args(task, out=tmp_path / "x.npz", data_dir=tmp_path)
    assert f"--task {task}" in refusal(train_behavior.train, args)


@pytest.mark.parametrize("settings", [{"train_steps": 1}, {"seed": -1}, {"noise": 2.0}], ids=str)
def test_bad_settings_of_the_training(settings, tmp_path):
    """One line, before anything is trained."""
    args = train_behavior.Args("Reacher-2x1", out=tmp_path / "x.npz", **settings)
    assert "must hold" in refusal(train_behavior.train, args)

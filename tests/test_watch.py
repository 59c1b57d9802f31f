"""tools/watch.py: it builds every script's team from a run directory, and writes films."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import export
import imageio
import numpy as np
import pytest
import torch
import watch
from conftest import POLICIES, ROOT, refusal
from test_readme import LINE

TINY = {"num_updates": 2, "eval_episodes": 2, "batch_size": 16, "hidden_dims": (16,)}
TINY |= {"device": "cpu", "compile": False}
all_methods = pytest.mark.parametrize("method", ["om2p", *POLICIES])


@pytest.fixture
def train(make_data, make_mujoco_data, tmp_path):
    """A function that trains a method on a task: the run directory, the policy, the returns."""

    def function(method, task, num_seeds=1):
        suite, make = ("mpe", make_data) if "simple" in task else ("mamujoco", make_mujoco_data)
        for seed in range(num_seeds):
            make(tmp_path / "data", task, transitions=25, seed=seed)
        module = importlib.import_module(f"{method}_{suite}")
        places = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs"}
        args = module.Args(task=task, num_seeds=num_seeds, **TINY, **places)
        policy, returns = module.train(args)
        (run_dir,) = (tmp_path / "runs").glob("*/*/seed*")
        return run_dir, policy, returns

    return function


@all_methods
def test_saved_team_plays_as_after_training(method, train):
    """The run's own copy of its script gives the final returns again, bit for bit."""
    run_dir, _, returns = train(method, "simple_tag")
    team = watch.load_team(run_dir, 2)
    assert Path(team.module.__file__).parent == run_dir
    np.testing.assert_array_equal(team.module.evaluate(team.policy, [team.env]), returns)


@all_methods
def test_one_of_several_seeds(method, train):
    """Of a run of several seeds the team of the one that is asked for plays, or the first one's."""
    run_dir, policy, _ = train(method, "simple_spread", num_seeds=2)
    for seed in (None, 0, 1):
        team = watch.load_team(run_dir, 2, seed)
        for key, values in team.policy.state_dict().items():
            assert torch.equal(values, policy.state_dict()[key].chunk(2)[seed or 0])
    assert "--seed 2" in refusal(watch.load_team, run_dir, 2, 2)


def test_padding_is_masked(train):
    """In a team of agents with 3, 1 and 3 actions the padding is 0, as in training."""
    run_dir, policy, _ = train("om2p", "Pusher-3p")
    team = watch.load_team(run_dir, 2)
    assert team.policy.mask.sum(dim=-1).flatten().tolist() == [3, 1, 3]
    obs, noise = torch.from_numpy(team.env.reset()), torch.randn(3, 2, 3)
    assert torch.equal(team.policy.act(obs, noise), policy.act(obs, noise))


def test_film_of_particles(train, tmp_path, capsys, monkeypatch):
    """26 pictures of four episodes; things move; the last line gives the returns."""
    run_dir, out = train("om2p", "simple_tag")[0], tmp_path / "größe/team.gif"
    monkeypatch.setenv("HOME", str(tmp_path))
    watch.main(watch.Args(run_dir, Path("~/größe/team.gif"), size=60))
    frames = np.stack(imageio.mimread(out))
    assert frames.shape[:3] == (26, 60, 240)
    assert (frames[0] != frames[-1]).any()
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert "'simple_tag', 25 steps" in printed
    (tmp_path / "file").write_text("")
    args = watch.Args(run_dir, tmp_path / "file/team.gif", size=9, steps=1)
    assert "cannot be written" in refusal(watch.main, args)


def test_film_of_five_particles(train, tmp_path):
    """Five agents play and are drawn, each in a colour of its own, none in the prey's."""
    run_dir, out = train("om2p", "simple_spread-5")[0], tmp_path / "team.gif"
    watch.main(watch.Args(run_dir, out, size=60, steps=2))
    assert len(imageio.mimread(out)) == 3
    env = watch.load_team(run_dir, 1).env
    assert len({watch.agent_color(env, i) for i in range(5)} - {"tab:red"}) == 5


def test_film_of_a_robot(train, tmp_path):
    """One picture every --every steps, where MuJoCo can draw."""
    run_dir, out = train("om2p", "Reacher-2x1")[0], tmp_path / "team.gif"
    options = f"--out {out} --size 64 --every 5".split()
    command = [sys.executable, watch.__file__, run_dir, *options]
    process = subprocess.run(command, capture_output=True, text=True)
    if "neither by EGL nor by OSMesa" in process.stderr:
        pytest.skip("MuJoCo cannot draw on this machine")
    assert process.returncode == 0, process.stderr
    frames = np.stack(imageio.mimread(out))
    assert frames.shape[:3] == (11, 64, 64)
    assert (frames[0] != frames[-1]).any()


def test_no_renderer_is_one_line(train, tmp_path, monkeypatch):
    """Where neither EGL nor OSMesa works, MuJoCo takes its default; if this fails, it says so."""
    monkeypatch.setattr(watch.os, "environ", {})
    monkeypatch.setattr(watch.sys, "executable", "/bin/false")
    monkeypatch.setattr("mujoco.Renderer", None)
    args = watch.Args(train("om2p", "Reacher-2x1")[0], tmp_path / "team.gif")
    assert "libegl1" in refusal(watch.main, args)
    assert not watch.os.environ


MPE2 = """def make_env(task: str):
    from mpe2 import simple_spread_v3

    return simple_spread_v3.parallel_env(max_cycles=5, continuous_actions=True), 5


class"""


@pytest.mark.parametrize("name", ["line", "mpe2"])
def test_another_environment(name, tmp_path, capsys):
    """A run of a script with another environment is watched, if it can be drawn, and exported."""
    if name == "line":  # the region `mpe` is another, as in tests/test_readme.py
        script = (ROOT / "om2p_mpe.py").read_text()
        script = re.sub(r"    for env in envs if .*\n.*prey_policy.*\n", "", script)
        script = re.sub(r"(?s)# region mpe\n.*# endregion mpe\n", lambda _: LINE, script)
    else:
        script = (ROOT / "om2p_mamujoco.py").read_text()
        script = re.sub(r"(?s)def make_env.*?\n\n\nclass", lambda _: MPE2, script)
    path = tmp_path / f"{name}.py"
    path.write_text(script)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    env = (module.MPE if name == "line" else module.MaMuJoCo)(name, 1)
    folder = tmp_path / "data" / name / "expert" / "seed_0_data"
    folder.mkdir(parents=True)
    for i in range(env.num_agents):
        for key, file in module.FILES.items():
            width = {"action": env.action_dims, "obs": env.obs_dims, "next_obs": env.obs_dims}
            np.save(folder / f"{file}_{i}.npy", np.zeros((25, width.get(key, [1] * 9)[i])))
    places = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs"}
    policy, _ = module.train(module.Args(task=name, **TINY, **places))
    run_dir, film = tmp_path / f"runs/{name}-expert/{name}/seed-0", tmp_path / "team.gif"
    export.main(export.Args(run_dir, tmp_path / "team.pt2"))
    team, obs = export.Team(tmp_path / "team.pt2"), torch.randn(env.num_agents, max(env.obs_dims))
    noise = torch.randn(env.num_agents, max(env.action_dims))
    expected = policy.act(obs[:, None], noise[:, None])[:, 0].detach()
    torch.testing.assert_close(team(obs, noise), expected)
    assert team.action_low[0][0] == (-1 if name == "line" else 0)
    if name == "line":
        assert "'line' cannot be drawn" in refusal(watch.main, watch.Args(run_dir, film))
    else:
        watch.main(watch.Args(run_dir, film, size=60, every=1))
        assert len(imageio.mimread(film)) == 6
        assert "'mpe2', 5 steps" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"out": Path("team.avi")}, {"steps": 0}, {"seed": -1}])
def test_bad_settings(changes, tmp_path):
    """One line that names the flag."""
    (name,), args = changes, {"run_dir": tmp_path, "out": tmp_path / "team.gif"} | changes
    assert f"--{name}" in refusal(watch.main, watch.Args(**args))


def test_unplayable_runs(train, tmp_path, monkeypatch):
    """One line for missing packages, a script of another version, a broken or missing policy."""
    run_dir, _, _ = train("om2p", "simple_spread")
    args = watch.Args(run_dir, tmp_path / "team.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -r requirements-dev.txt" in refusal(watch.main, args)
    (run_dir / "om2p_mpe.py").write_text("def train(args):\n    pass\n")
    assert "this version" in refusal(watch.load_team, run_dir, 2)
    (run_dir / "policy.pt").write_bytes(b"x")
    assert "finished run" in refusal(watch.load_team, run_dir, 2)
    assert "finished run" in refusal(watch.load_team, tmp_path, 2)

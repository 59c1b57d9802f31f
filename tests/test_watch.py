"""tools/watch.py writes films of runs; test_scripts.py checks that it loads every script's team."""

import subprocess
import sys
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
import watch
from conftest import refusal
from test_scripts import TINY


@pytest.fixture
def particle_run(make_data, tmp_path):
    """A finished run of om2p_mpe.py on simple_tag."""
    import om2p_mpe

    make_data(tmp_path / "data", "simple_tag")
    folders = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs"}
    om2p_mpe.train(om2p_mpe.Args(task="simple_tag", **folders, **TINY))
    return tmp_path / "runs/simple_tag-expert/om2p_mpe/seed-0"


def test_film_of_particles(particle_run, tmp_path, capsys):
    """26 pictures of four episodes; things move; the last line gives the returns."""
    out = tmp_path / "films/team.gif"
    watch.main(watch.Args(particle_run, out, size=60))
    frames = np.stack(imageio.mimread(out))
    assert frames.shape[:3] == (26, 60, 240)
    assert (frames[0] != frames[-1]).any()
    assert "simple_tag, 25 steps" in capsys.readouterr().out


def test_padding_is_masked(make_mujoco_data, tmp_path):
    """In a team of agents with 3, 1 and 3 actions, what only pads an action is not looked at."""
    import om2p_mamujoco

    make_mujoco_data(tmp_path / "data", "Pusher-3p")
    folders = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs"}
    policy, _ = om2p_mamujoco.train(om2p_mamujoco.Args(task="Pusher-3p", **folders, **TINY))
    team = watch.load_team(tmp_path / "runs/Pusher-3p-expert/om2p_mamujoco/seed-0", 2, 0)
    assert team.policy.mask.sum(dim=-1).flatten().tolist() == [3, 1, 3]
    obs, noise = torch.from_numpy(team.env.reset()), torch.randn(3, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(team.policy.act(obs, noise), policy.act(obs, noise))


def test_film_of_a_robot(make_mujoco_data, tmp_path, monkeypatch):
    """One picture every --every steps, where MuJoCo can draw; else one line."""
    import om2p_mamujoco

    make_mujoco_data(tmp_path / "data", "Reacher-2x1")
    folders = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs"}
    om2p_mamujoco.train(om2p_mamujoco.Args(task="Reacher-2x1", **folders, **TINY))
    folder, out = tmp_path / "runs/Reacher-2x1-expert/om2p_mamujoco/seed-0", tmp_path / "team.gif"
    options = ["--out", out, "--size", "64", "--every", "5"]
    process = subprocess.run(
        [sys.executable, watch.__file__, folder, *options], capture_output=True, text=True
    )
    if "neither by EGL nor by OSMesa" in process.stderr:
        pytest.skip("MuJoCo cannot draw on this machine")
    assert process.returncode == 0, process.stderr
    assert "Reacher-2x1, 50 steps" in process.stdout
    frames = np.stack(imageio.mimread(out))
    assert frames.shape[:3] == (11, 64, 64)
    assert (frames[0] != frames[-1]).any()


def test_no_renderer_is_one_line(monkeypatch):
    """Where neither EGL nor OSMesa works, it says so."""
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(watch.sys, "executable", "/bin/false")
    assert "EGL" in refusal(watch.choose_renderer)


def test_missing_packages(particle_run, tmp_path, monkeypatch):
    """It says what to install before anything is played."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = watch.Args(particle_run, tmp_path / "team.gif")
    assert "pip install -r requirements-dev.txt" in refusal(watch.main, args)
    assert not list(tmp_path.glob("team*"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out": "team.avi"}, "--out"),
        ({"steps": 0}, "--steps"),
        ({"size": 0}, "--size"),
        ({"seed": -1}, "--seed"),
        ({"run_dir": "nowhere"}, "nowhere is not the directory of a finished run"),
    ],
    ids=str,
)
def test_bad_settings(changes, reason, particle_run, tmp_path):
    """One line, and no film."""

    changes = {k: Path(v) if isinstance(v, str) else v for k, v in changes.items()}
    args = watch.Args(**{"run_dir": particle_run, "out": tmp_path / "team.gif", **changes})
    assert reason in refusal(watch.main, args)
    assert not list(tmp_path.glob("team*"))


def test_unfinished_run_is_refused(particle_run, tmp_path):
    """Without policy.pt there is nothing to play; a broken one is named."""
    (particle_run / "policy.pt").write_bytes(b"x")
    assert "finished run" in refusal(watch.main, watch.Args(particle_run, tmp_path / "x.gif"))
    (particle_run / "policy.pt").unlink()
    assert "policy.pt" in refusal(watch.main, watch.Args(particle_run, tmp_path / "x.gif"))

"""tools/export.py: one file with the trained team, which acts as the script does; tools/team.py."""

import io
import subprocess
import sys
from pathlib import Path

import export
import pytest
import team as loader
import torch
from conftest import make_policy, refusal
from test_samplers import GENERATIVE
from test_watch import train  # noqa: F401, a fixture

import om2p_mpe

FACTS = {"task": "x", "obs_dims": [3, 2], "action_dims": [2, 1], "samples": 1, "noise_scale": 1.0}
FACTS |= {"action_low": [[0.0, -2.0], [-1.0]], "action_high": [[1.0, 4.0], [1.0]]}


def make_team(name, **facts):
    """A policy of two agents, the second with smaller dimensions, and its exported team."""
    torch.manual_seed(3)
    policy = om2p_mpe.MeanFlowPolicy(2, 3, 2, (16, 8)) if name == "om2p" else make_policy(name)
    policy.mask[1, :, 1] = 0
    if name == "dom2":
        policy.times = policy.times[:3]  # two steps, as five take long to export
    facts = {**FACTS, **facts, "noise": name in ("om2p", "dom2", "flow_ql", "fql")}
    return policy, loader.Team(io.BytesIO(export.export(policy, facts)))


@pytest.mark.parametrize("name", ["om2p", "bc", *GENERATIVE])
def test_exported_team_acts_as_the_script(name):
    """With the same noise; both float types, any B or none; and what `difference` says."""
    policy, team = make_team(name)
    for batch_size in (1, 7):
        assert export.difference(policy, team, batch_size) < 1e-5
    obs = torch.randn(2, 7, 3)
    inputs = [obs.double(), *([torch.randn(1, 2, 7, 2).double()] if team.noise else [])]
    action = team.program(*inputs)  # the program alone, where gradients are on
    assert (action.dtype, action.requires_grad, action.shape) == (torch.float32, False, (2, 7, 2))
    assert (action[1, :, 1] == 0).all()
    with torch.no_grad():
        for values in policy.parameters():
            values *= 2
    assert export.difference(policy, team, 7) > 1e-3


@pytest.mark.parametrize("name", ["om2p", "diffusion_ql"])
def test_samples_and_noise_scale(name):
    """An action is the mean of K samples, whose noise is scaled; at 0 there is none."""
    policy, team = make_team(name, samples=3, noise_scale=0.5)
    for batch_size in (1, 7):
        assert export.difference(policy, team, batch_size) < 1e-6
    obs = torch.randn(2, 7, 3)
    assert not torch.equal(team(obs), team(obs))
    _, calm = make_team(name, noise_scale=0.0)
    assert torch.equal(calm(obs), calm(obs))
    if name == "om2p":
        noise = torch.randn(3, 2, 7, 2)
        expected = sum(policy.act(obs, e / 2) for e in noise) / 3
        torch.testing.assert_close(team(obs, noise), expected.detach())
        torch.testing.assert_close(team(obs[:, 4], noise[:, :, 4]), expected[:, 4].detach())
        torch.testing.assert_close(calm(obs), policy.act(obs, torch.zeros(2, 7, 2)).detach())


def test_the_loader():
    """Lists of agents' own arrays, actions in their own units, and what it refuses."""
    policy, team = make_team("om2p")
    obs, noise = torch.randn(2, 7, 3), torch.randn(2, 7, 2)
    obs[1, :, 2] = 0
    own = [obs[0].double().numpy(), obs[1, :, :2].double().numpy()]
    action = team(own, noise)
    torch.testing.assert_close(action, policy.act(obs, noise).detach())
    first, second = team.in_environment(action)
    expected = action[0] * torch.tensor([0.5, 3.0]) + torch.tensor([0.5, 1.0])
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, action[1, :, :1])
    for bad in ([obs[:, :, :1]], [obs, noise.transpose(0, 1)], [obs[:1]]):
        with pytest.raises(ValueError, match=r"numbers|shape|zip"):
            team(*bad)
    with pytest.raises(ValueError, match="no noise"):
        make_team("bc")[1](obs, noise)


def test_a_run(train, tmp_path, capsys, monkeypatch):  # noqa: F811
    """From a run of two seeds to the file of one of them; it needs team.py and torch alone."""
    run_dir, policy, _ = train("om2p", "simple_spread", num_seeds=2)
    monkeypatch.setenv("HOME", str(tmp_path))
    export.main(export.Args(run_dir, Path("~/größe/team.pt2"), seed=1))
    assert ascii(str(tmp_path / "größe/team.pt2")) in capsys.readouterr().out
    obs, noise = torch.randn(3, 5, 18), torch.randn(3, 5, 2)
    team = loader.Team(tmp_path / "größe/team.pt2")
    joint = policy.act(torch.cat([obs, obs]), torch.cat([noise, noise]))  # of seeds 0 and 1
    torch.testing.assert_close(team(obs, noise), joint[3:].detach())
    (tmp_path / "team.py").write_text(Path(loader.__file__).read_text())
    code = "import sys, torch; from team import Team; team = Team(sys.argv[1])"
    code = f"import sys; sys.path.insert(0, '.'); {code}; print(team(torch.zeros(3, 18)).shape)"
    command = [sys.executable, "-I", "-c", code, "größe/team.pt2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "torch.Size([3, 2])\n", result.stderr


def test_five_agents(train, tmp_path):  # noqa: F811
    """A team of another size is exported, too."""
    run_dir, policy, _ = train("om2p", "simple_spread-5")
    export.main(export.Args(run_dir, tmp_path / "team.pt2"))
    team, obs, noise = loader.Team(tmp_path / "team.pt2"), torch.randn(5, 30), torch.randn(5, 2)
    expected = policy.act(obs[:, None], noise[:, None])[:, 0].detach()
    torch.testing.assert_close(team(obs, noise), expected)


@pytest.mark.parametrize("changes", [{"out": Path("x.onnx")}, {"samples": 0}, {"noise_scale": -1}])
def test_bad_settings(changes, tmp_path):
    """One line that names the flag, no file."""
    (name,), args = changes, {"run_dir": tmp_path, "out": tmp_path / "team.pt2"} | changes
    assert f"--{name.replace('_', '-')}" in refusal(export.main, export.Args(**args))
    assert not list(tmp_path.iterdir())


def test_refusals(train, tmp_path, monkeypatch):  # noqa: F811
    """One line for policies without noise, for a file that cannot be written, for other actions."""
    run_dir, out = train("bc", "simple_spread")[0], tmp_path / "file/team.pt2"
    assert "--samples" in refusal(export.main, export.Args(run_dir, out, samples=2))
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(export.main, export.Args(run_dir, out))
    monkeypatch.setattr(export.Act, "forward", lambda act, obs, noise=None: 0 * obs[..., :2])
    assert "otherwise" in refusal(export.main, export.Args(run_dir, tmp_path / "team.pt2"))
    assert not (tmp_path / "team.pt2").exists()

"""tools/export.py: one file with the trained team, which acts as the script does."""

from pathlib import Path

import export
import pytest
import torch
from conftest import make_policy, refusal
from test_samplers import GENERATIVE

import om2p_mpe


@pytest.mark.parametrize("name", ["om2p", "bc", *GENERATIVE])
def test_exported_team_acts_as_the_script(name, tmp_path):
    """With the same noise, for other numbers of observations than it was exported with."""
    torch.manual_seed(3)
    policy = om2p_mpe.MeanFlowPolicy(2, 3, 2, (16, 8)) if name == "om2p" else make_policy(name)
    policy.mask[1, :, 1] = 0  # agent 1 has one action
    if name == "dom2":
        policy.times = policy.times[:3]  # two steps, as five take long to export
    torch.export.save(export.export(policy, 2, 3), tmp_path / "team.pt2")
    program = torch.export.load(tmp_path / "team.pt2").module()
    obs = torch.randn(2, 7, 3)
    assert export.difference(policy, program, obs) < 1e-6
    assert (program(obs)[1, :, 1] == 0).all()


def test_a_run(make_data, tmp_path, capsys):
    """From a run directory of two seeds to the file of one of them, and a line about it."""
    settings = {"num_updates": 2, "eval_episodes": 2, "batch_size": 16, "hidden_dims": (16,)}
    settings |= {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs", "device": "cpu"}
    for seed in (0, 1):
        make_data(tmp_path / "data", seed=seed)
    policy, _ = om2p_mpe.train(om2p_mpe.Args(num_seeds=2, compile=False, **settings))
    (run_dir,), out = (tmp_path / "runs").glob("*/*/seed*"), tmp_path / "new/team.pt2"
    export.main(export.Args(run_dir, out, seed=1))
    assert str(out) in capsys.readouterr().out
    program, obs = torch.export.load(out).module(), torch.randn(3, 5, 18)
    torch.manual_seed(0)
    action = program(obs)
    torch.manual_seed(0)
    noise = torch.randn(3, 5, 2)
    joint = policy.act(torch.cat([obs, obs]), torch.cat([noise, noise]))  # of seeds 0 and 1
    torch.testing.assert_close(action, joint[3:])


@pytest.mark.parametrize("out", ["team.pt2", "team.onnx"])
def test_refusals(out, tmp_path):
    """One line, no file."""
    refusal(export.main, export.Args(Path("nowhere"), tmp_path / out))
    assert not list(tmp_path.iterdir())

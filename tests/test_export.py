"""tools/export.py: one file with the trained team, which acts as the script does."""

import subprocess
import sys

import export
import pytest
import torch
from conftest import POLICIES, ROOT, make_policy

import om2p_mpe


def exported(policy, path):
    """The policy after a way through a file."""
    torch.export.save(export.export(policy, 2, 3), path)
    return torch.export.load(path).module()


@pytest.mark.parametrize("name", ["om2p", *POLICIES])
def test_exported_team_acts_as_the_script(name, tmp_path):
    """With the same noise, for other numbers of observations than it was exported with."""
    torch.manual_seed(3)
    policy = om2p_mpe.MeanFlowPolicy(2, 3, 2, (16, 8)) if name == "om2p" else make_policy(name)
    program = exported(policy, tmp_path / "team.pt2")
    for batch_size in (1, 7):
        obs = torch.randn(2, batch_size, 3)
        assert export.difference(policy, program, obs) < 1e-6
        with torch.no_grad():
            assert program(obs).shape == (2, batch_size, 2)
    with torch.no_grad():
        for weights in policy.parameters():  # the file has those of before
            weights.add_(0.1)
    assert export.difference(policy, program, obs) > 1e-4


def run(*words, cwd):
    """The command line in its own process."""
    command = [sys.executable, str(ROOT / "tools/export.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_a_run(make_data, tmp_path):
    """From a run directory to a file of the name asked for, and a line with the times."""
    make_data(tmp_path / "data")
    args = om2p_mpe.Args(
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "runs",
        num_updates=2,
        eval_episodes=2,
        batch_size=16,
        hidden_dims=(16,),
        device="cpu",
        compile=False,
    )
    policy, _ = om2p_mpe.train(args)
    folder, out = tmp_path / "runs/simple_spread-expert/om2p_mpe/seed-0", tmp_path / "new/team.pt2"
    process = run(folder, "--out", out, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert str(out) in process.stdout
    obs = torch.randn(3, 5, 18)
    assert export.difference(policy, torch.export.load(out).module(), obs) < 1e-6


@pytest.mark.parametrize("words", [("nowhere",), ("nowhere", "--out", "team.onnx")])
def test_refusals(words, tmp_path):
    """One line, status 1, no file."""
    process = run(*words, cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

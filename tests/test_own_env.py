"""docs/your-data.md's section on simulators of one's own, done as it says."""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

BLOCKS = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs/your-data.md").read_text())
TEAMS = {  # observations and actions of each agent
    "simple_spread": ([18] * 3, [5] * 3),
    "simple_tag": ([16, 16, 16, 14], [5] * 4),
}


@pytest.mark.parametrize("task", TEAMS)
def test_another_simulator(task, tmp_path, monkeypatch, capsys, caplog):
    """With the page's `make_env` and recordings the MuJoCo script learns in PettingZoo's mpe2.

    The script stands alone in a folder; the teams have equal and unequal agents.
    """
    make_env, record = (
        next(block for block in BLOCKS if word in block).replace("simple_spread", task)
        for word in ("def make_env", "np.save")
    )
    script = tmp_path / "om2p_mpe2.py"
    text = (ROOT / "om2p_mamujoco.py").read_text()
    text, count = re.subn(r"(?s)def make_env\(.*?\n\n\n", lambda _: f"{make_env}\n\n", text)
    assert count == 1
    script.write_text(text)
    (tmp_path / "record.py").write_text(record)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, script.stem, raising=False)  # the other team's
    runpy.run_path("record.py")
    folder, (obs_dims, action_dims) = tmp_path / f"data/{task}/random/seed_0_data", TEAMS[task]
    for i, (obs_dim, action_dim) in enumerate(zip(obs_dims, action_dims, strict=True)):
        arrays = [np.load(folder / f"{name}_{i}.npy") for name in ("obs", "next_obs", "acs")]
        length = len(arrays[0])
        assert [x.shape[1] for x in arrays] == [obs_dim, obs_dim, action_dim]
        np.testing.assert_array_equal(arrays[0][1:25], arrays[1][:24])  # of the first episode
        assert np.load(folder / f"rews_{i}.npy").std() > 0
    assert not (folder / f"obs_{len(obs_dims)}.npy").exists()
    assert length % 25 == 0
    options = f"--task {task} --quality random --num-updates 6 --eval-interval 3 --eval-episodes 2"
    options += " --hidden-dims 16 --device cpu --no-compile"
    monkeypatch.setattr(sys, "argv", [script.name, *options.split()])
    runpy.run_path(script.name, run_name="__main__")
    assert np.isfinite(float(re.search(r"final return (-?[\d.]+)", capsys.readouterr().out)[1]))
    assert not caplog.messages  # of actions that do not fit
    run_dir = tmp_path / f"runs/{task}-random/om2p_mpe2/seed-0"
    weights = torch.load(run_dir / "policy.pt", weights_only=True)
    assert len(weights["net.1.weight"]) == len(obs_dims)

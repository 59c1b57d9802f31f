"""Learning from logs without a simulator: conversion, held-out episodes, raw units, resuming."""

import csv
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import export
import numpy as np
import pytest
import torch
import watch
from conftest import ROOT, refusal
from gymnasium.spaces import Box
from numpy.testing import assert_array_equal

sys.path += [str(ROOT / "examples"), str(ROOT / "benchmark")]
import logs_to_npy
import om2p_logs
from logs import ACTION, ACTION_UNIT, COLUMNS, NAMES, OBS, joined, make_episodes, team_reward

PAGE = (ROOT / "docs/your-data.md").read_text()
TINY = {"hidden_dims": (32,), "batch_size": 64, "num_updates": 6, "eval_interval": 3}


@pytest.fixture(scope="module")
def episodes():
    """Forty of them, as they are recorded: nobody knows the good actions."""
    return [{key: episode[key] for key in NAMES} for episode in make_episodes(40)]


@pytest.fixture(scope="module")
def log(episodes, tmp_path_factory):
    """The folder of files that the HDF5 file of these episodes makes."""
    h5py, folder = pytest.importorskip("h5py"), tmp_path_factory.mktemp("log")
    h5py.File(folder / "robots.hdf5", "w").update(joined(episodes))
    convert(folder / "robots.hdf5", folder / "robots")
    return folder / "robots"


def convert(source, out):
    """Convert a source of the four robots; the arrays by their files' names."""
    logs_to_npy.convert(logs_to_npy.Args(str(source), out, **COLUMNS))
    return {path.stem: np.load(path) for path in out.iterdir()}


def train(log, run_dir, **changes):
    """Train on a folder; the run directory."""
    torch.manual_seed(99)  # whatever the state was, the run's own seed decides
    settings = {"data": log, "run_dir": run_dir, "device": "cpu", "compile": False}
    om2p_logs.train(om2p_logs.Args(**settings | TINY | changes))
    return next(run_dir.glob("log-expert/om2p_logs/seed-*"))


def results(folder):
    """What a run ends with: policy.pt, and metrics.csv without the time."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    rows = [{key: row[key] for key in row if key != "seconds"} for row in rows]
    return torch.load(folder / "policy.pt", weights_only=True), rows


@pytest.mark.filterwarnings("ignore:(.* is set to|env_spec is) None:UserWarning")
def test_formats_agree(episodes, log, tmp_path, monkeypatch):
    """HDF5, .npz and Minari give the same files; columns, types and flags are as they should be."""
    minari = pytest.importorskip("minari")
    expected, rows = {path.stem: np.load(path) for path in log.iterdir()}, joined(episodes)
    np.savez(tmp_path / "robots.npz", **rows)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    buffers = []
    for episode in episodes:
        obs = np.append(episode["observations"], episode["next_observations"][-1:], axis=0)
        steps = [None, None, None, obs, *(episode[name] for name in NAMES[1:5])]
        buffers.append(minari.data_collector.EpisodeBuffer(*steps))
    boxes = [Box(-np.inf, np.inf, (sum(dims),), np.float64) for dims in (OBS, ACTION)]
    spaces = {"observation_space": boxes[0], "action_space": boxes[1]}
    minari.create_dataset_from_buffers("robots/made-up-v0", buffers, **spaces)
    for source in (tmp_path / "robots.npz", "robots/made-up-v0"):
        found = convert(source, tmp_path / "out")
        for name, values in expected.items():
            assert found[name].dtype == np.float32
            assert_array_equal(found[name], values)
        shutil.rmtree(tmp_path / "out")
    assert_array_equal(expected["obs_2"], rows["observations"][:, 20:27].astype(np.float32))
    assert_array_equal(expected["acs_3"], rows["actions"][:, 8:10].astype(np.float32))
    assert_array_equal(expected["dones_1"], rows["terminals"])  # time limits are no terminations


def test_without_next_observations(episodes, log, tmp_path, capsys):
    """They are the next row's; rows at cuts are dropped, those of terminations are kept."""
    rows = joined(episodes)
    del rows["next_observations"]
    rows["rewards"] = rows["rewards"][:, None] * [1, 0, 0, 0]  # one for each agent
    np.savez(tmp_path / "robots.npz", **rows)
    found = convert(tmp_path / "robots.npz", tmp_path / "out")
    kept = ~rows["timeouts"]
    assert f"dropped {(~kept).sum()} rows" in capsys.readouterr().out
    for name, values in found.items():
        expected = np.load(log / f"{name}.npy")[kept]
        if name.startswith("next_obs"):
            values, expected = (x[~rows["terminals"][kept]] for x in (values, expected))
        assert_array_equal(values, expected * (name not in ("rews_1", "rews_2", "rews_3")))


def test_neither_cuts_nor_next_observations(episodes, tmp_path):
    """Without both, rows of two episodes could not be told apart; one is enough."""
    rows = joined(episodes)
    del rows["timeouts"]
    np.savez(tmp_path / "whole.npz", **rows)
    assert len(convert(tmp_path / "whole.npz", tmp_path / "whole")["obs_0"]) == len(rows["rewards"])
    del rows["next_observations"]
    np.savez(tmp_path / "robots.npz", **rows)
    source, out = str(tmp_path / "robots.npz"), tmp_path / "out"
    assert "no timeouts or truncations" in refusal(
        logs_to_npy.convert, logs_to_npy.Args(source, out)
    )
    assert not out.exists()


def test_bad_columns(episodes, tmp_path):
    """Columns that are not there, or no columns, are named, and nothing is written."""
    np.savez(tmp_path / "robots.npz", **episodes[0])
    source, out = str(tmp_path / "robots.npz"), tmp_path / "out"
    for columns in ("30:40", "3", "a:b"):
        assert columns in refusal(logs_to_npy.convert, logs_to_npy.Args(source, out, (columns,)))
    assert "no.hdf5" in refusal(logs_to_npy.convert, logs_to_npy.Args("no.hdf5", out))
    assert not out.exists()


def test_learns_in_the_logs_units(log, tmp_path):
    """Held-out actions come nearer; policy.pt takes and gives raw units, within their limits."""
    data, error = om2p_logs.load_log(log), 0.0
    untrained = train(log, tmp_path / "0", num_updates=1, learning_rate=0.0)
    folder = train(log, tmp_path / "1", num_updates=300, eval_interval=300, q_weight=0)
    team = om2p_logs.Team(4, 10, 3, (8,))
    team.fit(data)
    assert not team.policy.act(data["obs"])[2:, :, 2:].any()  # what critics see in training
    before, after = (results(x)[1][-1]["held_out_action_distance"] for x in (untrained, folder))
    assert float(after) < 0.5 < 1 < float(before)
    action = om2p_logs.load_team(folder).act(data["obs"])
    assert action.shape == data["action"].shape
    for i, width in enumerate(ACTION):
        own, recorded = action[i, :, :width], data["action"][i, :, :width]
        low, high = recorded.aminmax(dim=0)
        assert torch.equal(own, own.clamp(low - 1e-5 * high.abs(), high + 1e-5 * high.abs()))
        assert not action[i, :, width:].any()
        error += ((own - recorded).square().mean(dim=0) / recorded.var(dim=0)).mean() / len(ACTION)
    assert error < 0.5


def test_from_a_log_to_a_team(episodes, tmp_path, monkeypatch, capsys):
    """The page's commands alone: HDF5, files, card, training, an exported team in raw units.

    On other episodes the actions of all robots are near the good ones.
    """
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    h5py.File("robots.hdf5", "w").update(joined(episodes))
    tools = r"(?m)^    python ((?:examples/\w+|data/card|tools/export)\.py .*)"
    commands = re.findall(tools, PAGE.replace("\\\n", ""))
    assert len(commands) == 4
    for command in commands:
        script, *options = command.split()
        if "om2p_logs.py" in script:
            options += ["--num-updates", "300", "--device", "cpu", "--no-compile"]
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert "warning: scales differ" in capsys.readouterr().out
    rows = joined(make_episodes(20, seed=1))
    names = {"obs": np.split(rows["observations"], np.cumsum(OBS)[:-1], axis=1)}
    blocks = re.findall(r"(?s)```python\n(.*?)```", PAGE)
    exec(next(block for block in blocks if "Team(" in block), names)
    trained_on, *_ = om2p_logs.split_log(om2p_logs.load_log(Path("robots")), 0.1)
    for i, (action, width) in enumerate(zip(names["action"], ACTION, strict=True)):
        assert action.shape == (len(rows["rewards"]), width)
        low, high = trained_on["action"][i, :, :width].aminmax(dim=0)
        assert names["team"].action_low[i] == pytest.approx(low.tolist(), rel=1e-3)
        assert (action >= 0.999 * low - 1e-3 * high).all()
        assert (action <= 1.001 * high).all()
    taken = np.concatenate(names["action"], axis=1)
    far, always_the_same = (
        np.square((actions - rows["good"]) / ACTION_UNIT).mean(axis=0)
        for actions in (taken, rows["good"].mean(axis=0))
    )
    assert (far < always_the_same).all()
    assert far.mean() < 0.6 * always_the_same.mean()


def test_reward_of_a_team():
    """Recorded actions get the recorded reward, good ones 0."""
    made = make_episodes(3)
    rows = joined(made)
    for key, reward in (("actions", rows["rewards"].mean()), ("good", 0)):
        action = torch.full((4, len(rows[key]), 3), torch.nan)
        for i, own in enumerate(np.split(rows[key], np.cumsum(ACTION)[:-1], axis=1)):
            action[i, :, : ACTION[i]] = torch.from_numpy(own)
        team = SimpleNamespace(act=lambda obs, action=action: action)
        assert team_reward(team, made) == pytest.approx(reward, abs=1e-9, rel=1e-5)


def test_held_out_episodes_are_not_trained_on(log, tmp_path):
    """Other ones change the figures, and neither weights nor statistics; they are whole."""
    before = results(train(log, tmp_path / "0"))
    length = (data := om2p_logs.load_log(log))["reward"].shape[1]
    index = data | {"reward": torch.arange(length).expand(4, -1)}
    kept, held_out, text = om2p_logs.split_log(index, 0.1)
    assert "40 episodes of 8 to 30 steps, 4 held out" in text
    rows = held_out["reward"][0].numpy()
    assert sorted([*rows, *kept["reward"][0].tolist()]) == list(range(length))
    inside = (data["next_obs"][0, :-1] == data["obs"][0, 1:]).all(dim=-1).numpy()
    assert inside[np.setdiff1d(rows, [length - 1])].sum() == len(rows) - 4
    for path in shutil.copytree(log, tmp_path / "log").glob("[aonr]*.npy"):  # not dones
        values = np.load(path)
        values[rows] *= 2
        np.save(path, values)
    after = results(train(tmp_path / "log", tmp_path / "1"))
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    for key, value in before[1][-1].items():
        assert (value != after[1][-1][key]) == key.startswith("held_out"), key


def test_scale_of_held_out_rewards(log, tmp_path):
    """It is the training rows': twice the rewards on held-out rows are another TD error."""
    before = results(train(log, tmp_path / "0"))
    data = om2p_logs.load_log(log)
    data["reward"] = torch.arange(data["reward"].shape[1]).expand(4, -1)
    rows = om2p_logs.split_log(data, 0.1)[1]["reward"][0].numpy()
    for path in shutil.copytree(log, tmp_path / "log").glob("rews_*.npy"):
        values = np.load(path)
        values[rows] *= 2
        np.save(path, values)
    after = results(train(tmp_path / "log", tmp_path / "1"))
    torch.testing.assert_close(before[0], after[0], rtol=0, atol=0)
    for key, value in before[1][-1].items():
        assert (value != after[1][-1][key]) == (key == "held_out_td_error"), key


def test_killed_run_goes_on(log, tmp_path, monkeypatch):
    """Killed while it writes its second checkpoint, it ends as if it had not been stopped."""
    undisturbed, save, calls = results(train(log, tmp_path / "0")), torch.save, []

    def killed(state, path):
        save(state, path)
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(log, tmp_path / "1")
    resumed = results(train(log, tmp_path / "1", resume=True))
    torch.testing.assert_close(resumed[0], undisturbed[0], rtol=0, atol=0)
    assert resumed[1] == undisturbed[1]
    once = results(train(log, tmp_path / "2", eval_interval=6))
    torch.testing.assert_close(once[0], undisturbed[0], rtol=0, atol=0)


def test_several_seeds(log, tmp_path):
    """Seeds that share a log have their own figures, under names that are no returns'."""
    _, rows = results(train(log, tmp_path, num_seeds=2))
    assert [(row["step"], row["seed"]) for row in rows] == [*zip("3366", "0101", strict=True)]
    for key in ("action_distance", "mean_flow", "td_error", "q_gain"):
        assert rows[0][f"held_out_{key}"] != rows[1][f"held_out_{key}"]
    assert not [key for key in rows[0] if "return" in key or "score" in key]


def test_tools_on_a_run(log, tmp_path):
    """Of several seeds the one that is asked for is exported; a team of logs cannot be watched."""
    folder, out = train(log, tmp_path, num_seeds=2), tmp_path / "team.pt2"
    obs, noise = om2p_logs.load_log(log)["obs"][:, :9], torch.randn(4, 9, 3)
    for seed in (0, 1):
        export.main(export.Args(folder, out, seed=seed))
        expected = om2p_logs.load_team(folder, seed).act(obs, noise)
        torch.testing.assert_close(export.Team(out)(obs, noise), expected)
    assert not torch.equal(om2p_logs.load_team(folder).act(obs, noise), expected)
    assert "seed 2" in refusal(export.main, export.Args(folder, out, seed=2))
    assert "no simulator" in refusal(watch.main, watch.Args(folder, tmp_path / "team.gif"))
    assert not (tmp_path / "team.gif").exists()


def test_errors(log, tmp_path):
    """One line says what is wrong, and no run directory is made."""
    runs, incomplete = tmp_path / "runs", shutil.copytree(log, tmp_path / "incomplete")
    (incomplete / "acs_2.npy").unlink()
    for path in shutil.copytree(log, tmp_path / "one").iterdir():
        np.save(path, np.load(path)[:8])
    cases = [(tmp_path / "missing", 0.1, "missing"), (incomplete, 0.1, "acs_2.npy")]
    cases += [(None, 0.1, "log/expert/seed_0_data"), (tmp_path / "one", 0.5, "1 episodes")]
    cases += [(log, 0.0, "40 episodes is 0"), (log, 0.01, "is 0"), (log, 1.0, "is 40")]
    for folder, share, reason in cases:
        assert reason in refusal(lambda: train(folder, runs, held_out=share))  # noqa: B023
    assert not runs.exists()

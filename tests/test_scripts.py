"""Every script alone: what it writes and refuses, and how it goes on after a stop.

What differs from method to method is tested on all scripts. What the scripts share is the same in
all of them, byte for byte (test_regions.py), and is tested on OM2P's two, or on om2p_mpe.py.
"""

import csv
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = sorted(ROOT.glob("om2p_*.py")) + sorted((ROOT / "baselines").glob("*.py"))
MUJOCO = [path for path in SCRIPTS if path.stem.endswith("_mamujoco")]
TASKS = {"mpe": "simple_spread", "mamujoco": "Reacher-2x1"}  # by the end of a script's name
TINY = {"num_updates": 6, "eval_interval": 3, "eval_episodes": 2, "batch_size": 16}
TINY |= {"hidden_dims": (16, 16), "device": "cpu", "compile": False}
OWN_TINY = {"dom2": {"score_dims": (16, 8), "solver_steps": 2}}  # in addition, by method
OWN_TINY |= {"diffusion_ql": {"diffusion_steps": 2}, "flow_ql": {"flow_steps": 2}}


class Script:
    """A script copied alone into a folder, with settings for a tiny run."""

    def __init__(self, original, folder, data):
        self.path = Path(shutil.copy(original, folder))
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        method, suite = self.path.stem.rsplit("_", 1)
        self.task = TASKS[suite]
        self.settings = {"task": self.task, "data_dir": data} | TINY | OWN_TINY.get(method, {})

    def train(self, run_dir, **changes):
        """Train in this process; the run directory. `policy` and `returns` are kept as well."""
        torch.manual_seed(99)  # whatever the state was, the run's own seed decides
        args = self.module.Args(**self.settings | {"run_dir": run_dir} | changes)
        self.policy, self.returns = self.module.train(args)
        return self.folder(run_dir, "seed-0" if args.num_seeds == 1 else "seed-0-1")

    def folder(self, run_dir, name="seed-0"):
        """The run directory."""
        return run_dir / f"{self.task}-expert" / self.path.stem / name

    def flags(self, **changes):
        """The settings as a command line."""
        line = []
        for key, value in (self.settings | changes).items():
            name, values = key.replace("_", "-"), value if isinstance(value, tuple) else (value,)
            line += [f"--no-{name}"] if value is False else [f"--{name}", *map(str, values)]
        return line


@pytest.fixture(scope="module")
def data(make_data, make_mujoco_data, tmp_path_factory):
    """A data folder with tiny datasets of seeds 0 and 1 for every suite."""
    folder = tmp_path_factory.mktemp("data")
    for seed in (0, 1):
        make_data(folder, TASKS["mpe"], seed=seed)
        make_mujoco_data(folder, TASKS["mamujoco"], seed=seed)
    return folder


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda path: path.stem)
def script(request, data, tmp_path_factory):
    """Each script in turn."""
    return Script(request.param, tmp_path_factory.mktemp("script"), data)


@pytest.fixture(scope="module", params=SCRIPTS[:2], ids=lambda path: path.stem)
def om2p(request, data, tmp_path_factory):
    """OM2P's script of each suite."""
    return Script(request.param, tmp_path_factory.mktemp("script"), data)


@pytest.fixture(scope="module")
def mpe(data, tmp_path_factory):
    """The script om2p_mpe.py."""
    return Script(ROOT / "om2p_mpe.py", tmp_path_factory.mktemp("script"), data)


@pytest.fixture(scope="module")
def finished(script, tmp_path_factory):
    """The run directory of a script's run that nothing has disturbed."""
    return script.train(tmp_path_factory.mktemp("finished"))


def weights(folder):
    """The policy that a run has saved."""
    return torch.load(folder / "policy.pt", weights_only=True)


def metrics(folder):
    """The rows of metrics.csv without the column that differs from run to run."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_results(one, two):
    """Two runs have the same weights, bit for bit, and the same curves and final returns."""
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=0)
    assert metrics(one) == metrics(two)
    np.testing.assert_array_equal(*(np.load(path / "final_returns.npy") for path in (one, two)))


ONE_BY_ONE = """
import json, os, runpy, sys
for sys.argv in json.load(sys.stdin):
    os.chdir(os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_each_script_runs_alone(data, tmp_path):
    """In an empty folder, by `python -I`, each writes all of its outputs and nothing else.

    One process runs them all, one after the other, which saves 15 imports of PyTorch.
    """
    for original in SCRIPTS:
        (tmp_path / original.stem).mkdir()
    scripts = [Script(original, tmp_path / original.stem, data) for original in SCRIPTS]
    lines = [[str(script.path), *script.flags(quality="expert")] for script in scripts]
    command = [sys.executable, "-I", "-c", ONE_BY_ONE]
    process = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    for script in scripts:
        path, folder = script.path, script.folder(script.path.parent / "runs")
        assert {item.name for item in path.parent.iterdir()} == {path.name, "runs"}
        assert (folder / path.name).read_bytes() == path.read_bytes()
        names = {item.name.split(".tfevents")[0] for item in folder.iterdir()} - {path.name}
        files = {"args.json", "metrics.csv", "final_returns.npy", "policy.pt", "checkpoint.pt"}
        assert names == files | {"events.out"}


def test_help_documents_every_setting(script, monkeypatch, capsys):
    """The text below every field of Args is printed by --help, task, quality and seed first."""
    monkeypatch.setattr(sys, "argv", [script.path.name, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script.path), run_name="__main__")
    shown = re.sub(r"[│\s]", "", capsys.readouterr().out)
    names = [field.name for field in fields(script.module.Args)]
    assert names[:3] == ["task", "quality", "seed"]
    for name in names:
        text = re.search(rf'\n    {name}: .*\n    """([^"]+)"""\n', script.path.read_text())[1]
        assert re.sub(r"\s", "", text) in shown
        assert f"--{name.replace('_', '-')}" in shown


def test_outputs(script, finished):
    """Settings, curves, TensorBoard's scalars and final returns say the same."""
    settings = json.loads((finished / "args.json").read_text())
    assert settings.keys() == {field.name for field in fields(script.module.Args)}
    assert (settings["num_updates"], settings["hidden_dims"]) == (6, [16, 16])
    rows, returns = metrics(finished), np.load(finished / "final_returns.npy")
    assert [(row["step"], row["seed"]) for row in rows] == [("3", "0"), ("6", "0")]
    assert returns.shape == (2,)
    assert float(rows[-1]["return"]) == pytest.approx(returns.mean())
    tags = {f"losses/{key}": key for key in rows[0].keys() - {"step", "return", "score", "seed"}}
    assert "losses/policy" in tags
    events = EventAccumulator(str(finished)).Reload()
    for tag, column in (tags | {"charts/return": "return"}).items():
        shown = [event.value for event in events.Scalars(tag)]
        assert shown == pytest.approx([float(row[column]) for row in rows])


def test_every_weight_moves(script, finished, tmp_path):
    """None is what it is after an update with a step of size 0, which is its initial value."""
    initial = weights(script.train(tmp_path, learning_rate=0.0, num_updates=1))
    final, names = weights(finished), dict(script.policy.named_parameters())
    assert final.keys() == initial.keys() >= names.keys()
    assert not [key for key in names if torch.equal(initial[key], final[key])]


def kill_and_resume(script, run_dir, monkeypatch, **changes):
    """End a run when half of its second checkpoint is written; resume it; the run directory."""
    save, calls = torch.save, []

    def killed(state, path):
        save(state, path)
        calls.append(None)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        script.train(run_dir, **changes)
    folder = script.train(run_dir, resume=True, **changes)
    assert len(calls) == 4  # the second checkpoint again, and the policy
    return folder


def test_killed_run_goes_on(script, finished, tmp_path, monkeypatch):
    """From the checkpoint before to the results of an undisturbed run."""
    assert_same_results(kill_and_resume(script, tmp_path, monkeypatch), finished)


def test_agents_and_seeds_learn_alone(script, data, tmp_path):
    """Other data of one agent of one seed change that agent's weights, and no bit of another's."""
    script.train(tmp_path, num_seeds=2)
    before = script.policy
    changed = shutil.copytree(data, tmp_path / "data") / script.task / "expert/seed_1_data"
    for name in ("acs_0", "rews_0"):
        np.save(changed / f"{name}.npy", -np.load(changed / f"{name}.npy"))
    script.train(tmp_path, num_seeds=2, data_dir=tmp_path / "data")
    agent = len(list(changed.glob("obs_*.npy")))  # the first one of the second seed
    for one, two in zip(before.parameters(), script.policy.parameters(), strict=True):
        equal = [torch.equal(a, b) for a, b in zip(one, two, strict=True)]
        assert equal == [k != agent for k in range(2 * agent)]


def test_standardize(script, data, tmp_path):
    """Observations 4 times as large lead to the same weights, bit for bit, and without it do not.

    A policy that learned from those acts as before on observations 4 times as large.
    """
    large, obs = Path(shutil.copytree(data, tmp_path / "data")), []
    for path in sorted((large / script.task / "expert/seed_0_data").glob("*obs_*.npy")):
        np.save(path, 4 * np.load(path))
        obs += [torch.from_numpy(np.load(path))] * path.stem.startswith("obs")
    width = max(x.shape[1] for x in obs)
    obs = torch.stack([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in obs])
    policies, weights, actions = [], [], []
    for folder, standardize in ((data, True), (large, True), (large, False)):
        script.train(tmp_path, data_dir=folder, standardize=standardize, num_updates=3)
        policies.append(script.policy)
        weights.append(torch.cat([x.flatten() for x in script.policy.parameters()]))
        torch.manual_seed(0)
        actions.append(script.policy.act(obs / 4 if folder == data else obs))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    torch.testing.assert_close(actions[0], actions[1])
    for name, x in policies[1].state_dict().items():
        if name.endswith(".mean"):
            torch.testing.assert_close(x[..., :width], obs.mean(dim=1, keepdim=True))
            assert not x[..., width:].any()


@pytest.mark.parametrize("path", MUJOCO, ids=lambda path: path.stem)
def test_padding_stays_zero(path, make_mujoco_data, tmp_path, monkeypatch):
    """Pusher-3p's agents have 3, 1 and 3 joints: a 2nd and a 3rd action of the middle one are 0.

    So it is in all actions that critics see, and in the policy's, for both seeds.
    """
    for seed in (0, 1):
        make_mujoco_data(tmp_path, "Pusher-3p", transitions=100, seed=seed)
    script, seen = Script(path, tmp_path, tmp_path), []
    critic = getattr(script.module, "Critic", None)  # behaviour cloning has none
    if critic:
        forward = critic.forward

        def watched(self, obs, action):
            seen.append(action.detach())
            return forward(self, obs, action)

        monkeypatch.setattr(critic, "forward", watched)
    script.train(tmp_path, task="Pusher-3p", num_seeds=2, num_updates=2)
    assert bool(seen) == bool(critic)
    obs_dim = max(script.module.MaMuJoCo("Pusher-3p", 1).obs_dims)
    seen.append(script.policy.act(torch.randn(6, 50, obs_dim)))
    for action in seen:
        used = action.movedim(-3, 0).reshape(6, -1, 3).ne(0).any(dim=1)
        assert used.tolist() == 2 * [[True] * 3, [True, False, False], [True] * 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(script, tmp_path, monkeypatch):
    """A captured run goes on as if it had not been stopped, and its policy loads on a CPU."""
    changes = {"device": "cuda", "compile": True, "num_updates": 12, "eval_interval": 6}
    final = weights(script.train(tmp_path / "finished", **changes))
    resumed = weights(kill_and_resume(script, tmp_path / "stopped", monkeypatch, **changes))
    torch.testing.assert_close(resumed, final, rtol=1e-3, atol=1e-3)
    assert {value.device.type for value in resumed.values()} == {"cpu"}


@pytest.mark.parametrize("task", ["Walker-9x9", "simple_tag-5", "simple_spread-0"])
def test_bad_task(task, script, tmp_path, monkeypatch, capsys):
    """A task that does not exist is named in the error's line, and no run directory is made."""
    line = script.flags(run_dir=tmp_path / "runs", task=task)
    monkeypatch.setattr(sys, "argv", [script.path.name, *line])
    with pytest.raises(SystemExit, match=rf"^error: --task {task} is not .*$") as stop:
        runpy.run_path(str(script.path), run_name="__main__")
    assert "\n" not in stop.value.code
    assert not (tmp_path / "runs").exists()


def test_five_agents(mpe, make_data, tmp_path, capsys):
    """A team of five on data of five: five policies, and a score that is NaN."""
    make_data(tmp_path, "simple_spread-5", "random", 100)
    changes = {"task": "simple_spread-5", "quality": "random", "data_dir": tmp_path}
    mpe.train(tmp_path / "runs", **changes)
    folder = tmp_path / "runs/simple_spread-5-random/om2p_mpe/seed-0"
    assert {len(values) for values in weights(folder).values()} == {5}
    assert [row["score"] for row in metrics(folder)] == ["nan", "nan"]
    assert "normalized score nan" in capsys.readouterr().out


def test_batch_larger_than_the_data(om2p, tmp_path):
    """Batches are drawn with replacement, so that any number of transitions will do."""
    om2p.train(tmp_path, batch_size=501)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_updates": 0}, "--num-updates"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"eval_episodes": -1}, "--eval-episodes"),
        ({"batch_size": 0}, "--batch-size"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"quality": "perfect"}, "perfect/seed_0_data"),
        ({"num_seeds": 3}, "seed_2_data"),
    ],
    ids=str,
)
def test_bad_settings(changes, reason, om2p, tmp_path):
    """One line says what is wrong, before any training, and no run directory is made."""
    assert reason in refusal(lambda: om2p.train(tmp_path / "runs", **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_signal_loses_nothing(number, mpe, tmp_path):
    """A process that was stopped while it trained ends, resumed, as an undisturbed run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    changes, folder = {"num_updates": 200, "eval_interval": 20}, mpe.folder(tmp_path / "stopped")
    command = [sys.executable, mpe.path, *mpe.flags(**changes, run_dir=tmp_path / "stopped")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate()
    assert process.returncode
    assert not (folder / "policy.pt").exists()
    mpe.train(tmp_path / "stopped", resume=True, **changes)
    assert_same_results(folder, mpe.train(tmp_path / "undisturbed", **changes))


def test_resume_when_nothing_is_left_to_do(mpe, tmp_path):
    """A finished run writes the same results again; where none began, --resume begins one."""
    folder = mpe.train(tmp_path / "one", resume=True)
    for name in ("policy.pt", "final_returns.npy"):
        (folder / name).unlink()
    mpe.train(tmp_path / "one", resume=True)
    assert_same_results(folder, mpe.train(tmp_path / "two"))


def test_resume_with_other_settings(mpe, tmp_path):
    """One line names the setting, and the checkpoint stays as it was."""
    before = (mpe.train(tmp_path) / "checkpoint.pt").read_bytes()
    assert "num_updates" in refusal(lambda: mpe.train(tmp_path, resume=True, num_updates=7))
    assert (mpe.folder(tmp_path) / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("streams", ["", "2>&-", ">&- 2>&-"])
def test_any_terminal_and_folder(streams, mpe, tmp_path):
    """A run ends well without output or with an ASCII one, in a home folder of another alphabet."""
    (home := tmp_path / "läufe").mkdir()
    line = shlex.join([sys.executable, str(mpe.path), *mpe.flags(run_dir="~/runs")])
    environment = os.environ | {"HOME": str(home), "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(f"{line} {streams}", shell=True, env=environment).returncode == 0
    assert (mpe.folder(home / "runs") / "final_returns.npy").exists()


def test_constant_rewards(mpe, data, tmp_path):
    """Rewards that are all -1 teach nothing, and are not blown up to where training diverges."""
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    for path in folder.rglob("rews_*.npy"):
        np.save(path, np.full_like(np.load(path), -1))
    mpe.train(tmp_path, data_dir=folder, num_updates=100, eval_interval=100)


def test_new_run_keeps_the_old_ones(mpe, tmp_path):
    """Three runs one right after the other, not resumed: all three results are there."""
    runs = [mpe.train(tmp_path, num_updates=k) / "policy.pt" for k in (1, 2, 3)]
    old = runs[0].parents[1].glob("old-seed-0-*/policy.pt")
    assert len({path.read_bytes() for path in (runs[-1], *old)}) == 3


def test_names_keep_runs_apart(mpe, tmp_path):
    """--name is part of the path, and the run without one stays as it was."""
    folder = mpe.train(tmp_path)
    mpe.train(tmp_path, name="wide", hidden_dims=(32,))
    named = tmp_path / "simple_spread-expert/om2p_mpe-wide/seed-0"
    assert [weights(path)["net.1.weight"].shape[-1] for path in (folder, named)] == [16, 32]


def test_two_seeds_share_a_directory(om2p, tmp_path):
    """Returns (2, K), one row of the curve for each seed, and the weights of both teams."""
    folder = om2p.train(tmp_path, num_seeds=2)
    returns, rows = np.load(folder / "final_returns.npy"), metrics(folder)
    assert returns.shape == (2, 2)
    np.testing.assert_array_equal(returns, om2p.returns)
    assert [row["step"] + row["seed"] for row in rows] == ["30", "31", "60", "61"]
    last = [float(row["return"]) for row in rows[2:]]
    assert last == pytest.approx(returns.mean(axis=1).tolist())
    assert last[0] != last[1]
    torch.testing.assert_close(weights(folder), {**om2p.policy.state_dict()}, rtol=0, atol=0)


def test_two_seeds_go_on(mpe, tmp_path, monkeypatch):
    """Both, from one checkpoint to the results of an undisturbed run."""
    resumed = kill_and_resume(mpe, tmp_path / "killed", monkeypatch, num_seeds=2)
    assert_same_results(resumed, mpe.train(tmp_path / "undisturbed", num_seeds=2))


def test_seeds_of_different_lengths_are_refused(mpe, make_data, tmp_path):
    """Data of different numbers of transitions cannot be one tensor; a line says which."""
    for seed, transitions in enumerate((500, 400)):
        make_data(tmp_path, transitions=transitions, seed=seed)
    message = refusal(lambda: mpe.train(tmp_path / "runs", num_seeds=2, data_dir=tmp_path))
    assert "seed_1_data/obs_0.npy" in message
    assert not (tmp_path / "runs").exists()

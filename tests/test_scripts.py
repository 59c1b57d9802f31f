"""Every script alone: what it prints, writes and refuses, and how it goes on after a stop.

A script is copied into an empty folder. One run a script is a process of its own, `python -I`; the
rest happens in this process, where a second run costs a tenth of a second instead of three.
"""

import ast
import csv
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import fields
from types import SimpleNamespace
from typing import get_origin

import numpy as np
import pytest
import torch
import watch
from conftest import ROOT, Code, refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = sorted(ROOT.glob("om2p_*.py")) + sorted((ROOT / "baselines").glob("*.py"))
TASKS = {"mpe": "simple_spread", "mamujoco": "Reacher-2x1"}  # by the end of a script's name
OTHER_TASKS = {"mpe": "simple_tag", "mamujoco": "Pusher-3p"}
TINY = {"num_updates": 6, "eval_interval": 3, "eval_episodes": 4, "batch_size": 16}
TINY |= {"hidden_dims": (16, 16), "device": "cpu", "compile": False}
OWN_TINY = {"dom2": {"score_dims": (16, 8)}}  # in addition, by the method's name


def flags(**settings):
    """Settings as a command line."""
    line = []
    for key, value in settings.items():
        name, values = key.replace("_", "-"), value if isinstance(value, tuple) else (value,)
        line += [f"--no-{name}"] if value is False else [f"--{name}", *map(str, values)]
    return line


def copy_alone(path, folder):
    """Copy a script into a new folder."""
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes())
    return folder / path.name


def load(path):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(script, *line):
    """Run a script by itself, isolated from this repository and from the user's packages."""
    command = [sys.executable, "-I", script.name, *line]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=script.parent, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(make_data, make_mujoco_data, tmp_path_factory):
    """A data folder with a tiny dataset of every suite's task."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, TASKS["mpe"])
    make_mujoco_data(folder, TASKS["mamujoco"])
    return folder


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda path: path.stem)
def script(request, tmp_path_factory):
    """The path of a script copied alone into a folder, and the task it is tested on."""
    path = copy_alone(request.param, tmp_path_factory.mktemp("script") / "alone")
    method, suite = path.stem.rsplit("_", 1)
    tiny = TINY | OWN_TINY.get(method, {})
    return SimpleNamespace(path=path, task=TASKS[suite], other=OTHER_TASKS[suite], tiny=tiny)


@pytest.fixture(scope="module")
def run(script, data):
    """The one run of a script in its own process: the process and the run directory."""
    line = flags(task=script.task, quality="expert", data_dir=data, **script.tiny)
    process = python(script.path, *line)
    assert process.returncode == 0, process.stderr
    folder = script.path.parent / "runs" / f"{script.task}-expert" / script.path.stem / "seed-0"
    return SimpleNamespace(process=process, folder=folder)


@pytest.fixture
def train(script, data, tmp_path):
    """A function that trains in this process, in tmp_path/runs, with changes to the tiny settings.

    Attributes: `module`, the script; `folder`, the run directory.
    """
    module = load(script.path)

    def function(**changes):
        settings = {"task": script.task, "data_dir": data, "run_dir": tmp_path / "runs"}
        torch.manual_seed(99)  # whatever the state was, the run's own seed decides
        return module.train(module.Args(**settings | script.tiny | changes))

    function.module = module
    function.folder = tmp_path / "runs" / f"{script.task}-expert" / script.path.stem / "seed-0"
    return function


def weights(folder):
    """The policy that a run has saved."""
    return torch.load(folder / "policy.pt", weights_only=True)


def metrics(folder):
    """The rows of metrics.csv without the column that differs from run to run."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(one, two):
    """Whether two state dictionaries are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(script, train, capsys):
    """On a GPU the whole update is captured, resumed too, and the policy is saved for a CPU."""
    settings = {"device": "cuda", "compile": True, "num_updates": 12, "eval_interval": 6}
    train(**settings)
    (train.folder / "checkpoint-previous.pt").replace(train.folder / "checkpoint.pt")
    policy, _ = train(**settings, resume=True)
    assert "going on without" not in capsys.readouterr().err
    saved = weights(train.folder)
    assert all(value.device.type == "cpu" for value in saved.values())
    assert same(saved, {key: value.cpu() for key, value in policy.state_dict().items()})


# Help


def documented_fields(source):
    """The fields of Args and the docstrings below them: {name: docstring or None}."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    body = next(node for node in classes if node.name == "Args").body
    fields = {}
    for node, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            fields[node.target.id] = below.value.value if is_text else None
    return fields


def cli(monkeypatch, script, *line):
    """Run a script's command line in this process; its exit status."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(script.path.parent)
    monkeypatch.setattr(sys, "argv", [script.path.name, *line])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.path.name, run_name="__main__")
    return stop.value.code


def test_help_documents_every_setting(script, monkeypatch, capsys):
    """Every field of Args has a docstring in the house style, and --help prints it."""
    fields = documented_fields(script.path.read_text())
    assert cli(monkeypatch, script, "--help") == 0
    shown = re.sub(r"[│\s]", "", capsys.readouterr().out)
    assert {"task", "quality", "seed", "device", "resume", "num_updates"} <= fields.keys()
    for name, text in fields.items():
        assert text, f"{name} has no docstring"
        assert not text.endswith("."), name
        assert f"--{name.replace('_', '-')}" in shown
        assert re.sub(r"\s", "", text) in shown, name


# Outputs


def test_outputs(run, script):
    """A run writes its settings, its source, curves, returns, policy and checkpoint, no more."""
    settings = json.loads((run.folder / "args.json").read_text())
    names = documented_fields(script.path.read_text()).keys()
    assert settings.keys() == names | {"first_seed"}
    assert (settings["num_updates"], settings["hidden_dims"]) == (6, [16, 16])
    assert (run.folder / script.path.name).read_bytes() == script.path.read_bytes()
    assert {path.name for path in script.path.parent.iterdir()} == {script.path.name, "runs"}

    returns, rows = np.load(run.folder / "final_returns.npy"), metrics(run.folder)
    assert returns.shape == (4,)
    assert len(set(returns)) == 4
    assert [row["step"] for row in rows] == ["3", "6"]
    assert float(rows[-1]["return"]) == pytest.approx(returns.mean())
    no_scale = {"score"} if script.task == "Reacher-2x1" else set()
    for row in rows:
        assert {key for key, value in row.items() if not np.isfinite(float(value))} == no_scale

    events = EventAccumulator(str(run.folder)).Reload()
    for tag, column in (("charts/return", "return"), ("charts/normalized_score", "score")):
        assert [event.step for event in events.Scalars(tag)] == [3, 6]
        shown = [event.value for event in events.Scalars(tag)]
        expected = [float(row[column]) for row in rows]
        assert shown == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert any(tag.startswith("losses/") for tag in events.Tags()["scalars"])
    (settings,) = events.Tensors("settings/text_summary")
    assert b"|seed|0|" in settings.tensor_proto.string_val[0]

    names = {path.name.split(".")[0] for path in run.folder.iterdir()}
    files = {"args", script.path.stem, "metrics", "final_returns", "policy", "checkpoint"}
    files |= {"checkpoint-previous"}
    assert names == files | {"events"}


def test_saved_team_plays_as_after_training(run, data):
    """tools/watch.py builds it by the run's own script: the final returns again, bit for bit."""
    team = watch.load_team(run.folder, TINY["eval_episodes"], seed=5, data_dir=data)
    (returns,) = team.module.evaluate(team.policy, [team.env])
    np.testing.assert_array_equal(returns, np.load(run.folder / "final_returns.npy"))
    assert team.module.__file__.startswith(str(run.folder))


def test_last_line(run):
    """The run ends with its return and score; warnings and progress bars stay out of files."""
    rows = metrics(run.folder)
    last = run.process.stdout.strip().splitlines()[-1]
    assert f"return {float(rows[-1]['return']):.1f}" in last
    assert f"normalized score {float(rows[-1]['score']):.1f}" in last
    assert run.process.stderr == ""


def test_weights_have_moved(run, train):
    """Every parameter of the policy has left its initial value: what a run without steps saves."""
    policy, _ = train(learning_rate=1e-30)
    initial, final = weights(train.folder), weights(run.folder)
    assert initial.keys() == final.keys()
    moved = {key for key in final if not torch.equal(initial[key], final[key])}
    assert moved == dict(policy.named_parameters()).keys()
    assert all(value.isfinite().all() for value in final.values())


def test_same_seed_same_run(run, train):
    """In this process as in its own: weights, returns and curves are those of the seed."""
    train()
    assert same(weights(train.folder), weights(run.folder))
    assert metrics(train.folder) == metrics(run.folder)
    one, two = (np.load(folder / "final_returns.npy") for folder in (train.folder, run.folder))
    assert np.array_equal(one, two)


def test_one_agents_data_train_that_agent(run, train, script, data, tmp_path):
    """Other actions and rewards of agent 0 change its weights, and no bit of another agent's."""
    shutil.copytree(data, tmp_path / "data")
    for name in ("acs_0", "rews_0"):
        path = tmp_path / f"data/{script.task}/expert/seed_0_data/{name}.npy"
        np.save(path, -np.load(path))
    policy, _ = train(data_dir=tmp_path / "data")
    first, second = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["states"]
        for folder in (run.folder, train.folder)
    )
    moved = dict(policy.named_parameters()).keys()
    networks = {"policy", "critic", "target_policy", "target_critic"} & first.keys()
    assert networks >= {"policy"}
    for name in networks:
        for key, value in first[name].items():
            a, b = value.movedim(-3, 0), second[name][key].movedim(-3, 0)  # (N, ...)
            assert torch.equal(a[1:], b[1:])
            if "critic" in name or key in moved:
                assert not torch.equal(a[0], b[0])


# Several seeds at once


@pytest.fixture
def two_seeds(script, train, data, make_data, make_mujoco_data, tmp_path):
    """A function as `train` that trains seeds 0 and 1 at once.

    Attributes: `folders`, the run directories; `data`, the data folder; `make`, what made seed 1's.
    """
    make = make_data if script.path.stem.endswith("_mpe") else make_mujoco_data
    shutil.copytree(data, tmp_path / "data")
    make(tmp_path / "data", script.task, seed=1)

    def function(**changes):
        return train(num_seeds=2, data_dir=tmp_path / "data", **changes)

    function.folders = [train.folder, train.folder.with_name("seed-1")]
    function.data, function.make = tmp_path / "data", make
    return function


def test_two_seeds_at_once(script, two_seeds):
    """Every seed has its own run directory, and its team plays alone what it has learned."""
    policy, returns = two_seeds()
    assert returns.shape == (2, 4)
    joint = {key: value.chunk(2) for key, value in policy.state_dict().items()}
    for seed, folder in enumerate(two_seeds.folders):
        settings = json.loads((folder / "args.json").read_text())
        assert (settings["seed"], settings["first_seed"], settings["num_seeds"]) == (seed, 0, 2)
        np.testing.assert_array_equal(np.load(folder / "final_returns.npy"), returns[seed])
        assert float(metrics(folder)[-1]["return"]) == pytest.approx(returns[seed].mean())
        assert same(weights(folder), {key: values[seed] for key, values in joint.items()})
        team = watch.load_team(folder, 2, seed, two_seeds.data)
        action = team.policy.act(torch.from_numpy(team.env.reset()))
        assert action.shape == (team.env.num_agents, 2, max(team.env.action_dims))
    assert not same(*map(weights, two_seeds.folders))
    assert not np.array_equal(*returns)


def test_seeds_do_not_influence_one_another(script, two_seeds):
    """Other data of seed 1 change all of its weights, and no bit of seed 0's."""
    policy, _ = two_seeds()
    before = [weights(folder) for folder in two_seeds.folders]
    shutil.rmtree(two_seeds.data / script.task / "expert/seed_1_data")
    two_seeds.make(two_seeds.data, script.task, seed=2)
    folder = two_seeds.data / script.task / "expert"
    (folder / "seed_2_data").rename(folder / "seed_1_data")
    two_seeds()
    after = [weights(folder) for folder in two_seeds.folders]
    assert same(before[0], after[0])
    moved = dict(policy.named_parameters()).keys()
    assert not any(torch.equal(before[1][key], after[1][key]) for key in moved)


def test_two_seeds_go_on(two_seeds):
    """From the checkpoint of both, in the first one's directory, to the same weights and curves."""
    two_seeds()
    before = [(weights(folder), metrics(folder)) for folder in two_seeds.folders]
    (two_seeds.folders[0] / "checkpoint.pt").unlink()  # that of update 3 is left
    two_seeds(resume=True)
    for folder, (old_weights, old_metrics) in zip(two_seeds.folders, before, strict=True):
        assert same(weights(folder), old_weights)
        assert metrics(folder) == old_metrics


def test_seeds_are_locked_and_kept(script, train, two_seeds):
    """One seed's directory in use stops both; trained again alone, its old results are kept."""
    with train.module.locked(two_seeds.folders[1:]):
        assert str(two_seeds.folders[1]) in refusal(two_seeds)
    two_seeds()
    old = (two_seeds.folders[1] / "policy.pt").read_bytes()
    train(seed=1, data_dir=two_seeds.data, resume=True)  # it has no checkpoint of its own
    (kept,) = two_seeds.folders[1].parent.glob("old/seed-1-*/policy.pt")
    assert kept.read_bytes() == old


def test_other_run_between_stop_and_resume_is_kept(script, train, two_seeds, monkeypatch):
    """Seed 1 trained alone while both were stopped: its results go aside when both go on."""
    policy_loss, calls = train.module.policy_loss, []

    def stop_at_the_fourth(*args):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return policy_loss(*args)

    monkeypatch.setattr(train.module, "policy_loss", stop_at_the_fourth)
    with pytest.raises(SystemExit):
        two_seeds()
    train(seed=1, data_dir=two_seeds.data)
    alone = (two_seeds.folders[1] / "policy.pt").read_bytes()
    two_seeds(resume=True)
    kept = [path.read_bytes() for path in two_seeds.folders[0].parent.glob("old/*/policy.pt")]
    assert kept == [alone]
    assert [row["step"] for row in metrics(two_seeds.folders[1])] == ["3", "6"]


def kept_policies(folder) -> list[bytes]:
    """All results of a script, also those that were moved aside."""
    return sorted(path.read_bytes() for path in folder.parent.rglob("policy.pt"))


def test_joint_run_does_not_take_over_a_later_one(train, two_seeds):
    """Seed 1 trained anew after both, then both resumed, which are finished: all three are kept."""
    two_seeds()
    joint = metrics(two_seeds.folders[1])
    train(seed=1, data_dir=two_seeds.data, learning_rate=1e-3)
    before = kept_policies(train.folder)
    two_seeds(resume=True)
    assert set(kept_policies(train.folder)) == set(before)
    assert len(set(before)) == 3
    assert metrics(two_seeds.folders[1]) == joint


def stopped(function, module, monkeypatch, at: int, **changes):
    """Call a training that ends by SIGTERM at its update `at`."""
    policy_loss, calls = module.policy_loss, []

    def stop_there(*args):
        calls.append(None)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return policy_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "policy_loss", stop_there)
        with pytest.raises(SystemExit, match="--resume goes on"):
            function(**changes)


@pytest.mark.parametrize("first", ["joint", "alone"])
def test_stopped_runs_do_not_go_on_in_one_another(first, train, two_seeds, monkeypatch):
    """Both stopped and seed 1 stopped alone, in either order: each ends with its own result."""
    alone = {"seed": 1, "data_dir": two_seeds.data}
    stopped(two_seeds, train.module, monkeypatch, 4)
    stopped(train, train.module, monkeypatch, 4, **alone)
    if first == "joint":
        two_seeds(resume=True)
        train(resume=True, **alone)
    else:
        train(resume=True, **alone)
        two_seeds(resume=True)
    joint = (two_seeds.folders[0] / "policy.pt").read_bytes()
    results = kept_policies(train.folder)
    assert len(set(results)) == len(results) == 3
    assert joint in results


def test_seeds_of_different_lengths_are_refused(script, two_seeds):
    """Data of different numbers of transitions cannot be one tensor: a line says what to do."""
    shutil.rmtree(two_seeds.data / script.task / "expert/seed_1_data")
    two_seeds.make(two_seeds.data, script.task, transitions=400, seed=1)
    assert "without --num-seeds" in refusal(two_seeds)
    assert not two_seeds.folders[0].exists()


# Refusals


@pytest.mark.parametrize(
    "wrong", [("--task", "simple_speaker"), ("--quality", "perfect"), ("--num-updates", "many")]
)
def test_bad_command_line(wrong, script, monkeypatch, capsys):
    """A value that is none of the choices is repeated in the error, and nothing is written."""
    before = sorted(script.path.parent.rglob("*"))
    status = cli(monkeypatch, script, *wrong)
    error = capsys.readouterr().err
    if isinstance(status, str):  # MaMuJoCo itself knows its tasks
        status, error = 2, status
        assert error.startswith("error: ")
        assert "\n" not in error
    assert status == 2
    assert wrong[0] in error
    assert wrong[1] in error
    assert sorted(script.path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_updates": 0}, "--num-updates"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"num_seeds": 2}, "seed 1"),
        ({"eval_interval": 0}, "--eval-interval"),
        ({"eval_episodes": -1}, "--eval-episodes"),
        ({"batch_size": 0}, "--batch-size"),
        ({"batch_size": 501}, "500 transitions"),
        ({"device": "abacus"}, "--device abacus"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"quality": "medium"}, "no {task} medium data"),
        ({"quality": "medium-expert"}, "no {task} medium data"),
        ({"seed": 1}, "seed 1"),
        ({"task": "other"}, "no {other} expert data"),
        ({"quality": "medium", "device": "abacus", "num_updates": 0}, "--num-updates is 0"),
    ],
    ids=str,
)
def test_bad_settings(changes, reason, script, train, tmp_path):
    """One line says what is wrong, before any training, and no run directory is left."""
    if "task" in changes:
        changes = {"task": script.other}
    reason = reason.format(task=script.task, other=script.other)
    assert reason in refusal(lambda: train(**changes))
    assert not (tmp_path / "runs").exists()


def own(names, **values):
    """Cases of one setting each: (script, setting, value)."""
    return [(f"{name}_mpe", *item) for name in names.split() for item in values.items()]


OUT_OF_RANGE = [
    *own("om2p td3_bc omar diffusion_ql dom2 flow_ql fql", gamma=1.1, tau=-0.1),
    *own("om2p td3_bc diffusion_ql dom2 flow_ql fql", q_weight=-1.0),
    *own("om2p", flow_ratio=1.5, delta=0.0, time_alpha=0.0, time_beta=-1.0),
    *own("omar dom2", cql_alpha=-1.0, cql_samples=0),
    *own("omar", omar_coe=2.0, omar_samples=1, omar_iterations=0, omar_sigma=0.0),
    *own("diffusion_ql", diffusion_steps=0),
    *own("dom2", solver_steps=0, score_dims=(0,), return_quantiles=(0.5, 2.0)),
    *own("flow_ql fql", flow_steps=0),
    *own("bc", learning_rate=-1.0, hidden_dims=(16, 0), seed=-1),
    *own("omar", omar_sigma=math.inf, omar_coe=math.nan),
    ("omar_mamujoco", "cql_noise", 0.0),
]


@pytest.mark.parametrize(("name", "setting", "value"), OUT_OF_RANGE)
def test_number_out_of_range(name, setting, value, data, tmp_path):
    """One line names the setting and the value, before anything is read or written."""
    module = load(next(path for path in SCRIPTS if path.stem == name))
    settings = {"data_dir": data, "run_dir": tmp_path / "runs", **TINY, setting: value}
    message = refusal(lambda: module.train(module.Args(**settings)))
    assert message.startswith(f"error: --{setting.replace('_', '-')} is {value}; it must be from ")
    assert not (tmp_path / "runs").exists()


AT_THE_ENDS = [
    ("om2p_mpe", {"q_weight": 0.0, "flow_ratio": 1.0, "gamma": 0.0, "tau": 1.0}),
    ("bc_mpe", {"learning_rate": 0.0, "hidden_dims": ()}),
    ("td3_bc_mpe", {"q_weight": 0.0, "gamma": 1.0, "tau": 0.0}),
    ("omar_mpe", {"omar_coe": 0.0, "omar_samples": 2, "omar_iterations": 1, "cql_samples": 1}),
    ("omar_mpe", {"omar_coe": 1.0, "cql_alpha": 0.0}),
    ("diffusion_ql_mpe", {"diffusion_steps": 1, "q_weight": 0.0}),
    ("dom2_mpe", {"solver_steps": 1, "score_dims": (4,), "return_quantiles": (0.0, 1.0)}),
    ("flow_ql_mpe", {"flow_steps": 1, "q_weight": 0.0}),
    ("fql_mpe", {"flow_steps": 1, "q_weight": 0.0}),
]


@pytest.mark.parametrize(("name", "changes"), AT_THE_ENDS)
def test_numbers_at_the_ends_of_their_ranges(name, changes, data, tmp_path):
    """What the docstrings allow can be run: the smallest numbers of steps, samples and widths."""
    module = load(next(path for path in SCRIPTS if path.stem == name))
    settings = {"data_dir": data, "run_dir": tmp_path / "runs", "batch_size": 1, "num_updates": 2}
    _, returns = module.train(module.Args(**TINY | settings | changes))
    assert np.isfinite(returns).all()


def test_no_widths_are_refused(data, tmp_path):
    """DOM2's score network has one block at least: `--score-dims` without a number is an error."""
    module = load(ROOT / "baselines/dom2_mpe.py")
    settings = {"data_dir": data, "run_dir": tmp_path / "runs", **TINY, "score_dims": ()}
    assert "--score-dims" in refusal(lambda: module.train(module.Args(**settings)))


def test_every_number_has_a_range(script):
    """RANGES knows all settings of Args that are numbers, and nothing else."""
    module = load(script.path)
    types = {field.name: field.type for field in fields(module.Args)}
    numbers = {name for name, kind in types.items() if kind in (int, float)}
    numbers |= {name for name, kind in types.items() if get_origin(kind) is tuple}
    assert {"seed", "num_updates", "hidden_dims", "learning_rate"} <= numbers
    assert module.RANGES.keys() == numbers


def test_error_of_a_process(tmp_path):
    """What a shell sees without data: one line on stderr, a status that is not 0, no traceback."""
    script = copy_alone(ROOT / "om2p_mpe.py", tmp_path / "alone")
    process = python(script, "--task", "simple_spread")
    assert process.returncode == 1
    assert process.stderr.startswith("error: there are no simple_spread expert data")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""
    assert list(tmp_path.rglob("*")) == [script.parent, script]


# Runs that go on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopped_run_equals_unbroken_run(number, run, train, monkeypatch):
    """Stopped by a signal it says how to go on, and then ends bit for bit as if it had not been."""
    calls, normal = [], signal.getsignal(number)

    def stop_at_the_fourth(*args):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return policy_loss(*args)

    policy_loss = train.module.policy_loss
    monkeypatch.setattr(train.module, "policy_loss", stop_at_the_fourth)
    with pytest.raises(SystemExit) as stop:
        train()
    assert stop.value.code == "stopped at update 4; --resume goes on from there"
    assert signal.getsignal(number) == normal
    assert not (train.folder / "policy.pt").exists()
    train(resume=True)
    assert len(calls) == 6
    assert same(weights(train.folder), weights(run.folder))
    assert metrics(train.folder) == metrics(run.folder)
    # File by file: within a second, TensorBoard would read the files in the order of their names
    steps = {}
    for path in train.folder.glob("events*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            steps.setdefault(tag, []).extend(event.step for event in events.Scalars(tag))
    assert len(steps) > 3
    assert all(sorted(found) == [3, 6] for found in steps.values())


def test_second_process_is_refused(train):
    """Who trains in a run directory has it alone; the other is told, and changes nothing."""
    train()
    before = sorted(train.folder.parent.rglob("*"))
    with train.module.locked([train.folder]):
        message = refusal(lambda: train(resume=True))
    assert message == f"error: another process is training in {train.folder}"
    assert sorted(train.folder.parent.rglob("*")) == before
    train(resume=True)


def test_resume_without_checkpoint_starts(run, train):
    """So that one command serves the first start and every restart."""
    train(resume=True)
    assert same(weights(train.folder), weights(run.folder))
    train(resume=True)  # finished: nothing is left to do, nothing is lost
    assert same(weights(train.folder), weights(run.folder))
    assert metrics(train.folder) == metrics(run.folder)


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.5}, {"hidden_dims": (16, 8)}, {"num_updates": 7}], ids=str
)
def test_resume_with_other_settings_is_refused(change, train):
    """The line names the setting with both values; the checkpoint stays as it was."""
    train()
    before = (train.folder / "checkpoint.pt").read_bytes()
    message = refusal(lambda: train(resume=True, **change))
    (name, value), *_ = change.items()
    assert name.replace("_", "-") in message.replace("_", "-")
    assert str(value) in message
    assert str(getattr(train.module.Args(**TINY), name)) in message
    assert (train.folder / "checkpoint.pt").read_bytes() == before


def flip(data: bytes) -> bytes:
    """The same bytes, but for one bit of the largest tensor in a file of torch.save."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    tensors = [info for info in archive.infolist() if "/data/" in info.filename]
    member = max(tensors, key=lambda info: info.file_size)
    with archive.open(member) as file:
        place = data.index(file.read()) + member.file_size // 2
    return data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :]


BAD_CHECKPOINTS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404: Not Found</html>\n"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:2_000]),
    "one bit": lambda path: path.write_bytes(flip(path.read_bytes())),
    "something else": lambda path: torch.save({"step": 3}, path),
    "code": lambda path: torch.save({"step": Code(path.parent / "executed")}, path),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_broken_checkpoint_falls_back(case, run, train, capsys):
    """The one before is taken, with a warning, and the run ends as if nothing had happened."""
    train()
    (train.folder / "final_returns.npy").unlink()
    BAD_CHECKPOINTS[case](train.folder / "checkpoint.pt")
    train(resume=True)
    warning = f"warning: {train.folder / 'checkpoint.pt'} is broken"
    assert capsys.readouterr().err.startswith(warning)
    assert (train.folder / "checkpoint.broken").exists()
    assert same(weights(train.folder), weights(run.folder))
    assert metrics(train.folder) == metrics(run.folder)
    assert not (train.folder / "executed").exists()


def test_fallback_keeps_the_whole_checkpoint(run, train, monkeypatch):
    """Killed while it writes the next one: the broken one has not taken the place of the whole."""
    train()
    (train.folder / "checkpoint.pt").write_bytes(b"broken")
    replace = os.replace

    def killed(source, target):
        if str(target).endswith("checkpoint.pt"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(train.module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train(resume=True)
    monkeypatch.undo()
    train(resume=True)
    assert same(weights(train.folder), weights(run.folder))


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_broken_checkpoints_are_refused(case, train):
    """With no whole one left, a line names the last; all files stay, and nothing is executed."""
    train()
    paths = [train.folder / name for name in ("checkpoint.pt", "checkpoint-previous.pt")]
    for path in paths:
        BAD_CHECKPOINTS[case](path)
    before = [path.read_bytes() for path in paths]
    assert str(paths[1]) in refusal(lambda: train(resume=True))
    assert [path.read_bytes() for path in paths] == before
    assert not (train.folder / "executed").exists()


def test_new_run_keeps_the_old_ones(train, tmp_path):
    """Three runs one right after the other, not resumed: all three results are there."""
    kept = []
    for num_updates in (1, 2, 3):
        train(num_updates=num_updates)
        kept.append((train.folder / "policy.pt").read_bytes())
    found = [path.read_bytes() for path in (tmp_path / "runs").rglob("policy.pt")]
    assert sorted(found) == sorted(kept)
    assert len(set(kept)) == 3
    assert (train.folder / "policy.pt").read_bytes() == kept[-1]

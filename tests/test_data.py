"""Loading and making datasets: what is read, what is refused, what the collectors write."""

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import card
import collect_mpe
import convert_prey
import numpy as np
import pytest
import torch
import train_behavior
import tyro
from collect_mamujoco import Args as MuJoCoArgs
from collect_mamujoco import collect_mamujoco
from collect_mpe import Args as MPEArgs
from conftest import ROOT, Code, reference_prey, refusal, write_prey
from numpy.testing import assert_allclose, assert_array_equal

import om2p_mamujoco
import om2p_mpe
from om2p_mpe import FILES, MPE, load_prey

BEHAVIOR = ROOT / "data" / "behavior"
SUITES = {  # script, task, environment; Reacher's agents observe 7 and 10 numbers
    "mpe": (om2p_mpe, "simple_tag", MPE("simple_tag", 1)),
    "mamujoco": (om2p_mamujoco, "Reacher-2x1", om2p_mamujoco.MaMuJoCo("Reacher-2x1", 1)),
}


@pytest.fixture(params=SUITES)
def suite(request, monkeypatch, tmp_path):
    """A suite with a dataset of 60 random rows: `load(seeds)`, its `folder` and its arrays."""
    monkeypatch.chdir(tmp_path)
    script, task, env = SUITES[request.param]
    folder, rng = tmp_path / task / "expert" / "seed_0_data", np.random.default_rng(0)
    folder.mkdir(parents=True)
    widths = {"obs": env.obs_dims, "next_obs": env.obs_dims, "action": env.action_dims}
    data = {}
    for (key, name), i in product(FILES.items(), range(env.num_agents)):
        shape = (60, widths[key][i]) if key in widths else (60,)
        data[key, i] = rng.uniform(-1, 1, shape).astype(np.float32)
        data[key, i] = data[key, i] > 0.9 if key == "done" else data[key, i]
        np.save(folder / f"{name}_{i}.npy", data[key, i])

    def load(seeds=(0,), quality="expert"):
        return script.load_dataset(tmp_path, task, quality, seeds, env)

    return SimpleNamespace(script=script, task=task, env=env, folder=folder, data=data, load=load)


# Loading


def test_loaded_values(suite):
    """Every agent's rows as float32 (N, T, dim) and (N, T), smaller agents padded with zeros.

    float64, and rewards and dones of shape (T, 1), are as good.
    """
    for key, name in FILES.items():
        values = suite.data[key, 1].astype(np.float64)
        np.save(suite.folder / f"{name}_1.npy", values.reshape(60, -1))
    loaded, env = suite.load(), suite.env
    dims = {"obs": max(env.obs_dims), "action": max(env.action_dims)}
    dims["next_obs"] = dims["obs"]
    assert set(loaded) == set(FILES)
    for key, values in loaded.items():
        assert values.dtype == torch.float32
        assert values.shape == (env.num_agents, 60, *([dims[key]] if key in dims else []))
        for i, agent in enumerate(values.numpy()):
            own = suite.data[key, i]
            assert_array_equal(agent[:, : own.shape[1]] if own.ndim == 2 else agent, own)
            assert own.ndim == 1 or not agent[:, own.shape[1] :].any()


def test_several_seeds(suite):
    """Datasets of two seeds are stacked along the agents, and have to be of one length."""
    other = suite.folder.with_name("seed_1_data")
    other.mkdir()
    for path in suite.folder.glob("*.npy"):
        np.save(other / path.name, 0.5 * np.load(path))
    loaded, N = suite.load((0, 1)), suite.env.num_agents
    assert loaded["obs"].shape[:2] == (2 * N, 60)
    assert_array_equal(loaded["obs"][N:], 0.5 * loaded["obs"][:N])
    np.save(other / "obs_0.npy", np.zeros((59, suite.env.obs_dims[0])))
    assert str(other / "obs_0.npy") in refusal(suite.load, (0, 1))


def change(function):
    """Overwrite the file with what a function makes of its array."""
    return lambda path: np.save(path, function(np.load(path)))


def put(value):
    """Set one number in the middle of the array."""
    return change(lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size // 2, value, x))


def cut(path):
    """Lose the second half of the file, as a broken download does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_FILES = {
    "missing": ("acs_1", Path.unlink, "No such file"),
    "truncated": ("obs_1", cut, "cannot be used"),
    "a web page": ("obs_0", lambda path: path.write_text("<html>404</html>"), "cannot be used"),
    "an archive": ("obs_0", lambda path: np.savez(path.open("wb"), x=1), "cannot be used"),
    "strings": ("rews_1", change(lambda x: np.full(60, "a")), "cannot be used"),
    "code": ("acs_0", change(lambda x: np.array([Code(Path("ran"))] * 60)), "cannot be used"),
    "empty": ("obs_0", change(lambda x: x[:0]), "its shape is (0, "),
    "too wide": ("acs_0", change(lambda x: np.tile(x, 2)), "its shape is (60, "),
    "rewards of all agents": ("rews_0", change(lambda x: np.ones((60, 3))), "not (60, 1)"),
    "short": ("dones_1", change(lambda x: x[:-1]), "its shape is (59, 1), not (60, 1)"),
    "NaN": ("obs_1", put(np.nan), "holds NaN"),
    "infinite": ("rews_1", put(-np.inf), "holds NaN or numbers outside"),
    "too large for float32": ("rews_0", put(1e300), "holds NaN or numbers outside"),
    "actions out of range": ("acs_1", put(1.5), "outside -1.001 to 1.001"),
    "done out of range": ("dones_0", put(2), "outside 0 to 1"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(case, suite):
    """One line names the file, and what is wrong with it; code is not run."""
    name, spoil, reason = BAD_FILES[case]
    path = suite.folder / f"{name}.npy"
    spoil(path)
    message = refusal(suite.load)
    assert str(path) in message
    assert reason in message
    assert "unsafely" not in message  # NumPy's advice for what it takes for a pickle
    assert not Path("ran").exists()


@pytest.mark.parametrize("collector", ["works", "fails", "is missing"])
@pytest.mark.parametrize("place", ["om2p.py", "baselines/other.py"])
def test_missing_dataset(place, collector, suite, monkeypatch, tmp_path):
    """The collector is found from the root and from baselines/, and called for what is missing.

    Where none is, as around a script that stands alone, a line names the ways to get data.
    """
    monkeypatch.setattr(suite.script, "__file__", str(tmp_path / place))
    (tmp_path / "data").mkdir()
    made = suite.folder.parents[1] / "medium/seed_0_data"
    code = f"import sys; print(sys.argv[1:], file=open({str(tmp_path / 'argv')!r}, 'w')); "
    if collector == "works":
        code += f"import shutil; shutil.copytree({str(suite.folder)!r}, {str(made)!r})"
    if collector != "is missing":
        (tmp_path / "data" / suite.env.collector).write_text(code)
    flags = f"--task {suite.task} --quality medium --seed 0"
    if collector == "works":
        assert suite.load((0,), "medium")["obs"].shape[1] == 60
    else:
        message = refusal(suite.load, (0,), "medium")
        assert f"python data/{suite.env.collector} {flags}" in message
        assert "bash data/download.sh" in message
        assert "docs/your-data.md" in message  # for tasks that neither of them knows
        assert (ROOT / "docs/your-data.md").is_file()
    if collector != "is missing":
        argv = f"{flags} --data-dir {tmp_path}".split()
        assert (tmp_path / "argv").read_text().strip() == str(argv)


# Prey


@pytest.mark.parametrize("zipped", [False, True])
def test_omars_prey(zipped, tmp_path):
    """Its checkpoint makes a prey.npz that acts as the torch module does, in float32.

    The batch norm is folded. The public files are in torch's old format, without zip.
    """
    (net, checkpoint), folder = reference_prey(14), tmp_path / "simple_tag"
    folder.mkdir()
    path = folder / "pretrained_adv_model.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    obs = 3 * torch.randn(1, 200, 14)
    expected = net(obs[0]).detach()
    convert_prey.write_prey(folder / "new.npz", convert_prey.read_original(path))
    action = load_prey(folder / "new.npz")(obs.numpy())
    assert action.dtype == np.float32
    assert_allclose(action[0], expected, rtol=0, atol=1e-5)
    policy, whose = collect_mpe.find_prey("simple_tag", tmp_path)  # comes before ours
    assert_allclose(policy(obs.numpy())[0], expected, rtol=0, atol=1e-5)
    assert whose == "that of prey.npz"


@pytest.mark.parametrize("content", [None, [1, 2], {"agent_params": [Code(Path("executed"))]}])
def test_bad_original_prey_is_refused(content, monkeypatch, tmp_path):
    """One line with its path; code in it is not run."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pretrained_adv_model.pt"
    torch.save(content, path) if content else path.write_text("<html>404: Not Found</html>\n")
    assert str(path) in refusal(convert_prey.read_original, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_prey_that_is_there_stays(tmp_path):
    """The collector uses it, and puts this project's there only where none is."""
    before = (path := write_prey(tmp_path / "simple_tag", 14)).read_bytes()
    assert collect_mpe.find_prey("simple_tag", tmp_path)[1] == "that of prey.npz"
    assert path.read_bytes() == before
    path.unlink()
    policy, whose = collect_mpe.find_prey("simple_tag", tmp_path)
    assert "fit" in whose
    obs = np.random.default_rng(0).normal(size=(1, 50, 14)).astype(np.float32)
    assert policy(obs).dtype == np.float32
    assert_allclose(policy(obs), load_prey(BEHAVIOR / "simple_tag_prey.npz")(obs), atol=1e-6)


# Collecting


def collect(folder, task="simple_spread", quality="random", transitions=1_000, seed=0, noise=0.1):
    """Make a small dataset; its card and its files, {name: array}."""
    is_mpe = task.startswith("simple_")
    args = (MPEArgs if is_mpe else MuJoCoArgs)(task, quality, seed, transitions, noise, folder)
    facts = (collect_mpe.collect_mpe if is_mpe else collect_mamujoco)(args)
    folder = folder / task / quality / f"seed_{seed}_data"
    assert json.loads((folder / "card.json").read_text()) == facts
    return facts, {path.stem: np.load(path) for path in folder.glob("*.npy")}


@pytest.mark.parametrize(
    ("task", "obs_dims", "action_dim", "horizon"),
    [("simple_tag", (16, 16, 16), 2, 25), ("Reacher-2x1", (7, 10), 1, 50)],
)
def test_collected_files(task, obs_dims, action_dim, horizon, tmp_path):
    """float32 of every agent's own widths; whole episodes whose rows go on from each other."""
    facts, files = collect(tmp_path, task, transitions=1_025)
    shapes = {"obs": obs_dims, "next_obs": obs_dims, "acs": (action_dim,) * len(obs_dims)}
    assert {name: (array.shape, array.dtype) for name, array in files.items()} == {
        f"{name}_{i}": ((1_025, shapes[name][i]) if name in shapes else (1_025,), np.float32)
        for name in FILES.values()
        for i in range(len(obs_dims))
    }
    for i in range(len(obs_dims)):
        goes_on = (files[f"next_obs_{i}"][:-1] == files[f"obs_{i}"][1:]).all(axis=-1)
        assert_array_equal(goes_on, np.arange(1, 1_025) % horizon != 0)
        assert not files[f"dones_{i}"].any()
        assert 0.99 < np.abs(files[f"acs_{i}"]).max() <= 1
    rewards = np.mean([files[f"rews_{i}"] for i in range(len(obs_dims))], axis=0)
    returns = rewards[: 1_025 // horizon * horizon].reshape(-1, horizon).sum(axis=-1)
    assert (facts["transitions"], facts["episodes"]) == (1_025, len(returns))
    assert facts["return mean"] == pytest.approx(returns.mean(), abs=0.01)
    assert facts["return sd"] == pytest.approx(returns.std(), abs=0.01)
    described, _ = card.describe(tmp_path / task / "random/seed_0_data")
    assert described["return"].startswith(f"{facts['return mean']:.2f}")


def test_falls_are_recorded(tmp_path):
    """`dones` is 1 in the row in which Hopper falls, and the next row starts an episode."""
    facts, files = collect(tmp_path, "Hopper-3x1", transitions=3_000)
    done = files["dones_0"].astype(bool)
    assert 60 < done.sum() < 300
    assert facts["return mean"] == pytest.approx(om2p_mamujoco.SCALE["Hopper-3x1"][0], abs=5)
    goes_on = [files[f"next_obs_{i}"][:-1] == files[f"obs_{i}"][1:] for i in range(3)]
    assert_array_equal(np.concatenate(goes_on, axis=1).all(axis=1), ~done[:-1])


@pytest.mark.parametrize("task", ["simple_tag", "Reacher-2x1"])
def test_same_seed_same_bytes(task, tmp_path):
    """A seed decides every byte; another seed changes states, actions and rewards."""
    _, one = collect(tmp_path / "1", task, transitions=500, seed=3)
    torch.rand(7)
    _, two = collect(tmp_path / "2", task, transitions=500, seed=3)
    _, other = collect(tmp_path / "3", task, transitions=500, seed=4)
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes()
        assert name.startswith("dones") or not np.array_equal(array[0], other[name][0])


@pytest.mark.parametrize("place", ["alone", "beside its parts"])
def test_mixtures(place, tmp_path):
    """The first 90 % of one dataset, then the first 10 % of the other, whether they are there."""
    _, one = collect(tmp_path, "simple_tag", "random", 500, 7)
    _, two = collect(tmp_path, "simple_tag", "medium", 500, 7)
    folder = tmp_path if place != "alone" else tmp_path / "elsewhere"
    facts, files = collect(folder, "simple_tag", "random-medium", 500, 7)
    for name, array in files.items():
        assert_array_equal(array, np.concatenate([one[name][:450], two[name][:50]]))
    assert (facts["transitions"], facts["episodes"]) == (500, 20)


@pytest.mark.parametrize("task", ["simple_spread", "simple_tag", "simple_world"])
def test_permuted_teams_play_the_same_episodes(task):
    """From a start with its agents permuted, a team's episode is the same, permuted."""
    worlds = [MPE(task, 20), MPE(task, 20)]
    N = worlds[0].num_agents
    prey = 0.5 * np.ones((len(worlds[0].size) - N, 20, 2))  # a network would see who is who
    plain, permuted = (
        collect_mpe.load_behavior(task, quality, worlds[0])
        for quality in ("expert", "multi-expert")
    )
    assert len(permuted) == N
    for shift, team in enumerate(permuted):
        order = [*np.roll(np.arange(N), -shift), *range(N, len(worlds[0].size))]
        obs = [worlds[0].reset(5), worlds[1].reset(5)]
        worlds[1].pos = worlds[0].pos[:, order]
        obs[1] = worlds[1].observe(range(N))
        for _ in range(MPE.horizon):
            both = zip((plain[0], team), obs, strict=True)
            actions = [x.act(torch.from_numpy(y)).detach().numpy() for x, y in both]
            assert_allclose(actions[1], actions[0][order[:N]], atol=1e-5)
            both = zip(worlds, actions, strict=True)
            results = [world.step(np.concatenate([action, prey])) for world, action in both]
            obs, rewards = zip(*results, strict=True)
            assert_allclose(worlds[1].pos, worlds[0].pos[:, order], atol=1e-5)
            assert_allclose(rewards[1], rewards[0][order[:N]], atol=1e-3)


def test_multi_expert(tmp_path):
    """Equal shares of N teams that return what the expert does, and begin otherwise."""
    facts, files = collect(tmp_path, "simple_spread", "multi-expert", 30_000)
    returns = np.mean([files[f"rews_{i}"].reshape(-1, 25).sum(axis=1) for i in range(3)], axis=0)
    shares = returns.reshape(3, 400).mean(axis=1)
    assert shares == pytest.approx(card.PUBLIC_RETURNS["simple_spread"]["expert"], abs=20)
    assert "3 permutations of the agents of 1 snapshot" in facts["behaviour"]
    assert 0.8 < float(facts["actions of two teams"].split()[0]) < 2.8
    env = MPE("simple_spread", 1)
    teams = collect_mpe.load_behavior("simple_spread", "multi-expert", env)
    obs = torch.from_numpy(np.stack([files[f"obs_{i}"][::25] for i in range(3)]))
    action = np.stack([files[f"acs_{i}"][::25] for i in range(3)])
    gaps = [np.abs(action - team.act(obs).detach().numpy()).mean(axis=(0, 2)) for team in teams]
    for k, gap in enumerate(gaps):  # nothing but exploration noise in its own share
        assert gap.reshape(3, 400).mean(axis=1).argmin() == k
        assert gap.reshape(3, 400).mean(axis=1)[k] < 0.1


@pytest.mark.parametrize("task", ["simple_tag", "Reacher-2x1"])
def test_mixture_of_public_data(task, make_data, make_mujoco_data, tmp_path):
    """Of data that are there and not from here, all rows count, whatever --num-transitions is."""
    make = make_data if task == "simple_tag" else make_mujoco_data
    for k, quality in enumerate(("medium", "expert")):
        make(tmp_path, task, quality, 333 + k)
        (tmp_path / task / quality / "seed_0_data/card.json").unlink(missing_ok=True)
    _, files = collect(tmp_path, task, "medium-expert", 500)
    for name, array in files.items():
        parts = [tmp_path / task / q / f"seed_0_data/{name}.npy" for q in ("medium", "expert")]
        expected = np.concatenate([np.load(parts[0])[:300], np.load(parts[1])[:33]])
        assert_array_equal(array, expected)


@pytest.mark.parametrize("task", ["simple_spread", "Reacher-2x1"])
def test_evaluation_starts_where_no_data_do(task, tmp_path):
    """With the dataset's seed, no evaluation episode begins as a recorded one."""
    _, files = collect(tmp_path, task, transitions=1_250, seed=3)
    is_mpe, seen = task == "simple_spread", []
    env = MPE(task, 200) if is_mpe else om2p_mamujoco.MaMuJoCo(task, 20)

    def act(obs):
        seen.append({tuple(row) for row in obs[1].numpy()})
        return torch.zeros(*obs.shape[:-1], max(env.action_dims))

    (om2p_mpe if is_mpe else om2p_mamujoco).evaluate(SimpleNamespace(act=act), [env], [3])
    recorded = {tuple(row) for row in files["obs_1"][:: env.horizon]}
    assert len(recorded) == 1_250 // env.horizon
    assert not recorded & seen[0]


def test_existing_dataset_is_refused(tmp_path):
    """It is left as it is; but a missing prey is put beside it."""
    collect(tmp_path, "simple_tag")
    folder = tmp_path / "simple_tag/random/seed_0_data"
    (tmp_path / "simple_tag/prey.npz").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert f"{folder} is there already" in refusal(collect, tmp_path, "simple_tag")
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert (tmp_path / "simple_tag/prey.npz").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_collection_leaves_nothing(error, monkeypatch, tmp_path):
    """Stopped after its files are begun, it takes them away again, and says so in one line."""
    saved, save = [], np.save

    def fail(path, values):
        save(path, values)
        saved.append(path)
        if len(saved) == 7:
            raise error

    monkeypatch.setattr(np, "save", fail)
    args = MPEArgs("simple_spread", "random", 0, 50, 0.1, tmp_path)
    with pytest.raises(SystemExit) as stop:
        collect_mpe.main(collect_mpe.collect_mpe, args)
    assert ("disk full" if isinstance(error, OSError) else "stopped") in stop.value.code
    assert tmp_path in saved[0].parents
    assert [path.name for path in tmp_path.rglob("*")] == ["simple_spread", "random"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"transitions": 0}, "--num-transitions"),
        ({"transitions": 26, "task": "simple_tag"}, "multiple of 25"),
        ({"transitions": 49, "task": "Reacher-2x1"}, "less than an episode"),
        ({"seed": -1}, "--seed"),
        ({"noise": 1.5}, "--noise"),
        ({"task": "simple_tag-5"}, "--task simple_tag-5"),
        ({"task": "simple_spread-0"}, "--task simple_spread-0"),
        ({"task": "Cat-2x2"}, "--task Cat-2x2"),
        ({"task": "Cat-2x2"}, "see docs/your-data.md"),
    ],
    ids=str,
)
def test_bad_settings(settings, reason, tmp_path):
    """One line, and nothing is written."""
    assert reason in refusal(lambda: collect(tmp_path, **settings))
    assert list(tmp_path.rglob("obs_0.npy")) == []


@pytest.mark.parametrize("task", ["Swimmer-2x1", "simple_spread-5"])
def test_missing_behavior(task, tmp_path):
    """The line is the command that trains it, to where the collector looks for it."""
    message = refusal(lambda: collect(tmp_path, task=task, quality="expert"))
    command = re.search(r"`python data/train_behavior.py (.*?)`", message)[1]
    args = tyro.cli(train_behavior.Args, args=command.split())
    assert (args.task, args.out) == (task, BEHAVIOR / f"{task}.npz")


def test_team_of_five(tmp_path):
    """Random data of five agents, at once; the card has no public return beside theirs."""
    facts, files = collect(tmp_path, "simple_spread-5", transitions=250)
    assert (facts["episodes"], facts["public data's return mean"]) == (10, None)
    assert {name: x.shape for name, x in files.items() if name.startswith("obs")} == {
        f"obs_{i}": (250, 30) for i in range(5)
    }
    described, _ = card.describe(tmp_path / "simple_spread-5/random/seed_0_data")
    assert described["return"].startswith(f"{facts['return mean']:.2f}")
    assert described["dataset"] == "simple_spread-5, random"
    assert not [key for key in described if "public" in key]


@pytest.mark.parametrize("task", ["simple_tag", "Reacher-2x1"])
def test_command_line(task, tmp_path):
    """As the scripts call it, from any folder: a card is printed, the data can be loaded."""
    script, _, env = SUITES["mpe" if task == "simple_tag" else "mamujoco"]
    flags = f"--task {task} --quality random --seed 2 --num-transitions 100 --data-dir x"
    command = [sys.executable, ROOT / "data" / env.collector, *flags.split()]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "transitions: 100\n" in run.stdout
    assert script.load_dataset(tmp_path / "x", task, "random", [2], env)["obs"].shape[1] == 100

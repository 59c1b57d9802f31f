"""Loading and making datasets: what is read, what is refused, what the collector writes."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import collect_mpe
import numpy as np
import pytest
import torch
from conftest import ROOT, Code, refusal, write_prey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import om2p_mpe
from om2p_mpe import MPE, evaluate, find_prey, load_dataset

BEHAVIOR = ROOT / "data" / "behavior"
FILES = {"obs": "obs", "action": "acs", "reward": "rews", "next_obs": "next_obs", "done": "dones"}
TASKS = ("simple_spread", "simple_tag", "simple_world")


def load(folder, task="simple_spread", quality="expert", seed=0):
    """load_dataset for the task's own environment."""
    return load_dataset(Path(folder), task, quality, seed, MPE(task, 1))


# Loading


@pytest.mark.parametrize("task", TASKS)
def test_loaded_values(task, make_data, tmp_path):
    """Every agent's rows, unchanged, as float32 tensors (N, T, dim) and (N, T)."""
    written = make_data(tmp_path, task, "medium", transitions=75, seed=4)
    loaded = load(tmp_path, task, "medium", seed=4)
    assert set(loaded) == set(FILES)
    for key, name in FILES.items():
        assert loaded[key].dtype == torch.float32
        assert_array_equal(loaded[key].numpy(), written[name])
    assert loaded["obs"].shape == (3, 75, MPE(task, 1).obs_dims[0])
    assert loaded["action"].shape == (3, 75, 2)
    assert loaded["reward"].shape == loaded["done"].shape == (3, 75)


def test_other_types_and_column_vectors(make_data, tmp_path):
    """float64, rewards and dones of shape (T, 1), and dones of type bool, with ones, are read."""
    written, folder = make_data(tmp_path), tmp_path / "simple_spread/expert/seed_0_data"
    done = np.arange(500) % 25 == 24
    for i in range(3):
        np.save(folder / f"obs_{i}.npy", written["obs"][i].astype(np.float64))
        np.save(folder / f"rews_{i}.npy", written["rews"][i].astype(np.float64)[:, None])
        np.save(folder / f"dones_{i}.npy", done[:, None] if i else done)
    loaded = load(tmp_path)
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert_array_equal(loaded["obs"].numpy(), written["obs"])
    assert_array_equal(loaded["reward"].numpy(), written["rews"])
    assert_array_equal(loaded["done"].numpy(), np.tile(done, (3, 1)))


@pytest.mark.parametrize(
    ("mixture", "first", "second"),
    [("medium-expert", "medium", "expert"), ("random-medium", "random", "medium")],
)
def test_mixtures(mixture, first, second, make_data, tmp_path):
    """The first 90 % of one dataset, then the first 10 % of the other."""
    one, two = (make_data(tmp_path, quality=quality, seed=7) for quality in (first, second))
    assert not np.array_equal(one["obs"], two["obs"])
    loaded = load(tmp_path, quality=mixture, seed=7)
    for key, name in FILES.items():
        expected = np.concatenate([one[name][:, :450], two[name][:, :50]], axis=1)
        assert_array_equal(loaded[key].numpy(), expected)


def replace(array):
    """Overwrite the file with another array."""
    return lambda path: np.save(path, array)


def change(function):
    """Overwrite the file with what a function makes of its array."""
    return lambda path: np.save(path, function(np.load(path)))


def put(value):
    """Set one number in the middle of the array."""

    def edit(array):
        array[len(array) // 2] = value
        return array

    return change(edit)


def cut(path):
    """Lose the second half of the file, as a broken download does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage(path):
    """Spoil the header of the file."""
    path.write_bytes(path.read_bytes().replace(b"}", b"{", 1))


BAD_FILES = {
    "missing": ("acs_1", Path.unlink, "No such file"),
    "narrow observations": (
        "next_obs_2",
        change(lambda x: x[:, :17]),
        "(60, 17); expected (60, 18)",
    ),
    "wide observations of the first": ("obs_0", replace(np.zeros((60, 24))), "expected (60, 18)"),
    "wide actions": ("acs_0", replace(np.zeros((60, 5))), "(60, 5); expected (60, 2)"),
    "flat actions": ("acs_0", replace(np.zeros(60)), "(60,); expected (60, 2)"),
    "rewards of all agents": ("rews_0", replace(np.zeros((60, 3))), "expected (60,)"),
    "a single number": ("rews_0", replace(np.float32(1)), "expected (60,)"),
    "short": ("dones_1", change(lambda x: x[:-1]), "(59,); expected (60,)"),
    "long": ("obs_1", change(lambda x: np.tile(x, (2, 1))), "(120, 18); expected (60, 18)"),
    "strings": ("rews_2", replace(np.full(60, "a")), "not an array of numbers"),
    "complex": ("rews_2", replace(np.zeros(60, complex)), "not an array of numbers"),
    "NaN": ("obs_1", put(np.nan), "NaN or infinite"),
    "infinite": ("rews_2", put(-np.inf), "NaN or infinite"),
    "too large for float32": ("rews_0", replace(np.full(60, 1e300)), "NaN or infinite"),
    "actions out of range": ("acs_2", put(1.5), "outside [-1, 1]"),
    "done below 0": ("dones_0", put(-7), "outside [0, 1]"),
    "done above 1": ("dones_2", put(255), "outside [0, 1]"),
    "truncated": ("obs_2", cut, "cannot be read"),
    "damaged header": ("obs_2", damage, "cannot be read"),
    "pickled": ("acs_0", replace(np.array([None] * 60)), "cannot be read"),
    "another format": ("acs_0", lambda path: path.write_text("1, 2, 3\n"), "cannot be read"),
    "empty": ("next_obs_0", lambda path: path.write_bytes(b""), "cannot be read"),
    "an archive": ("obs_0", lambda path: np.savez(path.open("wb"), x=1), "not an array"),
    "a folder": ("obs_1", lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a warning would be a second line
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(case, make_data, tmp_path):
    """One line names the file, and what is wrong with it or was expected."""
    name, spoil, reason = BAD_FILES[case]
    make_data(tmp_path, transitions=60)
    path = tmp_path / f"simple_spread/expert/seed_0_data/{name}.npy"
    spoil(path)
    message = refusal(load, tmp_path)
    assert str(path) in message
    assert reason in message


def test_other_numbers_of_agents_are_refused(make_data, tmp_path):
    """OM2P's release has four agents in simple_spread; neither four nor two pass for three."""
    make_data(tmp_path, transitions=50)
    folder = tmp_path / "simple_spread/expert/seed_0_data"
    for name in FILES.values():
        (folder / f"{name}_3.npy").write_bytes((folder / f"{name}_2.npy").read_bytes())
    message = refusal(load, tmp_path)
    assert str(folder) in message
    assert "more than the 3 agents" in message
    for name in FILES.values():
        (folder / f"{name}_3.npy").unlink()
        (folder / f"{name}_2.npy").unlink()
    assert str(folder / "obs_2.npy") in refusal(load, tmp_path)


def test_missing_dataset_without_collector(monkeypatch, tmp_path):
    """Where there is no repository around the script, a line names the two ways to get data."""
    monkeypatch.setattr(om2p_mpe, "__file__", str(tmp_path / "om2p_mpe.py"))
    message = refusal(load, tmp_path / "data", "simple_tag", "medium", 3)
    assert "python data/collect_mpe.py --task simple_tag --quality medium --seed 3" in message
    assert "bash data/download.sh simple_tag medium" in message
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("place", ["om2p_mpe.py", "baselines/other_mpe.py"])
def test_missing_dataset_with_a_collector_that_fails(place, monkeypatch, tmp_path, capfd):
    """The collector is found from the root and from baselines/; if it fails, so does the script."""
    monkeypatch.setattr(om2p_mpe, "__file__", str(tmp_path / place))
    (tmp_path / "data").mkdir()
    code = "import sys; print(sys.argv[1:]); sys.exit(3)"
    (tmp_path / "data/collect_mpe.py").write_text(code)
    assert "collect_mpe.py could not" in refusal(load, tmp_path / "x", "simple_tag", "medium", 3)
    options = ["--task", "simple_tag", "--quality", "medium", "--seed", "3"]
    assert str([*options, "--data-dir", str(tmp_path / "x")]) in capfd.readouterr().out


def test_interrupted_while_data_are_made(monkeypatch, tmp_path):
    """Ctrl-C ends the collector and the script that has started it, which says so."""
    monkeypatch.setattr(om2p_mpe.subprocess, "run", Mock(side_effect=KeyboardInterrupt))
    assert "stopped" in refusal(load, tmp_path)


def test_missing_dataset_made_by_another_process(make_data, monkeypatch, tmp_path):
    """A collector that fails because the data are there by now is no failure."""
    monkeypatch.setattr(om2p_mpe, "__file__", str(tmp_path / "om2p_mpe.py"))
    make_data(tmp_path / "x", "simple_spread", "medium", seed=3)
    done, place = tmp_path / "x/simple_spread", tmp_path / "data"
    done.rename(tmp_path / "made")
    place.mkdir()
    code = f"import pathlib, sys; pathlib.Path({str(tmp_path / 'made')!r}).rename({str(done)!r})"
    (place / "collect_mpe.py").write_text(f"{code}; sys.exit(1)")
    assert load(tmp_path / "x", "simple_spread", "medium", 3)["obs"].shape == (3, 500, 18)


def test_missing_dataset_is_made(tmp_path):
    """In the repository the collector makes what is missing, and training can go on."""
    loaded = load(tmp_path, "simple_spread", "random", 5)
    assert loaded["obs"].shape == (3, 100_000, 18)
    card = json.loads((tmp_path / "simple_spread/random/seed_5_data/card.json").read_text())
    assert card["transitions"] == 100_000


# Prey


def reference_prey(obs_dim, seed=0):
    """OMAR's prey as a torch module in evaluation mode, and the checkpoint that it would write."""
    torch.manual_seed(seed)
    norm = torch.nn.BatchNorm1d(obs_dim)
    layers = [torch.nn.Linear(*sizes) for sizes in ((obs_dim, 64), (64, 64), (64, 2))]
    relu = torch.nn.ReLU()
    net = torch.nn.Sequential(norm, layers[0], relu, layers[1], relu, layers[2], torch.nn.Tanh())
    for _ in range(3):
        net(2 + 3 * torch.randn(50, obs_dim))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    policy = {f"in_fn.{key}": value for key, value in norm.state_dict().items()}
    for k, layer in enumerate(layers, start=1):
        policy |= {f"fc{k}.{key}": value for key, value in layer.state_dict().items()}
    hunters = [{"policy": {"fc1.weight": torch.zeros(1)}}] * 3
    return net.eval(), {"init_dict": {"lr": 0.01}, "agent_params": [*hunters, {"policy": policy}]}


@pytest.mark.parametrize(
    ("task", "obs_dim", "zipped"), [("simple_tag", 14, False), ("simple_world", 22, True)]
)
def test_omars_prey(task, obs_dim, zipped, tmp_path):
    """The folded batch norm acts as the module does; the original comes before prey.npz.

    The public files are in torch's old format, without zip.
    """
    net, checkpoint = reference_prey(obs_dim)
    write_prey(tmp_path / task, obs_dim)
    path = tmp_path / task / "pretrained_adv_model.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    obs = 3 * torch.randn(1, 200, obs_dim)
    action = find_prey(task, tmp_path)(obs.numpy())
    assert action.shape == (1, 200, 2)
    assert_allclose(action[0], net(obs[0]).detach(), rtol=0, atol=1e-5)
    MPE(task, 3, prey_policy=find_prey(task, tmp_path)).step(np.zeros((3, 3, 2)))


@pytest.mark.parametrize(("task", "obs_dim"), [("simple_tag", 14), ("simple_world", 22)])
def test_our_prey(task, obs_dim, monkeypatch, tmp_path):
    """The fit that the project ships is a ReLU network with a tanh, and is put beside the data."""
    path = BEHAVIOR / f"{task}_prey.npz"
    assert "prey.npz" in collect_mpe.install_prey(task, tmp_path)
    assert (tmp_path / task / "prey.npz").read_bytes() == path.read_bytes()
    net, x = np.load(path), np.random.default_rng(0).normal(size=(1, 50, obs_dim))
    action = find_prey(task, tmp_path)(x.astype(np.float32))
    for k in range(3):
        x = np.maximum(x, 0) if k else x
        x = x @ net[f"weight_{k}"].astype(float) + net[f"bias_{k}"].astype(float)
    assert_allclose(action, np.tanh(x), rtol=0, atol=1e-4)


def test_no_prey(tmp_path):
    """simple_spread has none; where one is missing, a line says how to get it."""
    assert find_prey("simple_spread", tmp_path) is None
    message = refusal(find_prey, "simple_tag", tmp_path)
    assert str(tmp_path / "simple_tag") in message
    assert "python data/collect_mpe.py --task simple_tag" in message
    assert "bash data/download.sh simple_tag" in message


def test_the_command_for_a_missing_prey_helps(make_data, tmp_path):
    """It installs the prey even if the dataset itself is there already."""
    make_data(tmp_path, "simple_tag")
    (tmp_path / "simple_tag/prey.npz").unlink()
    with pytest.raises(SystemExit):  # that data exist
        collect_mpe.collect(collect_mpe.Args("simple_tag", "expert", data_dir=tmp_path))
    assert find_prey("simple_tag", tmp_path) is not None


def odd_shape(path):
    """A prey whose second layer does not take what its first gives, in the format of the path."""
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        np.savez(path, **{**arrays, "weight_1": arrays["weight_1"][:-1]})
    else:
        checkpoint = torch.load(path, weights_only=True)
        policy = checkpoint["agent_params"][-1]["policy"]
        policy["fc2.weight"] = policy["fc2.weight"][:, :-1]
        torch.save(checkpoint, path)


BAD_PREY = {
    "odd shape": odd_shape,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\x00\xffgarbage" * 9),
    "text": lambda path: path.write_text("<html>404: Not Found</html>\n"),
    "truncated": cut,
    "something else": lambda path: torch.save([1, 2], path),
    "other arrays": lambda path: np.savez(path.open("wb"), x=np.zeros(3)),
    "code": lambda path: torch.save({"agent_params": [Code(path.parent / "executed")]}, path),
}


@pytest.mark.parametrize("name", ["prey.npz", "pretrained_adv_model.pt"])
@pytest.mark.parametrize("case", BAD_PREY)
def test_bad_prey_is_refused(case, name, tmp_path):
    """A prey that is broken ends the program in one line with its path; code in it is not run."""
    path = tmp_path / "simple_tag" / name
    write_prey(path.parent, 14)
    if name.endswith(".pt"):
        torch.save(reference_prey(14)[1], path)
    BAD_PREY[case](path)
    message = refusal(find_prey, "simple_tag", tmp_path)
    assert str(path) in message
    assert "cannot be used as a prey" in message
    assert not (path.parent / "executed").exists()


def test_another_tasks_prey_is_refused(tmp_path):
    """simple_world's prey sees 22 numbers, simple_tag's 14."""
    path = write_prey(tmp_path / "simple_tag", 22)
    assert str(path) in refusal(find_prey, "simple_tag", tmp_path)


@st.composite
def damages(draw):
    """A file's name and a function of its bytes: cut off, changed in places, or other bytes."""
    name = draw(st.sampled_from(["obs_0", "acs_1", "rews_2", "next_obs_1", "dones_0"]))
    kind = draw(st.sampled_from(["cut", "change", "replace", "add"]))
    if kind == "cut":
        share = draw(st.floats(0, 1, exclude_max=True))
        return name, lambda content: content[: int(share * len(content))]
    if kind in ("replace", "add"):
        other, keep = draw(st.binary(max_size=300)), kind == "add"
        return name, lambda content: content * keep + other
    start = draw(st.sampled_from([0, 6, 10, 20, 60, 128]))  # magic, version, header, numbers
    patch = draw(st.binary(min_size=1, max_size=20))
    return name, lambda content: content[:start] + patch + content[start + len(patch) :]


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(damage=damages())
def test_any_damage_is_one_line_or_none(damage, make_data, tmp_path):
    """Whatever happens to a file's bytes: finite numbers of the right shape, or one line."""
    folder = tmp_path / "simple_spread/expert/seed_0_data"
    if not folder.exists():
        make_data(tmp_path, "simple_spread", "expert", 60)
    name, change = damage
    path = folder / f"{name}.npy"
    content, dataset, message = path.read_bytes(), None, None
    path.write_bytes(change(content))
    try:
        dataset = load(tmp_path, "simple_spread", "expert")
    except SystemExit as stop:
        message = stop.code
    path.write_bytes(content)
    if dataset is None:
        assert message.startswith("error: ")
        assert "\n" not in message
        assert path.stem in message or "expected (" in message  # obs_0 sets the others' length
    else:
        assert dataset["obs"].shape == (3, 60, 18)
        assert all(values.isfinite().all() for values in dataset.values())


LOAD = """
import sys
import time
from pathlib import Path
from om2p_mpe import MPE, load_dataset
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
env = MPE("simple_spread", 1)
load_dataset(sys.argv[1], "simple_spread", "random", 0, env)  # small: what is loaded but once
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
start = time.monotonic()
dataset = load_dataset(sys.argv[1], "simple_spread", "medium-expert", 0, env)
seconds = time.monotonic() - start
print((memory("VmHWM") - before) / sum(values.nbytes for values in dataset.values()), seconds)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux")
def test_loading_a_million_transitions(tmp_path):
    """In 10 s and 1.3 times the memory that stays at most, also from float64 and for a mixture."""
    widths = {"obs": (18,), "acs": (2,), "rews": (), "next_obs": (18,), "dones": (1,)}
    widths["states"] = (54,)  # which the public data have beside the rest
    for quality, rows in (("medium", 1_000_000), ("expert", 1_000_000), ("random", 100)):
        folder = tmp_path / "simple_spread" / quality / "seed_0_data"
        folder.mkdir(parents=True)
        for (name, width), i in product(widths.items(), range(3)):
            # Zeros, of which the disk holds none
            np.lib.format.open_memmap(folder / f"{name}_{i}.npy", "w+", float, (rows, *width))
    output = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ratio, seconds = map(float, output.stdout.split())
    assert 0.8 < ratio < 1.3
    assert seconds < 10


# Collecting


def collect(folder, task="simple_spread", quality="random", transitions=1_000, seed=0):
    """Make a small dataset; its card and its files, {name: array}."""
    args = collect_mpe.Args(
        task=task, quality=quality, seed=seed, num_transitions=transitions, data_dir=folder
    )
    card = collect_mpe.collect(args)
    folder = folder / task / quality / f"seed_{seed}_data"
    return card, {path.name: np.load(path) for path in folder.glob("*.npy")}


@pytest.mark.parametrize("task", TASKS)
def test_collected_files(task, tmp_path):
    """OMAR's files, float32; episodes of 25 rows that go on from each other; nothing is done."""
    width = MPE(task, 1).obs_dims[0]
    if task != "simple_spread":
        write_prey(tmp_path / task, width - 2)
    card, files = collect(tmp_path, task)
    shapes = {"obs": (width,), "acs": (2,), "rews": (), "next_obs": (width,), "dones": ()}
    assert {name: (array.shape, array.dtype) for name, array in files.items()} == {
        f"{name}_{i}.npy": ((1_000, *shape), np.float32)
        for name, shape in shapes.items()
        for i in range(3)
    }
    for i in range(3):
        obs, next_obs = files[f"obs_{i}.npy"], files[f"next_obs_{i}.npy"]
        inside = np.arange(1, 1_000) % 25 != 0
        goes_on = (next_obs[:-1] == obs[1:]).all(axis=-1)
        assert_array_equal(goes_on, inside)
        assert not files[f"dones_{i}.npy"].any()
        assert np.abs(files[f"acs_{i}.npy"]).max() == pytest.approx(1, abs=0.01)
    rewards = np.stack([files[f"rews_{i}.npy"] for i in range(3)])
    returns = rewards.reshape(3, 40, 25).sum(axis=-1).mean(axis=0)
    folder = tmp_path / task / "random/seed_0_data"
    assert json.loads((folder / "card.json").read_text()) == card
    assert (card["transitions"], card["episodes"]) == (1_000, 40)
    assert card["return mean"] == pytest.approx(returns.mean(), abs=0.01)
    assert card["return sd"] == pytest.approx(returns.std(), abs=0.01)
    assert load(tmp_path, task, "random")["obs"].shape == (3, 1_000, width)


def test_transitions_follow_from_each_other(tmp_path):
    """Replaying the recorded actions from the recorded states gives the recorded rewards."""
    _, files = collect(tmp_path, transitions=250)
    obs, action, next_obs, reward = (
        np.stack([files[f"{name}_{i}.npy"] for i in range(3)])
        for name in ("obs", "acs", "next_obs", "rews")
    )
    env = MPE("simple_spread", 250)
    env.vel, env.pos = obs[..., 0:2].transpose(1, 0, 2), obs[..., 2:4].transpose(1, 0, 2)
    env.landmarks = obs[0, :, 4:10].reshape(-1, 3, 2) + env.pos[:, :1]
    again, reward_again = env.step(action)
    assert_allclose(again, next_obs, rtol=0, atol=1e-5)
    assert_allclose(reward_again, reward, rtol=1e-4, atol=1e-4)


def test_same_seed_same_bytes(tmp_path):
    """A seed decides every byte; another seed changes states, actions and rewards."""
    _, one = collect(tmp_path / "1", seed=3)
    torch.rand(7)
    _, two = collect(tmp_path / "2", seed=3)
    _, other = collect(tmp_path / "3", seed=4)
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes()
        assert name.startswith("dones") or not np.array_equal(array, other[name])


def test_no_initial_state_is_repeated(tmp_path):
    """Roll-outs come in batches of episodes, each from initial states of its own."""
    _, files = collect(tmp_path, "simple_tag", "medium-replay", transitions=12 * 25 * 10)
    first = files["obs_0.npy"][::25]
    assert len(np.unique(first, axis=0)) == len(first) == 120


class Still:
    """A policy that does nothing and remembers the first observations."""

    first = None

    def act(self, obs):
        self.first = obs.numpy().copy() if self.first is None else self.first
        return torch.zeros(*obs.shape[:-1], 2)


def test_evaluation_starts_where_no_data_do(tmp_path):
    """With the dataset's seed, no agent begins an evaluation episode where it began a recorded."""
    _, files = collect(tmp_path, transitions=1_250, seed=3)
    policy = Still()
    evaluate(policy, [MPE("simple_spread", 1_000)], [3])
    for i in range(3):
        recorded = {tuple(place) for place in files[f"obs_{i}.npy"][::25, 2:4]}
        assert len(recorded) == 50
        assert not recorded & {tuple(place) for place in policy.first[i, :, 2:4]}


def test_existing_dataset_is_refused(tmp_path):
    """It is neither overwritten nor added to."""
    _, files = collect(tmp_path)
    folder = tmp_path / "simple_spread/random/seed_0_data"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert str(folder) in refusal(collect, tmp_path)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert list(folder.parent.iterdir()) == [folder]
    assert len(files) == len(times) - 1 == 15


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError("disk full"), RuntimeError, SystemExit]
)
def test_interrupted_collection_leaves_nothing(error, monkeypatch, tmp_path):
    """Stopped after its files are begun, it takes them away again."""

    def stop(_):
        assert list(tmp_path.rglob("obs_0.npy"))
        raise error

    monkeypatch.setattr(collect_mpe, "episode_returns", stop)
    with pytest.raises((SystemExit, RuntimeError)) as caught:
        collect(tmp_path)
    assert [path for path in tmp_path.rglob("*") if "seed" in path.name] == []
    if isinstance(error, OSError):
        assert "disk full" in caught.value.code


@pytest.mark.parametrize("transitions", [0, -25, 24, 26, 1_001])
def test_bad_number_of_transitions(transitions, tmp_path):
    """Whole episodes only."""
    assert "--num-transitions" in refusal(collect, tmp_path, "simple_spread", "random", transitions)
    assert list(tmp_path.iterdir()) == []


def test_bad_seed(tmp_path):
    """Negative seeds are refused by name."""
    assert "--seed" in refusal(collect, tmp_path, "simple_spread", "random", 50, -1)


@pytest.mark.parametrize("spoil", [Path.unlink, cut, lambda path: path.write_bytes(b"x")])
def test_bad_behavior_policies(spoil, monkeypatch, tmp_path):
    """A missing or broken file of behaviour policies is named."""
    path = tmp_path / "simple_spread.npz"
    np.savez(path, expert_0=np.zeros((1, 3, 18, 128), np.float16))
    spoil(path)
    monkeypatch.setattr(collect_mpe, "BEHAVIOR_DIR", tmp_path)
    message = refusal(collect, tmp_path / "data", "simple_spread", "expert")
    assert str(path) in message


# Behaviour: mean returns of the public data (OMAR), and how far ours may be from them
PUBLIC = {
    "simple_spread": {"random": 159.8, "medium-replay": 194.2, "medium": 259.9, "expert": 516.8},
    "simple_tag": {"random": -4.1, "medium-replay": 14.2, "medium": 88.7, "expert": 185.6},
    "simple_world": {"random": -6.8, "medium-replay": 3.5, "medium": 43.3, "expert": 79.5},
}


@pytest.mark.parametrize("quality", ["random", "medium-replay", "medium", "expert"])
@pytest.mark.parametrize("task", TASKS)
def test_returns_are_near_the_public_ones(task, quality, tmp_path):
    """2,000 episodes: medium within 15 %, medium-replay 15 points, expert no less than 95 %."""
    public = PUBLIC[task][quality]
    card, _ = collect(tmp_path, task, quality, transitions=50_000)
    assert card["public data's return mean"] == public
    ours = card["return mean"]
    if quality == "random":
        assert abs(ours - public) < (6 if task == "simple_spread" else 1.5)
    elif quality == "medium-replay":
        assert abs(ours - public) < 15
    elif quality == "medium":
        assert ours == pytest.approx(public, rel=0.15)
    else:
        assert ours > 0.95 * public


@pytest.mark.parametrize("task", TASKS)
def test_behavior_policies_explore(task, tmp_path):
    """Recorded actions scatter by 0.1 around the policy's own; medium-replay has many policies."""
    env = MPE(task, 1)
    policies = {q: collect_mpe.load_behavior(task, q, env) for q in ("expert", "medium-replay")}
    assert len(policies["expert"]) == 1
    assert len(policies["medium-replay"]) > 3
    _, files = collect(tmp_path, task, "expert", transitions=2_500)
    obs, action = (
        torch.from_numpy(np.stack([files[f"{name}_{i}.npy"] for i in range(3)]))
        for name in ("obs", "acs")
    )
    with torch.no_grad():
        own = policies["expert"][0].act(obs)
    noise = (action - own)[own.abs() < 0.6]
    assert noise.std() == pytest.approx(0.1, rel=0.1)
    assert action.abs().max() <= 1

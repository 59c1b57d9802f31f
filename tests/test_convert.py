"""Converting public data: vaults, MASTARS' files, and whatever else lies in their place."""

import json
import pickle
import subprocess
import sys
import types
from pathlib import Path

import convert_og_marl
import numpy as np
import pytest
from conftest import ROOT, Code, refusal
from numpy.testing import assert_array_equal

import om2p_mpe

PREY_DIMS = {"simple_spread": None, "simple_tag": 14, "simple_world": 22}
KEYS = {"obs": "observations", "acs": "actions", "rews": "rewards"}


def convert(source, folder, task="simple_tag", quality="medium", seed=0):
    """Convert into folder; the card and the files, {name: array}."""
    args = convert_og_marl.Args(source, task, quality, seed, folder)
    card = convert_og_marl.convert(args)
    folder = folder / task / quality / f"seed_{seed}_data"
    assert json.loads((folder / "card.json").read_text()) == card
    return card, {path.stem: np.load(path) for path in folder.glob("*.npy")}


def make_vault(make_data, folder, task="simple_tag", rows=100, seeds=2):
    """What OG-MARL has of a task: recorded episodes, and {key: (seeds, T, agents, ...)}.

    The prey, where there is one, is the last agent, its observations padded with -inf.
    """
    data = [make_data(folder / "omar", task, transitions=rows, seed=k) for k in range(seeds)]
    vault = {
        key: np.stack([np.moveaxis(part[name], 0, 1) for part in data])
        for name, key in KEYS.items()
    }
    if PREY_DIMS[task]:
        rng = np.random.default_rng(0)
        for key, values in vault.items():
            prey = rng.normal(size=values[:, :, :1].shape).astype(np.float32)
            if key == "observations":
                prey[..., PREY_DIMS[task] :] = -np.inf
            vault[key] = np.concatenate([values, prey], axis=2)
    vault["terminals"] = np.zeros(vault["rewards"].shape, bool)
    vault["terminals"][:, 24::25] = True
    vault["truncations"] = np.zeros_like(vault["terminals"])
    return data, vault


def describe(vault):
    """The metadata that Flashbax keeps beside the arrays; OG-MARL has the state, too."""
    shapes = {key: str(values.shape) for key, values in vault.items()}
    shapes["infos"] = {"state": str((*vault["rewards"].shape[:2], 8))}
    return {"version": 1.2, "structure_shape": shapes}


def write_with_flashbax(vault, folder):
    """Write a vault as OG-MARL did, in two goes."""
    pytest.importorskip("flashbax", reason="flashbax is not installed; it writes the vault")
    import flashbax
    import jax
    from flashbax.vault import Vault

    num_seeds, num_rows, _ = vault["rewards"].shape
    state = np.zeros((num_seeds, num_rows, 8), np.float32)
    experience = {**vault, "infos": {"state": state}}
    buffer = flashbax.make_trajectory_buffer(
        add_batch_size=num_seeds,
        sample_batch_size=1,
        sample_sequence_length=1,
        period=1,
        max_length_time_axis=num_rows + 1,
        min_length_time_axis=1,
    )
    buffer_state = buffer.init(jax.tree.map(lambda x: x[0, 0], experience))
    store = Vault(folder.parent.name, buffer_state.experience, str(folder.parents[1]), folder.name)
    for first, last in ((0, 30), (30, num_rows)):
        part = jax.tree.map(lambda x, rows=slice(first, last): x[:, rows], experience)
        buffer_state = buffer.add(buffer_state, part)
        store.write(buffer_state)


def write_with_tensorstore(vault, folder):
    """Write a vault without Flashbax, by its format: zarr arrays in one OCDBT database."""
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps(describe(vault)))
    arrays = {f"{key}.": values for key, values in vault.items()}
    arrays["vault_index"] = np.array([vault["rewards"].shape[1]], np.int32)
    for name, values in arrays.items():
        base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
        shape = values.shape if name == "vault_index" else (len(values), 10**13, *values.shape[2:])
        store = tensorstore.open(spec, create=True, dtype=values.dtype, shape=shape).result()
        place = slice(None) if name == "vault_index" else (slice(None), slice(values.shape[1]))
        store[place].write(values).result()


class Leaf:
    """An array of a vault as tensorstore gives it: slices are read on demand."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def __getitem__(self, index):
        return Leaf(self.values[index])

    def read(self):
        return types.SimpleNamespace(result=lambda: self.values)


@pytest.fixture
def stand_in(monkeypatch):
    """A function that writes a vault's arrays as .npy, which a stand-in for tensorstore reads."""

    def read_leaf(spec, read, open):
        name, base = spec["kvstore"]["path"], Path(spec["kvstore"]["base"]["path"])
        assert (spec["driver"], spec["kvstore"]["driver"]) == ("zarr", "ocdbt")
        assert name.endswith(".") == (name != "vault_index")
        return types.SimpleNamespace(result=lambda: Leaf(np.load(base / f"{name.strip('.')}.npy")))

    def write(vault, folder):
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps(describe(vault)))
        for key, values in vault.items():  # with room to grow, as vaults have
            np.save(folder / f"{key}.npy", np.concatenate([values, values[:, :9]], axis=1))
        np.save(folder / "vault_index.npy", np.array([vault["rewards"].shape[1]]))

    monkeypatch.setitem(sys.modules, "tensorstore", types.SimpleNamespace(open=read_leaf))
    return write


def check(card, files, data):
    """Of whole episodes of 25 rows, 24 are there, with OMAR's own next observations."""
    rows = data["obs"].shape[1]
    kept = np.arange(rows) % 25 != 24
    for name in ("obs", "acs", "rews", "next_obs"):
        for i in range(3):
            assert files[f"{name}_{i}"].dtype == np.float32
            assert_array_equal(files[f"{name}_{i}"], data[name][i][kept])
    for i in range(3):
        assert_array_equal(files[f"dones_{i}"], np.zeros(kept.sum(), np.float32))
    assert len(files) == 15
    assert (card["transitions"], card["episodes"]) == (kept.sum(), rows // 25)
    returns = data["rews"].reshape(3, -1, 25).sum(axis=-1).mean(axis=0)
    assert card["return mean"] == pytest.approx(returns.mean(), abs=0.01)
    assert card["return sd"] == pytest.approx(returns.std(), abs=0.01)
    assert card["rows of an episode"].startswith("25 to 25")


# Vaults


@pytest.mark.parametrize("task", PREY_DIMS)
def test_vault(task, stand_in, make_data, tmp_path):
    """Hunters alone, one seed, no padding; the scripts' loader takes what was made of it."""
    data, vault = make_vault(make_data, tmp_path, task)
    stand_in(vault, tmp_path / f"{task}.vlt/Medium-Replay")
    stand_in(vault, tmp_path / f"{task}.vlt/Medium")
    source = tmp_path / f"{task}.vlt"
    card, files = convert(source, tmp_path / "data", task, "medium-replay", seed=1)
    check(card, files, data[1])
    assert card["ends marked in the source"] == 4
    assert f"{task}.vlt/Medium-Replay, entry 1" in card["source"]
    env = om2p_mpe.MPE(task, 1)
    loaded = om2p_mpe.load_dataset(tmp_path / "data", task, "medium-replay", 1, env)
    assert loaded["next_obs"].shape == (3, 96, env.obs_dims[0])


@pytest.mark.parametrize("write", [write_with_flashbax, write_with_tensorstore])
def test_real_vault(write, make_data, tmp_path):
    """A vault from Flashbax' own hand, and one by the format alone, read without Flashbax."""
    pytest.importorskip("tensorstore", reason="tensorstore is not installed; it reads the vault")
    data, vault = make_vault(make_data, tmp_path)
    write(vault, tmp_path / "a b/simple_tag.vlt/Expert")
    for seed in (0, 1):
        card, files = convert(tmp_path / "a b", tmp_path / "data", quality="expert", seed=seed)
        check(card, files, data[seed])


def test_damaged_real_vault(make_data, tmp_path):
    """Files cut in half end in one line."""
    _, vault = make_vault(make_data, tmp_path)
    folder = tmp_path / "simple_tag.vlt/Medium"
    write_with_tensorstore(vault, folder)
    for path in folder.glob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(folder) in refusal(convert, folder, tmp_path / "data")


def test_halfcheetah(stand_in, tmp_path):
    """Nothing marks an end: episodes of 1,000 rows; a vault of one seed serves any --seed."""
    rng = np.random.default_rng(0)
    shapes = {"observations": (6,), "actions": (3,), "rewards": ()}
    vault = {
        key: rng.uniform(-1, 1, (1, 2_500, 2, *shape)).astype(np.float32)
        for key, shape in shapes.items()
    }
    vault["terminals"] = np.zeros((1, 2_500, 2))
    stand_in(vault, tmp_path / "2halfcheetah.vlt/Random")
    source = tmp_path / "2halfcheetah.vlt/Random"
    card, files = convert(source, tmp_path / "data", "HalfCheetah-2x3", "random", seed=7)
    kept = ~np.isin(np.arange(2_500), (999, 1_999, 2_499))
    assert card["rows of an episode"].startswith("500 to 1000")
    assert_array_equal(files["acs_1"], vault["actions"][0, kept, 1])
    assert_array_equal(files["next_obs_0"], vault["observations"][0, 1:, 0][kept[:-1]])
    assert not files["dones_1"].any()


def test_all_agents_may_be_padded(stand_in, make_data, tmp_path):
    """As they would be in a vault of observations wider than any agent's."""
    data, vault = make_vault(make_data, tmp_path)
    wider = ((0, 0), (0, 0), (0, 0), (0, 5))
    vault["observations"] = np.pad(vault["observations"], wider, constant_values=-np.inf)
    stand_in(vault, tmp_path / "vault")
    check(*convert(tmp_path / "vault", tmp_path / "data"), data[0])


def test_unwritten_rows_are_cut_off(stand_in, make_data, tmp_path):
    """Rows of zeros at the end, as in a vault whose seeds are of different lengths, are no data."""
    data, vault = make_vault(make_data, tmp_path)
    longer = {k: np.concatenate([v, np.zeros_like(v[:, :50])], axis=1) for k, v in vault.items()}
    stand_in(longer, tmp_path / "vault")
    check(*convert(tmp_path / "vault", tmp_path / "data"), data[0])


@pytest.mark.parametrize("marks", ["none", "truncations", "one row late"])
def test_ends_without_good_marks(marks, stand_in, make_data, tmp_path):
    """Jumps of a position tell the ends, too; a mark that is wrong costs a row and is shown."""
    data, vault = make_vault(make_data, tmp_path)
    ends = vault["terminals"]
    vault["terminals"] = (
        np.roll(ends, 1, axis=1) if marks == "one row late" else np.zeros_like(ends)
    )
    if marks == "truncations":
        vault["truncations"] = ends
    stand_in(vault, tmp_path / "vault")
    card, files = convert(tmp_path / "vault", tmp_path / "data")
    if marks == "one row late":
        assert card["rows of an episode"].startswith("1 to 24")
        kept = ~np.isin(np.arange(100) % 25, (0, 24))
        assert_array_equal(files["next_obs_2"], data[0]["next_obs"][2][kept])
    else:
        check(card, files, data[0])
        assert card["ends marked in the source"] == (4 if marks == "truncations" else 0)


def test_lost_rows_break_an_episode(stand_in, make_data, tmp_path):
    """No next observation is taken from across a gap."""
    data, vault = make_vault(make_data, tmp_path)
    stand_in({k: np.delete(v, 60, axis=1) for k, v in vault.items()}, tmp_path / "vault")
    card, files = convert(tmp_path / "vault", tmp_path / "data")
    kept = ~np.isin(np.arange(100), (24, 49, 59, 60, 74, 99))
    assert_array_equal(files["next_obs_0"], data[0]["next_obs"][0][kept])
    assert card["rows of an episode"].startswith("10 to 25")


def edit(**changes):
    """A function that changes arrays of a vault by functions that return the new ones."""

    def spoil(vault, folder):
        for key, function in changes.items():
            np.save(folder / f"{key}.npy", function(vault[key]))

    return spoil


def put(value):
    """Set one number in the middle of an array."""

    def change(values):
        values = values.copy()
        values[0, 50, 1] = value
        return values

    return change


def metadata(text):
    """Overwrite a vault's metadata."""
    return lambda vault, folder: (folder / "metadata.json").write_text(text)


def roll(values):
    """Make the last agent the first."""
    return np.roll(values, 1, axis=2)


def shuffle(values):
    """Lose the order of time, the same way for all arrays."""
    return values[:, np.random.default_rng(0).permutation(values.shape[1])]


BAD_VAULTS = {
    "no json": (metadata("{"), "cannot be read as a vault"),
    "version": (metadata('{"version": 2.0, "structure_shape": {}}'), "version is 2.0"),
    "no structure": (metadata('{"version": 1.2}'), "structure_shape"),
    "no rewards": (
        metadata('{"version": 1, "structure_shape": {"actions": "()"}}'),
        "has no observations",
    ),
    "lost array": (lambda vault, folder: (folder / "actions.npy").unlink(), "cannot be read"),
    "three agents": (edit(rewards=lambda x: x[:, :, :3]), "3 agents; expected 4"),
    "flat rewards": (edit(rewards=lambda x: x[..., 0]), "expected 3 axes"),
    "rewards of one axis": (edit(rewards=lambda x: x[0, :, 0]), "expected 3 axes"),
    "a number": (edit(rewards=np.sum), "expected 3 axes"),
    "flat observations": (edit(observations=lambda x: x[..., 0]), "expected 4 axes"),
    "deep terminals": (edit(terminals=lambda x: x[..., None, None]), "expected 3 axes"),
    "complex rewards": (edit(rewards=lambda x: x + 1j), "not an array of numbers"),
    "complex observations": (
        edit(observations=lambda x: x.astype(complex)),
        "not an array of numbers",
    ),
    "complex marks": (edit(truncations=lambda x: x.astype(complex)), "not an array of numbers"),
    "flat terminals": (edit(terminals=lambda x: x[0, 0]), "terminals of"),
    "unpadded": (edit(observations=lambda x: np.pad(x, ((0, 0),) * 3 + ((0, 8),))), "(100, 24)"),
    "narrow": (edit(observations=lambda x: x[..., :14]), "(100, 14); expected (100, 16)"),
    "prey first": (edit(observations=roll, rewards=roll, actions=roll), "obs of agent 0"),
    "NaN": (edit(rewards=put(np.nan)), "rews of agent 1"),
    "infinite": (edit(observations=put(np.inf)), "obs of agent 1"),
    "actions out of range": (edit(actions=put(1.5)), "outside [-1, 1]"),
    "no order": (edit(observations=shuffle), "do not follow from each other"),
    "nothing in it": (edit(observations=np.zeros_like), "0 rows"),
}


@pytest.mark.parametrize("case", BAD_VAULTS)
def test_bad_vault_is_refused(case, stand_in, make_data, tmp_path):
    """One line names the vault and what is wrong; nothing is written."""
    spoil, reason = BAD_VAULTS[case]
    _, vault = make_vault(make_data, tmp_path)
    folder = tmp_path / "a vault {0}"
    stand_in(vault, folder)
    spoil(vault, folder)
    message = refusal(convert, folder, tmp_path / "data")
    assert str(folder) in message
    assert reason in message
    assert not (tmp_path / "data").exists()


def test_wrong_vault_is_refused(stand_in, make_data, tmp_path):
    """Another task's, another quality's, a seed that it does not have, two to choose from, none."""
    _, vault = make_vault(make_data, tmp_path)
    stand_in(vault, tmp_path / "a/Expert")
    stand_in(vault, tmp_path / "b/Expert")
    folder, out = tmp_path / "a/Expert", tmp_path / "data"
    assert "expected 3 in simple_spread" in refusal(convert, folder, out, "simple_spread", "expert")
    assert "expected (100, 24)" in refusal(convert, folder, out, "simple_world", "expert")
    assert "not of quality medium" in refusal(convert, folder, out, "simple_tag", "medium")
    assert "seeds 0 to 1" in refusal(convert, folder, out, "simple_tag", "expert", 2)
    assert "it must be 0" in refusal(convert, folder, out, "simple_tag", "expert", -1)
    assert "2 vaults" in refusal(convert, tmp_path, out, "simple_tag", "expert")
    assert "0 vaults" in refusal(convert, tmp_path / "a", out, "simple_tag", "random")
    assert "0 vaults" in refusal(convert, tmp_path / "nowhere", out)


def test_without_tensorstore(monkeypatch, tmp_path):
    """It is named how to get it."""
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    (tmp_path / "metadata.json").write_text("{}")
    message = refusal(convert, tmp_path, tmp_path / "data")
    assert "pip install -r requirements-convert.txt" in message
    assert "tensorstore" in (ROOT / "requirements-convert.txt").read_text()


# MASTARS' files


@pytest.fixture
def mastars(make_data, tmp_path):
    """MASTARS' files of four episodes of simple_tag, and what OMAR's would hold."""
    data = make_data(tmp_path / "mastars", "simple_tag", "medium", 100, 2000)
    folder = tmp_path / "mastars/simple_tag/medium/seed_2000_data"
    for path in folder.glob("next_obs_*.npy"):
        path.unlink()
    return folder, data


@pytest.mark.parametrize("marked", [False, True])
def test_mastars_files(marked, mastars, tmp_path):
    """As a vault; dones may mark the last rows, or nothing, and may be columns; prey is ignored."""
    folder, data = mastars
    done = np.arange(100) % 25 == 24
    for i in range(3):
        np.save(folder / f"obs_{i}.npy", data["obs"][i].astype(float))
        if marked:
            np.save(folder / f"dones_{i}.npy", done[:, None])
    for name in ("obs", "acs", "rews", "dones"):
        np.save(folder / f"{name}_3.npy", np.full(100, np.nan))
    card, files = convert(folder, tmp_path / "data", seed=2000)
    check(card, files, data)
    assert card["ends marked in the source"] == (4 if marked else 0)


def replace(array):
    """Overwrite the file with another array."""
    return lambda path: np.save(path, array)


BAD_FILES = {
    "missing": ("acs_1", Path.unlink, "No such file"),
    "truncated": (
        "obs_2",
        lambda path: path.write_bytes(path.read_bytes()[:999]),
        "cannot be read",
    ),
    "text": ("rews_0", lambda path: path.write_text("1, 2\n"), "cannot be read"),
    "strings": ("rews_0", replace(np.full(100, "a")), "not an array of numbers"),
    "short": ("rews_1", replace(np.zeros(99)), "99 rows, unlike obs_0.npy"),
    "a number": ("rews_1", replace(np.float32(1)), "cannot be read"),
    "wide dones": ("dones_1", replace(np.zeros((100, 3))), "cannot be read"),
    "wide actions": ("acs_1", replace(np.zeros((100, 5))), "(100, 5); expected (100, 2)"),
    "NaN": ("acs_1", replace(np.full((100, 2), np.nan)), "NaN"),
    "one row": ("obs_0", replace(np.zeros((1, 16))), "unlike obs_0.npy"),
    "a fifth agent": ("obs_4", replace(np.zeros((100, 16))), "more than the 4 agents"),
    "next observations": ("next_obs_0", replace(np.zeros((100, 16))), "OMAR's layout already"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case, mastars, tmp_path):
    """One line says what is wrong, and where."""
    name, spoil, reason = BAD_FILES[case]
    folder, _ = mastars
    spoil(folder / f"{name}.npy")
    message = refusal(convert, folder, tmp_path / "data", "simple_tag", "medium")
    assert str(folder) in message
    assert reason in message


def test_nothing_is_unpickled(mastars, tmp_path):
    """Code in a file is not run: not in an array of objects, nor in a pickle under that name."""
    path, code = mastars[0] / "obs_0.npy", Code(tmp_path / "executed")
    np.save(path, np.array([code]), allow_pickle=True)
    assert str(path) in refusal(convert, mastars[0], tmp_path / "data")
    path.write_bytes(pickle.dumps(code))
    assert str(path) in refusal(convert, mastars[0], tmp_path / "data")
    assert not (tmp_path / "executed").exists()


# Writing


def test_existing_dataset_is_left_as_it_is(mastars, tmp_path):
    """It is neither overwritten nor added to."""
    folder = tmp_path / "data/simple_tag/medium/seed_0_data"
    folder.mkdir(parents=True)
    assert str(folder) in refusal(convert, mastars[0], tmp_path / "data")
    assert list(folder.parent.rglob("*")) == [folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), RuntimeError])
def test_interrupted_conversion_leaves_nothing(error, mastars, monkeypatch, tmp_path):
    """Stopped after files are begun, it takes them away again."""
    folder, count = tmp_path / "data", []
    save = np.save

    def fail(path, values):
        save(path, values)
        count.append(path)
        if len(count) == 7:
            raise error

    monkeypatch.setattr(np, "save", fail)
    args = convert_og_marl.Args(mastars[0], "simple_tag", "medium", 0, folder)
    with pytest.raises((SystemExit, RuntimeError)) as caught:
        convert_og_marl.main(args)
    assert folder in count[0].parents
    assert [path.name for path in folder.rglob("*")] == ["simple_tag", "medium"]
    if isinstance(error, OSError):
        assert "disk full" in caught.value.code


def test_command_line(mastars, tmp_path):
    """The script, alone in a folder, converts, and refuses to do so again, in one line."""
    script = tmp_path / "convert_og_marl.py"
    script.write_bytes((ROOT / "data/convert_og_marl.py").read_bytes())
    options = [mastars[0], "--task", "simple_tag", "--quality", "medium", "--seed", "3"]
    command = [sys.executable, "-I", script, *options, "--data-dir", tmp_path]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert (first.returncode, first.stderr) == (0, "")
    assert "transitions: 96\n" in first.stdout
    assert (tmp_path / "simple_tag/medium/seed_3_data/next_obs_2.npy").is_file()
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.startswith("error: ")
    assert second.stderr.count("\n") == 1

"""Converting public data: vaults, MASTARS' files, and whatever else lies in their place."""

import json
import sys
from pathlib import Path

import convert_og_marl
import numpy as np
import pytest
from conftest import Code, refusal
from numpy.testing import assert_array_equal

import om2p_mpe

PREY_DIMS = {"simple_spread": None, "simple_tag": 14, "simple_world": 22}
KEYS = {"obs": "observations", "acs": "actions", "rews": "rewards"}


def convert(source, folder, task="simple_tag", quality="medium", seed=0):
    """Convert into folder; the card and the files, {name: array}."""
    card = convert_og_marl.convert(convert_og_marl.Args(source, task, quality, seed, folder))
    folder = folder / task / quality / f"seed_{seed}_data"
    assert json.loads((folder / "card.json").read_text()) == card
    return card, {path.stem: np.load(path) for path in folder.glob("*.npy")}


def make_vault(make_data, folder, task="simple_tag"):
    """What OG-MARL has of a task: two seeds' data, and {key: (seeds, T, agents, ...)}.

    The prey, where there is one, is the last agent, its observations padded with -inf.
    """
    data = [make_data(folder / "omar", task, transitions=100, seed=k) for k in range(2)]
    vault = {KEYS[x]: np.stack([np.moveaxis(part[x], 0, 1) for part in data]) for x in KEYS}
    if PREY_DIMS[task]:
        for key, values in vault.items():
            prey = np.full_like(values[:, :, :1], 0.5)
            if key == "observations":
                prey[..., PREY_DIMS[task] :] = -np.inf
            vault[key] = np.concatenate([values, prey], axis=2)
    vault["terminals"] = np.zeros(vault["rewards"].shape, bool)
    vault["terminals"][:, 24::25] = True
    return data, vault


def write(vault, folder):
    """Write a vault by its format: zarr arrays, with room to grow, in one OCDBT database."""
    tensorstore = pytest.importorskip("tensorstore", reason="tensorstore is not installed")
    folder.mkdir(parents=True)
    shapes = {key: str(values.shape) for key, values in vault.items()} | {"infos": {"state": "()"}}
    (folder / "metadata.json").write_text(json.dumps({"version": 1.2, "structure_shape": shapes}))
    arrays = {f"{key}.": (values, (len(values), 10**13)) for key, values in vault.items()}
    arrays["vault_index"] = np.array([vault["actions"].shape[1]], np.int32), (1,)
    for name, (values, shape) in arrays.items():
        base = {"driver": "file", "path": f"{folder}/"}
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
        shape = (*shape, *values.shape[len(shape) :])
        store = tensorstore.open(spec, create=True, dtype=values.dtype, shape=shape).result()
        store[tuple(slice(size) for size in values.shape)].write(values).result()


def check(card, files, data):
    """Of whole episodes of 25 rows, 24 are there, with OMAR's own next observations."""
    kept = np.arange(100) % 25 != 24
    for i in range(3):
        for name in ("obs", "acs", "rews", "next_obs"):
            assert files[f"{name}_{i}"].dtype == np.float32
            assert_array_equal(files[f"{name}_{i}"], data[name][i][kept])
        assert_array_equal(files[f"dones_{i}"], np.zeros(96, np.float32))
    assert (len(files), card["transitions"], card["episodes"]) == (15, 96, 4)
    returns = data["rews"].reshape(3, -1, 25).sum(axis=-1).mean(axis=0)
    assert card["return mean"] == pytest.approx(returns.mean(), abs=0.01)
    assert card["return sd"] == pytest.approx(returns.std(), abs=0.01)


@pytest.mark.parametrize("task", PREY_DIMS)
def test_vault(task, make_data, tmp_path):
    """Hunters alone, one seed, no padding; the scripts' loader takes what was made of it."""
    data, vault = make_vault(make_data, tmp_path, task)
    source = tmp_path / f"{task}.vlt"
    for quality in ("Medium-Replay", "Medium"):
        write(vault, source / quality)
    card, files = convert(source, tmp_path / "data", task, "medium-replay", seed=1)
    check(card, files, data[1])
    assert card["ends marked in the source"] == 4
    env = om2p_mpe.MPE(task, 1)
    loaded = om2p_mpe.load_dataset(tmp_path / "data", task, "medium-replay", [1], env)
    assert loaded["next_obs"].shape == (3, 96, env.obs_dims[0])


def test_damaged_vault(make_data, tmp_path):
    """Files cut in half end in one line."""
    write(make_vault(make_data, tmp_path)[1], folder := tmp_path / "a b/simple_tag.vlt/Medium")
    for path in folder.glob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(folder) in refusal(convert, folder, tmp_path / "data")


def test_halfcheetah(tmp_path):
    """Nothing marks an end: episodes of 1,000 rows; a vault of one seed serves any --seed."""
    shapes, rng = {"observations": (6,), "actions": (3,), "rewards": ()}, np.random.default_rng(0)
    vault = {x: rng.uniform(-1, 1, (1, 2_500, 2, *shapes[x])).astype(np.float32) for x in shapes}
    write(vault | {"terminals": np.zeros((1, 2_500, 2))}, source := tmp_path / "Random")
    card, files = convert(source, tmp_path / "data", "HalfCheetah-2x3", "random", seed=7)
    kept = ~np.isin(np.arange(2_500), (999, 1_999, 2_499))
    assert card["rows of an episode"].startswith("500 to 1000")
    assert_array_equal(files["acs_1"], vault["actions"][0, kept, 1])
    assert_array_equal(files["next_obs_0"], vault["observations"][0, 1:, 0][kept[:-1]])


@pytest.mark.parametrize("marks", ["none", "truncations"])
def test_other_vaults(marks, make_data, tmp_path):
    """Jumps of a position tell the ends, too; -inf behind all and zeros at the end are cut off."""
    data, vault = make_vault(make_data, tmp_path)
    ends, vault["terminals"] = vault["terminals"], np.zeros_like(vault["terminals"])
    if marks == "truncations":
        vault["truncations"] = ends
    pad = ((0, 0), (0, 0), (0, 0), (0, 5))
    vault["observations"] = np.pad(vault["observations"], pad, constant_values=-np.inf)
    vault = {k: np.concatenate([v, np.zeros_like(v[:, :50])], axis=1) for k, v in vault.items()}
    write(vault, tmp_path / "vault")
    card, files = convert(tmp_path / "vault", tmp_path / "data")
    check(card, files, data[0])
    assert card["ends marked in the source"] == (4 if marks == "truncations" else 0)


def test_lost_rows_break_an_episode(make_data, tmp_path):
    """No next observation is taken from across a gap."""
    data, vault = make_vault(make_data, tmp_path)
    write({k: np.delete(v, 60, axis=1) for k, v in vault.items()}, tmp_path / "vault")
    card, files = convert(tmp_path / "vault", tmp_path / "data")
    kept = ~np.isin(np.arange(100), (24, 49, 59, 60, 74, 99))
    assert_array_equal(files["next_obs_0"], data[0]["next_obs"][0][kept])
    assert card["rows of an episode"].startswith("10 to 25")


def put(value):
    """Set one number in the middle of an array of a vault."""
    return lambda x: np.where(np.arange(x.size).reshape(x.shape) == x.size // 4, value, x)


BAD_VAULTS = {  # changed arrays, and what the line says
    "three agents": ({"rewards": lambda x: x[:, :, :3]}, "it has 3 agents, simple_tag has 4"),
    "flat rewards": ({"rewards": lambda x: x[..., 0]}, "cannot be read as a vault"),
    "complex rewards": ({"rewards": lambda x: x + 1j}, "rewards are not numbers"),
    "unpadded": ({"observations": lambda x: np.tile(x, 2)}, "(100, 32), not (100, 16)"),
    "NaN": ({"rewards": put(np.nan)}, "holds NaN"),
    "actions out of range": ({"actions": put(1.5)}, "outside [-1, 1]"),
    "no order": (
        {"observations": lambda x: np.roll(x[:, ::-1], 7, axis=1)},
        "do not follow from each other",
    ),
    "nothing in it": ({"observations": np.zeros_like}, "0 rows"),
}


@pytest.mark.parametrize("case", BAD_VAULTS)
def test_bad_vault_is_refused(case, make_data, tmp_path):
    """One line names the vault and what is wrong; nothing is written."""
    changes, reason = BAD_VAULTS[case]
    _, vault = make_vault(make_data, tmp_path)
    vault |= {key: change(vault[key]) for key, change in changes.items()}
    write(vault, folder := tmp_path / "a vault")
    message = refusal(convert, folder, tmp_path / "data")
    assert str(folder) in message
    assert reason in message
    assert not (tmp_path / "data").exists()


def test_wrong_vault_is_refused(make_data, tmp_path):
    """Another quality's, a seed that it does not have, two to choose from, none; bad metadata."""
    _, vault = make_vault(make_data, tmp_path)
    for name in ("a", "b"):
        write(vault, tmp_path / name / "Expert")
    folder, out = tmp_path / "a/Expert", tmp_path / "data"
    assert "not of quality medium" in refusal(convert, folder, out)
    assert "seeds 0 to 1" in refusal(convert, folder, out, "simple_tag", "expert", 2)
    assert "--seed" in refusal(convert, folder, out, "simple_tag", "expert", -1)
    assert "2 vaults" in refusal(convert, tmp_path, out, "simple_tag", "expert")
    assert "0 vaults" in refusal(convert, tmp_path / "nowhere", out)
    (folder / "metadata.json").write_text('{"version": 2.0, "structure_shape": {}}')
    assert "version is 2.0" in refusal(convert, folder, out, "simple_tag", "expert")


def test_without_tensorstore(monkeypatch, tmp_path):
    """It is named how to get it."""
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    (tmp_path / "metadata.json").write_text("{}")
    assert "requirements-convert.txt" in refusal(convert, tmp_path, tmp_path / "data")


@pytest.fixture
def mastars(make_data, tmp_path):
    """MASTARS' files of four episodes of simple_tag, and what OMAR's would hold."""
    data = make_data(tmp_path / "mastars", "simple_tag", "medium", 100, 2000)
    folder = tmp_path / "mastars/simple_tag/medium/seed_2000_data"
    for path in folder.glob("next_obs_*.npy"):
        path.unlink()
    return folder, data


def test_mastars_files(mastars, tmp_path):
    """As a vault; dones that mark the last rows may be columns; the prey is left out."""
    folder, data = mastars
    for i in range(3):
        np.save(folder / f"dones_{i}.npy", (np.arange(100) % 25 == 24)[:, None])
    np.save(folder / "obs_3.npy", np.full((100, 14), np.nan))
    card, files = convert(folder, tmp_path / "data", seed=2000)
    check(card, files, data)
    assert card["ends marked in the source"] == 4


BAD_FILES = {
    "missing": ("acs_1", Path.unlink, "No such file"),
    "strings": ("rews_0", lambda path: np.save(path, np.full(100, "a")), "than numbers"),
    "short": ("rews_1", lambda path: np.save(path, np.zeros(99)), "differ in length"),
    "a fifth agent": ("obs_4", lambda path: np.save(path, np.zeros((100, 16))), "the 4 agents"),
    "next_obs": ("next_obs_0", lambda path: path.touch(), "OMAR's layout already"),
    "code": ("acs_0", lambda path: np.save(path, np.array([Code(path.parent / "ran")])), "cannot"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case, mastars, tmp_path):
    """One line says what is wrong, and where; code is not run."""
    name, spoil, reason = BAD_FILES[case]
    spoil(mastars[0] / f"{name}.npy")
    message = refusal(convert, mastars[0], tmp_path / "data")
    assert str(mastars[0]) in message
    assert reason in message
    assert not (mastars[0] / "ran").exists()

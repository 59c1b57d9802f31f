"""The dataset card: what it counts, where episodes end, and what it says of broken files."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import card
import numpy as np
import pytest
from conftest import ROOT, Code, refusal

import om2p_mpe


@pytest.fixture
def dataset(make_data, tmp_path):
    """A folder of ten whole episodes of simple_tag, its path naming no task, and its arrays."""
    data = make_data(tmp_path / "made", "simple_tag", "medium", 250, 0)
    folder = tmp_path / "set"
    (tmp_path / "made/simple_tag/medium/seed_0_data").rename(folder)
    return folder, data


def write(folder, name, agent, array):
    """Overwrite one file of a dataset."""
    np.save(folder / f"{name}_{agent}.npy", array)


def select(folder, data, rows):
    """Keep some rows of all files, in the order given."""
    for name, arrays in data.items():
        for i, array in enumerate(arrays):
            write(folder, name, i, array[rows])


def drop_next_obs(folder):
    """Make the dataset one without next observations."""
    for path in folder.glob("next_obs_*.npy"):
        path.unlink()


# Numbers


def test_numbers(dataset):
    """Counts, ranges and returns are those of the arrays."""
    folder, data = dataset
    facts, returns = card.describe(folder)
    expected = data["rews"].astype(float).reshape(3, 10, 25).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(returns, expected, rtol=1e-12)
    assert facts["return"] == f"{expected.mean():.2f} ± {expected.std():.2f}, 10 episodes"
    assert (facts["agents"], facts["transitions"], facts["episodes"]) == (3, 250, 10)
    assert facts["obs"] == "3 x (250, 16) float32"
    assert facts["rews"] == "3 x (250,) float32"
    assert facts["rows of an episode"] == "25 to 25"
    assert facts["cut short at the end"] == "none"
    assert facts["share of done"] == 0
    assert facts["next_obs[t] == obs[t+1]"] == "in 240 rows of 249"
    broken = "short but not done", "go on past their end", "go on for some agents"
    assert [facts[key] for key in broken] == [0, 0, 0]
    assert facts["duplicates of earlier rows"] == 0
    for name in ("acs", "rews"):
        for i, x in enumerate(data[name].astype(float)):
            assert facts[f"{name}_{i}"] == f"{x.min():.4g} to {x.max():.4g}, mean {x.mean():.4g}"
    assert not [key for key in facts if "finite" in key or "public" in key or "missing" in key]


def test_files_are_mapped_and_read_in_pieces(dataset, monkeypatch):
    """Nothing is read before it is needed, and the size of the pieces does not matter."""
    folder, data = dataset
    assert all(isinstance(x, np.memmap) for x in card.read_files(folder)["next_obs"])
    select(folder, data, np.r_[0:250, 50:100])
    write(folder, "acs", 1, np.full((300, 2), np.nan))
    facts, returns = card.describe(folder)
    monkeypatch.setattr(card, "CHUNK", 7)
    again, returns_again = card.describe(folder)
    assert again == facts
    assert np.array_equal(returns_again, returns)
    assert facts["duplicates of earlier rows"] == 50


def test_share_of_done_and_types(dataset):
    """Other types, and columns of shape (T, 1), are as good; different shapes are all told."""
    folder, data = dataset
    done = np.arange(250) % 25 == 24
    write(folder, "dones", 0, done[:, None])
    write(folder, "rews", 1, data["rews"][1].astype(float)[:, None])
    facts, _ = card.describe(folder)
    assert facts["share of done"] == pytest.approx(0.04 / 3)
    assert facts["dones"] == "1 x (250,) bool, 2 x (250,) float32"
    assert facts["rews"] == "2 x (250,) float32, 1 x (250,) float64"
    assert facts["episodes"] == 10


def test_numbers_that_are_not_finite(dataset):
    """They are counted by file; ranges and returns are those of the others."""
    folder, data = dataset
    obs, reward = data["obs"][2].copy(), data["rews"][0].copy()
    obs[30, 4], obs[30, 5], reward[100], reward[101] = np.nan, -np.inf, np.inf, -np.inf
    write(folder, "obs", 2, obs)
    write(folder, "rews", 0, reward)
    facts, returns = card.describe(folder)
    assert facts["not finite in obs_2"] == "1 NaN, 1 infinite"
    assert facts["not finite in rews_0"] == "0 NaN, 2 infinite"
    assert "not finite in acs_0" not in facts
    assert facts["rews_0"].endswith(
        f" mean {np.delete(reward.astype(float), [100, 101]).mean():.4g}"
    )
    assert "inf" not in facts["rews_0"]
    assert facts["episodes"] == 11  # rows 29 and 30 do not go on, for NaN is not NaN
    assert len(returns) == 10
    assert np.isfinite(returns).all()


@pytest.mark.parametrize("name", ["obs", "acs", "rews"])
def test_a_row_that_differs_is_no_duplicate(name, dataset):
    """Of 50 rows repeated, one differs in one number of one agent."""
    folder, data = dataset
    select(folder, data, np.r_[0:250, 50:100])
    array = data[name][2][np.r_[0:250, 50:100]]
    array[260] += 0.25
    write(folder, name, 2, array)
    assert card.describe(folder)[0]["duplicates of earlier rows"] == 49


# Episodes


def test_without_next_obs(dataset):
    """--horizon, a done, or the task's name in the path tells where episodes end; or nothing."""
    folder, _ = dataset
    _, expected = card.describe(folder)
    drop_next_obs(folder)
    message = refusal(card.describe, folder)
    assert str(folder) in message
    assert "--horizon" in message
    facts, returns = card.describe(folder, 25)
    assert np.array_equal(returns, expected)
    assert "next_obs" not in facts
    assert "short but not done" not in facts
    assert card.describe(folder, 10)[0]["episodes"] == 25
    named = folder.parent / "simple_spread/data"
    named.parent.mkdir()
    folder.rename(named)
    assert np.array_equal(card.describe(named)[1], expected)
    write(named, "dones", 1, np.arange(250) % 25 == 24)
    assert np.array_equal(card.describe(named.rename(folder))[1], expected)


def test_episodes_that_end_by_done(dataset):
    """They may be of any length, and are whole though shorter than others."""
    folder, data = dataset
    done = np.zeros(250)
    done[[9, 34]] = 1
    select(folder, data, np.r_[0:10, 25:250])
    write(folder, "dones", 0, done[:235])
    facts, returns = card.describe(folder)
    assert (facts["episodes"], facts["rows of an episode"]) == (10, "10 to 25")
    assert facts["short but not done"] == 0
    assert returns[0] == pytest.approx(data["rews"][:, :10].sum() / 3)
    assert returns[1] == pytest.approx(data["rews"][:, 25:50].sum() / 3)


def test_an_unfinished_episode_counts_for_no_return(dataset):
    """The end of the files is no end of an episode."""
    folder, data = dataset
    select(folder, data, np.arange(240))
    facts, returns = card.describe(folder)
    assert (facts["episodes"], facts["cut short at the end"]) == (10, "1 episode")
    assert facts["short but not done"] == 0
    assert len(returns) == 9
    write(folder, "dones", 0, np.arange(240) == 239)
    assert len(card.describe(folder)[1]) == 10


def test_a_break_shows(dataset):
    """A lost row splits an episode into two that are too short."""
    folder, data = dataset
    select(folder, data, np.delete(np.arange(250), 60))
    facts, _ = card.describe(folder)
    assert facts["episodes"] == 11
    assert facts["rows of an episode"] == "10 to 25"
    assert facts["short but not done"] == 2


def test_rows_in_no_order_show(dataset):
    """Episodes of a row or so."""
    folder, data = dataset
    select(folder, data, np.random.default_rng(0).permutation(250))
    assert card.describe(folder)[0]["episodes"] > 240


def test_a_file_out_of_step_shows(dataset):
    """One agent's next observations that belong to other rows."""
    folder, data = dataset
    write(folder, "next_obs", 1, np.roll(data["next_obs"][1], 1, axis=0))
    facts, _ = card.describe(folder)
    assert facts["go on for some agents"] == 240


def test_a_wrong_end_shows(dataset):
    """A horizon that is too short, or a done in the middle, where rows go on all the same."""
    folder, _ = dataset
    assert card.describe(folder, 24)[0]["go on past their end"] == 10
    assert card.describe(folder, 50)[0]["go on past their end"] == 0
    write(folder, "dones", 2, np.isin(np.arange(250), (24, 60)))
    assert card.describe(folder)[0]["go on past their end"] == 1


def test_missing_rows_are_told(dataset):
    """Converted vaults lack the last row of every episode, and so its rewards."""
    folder, data = dataset
    select(folder, data, np.flatnonzero(np.arange(250) % 25 != 24))
    folder = folder.rename(folder.with_name("simple_tag"))
    facts, returns = card.describe(folder)
    assert facts["rows of an episode"] == "24 to 24"
    assert facts["missing of an episode"] == "1 of 25 rows"
    assert (facts["short but not done"], facts["go on past their end"]) == (0, 0)
    np.testing.assert_allclose(returns[0], data["rews"][:, :24].astype(float).sum() / 3)


# Public figures


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("simple_tag/expert/seed_0_data", ("simple_tag", "expert")),
        ("expert/simple_world/medium-replay", ("simple_world", "medium-replay")),
        ("HalfCheetah-v2/random/seed_3_data", ("HalfCheetah-2x3", "random")),
        ("Hopper-3x1/medium", (None, "medium")),
        ("simple_spread_expert", (None, None)),
    ],
)
def test_names_in_a_path(path, names, tmp_path):
    """Whole parts of the path count, the innermost first."""
    assert card.name_dataset(tmp_path / path) == names


def test_public_figures_stand_beside(make_data, tmp_path):
    """Where the path names task and quality; relative paths do, too."""
    make_data(tmp_path, "simple_spread", "medium-replay", 50, 0)
    facts, _ = card.describe(tmp_path / "simple_spread/medium-replay/seed_0_data")
    assert facts["dataset"] == "simple_spread, medium-replay"
    assert facts["public return, five seeds"] == 194.2
    assert facts["public return, one seed"] == "203.74 ± 80.49, 97500 transitions"


def test_public_figures_are_the_scripts_own():
    """The means of five seeds are those that scores are normalised by."""
    five = {task: {q: row[0] for q, row in rows.items()} for task, rows in card.PUBLIC.items()}
    cheetah = five.pop("HalfCheetah-2x3")
    assert five == om2p_mpe.PUBLIC_RETURNS
    tree = ast.parse((ROOT / "om2p_mamujoco.py").read_text())
    theirs = next(
        ast.literal_eval(node.value)["HalfCheetah-2x3"]
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "PUBLIC_RETURNS"
    )
    for quality, mean in theirs.items():  # of medium data only one seed is known
        one = card.PUBLIC["HalfCheetah-2x3"][quality][1]
        assert mean == (cheetah[quality] or pytest.approx(one, abs=0.05))


# Bad files


def replace(array):
    """Overwrite the file with another array."""
    return lambda path: np.save(path, array)


BAD_FILES = {
    "missing": ("acs_1", Path.unlink, "No such file"),
    "next_obs of some": ("next_obs_1", Path.unlink, "No such file"),
    "truncated": (
        "obs_2",
        lambda path: path.write_bytes(path.read_bytes()[:999]),
        "cannot be read",
    ),
    "empty": ("dones_0", lambda path: path.write_bytes(b""), "cannot be read"),
    "text": ("rews_0", lambda path: path.write_text("1, 2\n"), "cannot be read"),
    "an archive": ("obs_0", lambda path: np.savez(path.open("wb"), x=1), "not an array"),
    "strings": ("rews_0", replace(np.full(250, "a")), "not an array of numbers"),
    "complex": ("rews_2", replace(np.zeros(250, complex)), "not an array of numbers"),
    "short": ("rews_1", replace(np.zeros(249)), "249 rows"),
    "no rows": ("obs_0", replace(np.zeros((0, 16))), "0 rows"),
    "a number": ("rews_1", replace(np.float32(1)), "()"),
    "flat observations": ("obs_0", replace(np.zeros(250)), "expected (T, dim)"),
    "rewards of all": ("rews_0", replace(np.zeros((250, 3))), "expected (T,)"),
    "narrow": ("next_obs_1", replace(np.zeros((250, 3))), "another shape"),
    "a folder": ("obs_1", lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(case, dataset):
    """One line names the file, and what is wrong with it."""
    name, spoil, reason = BAD_FILES[case]
    path = dataset[0] / f"{name}.npy"
    spoil(path)
    message = refusal(card.describe, dataset[0])
    assert str(path) in message
    assert reason in message


def test_no_dataset(tmp_path):
    """An empty folder, and none."""
    assert str(tmp_path) in refusal(card.describe, tmp_path)
    assert "no obs_0.npy" in refusal(card.describe, tmp_path / "nowhere")


def test_nothing_is_unpickled(dataset, tmp_path):
    """Code in a file is not run: not in an array of objects, nor in a pickle under that name."""
    path, code = dataset[0] / "acs_0.npy", Code(tmp_path / "executed")
    np.save(path, np.array([code] * 250), allow_pickle=True)
    assert str(path) in refusal(card.describe, dataset[0])
    path.write_bytes(pickle.dumps(code))
    assert str(path) in refusal(card.describe, dataset[0])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("horizon", [0, -25])
def test_bad_horizon(horizon, dataset):
    """It is refused by name."""
    assert "--horizon" in refusal(card.main, card.Args(dataset[0], horizon=horizon))


def test_horizon_beyond_64_bits(dataset):
    """It ends no episode, as one of a million rows does."""
    expected = card.describe(dataset[0], 10**6)
    facts, returns = card.describe(dataset[0], 10**30)
    assert facts == expected[0]
    assert np.array_equal(returns, expected[1])


# Output


def test_histogram(dataset, capsys):
    """The terminal shows every episode in a bin, the fullest as the longest line."""
    card.main(card.Args(dataset[0]))
    lines = [line for line in capsys.readouterr().out.splitlines() if " to " in line]
    bins = [line for line in lines if "mean" not in line and "rows" not in line]
    counts = [int(line.split()[-1]) for line in bins]
    assert len(bins) == 15
    assert sum(counts) == 10
    assert bins[np.argmax(counts)].count("#") == max(line.count("#") for line in bins) == 40


LAST_REWARDS = {  # of an episode whose other rewards are 0
    "far from 0": 1e16 + 2 * np.arange(10),
    "greatest integer": np.full(10, 2**64 - 1, np.uint64),
    "least floats": 5e-324 * 3 * np.arange(10),
}


@pytest.mark.parametrize("case", LAST_REWARDS)
def test_returns_that_floats_hardly_tell_apart(case, dataset, tmp_path, capsys):
    """They have a histogram and a picture, of one bin."""
    reward = np.zeros(250, LAST_REWARDS[case].dtype)
    reward[24::25] = LAST_REWARDS[case]
    for i in range(3):
        write(dataset[0], "rews", i, reward)
    card.main(card.Args(dataset[0], png=tmp_path / "returns.png"))
    assert capsys.readouterr().out.endswith(f": {'#' * 40} 10\n")
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")


def test_picture(make_data, tmp_path, capsys):
    """--png writes one; a place that is none is named."""
    make_data(tmp_path, "simple_spread", "expert", 250, 0)
    folder = tmp_path / "simple_spread/expert/seed_0_data"
    card.main(card.Args(folder, png=tmp_path / "returns.PNG"))
    assert (tmp_path / "returns.PNG").read_bytes().startswith(b"\x89PNG")
    message = refusal(card.main, card.Args(folder, png=tmp_path / "nowhere/returns.png"))
    assert str(tmp_path / "nowhere") in message


def test_picture_replaces_no_data(dataset, capsys):
    """A file that is none of a picture, by its name, is left as it is, and no card is made."""
    path = dataset[0] / "acs_0.npy"
    before = path.read_bytes()
    assert str(path) in refusal(card.main, card.Args(dataset[0], png=path))
    assert path.read_bytes() == before
    assert capsys.readouterr().out == ""


def test_without_matplotlib(dataset, monkeypatch, tmp_path, capsys):
    """It is needed for the picture alone."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    card.main(card.Args(dataset[0]))
    args = card.Args(dataset[0], png=tmp_path / "x.png")
    assert "pip install matplotlib" in refusal(card.main, args)


def test_terminal_without_the_sign(dataset):
    """A terminal that is ASCII shows another one for it."""
    command = [sys.executable, ROOT / "data/card.py", dataset[0]]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert " ? " in run.stdout


def test_command_line(dataset, tmp_path):
    """The script, alone in a folder, prints a card, or one line and no traceback."""
    (tmp_path / "card.py").write_bytes((ROOT / "data/card.py").read_bytes())
    command = [sys.executable, "-I", tmp_path / "card.py", dataset[0]]
    good = subprocess.run(command, capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")
    assert "transitions: 250\n" in good.stdout
    (dataset[0] / "rews_2.npy").unlink()
    bad = subprocess.run(command, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1

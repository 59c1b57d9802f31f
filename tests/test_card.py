"""The dataset card: what it counts, where episodes end, and what it says of broken files."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import card
import numpy as np
import pytest
from conftest import ROOT, Code, refusal

import om2p_mamujoco
import om2p_mpe


@pytest.fixture
def dataset(make_data, monkeypatch, tmp_path):
    """A folder of ten whole episodes of simple_tag, its path naming no task, and its arrays."""
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "made", "simple_tag", "medium", 250, 0)
    folder = tmp_path / "set"
    (tmp_path / "made/simple_tag/medium/seed_0_data").rename(folder)
    return folder, data


def replace(array):
    """A function that overwrites a file with an array."""
    return lambda path: np.save(path, array)


def select(folder, data, rows):
    """Keep some rows of all files, in the order given."""
    for name, arrays in data.items():
        for i, array in enumerate(arrays):
            np.save(folder / f"{name}_{i}.npy", array[rows])


def test_numbers(dataset):
    """Counts, ranges and returns are those of the arrays."""
    folder, data = dataset
    facts, returns = card.describe(folder)
    expected = data["rews"].astype(float).reshape(3, 10, 25).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(returns, expected, rtol=1e-12)
    assert facts["return"] == f"{expected.mean():.2f} ± {expected.std():.2f}, 10 episodes"
    assert (facts["agents"], facts["transitions"], facts["episodes"]) == (3, 250, 10)
    assert (facts["obs"], facts["rews"]) == ("(250, 16) float32", "(250,) float32")
    assert facts["rows of an episode"] == "25 to 25"
    assert facts["cut short at the end"] == "none"
    assert facts["next_obs[t] == obs[t+1]"] == "in 240 rows of 249"
    broken = "short but not done", "go on past their end", "go on for some agents", "share of done"
    assert [facts[key] for key in broken] == [0, 0, 0, 0]
    for name in ("acs", "rews"):
        for i, x in enumerate(data[name].astype(float)):
            assert facts[f"{name}_{i}"] == f"{x.min():.4g} to {x.max():.4g}, mean {x.mean():.4g}"
    for i, x in enumerate(data["obs"]):
        ranges = [f"{a:.3g} to {b:.3g}" for a, b in zip(x.min(0), x.max(0), strict=True)]
        assert facts[f"obs_{i}"] == ", ".join(ranges)
    assert not [key for key in facts if key.split()[0] in ("not", "public", "warning")]


@pytest.mark.parametrize(("factor", "warns"), [(9, False), (11, True)])
def test_scales_that_differ(factor, warns, dataset):
    """A warning names the components of least and largest spread; constant ones do not count."""
    folder, data = dataset
    for i, obs in enumerate(data["obs"]):
        values = np.random.default_rng(i).normal(size=obs.shape)
        values = 7 + 3 * (values - values.mean(axis=0)) / values.std(axis=0)
        values[:, 1] = 1e4
        values[i, 0] = np.inf
        if i == 2:
            values[:, 5] *= factor
        np.save(folder / f"obs_{i}.npy", values)
    facts, _ = card.describe(folder)
    assert "inf" not in facts["obs_1"]
    assert facts["obs_1"].split(", ")[1] == "1e+04 to 1e+04"
    assert ("warning" in facts) == warns
    if warns:
        assert "obs_2[:, 5] 33" in facts["warning"]


def test_numbers_that_are_not_finite(dataset):
    """They are counted by file; ranges and returns are those of the others."""
    folder, data = dataset
    reward = data["rews"][0].copy()
    reward[100], reward[101] = np.inf, np.nan
    np.save(folder / "rews_0.npy", reward[:, None])  # a column is as good
    facts, returns = card.describe(folder)
    assert facts["not finite in rews_0"] == "2 numbers"
    assert f"mean {np.delete(reward.astype(float), [100, 101]).mean():.4g}" in facts["rews_0"]
    assert len(returns) == 9
    assert np.isfinite(returns).all()


@pytest.mark.parametrize("name", ["obs", "acs", "rews", None])
def test_duplicates(name, dataset):
    """Of 50 rows repeated, all count but one that differs in one number of one agent."""
    folder, data = dataset
    rows = np.r_[0:250, 50:100]
    select(folder, data, rows)
    if name:
        array = data[name][2][rows]
        array[260] += 0.25
        np.save(folder / f"{name}_2.npy", array)
    assert card.describe(folder)[0]["duplicates of earlier rows"] == (49 if name else 50)


def test_without_next_obs(dataset):
    """--horizon, a done, or the task's name in the path tells where episodes end; or nothing."""
    folder, _ = dataset
    _, expected = card.describe(folder)
    for path in folder.glob("next_obs_*.npy"):
        path.unlink()
    assert "--horizon" in refusal(card.describe, folder)
    assert np.array_equal(card.describe(folder, 25)[1], expected)
    assert card.describe(folder, 10)[0]["episodes"] == 25
    named = folder.parent / "simple_spread/data"
    named.parent.mkdir()
    folder.rename(named)
    assert np.array_equal(card.describe(named)[1], expected)


def test_episodes_that_end_by_done(dataset):
    """They may be of any length, and are whole though shorter than others."""
    folder, data = dataset
    done = np.zeros(250)
    done[[9, 34]] = 1
    select(folder, data, np.r_[0:10, 25:250])
    np.save(folder / "dones_0.npy", done[:235])
    facts, returns = card.describe(folder)
    assert (facts["episodes"], facts["rows of an episode"]) == (10, "10 to 25")
    assert facts["short but not done"] == 0
    assert returns[0] == pytest.approx(data["rews"][:, :10].sum() / 3)


BREAKS = {  # what is done to files and rows, and what the card then tells
    "cut off": (None, np.arange(240), {"cut short at the end": "1 episode", "episodes": 10}, 9),
    "a lost row": (None, np.delete(np.arange(250), 60), {"short but not done": 2}, 9),
    "out of step": ("next_obs_1", lambda x: np.roll(x, 1, 0), {"go on for some agents": 240}, 0),
    "a wrong done": ("dones_2", lambda x: np.arange(250) == 60, {"go on past their end": 1}, 10),
}


@pytest.mark.parametrize("case", BREAKS)
def test_breaks_show(case, dataset):
    """Lost rows, files out of step and wrong ends; episodes that they leave count for no return."""
    name, change, expected, count = BREAKS[case]
    if name:
        np.save(path := dataset[0] / f"{name}.npy", change(np.load(path)))
    else:
        select(*dataset, change)
    facts, returns = card.describe(dataset[0])
    assert {key: facts[key] for key in expected} == expected
    assert len(returns) == count or not count


def test_horizon(dataset):
    """One that is too short shows, one that is too long changes nothing, one below 1 is refused."""
    assert card.describe(dataset[0], 24)[0]["go on past their end"] == 10
    assert card.describe(dataset[0], 10**30)[0] == card.describe(dataset[0])[0]
    assert "--horizon" in refusal(card.main, card.Args(dataset[0], horizon=0))


@pytest.mark.parametrize(
    ("path", "name", "public"),
    [
        ("simple_spread/medium-replay/seed_0_data", "simple_spread, medium-replay", 194.2),
        ("expert/simple_tag/random", "simple_tag, random", -4.1),
        ("HalfCheetah-v2/random/seed_3_data", "HalfCheetah-2x3, random", -284.0),
        ("simple_spread-5/random/seed_0_data", "simple_spread-5, random", None),
        ("simple_spread-x/random/seed_0_data", "unknown task, random", None),
        ("Hopper-3x1/medium", "Hopper-3x1, medium", 723.6),
        ("Walker2d-2x3/medium", "unknown task, medium", None),
    ],
)
def test_public_figures(path, name, public, dataset, tmp_path):
    """They stand beside where the path names task and quality, the innermost names first."""
    (tmp_path / path).parent.mkdir(parents=True)
    facts, _ = card.describe(dataset[0].rename(tmp_path / path))
    assert (facts["dataset"], facts.get("public return")) == (name, public)


def test_public_figures_are_the_scripts_own():
    """The scripts normalise by them, where there are random data, and play as long."""
    for task, means in card.PUBLIC_RETURNS.items():
        make = om2p_mpe.MPE if task in om2p_mpe.SCALE else om2p_mamujoco.MaMuJoCo
        assert card.HORIZONS[task] == make(task, 1).horizon
        low, high = {**om2p_mpe.SCALE, **om2p_mamujoco.SCALE}[task]
        assert high == means["expert"]
        assert means["random"] in (low, None)


BAD_FILES = {
    "missing": ("acs_1", Path.unlink, "No such file"),
    "strings": ("rews_0", replace(np.full(250, "a")), "other things than numbers"),
    "code": ("acs_0", lambda x: x.write_bytes(pickle.dumps(Code(Path("ran")))), "cannot be used"),
    "short": ("rews_1", replace(np.zeros(249)), "(249,), not (250,)"),
    "no rows": ("obs_0", replace(np.zeros((0, 16))), "(0, 16)"),
    "narrow": ("next_obs_1", replace(np.zeros((250, 3))), "(250, 3), not (250, 16)"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused(case, dataset):
    """One line names the file, and what is wrong with it; code is not run."""
    name, spoil, reason = BAD_FILES[case]
    path = dataset[0] / f"{name}.npy"
    spoil(path)
    message = refusal(card.describe, dataset[0])
    assert str(path) in message
    assert reason in message
    assert not Path("ran").exists()


def test_command_line(dataset):
    """Card and histogram, every episode in a bin; a terminal without ± shows another sign."""
    command = [sys.executable, ROOT / "data/card.py", dataset[0]]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert " ? " in run.stdout
    bins = run.stdout.splitlines()[-15:]
    counts = [int(line.split()[-1]) for line in bins]
    assert sum(counts) == 10
    assert bins[np.argmax(counts)].count("#") == max(line.count("#") for line in bins) == 40

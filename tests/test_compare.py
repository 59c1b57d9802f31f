"""The comparison of runs: who is put together, what is shown, and the picture."""

import json

import compare
import pytest
from conftest import refusal

SETTINGS = {"task": "simple_tag", "quality": "expert", "num_updates": 200, "run_dir": "runs"}


@pytest.fixture
def make_run(tmp_path):
    """A function that writes a run directory whose seeds end with the given scores."""

    def write(name, scores, first=0, script="om2p_mpe.py", **settings):
        folder = tmp_path / name
        folder.mkdir()
        record = SETTINGS | {"seed": first, "num_seeds": len(scores), "name": name} | settings
        (folder / "args.json").write_text(json.dumps(record))
        (folder / script).touch()
        rows = [
            f"{step},{10 * value},{value},{60 * step},{first + k},0.5"
            for step in (100, 200)
            for k, value in enumerate(score + 200 - step for score in scores)
        ]
        (folder / "metrics.csv").write_text("\n".join(["step,return,score,seconds,seed,q", *rows]))
        return folder

    return write


def table_of(*folders):
    """The table of these run directories."""
    return compare.make_table(compare.group_runs([compare.read_run(f) for f in folders]))[0]


def test_seeds_are_one_row(make_run):
    """Runs of one seed and a run of two, of the same settings, are a row of four seeds."""
    table = table_of(
        make_run("a", [10]), make_run("b", [20], first=1), make_run("c", [40, 50], first=2)
    )
    assert list(table["seeds"]) == [4]
    mean, low, high = (float(x.strip("[],")) for x in table["score"][0].split())
    assert mean == 30
    assert 10 <= low < 30 < high <= 50
    assert list(table["best score"]) == ["130.0"]  # of the first evaluation
    assert list(table["minutes"]) == ["200.0"]


def test_what_differs_is_shown(make_run):
    """Rows differ in a column for each setting that differs within a method, and no other."""
    table = table_of(
        make_run("a", [10], q_weight=2.0),
        make_run("b", [20], q_weight=8.0),
        make_run("c", [30], script="fql_mpe.py", q_weight=30.0, flow_steps=10),
    )
    assert list(table.columns[:3]) == ["method", "q_weight", "seeds"]
    assert list(table["q_weight"]) == ["2.0", "8.0", "30.0"]
    assert list(table["score"]) == ["10.0", "20.0", "30.0"]  # of one seed no interval


def test_other_data_are_shown(make_run):
    """Rows of different tasks say so, also where each is of another method."""
    table = table_of(make_run("a", [10]), make_run("b", [20], script="fql_mpe.py", task="mine"))
    assert list(table.columns[:3]) == ["method", "task", "seeds"]


def test_run_that_goes_on(make_run):
    """A run without its last evaluation is told from one that has ended."""
    table = table_of(make_run("a", [10], num_updates=400), make_run("b", [10], num_updates=200))
    assert list(table["updates"]) == ["200 so far", "200"]


def test_picture_and_table(make_run, tmp_path, capsys):
    """The command prints the table and draws a panel for each task's data."""
    folders = make_run("a", [10, 12]), make_run("b", [float("nan")], task="Hopper-3x1")
    compare.main(compare.Args(folders, tmp_path / "compare.png"))
    assert "| om2p_mpe | Hopper-3x1" in capsys.readouterr().out
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_runs_on_logs(make_run, tmp_path, capsys):
    """Held-out figures take the place of returns, in three digits."""
    folder = make_run("a", [10, 12], script="om2p_logs.py")
    path = folder / "metrics.csv"
    path.write_text(path.read_text().replace("return,score", "held_out_td_error,held_out_x"))
    table = table_of(folder, make_run("b", [20]))
    assert list(table.columns[2:]) == [
        *("updates", "held out td error", "held out x", "minutes", "return", "score", "best score")
    ]
    assert table["held out x"][0].startswith("11 [")
    assert list(table["return"]) == ["-", "200.0"]
    path.write_text(path.read_text().replace("held_out_x", "held_out_action_distance"))
    compare.main(compare.Args((folder,), tmp_path / "compare.png"))
    assert "held out action distance" in capsys.readouterr().out
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_what_is_no_run(tmp_path):
    """A folder without a run's files, and none at all, end in one line."""
    assert str(tmp_path) in refusal(compare.read_run, tmp_path)
    assert "name at least one" in refusal(compare.main, compare.Args(()))

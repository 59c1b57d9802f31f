"""The benchmark: its grids, running them here and through Ray, and the report made of them.

One tiny grid of real trainings runs once: a cell that works, one that fails, one that had been
stopped. Everything else happens without a training, but for the test of Ray, which needs Ray.
"""

import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import product
from types import SimpleNamespace

import collect_mamujoco
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, refusal

sys.path.insert(0, str(ROOT / "benchmark"))
import efficiency
import frozen_critic
import noise
import picture
import report
import run
import steps as several
import variants

from om2p_mpe import MeanFlowPolicy, mean_flow_loss

MEDIUM, REPLAY, EXPERT = run.ABLATION_DATA


def load(path):
    """A script as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(cell, args):
    """The command of one cell alone, and its run directory."""
    words, (folder,) = run.command([cell], args)
    return words, folder


# Grids


def test_grids():
    """The sizes that the README tells, and no cell twice."""
    sizes = {grid: len(cells()) for grid, cells in run.GRIDS.items()}
    assert sizes["mpe"] == 8 * 12 * 5
    assert sizes["ablation"] == sum(map(len, run.ABLATION.values())) * 3 * 5
    assert sizes["ablation_mamujoco"] == sum(map(len, run.ABLATION_MAMUJOCO.values())) * 4 * 3
    assert {cell["method"] for cell in run.tune_grid()} == set(run.METHODS)
    assert sizes["equal_time"] == 3 * 12 * 3
    for cells in run.GRIDS.values():
        assert len({run.name(cell) for cell in cells()}) == len(cells())
    assert set(run.METHODS) == set(report.METHODS)


def test_commands():
    """Every cell has a folder of its own, where its script, which takes its command, will write."""
    scripts, folders = {}, []
    for grid, cells in run.GRIDS.items():
        for cell in cells():
            (_, script, *line), folder = command(cell, run.Args(grid=grid))
            folders.append(folder)
            if cell["seed"] > 0:
                continue  # the same but for the number
            if script not in scripts:
                scripts[script] = load(ROOT / script)
            args = tyro.cli(scripts[script].Args, args=line)
            assert (args.task, args.quality) == (cell["task"], cell["quality"])
            episodes = 20 if args.task == "HalfCheetah-2x3" else 1000
            assert (args.resume, args.eval_episodes, args.device) == (True, episodes, "cpu")
            place = args.run_dir / f"{args.task}-{args.quality}" / scripts[script].__name__
            assert folder == place / f"seed-{args.seed}"
            for name, value in zip(cell["setting"].split(), cell["value"].split(), strict=True):
                own = getattr(args, name.replace("-", "_"))
                own = own if isinstance(own, tuple) else (own,)
                assert own == tuple(type(own[0])(part) for part in value.split(","))
    assert len(set(folders)) == len(folders)


def test_seeds_are_grouped():
    """Only seeds that follow one another, of the same cell; every cell is in one group."""
    a, b = ([run.cell(m, "simple_spread", "expert", s) for s in range(5)] for m in ("bc", "fql"))
    cells = [a[0], b[0], a[1], b[1], a[2], b[3], a[3], b[4]]
    groups = run.in_one_process(cells, 3)
    assert groups == [[a[0], a[1], a[2]], [b[0], b[1]], [b[3], b[4]], [a[3]]]
    assert run.in_one_process(cells, 1) == [[cell] for cell in cells]


def test_dry_run(tmp_path, capsys):
    """Only the commands, one a line, and nothing is written."""
    run.main(run.Args(grid="tune", dry_run=True, results_dir=tmp_path / "results"))
    assert len(capsys.readouterr().out.splitlines()) == len(run.tune_grid())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"grid": "nonsense"}, "mpe, mamujoco, equal_time, tune, tune_mamujoco, ablation"),
        ({"ray": "local"}, "requirements-ray.txt"),
        ({"num_seeds": 0}, "--num-seeds is 0"),
        ({"workers": 0}, "--workers is 0"),
    ],
)
def test_refusals(settings, reason, tmp_path, monkeypatch):
    """One line says what is wrong, before anything is made."""
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    places = {name: tmp_path / name for name in ("run_dir", "data_dir", "results_dir")}
    assert reason in refusal(run.main, run.Args(**places | settings))
    assert list(tmp_path.iterdir()) == []


# Running


@pytest.fixture(scope="module")
def tiny(make_data, tmp_path_factory):
    """The grid "tiny", run once, with `args`. Its `cells`: one works, one fails, one was stopped.

    `data`: the arrays of the first and third; `before`: the third's checkpoint when it was stopped;
    `stop`: what run.main has said at the end.
    """
    place = tmp_path_factory.mktemp("benchmark")
    data = make_data(place / "data", "simple_spread", "medium", 500)
    make_data(place / "data", "simple_spread", "random", 50)
    works, fails = (run.cell("bc", "simple_spread", q, 0) for q in ("medium", "random"))
    stopped = run.cell("bc", "simple_spread", "medium", 0, "eval-interval", "3")
    places = {
        "run_dir": place / "runs",
        "data_dir": place / "data",
        "results_dir": place / "results",
    }
    args = run.Args(grid="tiny", num_updates=6, **places)

    (_, script, *line), folder = command(stopped, args)
    module = load(ROOT / script)
    write = module.write

    def write_and_stop(path, *rest, **options):
        write(path, *rest, **options)
        if path.name == "checkpoint.pt":
            os.kill(os.getpid(), signal.SIGINT)

    module.write = write_and_stop
    with pytest.raises(SystemExit, match="update 3; --resume"):
        module.train(tyro.cli(module.Args, args=line))
    before = torch.load(folder / "checkpoint.pt", weights_only=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.GRIDS, "tiny", lambda: [works, fails, stopped])
        with pytest.raises(SystemExit) as stop:
            run.main(args)
    return SimpleNamespace(
        cells=[works, fails, stopped], args=args, data=data, stop=stop.value.code, before=before
    )


@pytest.fixture
def no_training(monkeypatch):
    """The commands that run.py would start; each fails."""
    commands = []

    def fail(words, **_):
        commands.append(words)
        return subprocess.CompletedProcess(words, 1)

    popen = subprocess.Popen

    def start(words, **options):
        commands.append(words)
        return popen(["false"], **options)

    monkeypatch.setattr(run.subprocess, "run", fail)
    monkeypatch.setattr(run.subprocess, "Popen", start)
    return commands


def table(args, suffix=""):
    """A results file of the grid tiny."""
    return run.read_table(args.results_dir / f"tiny{suffix}.csv")


def test_rows(tiny):
    """The final return, score and data of each run that has ended, in the grid's order."""
    works, _, stopped = tiny.cells
    rows = table(tiny.args)
    assert [run.name(row) for row in rows] == [run.name(works), run.name(stopped)]
    returns = tiny.data["rews"].astype(float).reshape(3, -1, 25).sum(axis=2).mean(axis=0)
    for cell, row in zip((works, stopped), rows, strict=True):
        final = np.load(command(cell, tiny.args)[1] / "final_returns.npy")
        assert final.shape == (1000,)
        assert float(row["return"]) == pytest.approx(final.mean(), abs=0.006)
        score = 100 * (final.mean() - 159.8) / (516.8 - 159.8)
        assert float(row["score"]) == pytest.approx(score, abs=0.006)
        assert float(row["data_return"]) == pytest.approx(returns.mean(), abs=0.006)
        assert float(row["data_sd"]) == pytest.approx(returns.std(), abs=0.006)
        assert (row["updates"], row["num_seeds"]) == ("6", "1")
    machine = json.loads((tiny.args.results_dir / "tiny.json").read_text())
    assert (machine["workers"], machine["device"]) == (2, "cpu")


def test_returns_of_cut_off_episodes_do_not_count(tmp_path):
    """The collector's own: 50 steps an episode; the last 25 rows are of one that was cut off."""
    args = collect_mamujoco.Args("Reacher-2x1", "random", 3, 1_025, 0.1, tmp_path)
    card = collect_mamujoco.collect(args)
    returns = run.data_returns(tmp_path, "Reacher-2x1", "random", 3)
    assert len(returns) == card["episodes"] == 20
    assert returns.mean() == pytest.approx(card["return mean"], abs=0.01)
    folder = tmp_path / "Reacher-2x1" / "random" / "seed_3_data"
    for path in folder.glob("dones_*.npy"):  # it was not cut off, it ended
        done = np.load(path)
        done[-1] = 1
        np.save(path, done)
    assert len(run.data_returns(tmp_path, "Reacher-2x1", "random", 3)) == 21


def test_curves(tiny):
    """Every evaluation of these runs; the last is the row's score, the highest its best."""
    for cell, steps in zip(tiny.cells, (["6"], [], ["3", "6"]), strict=True):
        curve = [p for p in table(tiny.args, "_curves") if run.name(p) == run.name(cell)]
        assert [point["step"] for point in curve] == steps
        for row in table(tiny.args):
            if run.name(row) == run.name(cell):
                assert curve[-1]["score"] == row["score"]
                assert max(float(p["score"]) for p in curve) == float(row["best_score"])


def test_seeds_in_one_process(make_data, monkeypatch, tmp_path):
    """Two cells, one training; each has its own row, from its own run directory."""
    for seed in (3, 4):
        make_data(tmp_path / "data", "simple_spread", "medium", 500, seed)
    cells = [run.cell("bc", "simple_spread", "medium", seed) for seed in (3, 4)]
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: cells)
    places = {name: tmp_path / name for name in ("run_dir", "results_dir")}
    args = run.Args(grid="tiny", num_updates=2, num_seeds=2, data_dir=tmp_path / "data", **places)
    run.main(args)
    rows = table(args)
    assert [run.name(row) for row in rows] == [run.name(cell) for cell in cells]
    for cell, row in zip(cells, rows, strict=True):
        final = np.load(command(cell, args)[1] / "final_returns.npy")
        assert float(row["return"]) == pytest.approx(final.mean(), abs=0.006)
        assert row["num_seeds"] == "2"
    assert rows[0]["return"] != rows[1]["return"]
    assert len(list(tmp_path.glob("run_dir/**/log.txt"))) == 1


def test_failure(tiny):
    """The line names the command, its exit status and the reason that its log ends with."""
    head, line = tiny.stop.splitlines()
    assert head.startswith("error: ")
    words, folder = command(tiny.cells[1], tiny.args)
    assert line.startswith(" ".join(words))
    assert line.endswith("exit status 1, " + (folder / "log.txt").read_text().splitlines()[-1])
    assert "50 transitions" in line


def test_stopped_cell_goes_on(tiny):
    """Its first evaluation is the one from before the stop."""
    folder = command(tiny.cells[2], tiny.args)[1]
    with (folder / "metrics.csv").open() as file:
        first, _ = csv.DictReader(file)
    ((before, *_),) = tiny.before["progress"]["histories"]
    assert {key: float(value) for key, value in first.items()} == before


def test_finished_cells_are_not_run(tiny, no_training, monkeypatch, capsys):
    """A second call tries what has failed, and nothing without it, nor does it touch results."""
    files = {path: path.read_bytes() for path in tiny.args.results_dir.iterdir()}
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: tiny.cells)
    with pytest.raises(SystemExit, match="exit status 1"):
        run.main(tiny.args)
    assert no_training == [command(tiny.cells[1], tiny.args)[0]]
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: tiny.cells[::2])
    run.main(tiny.args)
    assert "all 2 runs" in capsys.readouterr().out
    assert len(no_training) == 1
    assert {path: path.read_bytes() for path in tiny.args.results_dir.iterdir()} == files


def test_machines_of_finished_cells_are_kept(tiny, no_training, monkeypatch, tmp_path):
    """A grid that goes on elsewhere names both; one that starts anew forgets what was there."""
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: tiny.cells)
    args = run.Args(**vars(tiny.args) | {"results_dir": tmp_path, "workers": 1})
    for file in tiny.args.results_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = run.processor()
    for name, expected in (("another", f"{first} and another"), (first, f"{first} and another")):
        monkeypatch.setattr(run, "processor", lambda name=name: name)
        with pytest.raises(SystemExit):  # one cell fails
            run.main(args)
        machine = json.loads((tmp_path / "tiny.json").read_text())
        assert (machine["processor"], machine["workers"]) == (expected, "2 and 1")
        assert machine["cores"] == os.cpu_count()
    (tmp_path / "tiny.csv").unlink()
    with pytest.raises(SystemExit):
        run.main(args)
    machine = json.loads((tmp_path / "tiny.json").read_text())
    assert (machine["processor"], machine["workers"]) == (first, 1)


def test_lost_results_come_from_the_runs(tiny, no_training, monkeypatch, tmp_path):
    """Without the tables, those of the finished runs are made again from their folders."""
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: tiny.cells[::2])
    args = run.Args(**vars(tiny.args) | {"results_dir": tmp_path / "again"})
    run.main(args)
    assert no_training == []
    for suffix in ("", "_curves"):
        assert table(args, suffix) == table(tiny.args, suffix)


def test_data_that_cannot_be_made(tiny, no_training, monkeypatch, tmp_path):
    """One line with the collector's command."""
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: tiny.cells)
    changes = {"data_dir": tmp_path / "data", "results_dir": tmp_path / "results"}
    message = refusal(run.main, run.Args(**vars(tiny.args) | changes))
    assert "collect_mpe.py --task simple_spread --quality medium --seed 0" in message
    assert len(no_training) == 1


def test_sigterm_stops_the_trainings(make_data, monkeypatch, tmp_path):
    """A terminated runner takes its trainings with it; they leave checkpoints and say so."""
    make_data(tmp_path / "data", "simple_spread", "medium")
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: [run.cell("bc", "simple_spread", "medium", 0)])
    places = {name: tmp_path / name for name in ("run_dir", "results_dir")}
    args = run.Args(grid="tiny", num_updates=10**6, data_dir=tmp_path / "data", **places)
    (folder,) = (command(cell, args)[1] for cell in run.GRIDS["tiny"]())

    def terminate():
        while not list(folder.glob("events*")):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit, match="the same command goes on"):
        run.main(args)
    while run.TRAININGS:
        time.sleep(0.1)
    assert "--resume goes on from there" in (folder / "log.txt").read_text()
    assert (folder / "checkpoint.pt").exists()


def test_interrupt(tiny, monkeypatch, tmp_path):
    """After Ctrl-C no further cell starts, and one line says how to go on."""
    started, go_on = [], threading.Event()

    def wait(cell, args):
        started.append(cell)
        go_on.wait(30)
        raise RuntimeError

    def interrupt(jobs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", wait)
    monkeypatch.setattr(run, "as_completed", interrupt)
    monkeypatch.setitem(run.GRIDS, "tiny", lambda: tiny.cells)
    changes = {"results_dir": tmp_path / "results", "workers": 1}
    with pytest.raises(SystemExit, match="the same command"):
        run.main(run.Args(**vars(tiny.args) | changes))
    go_on.set()
    time.sleep(0.2)
    assert len(started) <= 1


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray(make_data, tmp_path):
    """The command line through a Ray instance of its own, started elsewhere: two cells of the grid
    tune are missing; one works and has its row, the other fails and is named with the reason.
    """
    make_data(tmp_path / "data", *MEDIUM, 500)
    make_data(tmp_path / "data", *REPLAY, 50)
    columns = ("return", "data_return", "data_sd", "score", "data_score", "best_score")
    fake = dict.fromkeys((*columns, "updates", "seconds", "num_seeds"), 0)
    missing = [run.cell("bc", *data, 0, "learning-rate", "0.003") for data in (MEDIUM, REPLAY)]
    done = [cell for cell in run.tune_grid() if cell not in missing]
    results = tmp_path / "results"
    results.mkdir()
    run.write_table(results / "tune.csv", [{**cell, **fake} for cell in done])
    run.write_table(results / "tune_curves.csv", [{**cell, "step": 1, "score": 0} for cell in done])

    words = [sys.executable, str(ROOT / "benchmark" / "run.py"), "--grid", "tune", "--ray", "local"]
    words += ["--num-updates", "6", "--results-dir", "results", "--data-dir", "data"]
    words += ["--run-dir", "runs"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}  # Ray keeps a token there
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    process = subprocess.run(words, cwd=tmp_path, env=env, **pipes)
    assert process.returncode == 1, process.stderr
    _, problems = process.stderr.split("error: these runs have failed", 1)
    (line,) = (line for line in problems.splitlines() if "bc_mpe.py" in line)
    assert "--task simple_tag --quality medium-replay" in line
    assert "exit status 1, error: the dataset's 50 transitions" in line

    rows = {run.name(row): row for row in run.read_table(results / "tune.csv")}
    assert set(rows) == {run.name(cell) for cell in [*done, missing[0]]}
    assert float(rows[run.name(missing[0])]["return"]) != 0
    points = run.read_table(results / "tune_curves.csv")
    assert [p["step"] for p in points if run.name(p) == run.name(missing[0])] == ["6"]
    assert json.loads((results / "tune.json").read_text())["workers"] is None


# Numbers of the report


def test_estimate():
    """Mean and half the interval, against all the samples that a bootstrap can draw."""
    assert report.estimate([]) == "-"
    assert report.estimate([12.34]) == "12.3"
    assert report.estimate([-0.04]) == "0.0"
    assert report.estimate([7, 7, 7]) == "7.0 ± 0.0"
    assert report.estimate([0, 3, 6]) == "3.0 ± 3.0"  # all alike: 1 in 27, more than 2.5 %
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    exact = np.percentile([np.mean(draw) for draw in product(values, repeat=5)], (2.5, 97.5))
    assert report.interval(values) == pytest.approx(exact, abs=0.11)
    assert report.interval(values) == report.interval(values)


def test_highlight():
    """The highest is bold, and so is what prints the same; nothing is where there is nothing."""
    means = report.highlight([[1.04], [0.9, 1.02], [0.94], []], report.mean)
    assert means == ["**1.0**", "**1.0**", "0.9", "-"]
    assert report.highlight([[-3], [-2, -2]], report.estimate) == ["-3.0", "**-2.0 ± 0.0**"]
    assert report.highlight([[], []], report.estimate) == ["-", "-"]


# Tables and figures of made-up results


def row(method, task, quality, seed, score, setting="", value=""):
    """A row with this score, and data whose score is 20."""
    numbers = {"return": 2 * score, "data_return": 40, "data_sd": 5, "score": score}
    numbers |= {"data_score": 20, "best_score": score + 1, "updates": 4000, "seconds": 30 + seed}
    numbers["num_seeds"] = 1 + seed
    return {**run.cell(method, task, quality, seed, setting, value), **numbers}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A function that writes rows as a grid's results, where the report looks for them."""
    for name in ("RESULTS", "FIGURES"):
        monkeypatch.setattr(report, name, tmp_path / name)
    report.RESULTS.mkdir()
    monkeypatch.setattr(report, "PAGES", (tmp_path / "README.md", tmp_path / "more.md"))
    report.PAGES[1].write_text("More")

    def write(grid, rows):
        run.write_table(report.RESULTS / f"{grid}.csv", rows)
        keys = ("method", "task", "quality", "seed", "setting", "value")
        points = [
            {**{key: row[key] for key in keys}, "step": step, "score": row["score"] * step / 4000}
            for row in rows
            for step in (2000, 4000)
        ]
        run.write_table(report.RESULTS / f"{grid}_curves.csv", points)
        machine = {"processor": "Abacus", "cores": 2, "workers": 2, "device": "cpu", "torch": "2"}
        (report.RESULTS / f"{grid}.json").write_text(json.dumps(machine))

    return write


def mpe_rows(seeds=(0, 1)):
    """OM2P with scores 50 and 52 and BC with 51 on every dataset, the latter with seed 0 alone."""
    rows = [
        row("om2p", *data, seed, 50 + 2 * seed) for seed in seeds for data in report.DATASETS["mpe"]
    ]
    return rows + [row("bc", *data, 0, 51) for data in report.DATASETS["mpe"]]


def cells(table):
    """A Markdown table as a dictionary from the first two columns to the others."""
    lines = [line[2:-2].split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {tuple(line[:2]): line[2:] for line in lines}


def test_mpe_table(results):
    """Means, intervals, equal bests, averages, and how many seeds there are."""
    results("mpe", mpe_rows())
    table = report.tables()["mpe"]
    assert cells(table)["task", "data"] == ["data's score", "OM2P", "BC"]
    assert "2 runs at a time with one thread each, up to 2 seeds in one, torch 2" in table
    for data in report.DATASETS["mpe"]:
        assert cells(table)[data] == ["20.0", "**51.0 ± 1.0**", "**51.0**"]
    assert cells(table)["average", ""] == ["20.0", "**51.0 ± 1.0**", "**51.0**"]
    assert "Abacus, 2 cores, 2 runs at a time" in table
    assert "OM2P 2, BC 1;" in table
    results("mpe", mpe_rows(seeds=(0,)))
    assert "Seeds so far" not in report.tables()["mpe"]


def test_incomplete_grid(results):
    """A missing cell is a dash, and an average is over the seeds that have all datasets."""
    rows = [r for r in mpe_rows() if (r["task"], r["quality"]) != ("simple_tag", "random")]
    results("mpe", [*rows, row("om2p", "simple_tag", "random", 1, 52)])
    tables = report.tables()
    assert cells(tables["mpe"])["simple_tag", "random"] == ["20.0", "**52.0**", "-"]
    assert cells(tables["mpe"])["average", ""] == ["20.0", "**52.0**", "-"]
    assert "OM2P 1 to 2, BC 0 to 1;" in tables["mpe"]
    assert cells(tables["mpe_details"])["BC", "-"] == ["-", "4,000", "11"]
    results("mpe", rows)
    tables = report.tables()
    assert cells(tables["mpe"])["simple_tag", "random"] == ["-", "-", "-"]
    assert cells(tables["mpe"])["average", ""] == ["-", "-", "-"]
    assert len(cells(tables["data"])) == 2 + 11  # with the header


def test_other_tables_of_the_grid_mpe(results):
    """Returns, final and best scores, and every dataset once."""
    results("mpe", mpe_rows())
    tables = report.tables()
    assert cells(tables["returns"])["simple_world", "expert"] == ["40.0", "**102.0**", "**102.0**"]
    details = cells(tables["mpe_details"])
    assert details["OM2P", "51.0 ± 1.0"] == ["52.0 ± 1.0", "4,000", "24"]
    assert details["BC", "51.0"] == ["52.0", "4,000", "12"]
    assert cells(tables["data"])["simple_tag", "medium"] == ["40.0 ± 5.0", "88.7"]


def test_equal_time_table(results):
    """Scores with OM2P's updates and with its time, of methods that have both."""
    results("mpe", mpe_rows())
    rows = [row("bc", *data, seed, 30) for data in report.DATASETS["mpe"] for seed in (0, 1)]
    results("equal_time", [r | {"updates": 500} for r in rows])
    table = cells(report.tables()["equal_time"])
    assert table["OM2P", "**51.0 ± 1.0**"] == ["1.00", "4,000", "**51.0 ± 1.0**"]
    assert table["BC", "**51.0**"] == ["8.00", "500", "30.0 ± 0.0"]
    assert len(table) == 2 + 2
    costs = [{"part": "default", "method": m, "updates_per_second": 9} for m in ("om2p", "bc")]
    run.write_table(report.RESULTS / "efficiency_cpu.csv", costs)
    report.FIGURES.mkdir()
    report.time_curves()
    assert (report.FIGURES / "score_time.png").read_bytes().startswith(b"\x89PNG")


def test_equal_times():
    """The updates of the grid equal_time are those that the measured rates give."""
    rates = {}
    for method, name in report.COSTS_OF_DEFAULTS.items():
        script, settings = efficiency.METHODS[name]
        assert script == method
        assert settings.items() <= vars(efficiency.load_script(script).Args()).items()
        cost = report.cost_rows("cpu", "default")[name]
        rates[method] = float(cost["updates_per_second"])
    updates = run.om2p_mpe.Args().num_updates
    for method, number in run.EQUAL_TIME.items():
        assert int(number) == pytest.approx(updates * rates[method] / rates["om2p"], rel=0.05)


def test_grids_table(results):
    """Two seeds in one process share its time; a grid without results is left out."""
    results("mpe", [row | {"seconds": 3600} for row in mpe_rows()])
    assert [name for name in run.GRIDS if name not in report.GRIDS] == []
    _, _, *rows = report.tables()["grids"].splitlines()
    assert rows == ["| `mpe` | all methods on the particle environments | 36 | 30.0 |"]


def test_tune_table(results):
    """The best mean of a method is bold; what the scripts have as default is said to be so."""
    default = load(ROOT / "om2p_mpe.py").Args().q_weight
    rows = [row("om2p", *MEDIUM, 0, 10, "q-weight", f"{default:g}")]
    rows += [row("om2p", *REPLAY, 0, 30, "q-weight", f"{default:g}")]
    rows += [row("om2p", *data, 0, 25, "q-weight", "77") for data in (MEDIUM, REPLAY)]
    rows += [row("bc", *MEDIUM, 0, 12, "batch-size hidden-dims", "9 8,7")]
    results("tune", rows)
    table = cells(report.tables()["tune"])
    assert table["OM2P", f"`--q-weight {default:g}`, the default"] == ["10.0", "30.0", "20.0"]
    assert table["", "`--q-weight 77`"] == ["25.0", "25.0", "**25.0**"]
    assert table["BC", "`--batch-size 9 --hidden-dims 8 7`"] == ["12.0", "-", "-"]
    words = "--time-alpha 0.3 --time-beta 1.0 --hidden-dims 128 128 --derivative"
    assert report.is_default("om2p", f"{words} finite-difference")
    assert not report.is_default("om2p", f"{words} jvp")


def test_ablation_table(results):
    """The defaults, from the grid mpe, then the changes, several steps, and the data."""
    results("mpe", mpe_rows())
    changes = (("time-alpha time-beta", "0.5 1"), ("variant", "released"))
    data = list(product((MEDIUM, REPLAY), (0, 1)))
    rows = [row("om2p", *d, seed, 2 * seed, *c) for c in changes for d, seed in data]
    results("ablation", rows)
    keys = ("task", "quality", "seed", "steps", "score")
    steps = [dict(zip(keys, (*d, 0, k, 7 * k), strict=True)) for d, _ in data for k in (1, 5)]
    run.write_table(report.RESULTS / "steps.csv", steps)
    table = cells(report.tables()["ablation"])
    names = ["the defaults", "`--time-alpha 0.5 --time-beta 1`", "`--variant released`"]
    names += ["the defaults, acting in 5 steps", "the data"]
    assert [name for name, _ in table][2:] == names
    medium, replay = cells(report.tables()["mpe"])[MEDIUM], cells(report.tables()["mpe"])[REPLAY]
    assert table["the defaults", medium[1].strip("*")] == [replay[1].strip("*")]
    assert table["`--variant released`", "1.0 ± 1.0"] == ["1.0 ± 1.0"]
    assert table[names[3], "35.0 ± 0.0"] == ["35.0 ± 0.0"]
    assert table["the data", medium[0]] == [replay[0]]


def test_ablation_table_of_mamujoco(results):
    """The defaults from the grid mamujoco, the changes and the data; nothing of the MPE's steps."""
    results("mpe", mpe_rows())
    dataset = (run.CHEETAH, "medium")
    results("mamujoco", [row("om2p", *dataset, seed, 50 + seed) for seed in (0, 2)])
    results("ablation_mamujoco", [row("om2p", *dataset, 0, 30, "flow-ratio q-weight", "0.5 2")])
    keys = ("task", "quality", "seed", "steps", "score")
    run.write_table(
        report.RESULTS / "steps.csv", [dict(zip(keys, (*MEDIUM, 0, 5, 7), strict=True))]
    )
    lines = report.TABLES["ablation_mamujoco"][0]().splitlines()
    assert lines[2:4] == [
        "| the defaults | 51.0 ± 1.0 |",
        "| `--flow-ratio 0.5 --q-weight 2` | 30.0 |",
    ]
    assert lines[4].startswith("| the data | ")
    assert lines[5] == ""


def test_published_table(results):
    """All cells have a number for every quality, and averages are those of all three tasks.

    MA-TD3+BC by OMAR's settings stands below, if it has been trained.
    """
    table = cells(report.tables()["published"])
    averages = {name: row[2] for (name, _), row in table.items()}
    assert (averages["MA-TD3+BC"], averages["OMAR"], averages["MADiff-D"]) == (
        "48.4",
        "59.2",
        "63.8",
    )
    assert (averages["CFCQL"], averages["MAC-Flow"]) == ("-", "-")
    lists = [cell.split(" / ") for (_, first), row in table.items() for cell in (first, *row[:2])]
    assert {len(cell) for cell in lists[6:]} == {4}
    assert {row[3] for row in table.values()} - {"---", "source"} == set(report.SOURCES)
    scores = range(20, 32)
    data = report.DATASETS["mpe"]
    results("published", [row("td3_bc", *d, 0, k) for d, k in zip(data, scores, strict=True)])
    *_, last = (line for line in report.tables()["published"].splitlines() if line.startswith("|"))
    assert last.split(" | ")[1:5] == [
        "20.0 / 21.0 / 22.0 / 23.0",
        "24.0 / 25.0 / 26.0 / 27.0",
        "28.0 / 29.0 / 30.0 / 31.0",
        "25.5",
    ]


def test_readme_and_figures(results, capsys):
    """Tables and figures are written; what has no results is named; a lost place is an error."""
    results("mpe", mpe_rows())
    places = [f"<!-- table {name} -->\nold\n<!-- end -->" for name in report.TABLES]
    report.PAGES[0].write_text("\n\n".join(["# Title", *places[::2]]))
    report.PAGES[1].write_text("\n\n".join(["# More", *places[1::2]]))
    report.main()
    text = report.PAGES[0].read_text() + report.PAGES[1].read_text()
    for name, table in report.tables().items():
        assert f"<!-- table {name} -->\n{table}\n<!-- end -->" in text
    # prey, chaos, equal time, tune, ablation, three of mamujoco, noise, frozen critic, and costs:
    # of CPU, of both compiled
    assert text.count("\nold\n") == 10 + 4 + 1 + 4
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert all(name in said for name in ("prey", "tune (no tune.csv)", "ablation"))
    for name in ("learning_curves", "averages"):
        picture = (report.FIGURES / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert int.from_bytes(picture[16:20], "big") >= 900  # pixels wide
    report.PAGES[1].write_text("# More")
    report.PAGES[0].write_text(text.replace("<!-- table returns -->", ""))
    assert "0 places for the table returns" in refusal(report.main)
    report.PAGES[0].write_text(text)
    report.PAGES[1].write_text("<!-- table returns -->\n<!-- end -->")
    assert "2 places for the table returns" in refusal(report.main)


def test_costs(results):
    """Ratios are OM2P's seconds and bytes against the others'; NaN is a dash; figures are drawn."""
    keys = ("part", "method", "agents", "batch", "hidden_dims", "updates_per_second", "memory_mib")
    lines = [("equal", "om2p", 3, 256, "512", 50.0, 20.0)]
    lines += [("equal", "om2p-loop", 3, 256, "512", 25.0, math.nan)]
    lines += [("equal", "diffusion_ql-20", 3, 256, "512", 8.0, 70.0)]
    lines += [(part, "om2p", 3, 128, "128", 200.0, 4.0) for part in ("default", "published")]
    lines += [("default", f"flow_ql-{k}", 3, 128, "128", 500.0 / k, 4.0 * k) for k in (5, 10)]
    lines += [("batch", "om2p", 3, b, "128", 1e4 / b, b / 8) for b in (256, 1024)]
    lines += [("batch", "diffusion_ql-20", 3, b, "128", 1e3 / b, b) for b in (256, 1024)]
    same = {"low": 7.0, "high": 9.0, "gflop": 1234.5, "share_of_product": 0.456}
    same |= {"decision_ms": 0.01234, "decision_1000_ms": 12.34}
    rows = [dict(zip(keys, line, strict=True)) | same for line in lines]
    run.write_table(report.RESULTS / "efficiency_cpu.csv", rows)
    machine = {"processor": "P", "cores": 2, "threads": 2, "device": "cpu", "torch": "2"}
    machine |= {"compile": False}
    (report.RESULTS / "efficiency_cpu.json").write_text(json.dumps(machine))
    run.write_table(report.RESULTS / "efficiency_cpu_compiled.csv", rows)
    (report.RESULTS / "efficiency_cpu_compiled.json").write_text(json.dumps(machine))
    tables = report.tables()
    assert "memory" in tables["cost_default_cpu"]
    assert "memory" not in tables["cost_default_cpu_compiled"]
    lines = tables["cost_equal_cpu"].splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines[::2]] == ["| OM2P", "| Diffusion-QL, 20 steps"]
    assert lines[1] == (
        "| OM2P, agent by agent, nn.Linear | 25.0 (7.00 to 9.00) | 2.00 | - | - | 1,234 | 0.46 | "
        "0.012 | 12 |"
    )
    assert lines[2].split(" | ")[2:5] == ["6.25", "70.0", "3.50"]
    assert "time 6.2 to 10.0 times, the most with 3 agents, batches of 256" in tables["cost_cpu"]
    assert "memory 3.5 to 8.0 times, the most with 3 agents, batches of 256" in tables["cost_cpu"]
    report.FIGURES.mkdir()
    report.cost_bars("cpu")
    report.cost_growth("cpu")
    for name in ("cost_cpu", "growth_cpu"):
        assert (report.FIGURES / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_results(results, capsys):
    """Nothing but the published numbers, and one line that says so."""
    report.PAGES[0].write_text("<!-- table published -->\n<!-- end -->\n")
    report.main()
    said = capsys.readouterr().out
    assert all(name in said for name in set(report.TABLES) - {"published"})
    assert "figures" in said
    assert said.count("\n") == 1
    assert not report.FIGURES.exists()


# Variants of OM2P


def make_variant(kind, width=16):
    """A policy of two agents, observations of three numbers and actions of two, and a batch."""
    torch.manual_seed(0)
    policy = kind(2, 3, 2, (width,))
    obs, noise = torch.randn(2, 8, 3), torch.randn(2, 8, 2)
    return policy, obs, 2 * torch.rand(2, 8, 2) - 1, noise


def test_losses_of_variants():
    """Without du/dr the target is v; the release's quotient vanishes, and x is at the end t."""
    policy, obs, action, noise = make_variant(MeanFlowPolicy)
    r, t = torch.rand(2, 2, 8, 1).sort(dim=0).values
    v = action - noise

    def expected(time):
        x = (1 - time) * noise + time * action
        return ((policy(obs, x, r, t) - v) ** 2).sum() / 16  # mean over (8, 2), sum over agents

    plain = variants.no_derivative_loss(policy, obs, action, noise, r, t, 1e-2, "jvp")
    released = variants.released_loss(policy, obs, action, noise, r, t, 1e-2, "jvp")
    torch.testing.assert_close(plain, expected(r))
    torch.testing.assert_close(released, expected(t))
    assert abs(plain - released) > 1e-3
    whole = mean_flow_loss(policy, obs, action, noise, r, r)
    torch.testing.assert_close(variants.no_derivative_loss(policy, obs, action, noise, r, r), whole)


def test_short_step():
    """Within an interval longer than delta it is OM2P's; a shorter one is stepped to its end."""
    policy, obs, action, noise = make_variant(MeanFlowPolicy)
    r = torch.full((2, 8, 1), 0.3)
    inputs = policy, obs, action, noise
    for t in (r + 0.25, r):  # no more than delta, 0.2, or the end; and r = t
        torch.testing.assert_close(
            variants.short_step_loss(*inputs, r, t, 0.2, "jvp"),
            mean_flow_loss(*inputs, r, t, 0.2),
        )
    t = r + 0.1
    x, v = 0.7 * noise + 0.3 * action, action - noise
    u, end = policy(obs, x, r, t), policy(obs, x + 0.1 * v, t, t)
    expected = ((u - (v + end - u)) ** 2).sum() / 16  # (t - r) du/dr is the whole difference
    torch.testing.assert_close(variants.short_step_loss(*inputs, r, t, 0.2, "jvp"), expected)


def test_actions_of_variants():
    """The release acts with u alone; the penalty's policy as OM2P, and keeps what was clipped."""
    kinds = (MeanFlowPolicy, variants.ReleasedPolicy, variants.FreePolicy)
    policy, released, free = (make_variant(kind)[0] for kind in kinds)
    _, obs, _, noise = make_variant(MeanFlowPolicy)
    noise = 3 * noise
    u = policy(obs, noise, torch.zeros(2, 8, 1), torch.ones(2, 8, 1))
    torch.testing.assert_close(released.act(obs, noise), u.clamp(-1, 1))
    torch.testing.assert_close(free.act(obs, noise), policy.act(obs, noise))
    torch.testing.assert_close(free.free, noise + u)
    assert (free.free.abs() > 1).any()


def test_penalty():
    """The squared excess over the box is added, mean over the batch, sum over agents."""
    policy, obs, action, _ = make_variant(variants.FreePolicy)
    batch, args = {"obs": obs, "action": action}, variants.Args()
    losses = []
    for loss in (variants.om2p_policy_loss, variants.penalty_loss):
        torch.manual_seed(1)
        losses.append(loss(policy, lambda obs, action: 1 + action.sum(dim=-1)[None], batch, args))
    excess = policy.free - policy.free.clamp(-1, 1)
    assert excess.abs().max() > 0.5
    torch.testing.assert_close(losses[1][0] - losses[0][0], (excess**2).sum() / 16)


def test_several_steps():
    """One step is the policy's own action; two follow u over each half of the path."""
    policy, obs, _, _ = make_variant(MeanFlowPolicy)
    torch.manual_seed(1)
    noise = torch.randn(2, 8, 2)
    half, whole = torch.full((2, 8, 1), 0.5), torch.ones(2, 8, 1)
    x = noise + policy(obs, noise, 0 * half, half) / 2
    x = x + policy(obs, x, half, whole) / 2
    for number, expected in ((1, policy.act(obs, noise)), (2, x.clamp(-1, 1))):
        torch.manual_seed(1)
        torch.testing.assert_close(several.SeveralSteps(policy, number).act(obs), expected)


def test_several_steps_need_the_runs(tmp_path, monkeypatch):
    """Without all runs there is one line that says which is missing, and no table."""
    monkeypatch.setattr(several, "ROOT", tmp_path)
    monkeypatch.setattr(several, "find_prey", lambda *_: None)
    reason = refusal(several.main, several.Args(run_dir=tmp_path))
    assert "simple_spread-medium/om2p_mpe/seed-0 has no policy.pt" in reason
    assert not list(tmp_path.rglob("*.csv"))


def test_acting_with_less_noise_and_more():
    """The mean of each observation's own actions; noise of the size asked for, kept in the box."""
    policy, obs, _, _ = make_variant(MeanFlowPolicy)
    torch.manual_seed(1)
    actions = policy.act(obs.repeat_interleave(5, dim=1))
    expected = torch.stack([actions[:, 5 * k : 5 * k + 5].mean(dim=1) for k in range(8)], dim=1)
    torch.manual_seed(1)
    acting = noise.Acting(policy, samples=5)
    torch.testing.assert_close(acting.act(obs), expected)
    variance = actions.unflatten(1, (8, 5)).var(dim=2, correction=0).mean().item()
    assert math.isclose(*acting.variances, variance, rel_tol=1e-5)

    still = SimpleNamespace(act=lambda obs: torch.full((2, obs.shape[1], 2), 0.5))
    action = noise.Acting(still, noise_sd=0.1).act(torch.zeros(2, 100_000, 3))
    assert math.isclose(action.mean(), 0.5, abs_tol=0.001)
    assert math.isclose(action.std(), 0.1, abs_tol=0.001)
    assert noise.Acting(still, noise_sd=10.0).act(obs).abs().max() <= 1


def test_noise_table(tmp_path, monkeypatch):
    """A row for each way of acting, and its average over the datasets."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    keys = ("method", "quality", "seed", "acting", "score", "spread")
    rows = [
        dict(zip(keys, ("om2p", quality, seed, acting, 10 * k + seed + start, k / 10), strict=True))
        for acting, start in (("as trained", 0), ("mean of 16 actions", 1))
        for k, quality in enumerate(run.QUALITIES)
        for seed in (0, 2)
    ]
    run.write_table(tmp_path / "noise.csv", rows)
    assert report.noise_table().splitlines()[2:] == [
        "| OM2P | as trained | 1.0 ± 1.0 | 11.0 ± 1.0 | 21.0 ± 1.0 | 31.0 ± 1.0 | 16.0 | - |",
        "| OM2P | mean of 16 actions | 2.0 ± 1.0 | 12.0 ± 1.0 | 22.0 ± 1.0 | 32.0 ± 1.0 | 17.0 | "
        "0.00 / 0.10 / 0.20 / 0.30 |",
    ]


def test_what_noise_writes(tmp_path, monkeypatch):
    """Generating teams act by means, deterministic ones with noise; both also as they are."""
    monkeypatch.setattr(noise, "ROOT", tmp_path)
    (tmp_path / "benchmark" / "results").mkdir(parents=True)

    def evaluate(policy, *_):
        policy.act(torch.zeros(1, 2, 3))
        return np.array([[policy.samples, policy.noise_sd, 4.0]])

    module = SimpleNamespace(evaluate=evaluate, normalized_score=lambda task, returns: 10 * returns)
    alternating = SimpleNamespace(act=lambda obs: torch.arange(obs.shape[1])[None, :, None] % 2.0)
    team = SimpleNamespace(module=module, policy=alternating, env=None)
    monkeypatch.setattr(noise, "load_team", lambda *_: team)
    monkeypatch.setattr(noise.Path, "exists", lambda _: True)
    noise.main(noise.Args(run_dir=tmp_path, seeds=(2,), samples=7, noise_sd=0.5))
    rows = run.read_table(tmp_path / "benchmark" / "results" / "noise.csv")
    assert [row["quality"] for row in rows[::2]] == 3 * list(run.QUALITIES)
    assert [tuple(row.values()) for row in rows[:2] + rows[-1:]] == [
        ("om2p", "expert", "2", "as trained", "16.67", "10.0", "0.0"),
        ("om2p", "expert", "2", "mean of 7 actions", "36.67", "40.0", "0.4949"),
        ("td3_bc", "random", "2", "noise 0.5 added", "18.33", "10.0", "0.0"),
    ]


def test_noise_needs_the_runs(tmp_path, monkeypatch):
    """Without all runs there is one line that says which is missing, and no table."""
    monkeypatch.setattr(noise, "ROOT", tmp_path)
    reason = refusal(noise.main, noise.Args(run_dir=tmp_path))
    assert "HalfCheetah-2x3-expert/om2p_mamujoco/seed-0 has no policy.pt" in reason
    assert not list(tmp_path.rglob("*.csv"))


def test_a_frozen_critic_needs_scripts(tmp_path):
    """A name that no script has is refused before the critic is trained."""
    args = frozen_critic.Args(("om2p-split --q-weight 2", "abacus"), data_dir=tmp_path)
    assert "abacus" in refusal(frozen_critic.main, args)


def test_picture_needs_a_run():
    """The program that draws teams says what it wants, where no run directory is named."""
    assert "name run directories" in refusal(picture.main, picture.Args(run_dirs=()))


def test_smaller_q():
    """The target is that of the lower of two critics, whichever it is for an action."""
    policy, obs, action, _ = make_variant(MeanFlowPolicy)
    zeros = torch.zeros(2, 8)
    batch = {"obs": obs, "action": action, "reward": zeros, "next_obs": obs, "done": zeros}
    low, high = -torch.rand(2, 8), torch.rand(2, 8)
    swap = torch.rand(2, 8) < 0.5

    def critics(obs, action):
        return torch.stack([torch.where(swap, low, high), torch.where(swap, high, low)])

    loss = variants.CHANGES["smaller-q"]["critic_loss"]
    found, _ = loss(lambda obs, action: torch.zeros(2, 2, 8), critics, policy, batch, 0.5)
    torch.testing.assert_close(found, 2 * (0.5 * low).square().mean(dim=-1).sum())


def test_variant_trains(make_data, tmp_path):
    """The command line trains the variant, under a run directory of its own."""
    make_data(tmp_path / "data")
    line = "--variant released --num-updates 2 --eval-interval 2 --eval-episodes 2 --hidden-dims 8"
    places = ["--data-dir", tmp_path / "data", "--run-dir", tmp_path / "runs"]
    command = [sys.executable, ROOT / "benchmark" / "variants.py", *line.split(), *places]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "simple_spread-expert" / "variants" / "seed-0"
    assert json.loads((folder / "args.json").read_text())["variant"] == "released"


def test_conservative():
    """OM2P's loss, and a tenth of logsumexp Q(uniform actions) - Q(data), sum over critics, agents.

    Q is the sum of an action's two components here, so that it is 0.5 for all recorded ones.
    """
    policy, _, _, _ = make_variant(MeanFlowPolicy)
    obs, action = torch.zeros(2, 20_000, 3), torch.full((2, 20_000, 2), 0.25)
    zeros = torch.zeros(2, 20_000)
    batch = {"obs": obs, "action": action, "reward": zeros, "next_obs": obs, "done": zeros}

    def critics(obs, action):
        return action.sum(dim=-1).expand(2, -1, -1)

    loss = variants.CHANGES["conservative"]["critic_loss"]
    torch.manual_seed(1)
    found, q = loss(critics, critics, policy, batch, 0.9)
    torch.manual_seed(1)
    plain, _ = variants.om2p_critic_loss(critics, critics, policy, batch, 0.9)
    torch.testing.assert_close(q, torch.full((2, 2, 20_000), 0.5))
    uniform = 2 * torch.rand(10, 1_000_000, 2).sub(0.5)
    gap = uniform.sum(dim=-1).logsumexp(dim=0).mean() - 0.5
    assert math.isclose(found - plain, 0.1 * 4 * gap, rel_tol=0.01)


def test_greedy_takes_the_best_of_its_draws():
    """Each observation's action is the one that the critic values most among those drawn for it."""
    critic = SimpleNamespace(target=torch.tensor([[[0.5, -0.5]], [[-0.5, 0.0]]]))

    def q(obs, action):  # highest at the agent's target plus its observation
        return -(action - critic.target - obs).square().sum(dim=-1).expand(2, -1, -1)

    obs = 0.3 * torch.randn(2, 50, 2)
    many, one = (frozen_critic.Greedy(q, samples).act(obs) for samples in (2_000, 1))
    best = (critic.target + obs).clamp(-1, 1)
    assert many.shape == (2, 50, 2)
    assert (many - best).abs().max() < 0.2
    assert (one - best).abs().max() > 0.5


def test_linear_share():
    """One for a linear function with an offset, zero for an even one, half for the sum of both."""
    obs = torch.randn(2, 20_000, 1)
    odd, even = 3 * obs + 1, obs.square() * 3 / math.sqrt(2)
    for values, share in ((odd, 1), (even, 0), (odd + even, 0.5)):
        assert math.isclose(frozen_critic.linear_share(obs, values), share, abs_tol=0.05)


def test_split_policy():
    """Its second network acts on the whole interval, not on a point; it is no larger than one."""
    torch.manual_seed(0)
    plain, split = (kind(3, 18, 2, (128, 128)) for kind in (MeanFlowPolicy, variants.SplitPolicy))
    sizes = [sum(p.numel() for p in policy.parameters()) for policy in (plain, split)]
    assert math.isclose(*sizes, rel_tol=0.05)
    obs, x = torch.randn(3, 8, 18), torch.randn(3, 8, 2)
    r, t = torch.zeros(3, 8, 1), torch.ones(3, 8, 1)
    middle = t / 2
    before = split(obs, x, r, t), split(obs, x, middle, middle)
    with torch.no_grad():
        split.whole[-1].bias += 1
    torch.testing.assert_close(split(obs, x, r, t), before[0] + 1)
    torch.testing.assert_close(split(obs, x, middle, middle), before[1])


def test_policies_on_a_frozen_critic(make_data, tmp_path, monkeypatch):
    """Every script's policy learns from the same critic, which stays as it is; all are measured."""
    monkeypatch.setattr(frozen_critic, "ROOT", tmp_path)
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    methods = ("om2p-split --q-weight 3", "omar", "dom2", "fql")
    settings = {"num_updates": 3, "episodes": 4, "run_dir": tmp_path / "runs"}
    make_data(tmp_path / "data", quality="random")
    args = frozen_critic.Args(methods, seeds=(0,), data_dir=tmp_path / "data", **settings)
    frozen_critic.main(args)
    rows = run.read_table(tmp_path / "benchmark" / "results" / "frozen_critic.csv")
    assert [row["method"] for row in rows] == ["critic", *methods]
    assert all(-100 < float(row["score"]) < 100 for row in rows)
    assert all(0 <= float(row["linear"]) <= 1 for row in rows)
    critics = [
        torch.load(path, weights_only=True)["states"]["critic"]
        for path in sorted(args.run_dir.rglob("checkpoint.pt"))
    ]
    assert len(critics) == 5
    for other in critics[1:]:
        torch.testing.assert_close(other, critics[0], rtol=0, atol=0)
    (record,) = (args.run_dir / methods[0]).rglob("args.json")
    assert json.loads(record.read_text())["q_weight"] == 3


def test_frozen_critic_table(tmp_path, monkeypatch):
    """A row for every policy, with its settings, and for the critic."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    keys = ("method", "seed", "score", "linear")
    rows = [
        ("critic", 0, 30, 0.5),
        ("critic", 1, 32, 0.52),
        ("om2p-split --q-weight 16", 0, 2, 0.7),
    ]
    run.write_table(tmp_path / "frozen_critic.csv", [dict(zip(keys, r, strict=True)) for r in rows])
    assert report.frozen_critic_table().splitlines()[2:] == [
        "| best of 64 uniform actions by the critic | 0.51 | 31.0 ± 1.0 |",
        "| OM2P, a second network near (0, 1), `--q-weight 16` | 0.70 | 2.0 |",
    ]

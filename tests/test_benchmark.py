"""The benchmark: its grids, running them here and through Ray, the report, and the variants."""

import importlib
import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from conftest import ROOT, refusal

sys.path.insert(0, str(ROOT / "benchmark"))
import conventions
import efficiency
import frozen_critic
import noise
import picture
import q_scale
import report
import run
import sketch
import steps as several
import variants

import om2p_mpe
from om2p_mpe import MeanFlowPolicy

MEDIUM, REPLAY, _ = run.ABLATION_DATA


def test_grids():
    """No cell is there twice, all that have results are there, and a page has the command."""
    page = (ROOT / "docs/reproduce.md").read_text()
    for grid in run.GRIDS:
        assert re.search(rf"run\.py --grid {grid}\b", page)
        cells = run.cells_of(grid)
        known = run.read_table(ROOT / "benchmark" / "results" / f"{grid}.csv").index
        assert len(set(cells)) == len(cells)
        assert set(known) <= set(cells)
    assert len(run.cells_of("mpe")) == 8 * 12 * 5


@pytest.mark.parametrize("grid", run.GRIDS)
def test_commands(grid):
    """Every cell has a folder of its own, where its script, which takes its command, will write."""
    folders = set()
    for cell in run.cells_of(grid):
        (_, script, *line), folder = run.command([cell], run.Args(grid=grid))
        folders.add(folder)
        if cell.seed > 0:
            continue  # the same but for the number
        script = importlib.import_module(script.rpartition("/")[2].removesuffix(".py"))
        is_variant = script is variants
        args = variants.parse(line)[1] if is_variant else tyro.cli(script.Args, args=line)
        assert (args.task, args.quality, args.resume) == (cell.task, cell.quality, True)
        assert args.eval_episodes == (1000 if args.task in run.TASKS else 20)
        assert folder.parents[1] == args.run_dir / f"{args.task}-{args.quality}"
        assert folder.parent.name == "-".join(filter(None, [script.__name__, args.name]))
        for name, value in zip(cell.setting.split(), cell.value.split(), strict=True):
            own = getattr(args, name.replace("-", "_"))
            value = str(own) if value == "yes" and own is True else value
            own = own if isinstance(own, tuple) else (own,)
            assert own == tuple(type(own[0])(part) for part in value.split(","))
    assert len(folders) == len(run.cells_of(grid))


def test_seeds_are_grouped():
    """Only seeds that follow one another, of the same cell; every cell is in one group."""
    a, b = ([run.Cell(m, *MEDIUM, s, "", "") for s in range(5)] for m in ("bc", "fql"))
    cells = [a[0], b[0], a[1], b[1], a[2], b[3], a[3], b[4]]
    groups = run.in_one_process(cells, 3)
    assert groups == [[a[0], a[1], a[2]], [b[0], b[1]], [b[3], b[4]], [a[3]]]


def test_dry_run(tmp_path, capsys):
    """Only the commands, one a line, and nothing is written."""
    run.main(run.Args(grid="tune", dry_run=True, results_dir=tmp_path / "results"))
    assert len(capsys.readouterr().out.splitlines()) == len(run.cells_of("tune"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tiny(make_data, tmp_path_factory):
    """Two seeds of BC in one process, and a cell that fails since a file of its data is missing.

    They were run with `args`; `data` are the arrays of seed 0, `stop` is what run.main has said.
    """
    place = tmp_path_factory.mktemp("benchmark")
    data = [make_data(place / "data", *MEDIUM, 500, seed) for seed in (0, 1)]
    make_data(place / "data", "simple_spread", "random", 50)
    (place / "data/simple_spread/random/seed_0_data/acs_1.npy").unlink()
    cells = [run.Cell("bc", *MEDIUM, seed, "eval-interval", "2") for seed in (0, 1)]
    cells.append(run.Cell("bc", "simple_spread", "random", 0, "", ""))
    places = {f"{name}_dir": place / name for name in ("run", "data", "results")}
    args = run.Args(grid="tiny", num_updates=3, num_seeds=2, **places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "cells_of", lambda _: cells)
        with pytest.raises(SystemExit) as stop:
            run.main(args)
    folder = run.command(cells[:2], args)[1]
    return SimpleNamespace(cells=cells, args=args, data=data, stop=stop.value.code, folder=folder)


@pytest.fixture
def no_training(tiny, monkeypatch):
    """The commands that run.py would start for the cells of `tiny`; each fails."""
    commands = []

    def fail(words, **_):
        commands.append(words)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(run.subprocess, "run", fail)
    monkeypatch.setattr(run, "cells_of", lambda _: tiny.cells)
    return commands


def test_rows(tiny):
    """The final return, score and data of each run that has ended."""
    rows = run.read_table(tiny.args.results_dir / "tiny.csv")
    assert list(rows.index) == tiny.cells[:2]
    final = np.load(tiny.folder / "final_returns.npy")
    assert final.shape == (2, 1000)
    score = 100 * (final.mean(axis=1) - 159.8) / (516.8 - 159.8)
    data = [d["rews"].astype(float).reshape(3, -1, 25).sum(axis=2).mean(axis=0) for d in tiny.data]
    wanted = {"return": final.mean(axis=1), "score": score}
    wanted |= {"data_return": [x.mean() for x in data], "data_sd": [x.std() for x in data]}
    for key, values in wanted.items():
        assert rows[key].tolist() == pytest.approx(values, abs=0.006)
    assert rows[["updates", "num_seeds"]].values.tolist() == [[3, 2], [3, 2]]


def test_curves(tiny):
    """Every evaluation of each seed; the last is the row's score, the highest its best."""
    rows = run.read_table(tiny.args.results_dir / "tiny.csv")
    curves = run.read_table(tiny.args.results_dir / "tiny_curves.csv")
    for cell in tiny.cells[:2]:
        curve = curves.loc[[cell]]
        assert curve.step.tolist() == [2, 3]
        assert curve.score.iloc[-1] == rows.score[cell]
        assert curve.score.max() == rows.best_score[cell]


def test_failure(tiny):
    """The line names the command, its exit status and the reason that its log ends with."""
    _, line = tiny.stop.splitlines()
    words, folder = run.command(tiny.cells[2:], tiny.args)
    assert line.startswith(" ".join(words))
    reason = folder.with_suffix(".log").read_text().splitlines()[-1]
    assert line.endswith(f"exit status 1, {reason}")
    assert "acs_1.npy cannot be used" in reason


def test_size_of_data_that_are_made(tmp_path, monkeypatch):
    """Missing data are as large as asked for, a replay as always; a failure names its command."""
    calls = []

    def collect(words, **_):
        calls.append(" ".join(words))
        return SimpleNamespace(returncode=len(calls) // 3)

    monkeypatch.setattr(run.subprocess, "run", collect)
    folders = dict.fromkeys(("run_dir", "data_dir", "results_dir"), tmp_path)
    with pytest.raises(SystemExit, match="quality medium-replay"):
        run.main(run.Args(grid="published", num_transitions=50, **folders))
    assert ["--num-transitions 50" in call for call in calls] == [True, True, False]


def test_finished_cells_are_not_run(tiny, no_training):
    """A second call tries what has failed alone, and leaves the results as they are."""
    files = {path: path.read_bytes() for path in tiny.args.results_dir.iterdir()}
    with pytest.raises(SystemExit, match="exit status 1"):
        run.main(tiny.args)
    assert no_training == [run.command(tiny.cells[2:], tiny.args)[0]]
    assert {path: path.read_bytes() for path in tiny.args.results_dir.iterdir()} == files


def test_lost_results_come_from_the_runs(tiny, no_training, monkeypatch, tmp_path):
    """Without the tables, those of the finished runs are made again from their folders."""
    monkeypatch.setattr(run, "cells_of", lambda _: tiny.cells[:2])
    run.main(run.Args(**vars(tiny.args) | {"results_dir": tmp_path}))
    assert no_training == []
    for name in ("tiny.csv", "tiny_curves.csv"):
        assert (tmp_path / name).read_bytes() == (tiny.args.results_dir / name).read_bytes()


def test_machines_of_finished_cells_are_kept(tmp_path):
    """A grid that goes on elsewhere names both; one that starts anew forgets what was there."""
    path, known = tmp_path / "grid.json", []
    for number, goes_on in ((2, False), (1, True), (2, True), (1, False)):
        run.write_machine(path, run.Args(workers=number), goes_on)
        known.append(json.loads(path.read_text())["workers"])
    assert known == [2, "2 and 1", "2 and 1", 1]


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray(make_data, tmp_path):
    """Through a Ray instance of its own: one missing cell works, the other fails and is named."""
    make_data(tmp_path / "data", *MEDIUM, 500)
    make_data(tmp_path / "data", *REPLAY, 50)
    tmp_path.joinpath("data", *REPLAY, "seed_0_data/acs_1.npy").unlink()
    missing = [run.Cell("bc", *data, 0, "learning-rate", "0.003") for data in (MEDIUM, REPLAY)]
    done = [cell for cell in run.cells_of("tune") if cell not in missing]
    (results := tmp_path / "results").mkdir()
    run.write_table(results / "tune.csv", pd.DataFrame(done).assign(score=0))
    run.write_table(results / "tune_curves.csv", pd.DataFrame(done).assign(step=1, score=0))
    line = "--grid tune --ray local --num-updates 6 --results-dir results --data-dir data"
    words = [sys.executable, ROOT / "benchmark" / "run.py", *line.split(), "--run-dir", "runs"]
    env = {**os.environ, "HOME": str(tmp_path)}  # Ray keeps a token there
    process = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    _, problems = process.stderr.split("error: these runs have failed", 1)
    assert "--task simple_tag --quality medium-replay" in problems
    assert "acs_1.npy cannot be used" in problems
    rows = run.read_table(results / "tune.csv")
    assert set(rows.index) == {*done, missing[0]}
    assert json.loads((results / "tune.json").read_text())["workers"] is None


def test_estimate():
    """Mean and half the interval, against all the samples that a bootstrap can draw."""
    assert report.estimate([]) == "-"
    assert report.estimate([-0.04]) == "0.0"
    assert report.estimate([0, 3, 6]) == "3.0 ± 3.0"  # all alike: 1 in 27, more than 2.5 %
    values = [3.0, 1.0, 4.0, 1.5, 9.0]
    exact = np.percentile([np.mean(draw) for draw in product(values, repeat=5)], (2.5, 97.5))
    assert report.interval(values) == pytest.approx(exact, abs=0.11)


def test_averages():
    """They are over the seeds that have all datasets."""
    rows = pd.DataFrame(run.MPE, columns=["task", "quality"]).assign(method="bc", seed=0, score=51)
    rows = pd.concat([rows, rows.assign(seed=1, score=53), rows[1:].assign(seed=2, score=55)])
    rows["data"] = rows.task + " " + rows.quality
    assert report.averages(rows, "bc", "mpe") == [51, 53]
    assert report.averages(rows[rows.seed == 2], "bc", "mpe") == []


def test_against(monkeypatch):
    """Differences, datasets and pairs that OM2P wins, of seeds that both have; a tie is half."""
    rows = pd.DataFrame(
        product(report.draw.LOOKS, (0, 1), ("a", "b")), columns=["method", "seed", "data"]
    )
    rows["score"] = 50.0 + 10 * (rows.method == "om2p") * (rows.data == "a")
    fql = rows.method == "fql"
    rows.loc[fql, "score"] = [40.0, 56.0, 80.0, 48.0]
    rows = rows[(rows.method != "bc") | (rows.seed == 0)]
    monkeypatch.setattr(report, "read", lambda _: rows)
    lines = {cells[1]: cells[2:5] for cells in map(split_row, report.against_table().splitlines())}
    assert lines["MA-TD3+BC"] == ["5.0 ± 0.0", "1 of 2", "75.0 ± 0.0"]
    assert lines["BC"] == ["5.0", "1 of 2", "75.0"]
    assert lines["FQL"] == ["-1.0 ± 8.0", "0 of 2", "50.0 ± 0.0"]


def test_conservative(monkeypatch):
    """Rows without the term and with it, of the same seeds, unless there are none."""
    rows = pd.DataFrame(run.MPE, columns=["task", "quality"])
    rows["data"], rows["score"] = rows.task + " " + rows.quality, 3.0 * rows.index
    rows["data_score"] = 2.0 * rows.index
    pairs = product(("om2p", "fql"), range(3))
    rows = pd.concat([rows.assign(method=m, seed=s) for m, s in pairs], ignore_index=True)
    changed = rows[rows.seed < 2].assign(score=rows.score + 1)
    tables = {"mpe.csv": rows.assign(score=rows.score + 9 * (rows.seed == 2))}
    monkeypatch.setattr(report, "read", lambda name: tables.get(name, changed))
    monkeypatch.setattr(report, "machine_line", lambda _: "")

    def lines():
        return [split_row(line)[1:-1] for line in report.conservative_table().splitlines()[2:]]

    names = [*map(list, product(("OM2P", "FQL"), ("without", "with")))]
    *found, data = lines()
    assert data == ["the data", "", "8.0", "10.0", "12.0", "14.0", "11.0", ""]
    assert [row[:2] for row in found] == names
    plain, more = (
        [f"{x:.1f} ± 0.0" for x in (12 + k, 15 + k, 18 + k, 21 + k, 16.5 + k)] for k in (0, 1)
    )
    assert [row[2:-1] for row in found] == [more, plain, plain, more]
    assert [row[-1] for row in found] == [f"{x} ± 0.0" for x in ("1.0", "0.0", "0.0", "1.0")]
    changed = changed[changed.method == "fql"]
    assert [row[:2] for row in lines()[:-1]] == names[1:]


def test_two_networks_table(monkeypatch):
    """OM2P and FQL of the seeds that have two networks, and the gain; no rows of other seeds."""
    rows = pd.DataFrame(run.MPE, columns=["task", "quality"])
    rows["data"], rows["score"] = rows.task + " " + rows.quality, 3.0 * rows.index
    rows["data_score"] = 7.0
    pairs = product(("om2p", "fql"), range(3))
    rows = pd.concat([rows.assign(method=m, seed=s) for m, s in pairs], ignore_index=True)
    rows.loc[rows.seed == 2, "score"] += 50
    new = rows[(rows.seed < 2) & (rows.method == "om2p")].assign(score=rows.score + 2)
    tables = {"mpe.csv": rows, "two_networks.csv": new}
    monkeypatch.setattr(report, "read", tables.get)
    monkeypatch.setattr(report, "machine_line", lambda _: "")
    table = [split_row(line)[1:-1] for line in report.two_networks_table().splitlines()[2:]]
    assert [(row[0], row[-2], row[-1]) for row in table] == [
        ("OM2P", "16.5 ± 0.0", ""),
        ("FQL", "16.5 ± 0.0", ""),
        ("OM2P", "18.5 ± 0.0", "2.0 ± 0.0"),
        ("the data", "7.0", ""),
    ]


def test_standardised(monkeypatch):
    """Both kinds of observations, of the seeds that have both, and the gain; for whom both ran."""
    rows = pd.DataFrame({"quality": run.QUALITIES}).assign(task="Hopper-3x1")
    rows["data_score"] = rows["score"] = 4.0 * rows.index
    others = rows.assign(task="Ant-2x4", data_score=99.0, score=99.0)
    rows = pd.concat([rows, others], ignore_index=True)
    rows["data"] = rows.task + " " + rows.quality
    pairs = product(("om2p", "bc", "fql"), range(3))
    rows = pd.concat([rows.assign(method=m, seed=s) for m, s in pairs], ignore_index=True)
    rows.loc[rows.seed == 2, "score"] += 50
    new = rows[(rows.seed < 2) & (rows.method != "fql")].assign(score=rows.score + 2)
    new = new[(new.method == "om2p") | (new.quality != "random")]
    tables = {"robots.csv": rows, "robots_standardised.csv": new}
    monkeypatch.setattr(report, "read", tables.get)
    monkeypatch.setattr(report, "machine_line", lambda _: "")
    table = report.TABLES["standardised_hopper"]().splitlines()[2:]
    cells = [[f"{x}.0 ± 0.0" for x in (k, 4 + k, 8 + k, 12 + k, 6 + k)] for k in (0, 2)]
    assert [split_row(line)[1:-1] for line in table] == [
        ["OM2P", "as recorded", *cells[0], ""],
        ["OM2P", "standardised", *cells[1], "2.0 ± 0.0"],
        ["the data", "", "0.0", "4.0", "8.0", "12.0", "6.0", ""],
    ]


def test_suite_table(monkeypatch):
    """Averages at the end, of the best, of the last third, and of the same seeds' shorter runs."""
    rows = pd.DataFrame(run.TUNING_DATA, columns=["task", "quality"])
    rows["data"], rows["updates"] = rows.task + " " + rows.quality, 9
    rows = pd.concat([rows.assign(method="om2p", seed=s, score=40.0 + s) for s in range(3)])
    curves = pd.concat([rows.assign(step=k, score=rows.score - (9 - k) ** 2) for k in range(1, 10)])
    rows["data_score"], rows["best_score"] = 7.0, rows.score + 5
    tables = {"mpe_long.csv": rows[rows.seed < 2], "mpe.csv": rows.assign(score=rows.score - 20)}
    tables["mpe_long_curves.csv"] = curves[curves.seed < 2]
    monkeypatch.setattr(report, "read", tables.get)
    monkeypatch.setattr(report, "machine_line", lambda _: "")
    table = report.TABLES["mpe_long"]().splitlines()[2:]
    assert split_row(table[0])[1:-1] == ["simple_spread", "medium", "7.0", "**40.5 ± 0.5**"]
    late = 40.5 - (0 + 1 + 4) / 3
    ends = {"average": "**40.5 ± 0.5**", "average, best in training": "45.5 ± 0.5"}
    ends["average, last third of training"] = f"{late:.1f} ± 0.5"
    ends["average, 9 updates on 100,000 transitions"] = "20.5 ± 0.5"
    assert {row[1]: row[4] for row in map(split_row, table[4:])} == ends


def split_row(line: str) -> list[str]:
    """The cells of a table's row, with what is before and behind it."""
    return [cell.strip() for cell in line.split("|")]


def test_pages_have_all_tables():
    """They are as `report.py` makes them, each on one page, unless they have no results yet."""
    text = "".join(page.read_text() for page in report.PAGES)
    places = re.findall(r"<!-- table (\w+) -->\n(.*?)<!-- end -->", text, flags=re.S)
    assert sorted(name for name, _ in places) == sorted(report.TABLES)
    for name, old in places:
        if "cuda" not in name or (report.RESULTS / "efficiency_cuda_compiled.csv").exists():
            assert old == report.TABLES[name]() + "\n", name


def test_equal_times():
    """The updates of the grid equal_time are those that the rates of the scripts' defaults gave."""
    rates = report.cost_rows("epyc", "default").updates_per_second
    for cell in run.cells_of("equal_time"):
        name = cell.method + report.DEFAULT_STEPS[cell.method]
        script, settings = efficiency.METHODS[name]
        assert settings.items() <= vars(importlib.import_module(f"{script}_mpe").Args()).items()
        assert int(cell.value) == pytest.approx(4_000 * rates[name] / rates["om2p"], rel=0.05)


def test_two_processors():
    """OM2P's updates per second over a method's, on each processor, in each part."""
    header, _, *lines = map(split_row, report.two_cpus_table().splitlines())
    row = next(row for row in lines if row[1] == "FQL, 10 steps")
    for words, part in (("equal networks", "equal"), ("the scripts' defaults", "default")):
        for name, kind in (("Intel", "cpu"), ("AMD EPYC", "epyc")):
            rates = report.read(f"efficiency_{kind}.csv").query(f"part == '{part}'")
            rates = rates.set_index("method").updates_per_second
            found = float(row[header.index(f"{words}, {name}")])
            assert found == pytest.approx(rates["om2p"] / rates["fql-10"], rel=0.005)


def test_main(tmp_path, monkeypatch, capsys):
    """Tables and line counts are written; what has no results is named, and left as it is."""
    page = tmp_path / "README.md"
    place = "<!-- table {} -->\n{}\n<!-- end -->\n"
    line = "| [`run.csv`](run.csv) | x | {} |\n"
    page.write_text(place.format("chaos", "old") + place.format("tune", "old") + line.format(7))
    (tmp_path / "run.csv").write_text("a\nb\n")
    (tmp_path / "chaos.csv").write_text("what,kills\nom2p,4\n")
    monkeypatch.setattr(report, "PAGES", [page])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.main()
    table = place.format("chaos", report.TABLES["chaos"]()) + place.format("tune", "old")
    assert page.read_text() == table + line.format(2)
    assert "left as they are: tune, learning_curves.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in report.FIGURES if "cuda" not in name])
def test_figures(name):
    """Each can be drawn from the results."""
    assert report.FIGURES[name]().axes


def test_flow_of_the_sketch():
    """The drawn paths end in actions that are distributed like the data."""
    noise = np.random.default_rng(0).standard_normal(2_000)
    actions = sketch.follow(noise, 500)[-1]
    near = np.abs(actions[:, None] - sketch.MODES) < 4 * sketch.SPREAD
    assert near.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.03)
    kind = actions[near[:, 1]]
    assert kind.mean() == pytest.approx(sketch.MODES[1], abs=0.02)
    assert kind.std() == pytest.approx(sketch.SPREAD, rel=0.15)


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
    for loss, time in ((variants.no_derivative_loss, r), (variants.released_loss, t)):
        u = policy(obs, (1 - time) * noise + time * action, r, t)
        expected = (u - (action - noise)).square().sum() / 16  # mean over (8, 2), sum over agents
        torch.testing.assert_close(loss(policy, obs, action, noise, r, t), expected)


def test_q_at_noise():
    """The Q term acts on the policy's own actions, wherever the paths of the flow loss are."""
    policy, obs, action, _ = make_variant(MeanFlowPolicy)
    policy.act = lambda obs: 0.1 * torch.ones(2, 8, 2)
    seen, batch = [], {"obs": obs, "action": action}

    def critic(_, action):
        seen.append(action)
        return -action.sum(dim=-1).expand(2, 2, 8)

    loss, parts = variants.q_at_noise_loss(policy, critic, batch, om2p_mpe.Args(q_weight=3.0))
    assert torch.equal(seen[-1], 0.1 * torch.ones(2, 8, 2))
    torch.testing.assert_close(loss, parts["mean_flow"] + 3.0 * 2)  # -|Q| / |Q| of both agents


def test_actions_of_variants():
    """The release acts with u alone; the penalty's policy keeps the ends of paths unclipped."""
    policy, released, free = (
        make_variant(kind)[0]
        for kind in (MeanFlowPolicy, variants.ReleasedPolicy, variants.FreePolicy)
    )
    _, obs, _, noise = make_variant(MeanFlowPolicy)
    u = policy(obs, 3 * noise, torch.zeros(2, 8, 1), torch.ones(2, 8, 1))
    torch.testing.assert_close(released.act(obs, 3 * noise), u.clamp(-1, 1))
    torch.testing.assert_close(free.act(obs, 3 * noise), policy.act(obs, 3 * noise))
    torch.testing.assert_close(free.free, 3 * noise + u)
    free(obs, noise, torch.full((2, 8, 1), 0.5), torch.ones(2, 8, 1))
    half = policy(obs, noise, torch.full((2, 8, 1), 0.5), torch.ones(2, 8, 1)) / 2
    torch.testing.assert_close(free.free, noise + half)


def test_two_networks():
    """The second network, half as wide, sees the observation, and grows with the interval."""
    policy, obs, x, _ = make_variant(MeanFlowPolicy)
    two = make_variant(variants.TwoNetworks)[0]
    r, t = torch.rand(2, 2, 8, 1).sort(dim=0).values
    added = two(obs, x, r, t) - policy(obs, x, r, t)
    torch.testing.assert_close(added, (t - r) * two.shift(obs))
    torch.testing.assert_close(two(obs, x, t, t), policy(obs, x, t, t))
    assert two.shift[1].weight.shape == (2, 3, policy.net[1].weight.shape[-1] // 2)
    assert added.abs().max() > 0.01


def test_smaller_q():
    """The target is that of the lower of two critics, whichever it is for an action."""
    policy, obs, action, _ = make_variant(MeanFlowPolicy)
    zeros, q = torch.zeros(2, 8), torch.randn(2, 2, 8)
    batch = {"obs": obs, "action": action, "reward": zeros, "next_obs": obs, "done": zeros}
    loss = variants.CHANGES["smaller-q"]["critic_loss"]
    found, _ = loss(lambda *_: torch.zeros(2, 2, 8), lambda *_: q, policy, batch, 0.5)
    torch.testing.assert_close(found, 2 * (0.5 * q.amin(dim=0)).square().mean(dim=-1).sum())


def test_rivals_with_om2ps_conservative_term():
    """0.1 softplus(Q(o, a') - Q(o, a)) with one uniform action, on top of a method's own loss."""
    policy, obs, action, _ = make_variant(MeanFlowPolicy)
    policy.mask, seen = torch.tensor([1.0, 0.0]).expand(2, 1, 2), []
    q = torch.randn(2, 2, 8)

    def critic(obs, action):
        seen.append(action)
        return action.sum(dim=-1).expand(2, 2, 8)

    args = critic, None, policy, {"obs": obs, "action": action}, 0.5, torch.amin
    found, same = variants.cql_critic_loss(lambda *given: (len(given), q), *args)
    other = seen.pop()
    assert same is q
    assert not seen
    assert 0.5 < other[..., 0].abs().max() <= 1
    assert not other[..., 1].any()
    gap = other.sum(dim=-1) - q
    torch.testing.assert_close(found, 6 + 0.1 * gap.exp().log1p().mean(dim=-1).sum())


@pytest.mark.parametrize(
    ("words", "loss"),
    [("--variant conservative", "conservative_critic_loss"), ("--variant cql --method=fql", "")],
)
def test_variant_trains(words, loss, make_data, tmp_path, monkeypatch):
    """The command line trains the variant, under a run directory of its own."""
    make_data(tmp_path / "data")
    script = om2p_mpe if loss else importlib.import_module("fql_mpe")
    for name in ("critic_loss", "__file__"):  # what it changes is changed back
        monkeypatch.setattr(script, name, getattr(script, name))
    line = f"{words} --num-updates 2 --eval-episodes 2 --hidden-dims 8 --no-compile"
    monkeypatch.setattr(sys, "argv", ["variants.py", *line.split()])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(variants.__file__, run_name="__main__")
    (folder,) = tmp_path.glob("runs/simple_spread-expert/variants/seed-0")
    assert "conservative_critic_loss" in (folder / "variants.py").read_text()
    changed = script.critic_loss
    assert getattr(changed, "func", changed).__name__ == (loss or "cql_critic_loss")


@pytest.mark.parametrize("words", ["--variant cql", "--variant penalty --method fql"])
def test_variants_of_other_methods(words, monkeypatch):
    """OM2P has OM2P's variants, others have the conservative term."""
    monkeypatch.setattr(sys, "argv", ["variants.py", *words.split()])
    assert "--variant cql is for all methods but om2p" in refusal(variants.main)


def test_mixed_conventions():
    """Every agent's action is that of the team that it has chosen, with the data's noise."""
    acts = [lambda obs, sd, k=k: obs[..., :2] + 10 * k + (sd - 0.1) for k in range(3)]
    teams = [SimpleNamespace(act=act) for act in acts]
    number, obs = torch.tensor([[0, 2, 1], [2, 0, 0]]), torch.rand(2, 3, 4)
    policy = conventions.Mixed(teams, lambda actions: conventions.pick(actions, number))
    torch.testing.assert_close(policy.act(obs), obs[..., :2] + 10 * number[..., None])


def test_table_of_conventions(monkeypatch, tmp_path):
    """Fewer episodes give the returns of the table, within five standard errors."""
    monkeypatch.setattr(conventions, "ROOT", tmp_path)
    monkeypatch.setattr(conventions, "EPISODES", 300)
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    conventions.main()
    name = "benchmark/results/conventions.csv"
    few, many = (pd.read_csv(root / name)["return"].tolist() for root in (tmp_path, ROOT))
    assert few == pytest.approx(many, abs=30)


def test_several_steps():
    """One step is the policy's own action; two follow u over each half of the path."""
    policy, obs, _, _ = make_variant(MeanFlowPolicy)
    torch.manual_seed(1)
    noise, whole = torch.randn(2, 8, 2), torch.ones(2, 8, 1)
    x = noise + policy(obs, noise, 0 * whole, whole / 2) / 2
    x = x + policy(obs, x, whole / 2, whole) / 2
    for number, expected in ((1, policy.act(obs, noise)), (2, x.clamp(-1, 1))):
        torch.manual_seed(1)
        torch.testing.assert_close(several.SeveralSteps(policy, number).act(obs), expected)


def test_find_team(tiny):
    """The team of a seed is found in the run of several; a seed without a run is an error."""
    team = several.find_team(tiny.folder.parent, 1, 5)
    weights = torch.load(tiny.folder / "policy.pt")["net.1.weight"]
    torch.testing.assert_close(team.policy.net[1].weight, weights[3:])
    assert (team.seed, team.env.num_episodes) == (1, 5)
    assert "seed 2" in refusal(several.find_team, tiny.folder.parent, 2, 5)


def test_picture(tiny, tmp_path):
    """Each run is a row of panels."""
    picture.main(picture.Args((tiny.folder, tiny.folder), tmp_path / "team.png", episodes=2))
    assert (tmp_path / "team.png").stat().st_size > 10_000


def test_acting():
    """By the mean of each observation's own actions, whose variance is recorded, plus noise."""
    policy = SimpleNamespace(
        act=lambda obs: 0.1 * obs[..., :2] + (torch.arange(obs.shape[1])[:, None] % 2) / 2
    )
    obs = torch.rand(2, 50_000, 3)
    acting = noise.Acting(policy, samples=2, noise_sd=0.01)
    rest = acting.act(obs) - (0.1 * obs[..., :2] + 0.25)
    assert math.isclose(rest.std(), 0.01, rel_tol=0.02)
    assert math.isclose(rest.mean(), 0, abs_tol=0.001)
    assert acting.variances == pytest.approx([1 / 16])


def test_noise_of_a_grid(tiny, tmp_path, monkeypatch):
    """Teams come from the grid's own folders, and play as trained, by their mean, or with noise."""
    monkeypatch.setattr(noise, "ROOT", tmp_path)
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    team, places = several.find_team(tiny.folder.parent, 1, 5), []
    team.policy = SimpleNamespace(act=lambda obs: torch.rand(3, obs.shape[1], 2))
    monkeypatch.setattr(noise, "find_team", lambda *place: places.append(place) or team)
    noise.main(noise.Args("mpe_long", tmp_path, ("om2p", "td3_bc"), (1,)))
    name = "mpe_long/simple_world-expert/td3_bc_mpe-num-updates-eval-interval-20000-2000"
    assert places[-1] == (tmp_path / name, 1, 1_000)
    rows = pd.read_csv(tmp_path / "benchmark/results/noise_mpe_long.csv")
    assert len(rows) == 2 * 4 * 2
    plain = rows.acting == "as trained"
    scores = rows[plain].groupby("task").score  # of the same team and start states
    assert (scores.nunique() == 1).all()
    assert not (rows[~plain].score == rows[~plain].task.map(scores.first())).any()
    sampled = rows.acting == "mean of 16 actions"
    assert set(rows[sampled].method) == {"om2p"}
    assert (rows[sampled].spread > 0).all()
    assert not rows[~sampled].spread.any()


def test_linear_share():
    """One for a linear function with an offset, zero for an even one, half for the sum of both."""
    obs = torch.randn(2, 20_000, 1)
    odd, even = 3 * obs + 1, obs.square() * 3 / math.sqrt(2)
    for values, share in ((odd, 1), (even, 0), (odd + even, 0.5)):
        assert math.isclose(frozen_critic.linear_share(obs, values), share, abs_tol=0.05)


def test_policies_on_a_frozen_critic(make_data, tmp_path, monkeypatch):
    """Every policy learns from the same critic, which stays as it is; all are measured."""
    monkeypatch.setattr(frozen_critic, "ROOT", tmp_path)
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    make_data(tmp_path / "data", quality="random")
    methods = ("om2p --cql-alpha 0 --q-weight 3", "omar", "fql")
    places = {"data_dir": tmp_path / "data", "run_dir": tmp_path / "runs"}
    frozen_critic.main(frozen_critic.Args(methods, (0,), num_updates=3, episodes=4, **places))
    rows = pd.read_csv(tmp_path / "benchmark" / "results" / "frozen_critic.csv")
    assert rows.method.tolist() == ["critic", *methods]
    assert rows.linear.between(0, 1).all()
    parts = [torch.load(path)["parts"] for path in tmp_path.rglob("checkpoint.pt")]
    assert len(parts) == 4
    for part in parts[1:]:
        torch.testing.assert_close(part[1], parts[0][1], rtol=0, atol=0)


def test_steepness():
    """Of a critic that is linear in the action, without the padding's share."""
    slope, mask = torch.tensor([3.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]).expand(2, 1, 3)
    action = 0.1 * torch.rand(2, 50, 3)
    obs = torch.tensor([[[-1.0]], [[3.0]]]).expand(2, 50, 1)  # Q is near -10 and 30

    def critic(obs, action):
        q = 10 * obs.squeeze(-1) + (action - action.detach()) @ slope
        return torch.stack([q + 1, q - 1])

    size, steep = q_scale.steepness(critic, obs, action, mask)
    assert math.isclose(size, 20, rel_tol=1e-5)
    assert math.isclose(steep, (5 / 10 + 5 / 30) / 2, rel_tol=1e-5)


def test_q_scale(make_data, make_mujoco_data, tmp_path, monkeypatch):
    """Rows of runs, of one seed and two: their weights, and moves for two action dims and one."""
    make_data(tmp_path / "data", *MEDIUM, 200)
    for seed in (0, 1):
        make_mujoco_data(tmp_path / "data", "Reacher-2x1", "medium", 200, seed)
    line = "--quality medium --num-updates 2 --eval-episodes 1 --device cpu --batch-size 8 "
    line += f"--hidden-dims 8 8 --data-dir {tmp_path / 'data'} --run-dir {tmp_path / 'runs'}"
    folders = []
    for name, words in (
        ("om2p_mpe", f"--task {MEDIUM[0]} --q-weight 3000"),
        ("td3_bc_mamujoco", "--task Reacher-2x1 --q-weight 7000 --num-seeds 2"),
    ):
        script = importlib.import_module(name)
        script.train(tyro.cli(script.Args, args=[*line.split(), *words.split()]))
        folders += tmp_path.glob(f"runs/*/{name}/seed-*")
    monkeypatch.setattr(q_scale, "ROOT", tmp_path)
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    q_scale.main(q_scale.Args(tuple(folders)))
    rows = pd.read_csv(tmp_path / "benchmark" / "results" / "q_scale.csv")
    assert rows.method.tolist() == ["om2p", "td3_bc"]
    assert rows.q_weight.tolist() == [3000, 7000]
    moves = rows.q_weight * rows.steepness * [1, 0.5]
    assert rows.move.tolist() == pytest.approx(moves.tolist(), rel=0.01, abs=0.05)
    assert rows.move.min() > 1


def test_replay(monkeypatch):
    """Curves of the two sizes of one dataset, the smaller first, of methods that have both."""
    keys = {"method": "om2p", "data": "a", "seed": 0}
    large = pd.DataFrame([keys | {"step": k * 1_000, "score": k} for k in (4, 8, 14, 20)])
    small = pd.concat([large.assign(score=50), large.assign(data="b", score=90)])
    tables = {"replay_curves.csv": large, "mpe_long_curves.csv": small}
    monkeypatch.setattr(report, "read", tables.get)
    rows = [split_row(line)[2:-1] for line in report.TABLES["replay"]().splitlines()[2:]]
    assert rows == [["100,000", *["50.0"] * 4], ["1,000,000", "4.0", "8.0", "14.0", "20.0"]]

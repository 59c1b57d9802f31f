"""Put tables and figures of all README.md together from the files under benchmark/results/.

    python benchmark/report.py

A table stands in one README.md between `<!-- table NAME -->` and `<!-- end -->` and is replaced
there; figures go to benchmark/figures/. What has no results yet is named, and left as it is.
"""

import csv
import importlib.util
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import om2p_mamujoco  # noqa: E402
import om2p_mpe  # noqa: E402

PAGES = tuple(ROOT / folder / "README.md" for folder in ("", "baselines", "benchmark"))
RESULTS = ROOT / "benchmark" / "results"
FIGURES = ROOT / "benchmark" / "figures"
PUBLIC_RETURNS = om2p_mpe.PUBLIC_RETURNS | om2p_mamujoco.PUBLIC_RETURNS
TASKS = tuple(om2p_mpe.PUBLIC_RETURNS)
QUALITIES = ("expert", "medium", "medium-replay", "random")
DATASETS = {  # of the suites, and of the grids and files of their names
    "mpe": tuple(product(TASKS, QUALITIES)),
    "mamujoco": tuple(product(om2p_mamujoco.PUBLIC_RETURNS, QUALITIES)),
}
METHODS = {  # name; colour, Okabe and Ito's for all eyes, and line in the figures
    "om2p": ("OM2P", "#D55E00", "-"),
    "bc": ("BC", "#999999", "--"),
    "td3_bc": ("MA-TD3+BC", "#0072B2", "-"),
    "omar": ("OMAR", "#56B4E9", "--"),
    "diffusion_ql": ("Diffusion-QL", "#009E73", "-"),
    "dom2": ("DOM2", "#000000", "--"),
    "flow_ql": ("Flow-QL", "#CC79A7", "-"),
    "fql": ("FQL", "#E69F00", "--"),
}
COSTS_OF_DEFAULTS = {method: method for method in METHODS} | {  # in benchmark/efficiency.py
    "diffusion_ql": "diffusion_ql-5",
    "dom2": "dom2-5",
    "flow_ql": "flow_ql-10",
    "fql": "fql-10",
}
GRIDS = {  # of benchmark/run.py
    "mpe": "all methods on the particle environments",
    "mamujoco": "all methods on HalfCheetah-2x3",
    "equal_time": "the multi-step policies, each for as long as OM2P's 4,000 updates take",
    "tune": "every method's main settings, on four datasets of the particle environments",
    "tune_mamujoco": "every method's main setting, on two datasets of HalfCheetah-2x3",
    "ablation": "OM2P without or with other ideas",
    "ablation_mamujoco": "OM2P's weights, times and du/dr on HalfCheetah-2x3",
    "published": "MA-TD3+BC by OMAR's settings",
}
PUBLISHED = """
BC|35.0 / 31.6 / 10.0 / -0.5|40.0 / 22.5 / 0.9 / 1.2|33.0 / 25.3 / 2.3 / -2.4|[1]
MA-ICQ|104.0 / 29.3 / 13.6 / 6.3|113.0 / 63.3 / 34.5 / 2.2|109.5 / 71.9 / 12.0 / 1.0|[1]
MA-TD3+BC|108.3 / 29.3 / 15.4 / 9.8|115.2 / 65.1 / 28.7 / 5.7|110.3 / 73.4 / 17.4 / 2.8|[1]
MA-CQL|98.2 / 34.1 / 20.0 / 24.0|93.9 / 61.7 / 24.8 / 5.0|71.9 / 58.6 / 29.6 / 0.6|[1]
OMAR|114.9 / 47.9 / 37.9 / 34.4|116.2 / 66.7 / 47.1 / 11.1|110.4 / 74.6 / 42.9 / 5.9|[1]
MADiff-D|95.0 / 64.9 / 30.3 / 6.9|120.9 / 77.2 / 62.3 / 3.2|122.6 / 123.5 / 57.1 / 2.0|[1]
DOM2†|131.3 / 55.8 / 46.0 / 49.9|138.7 / 84.3 / 81.5 / 112.2|123.2 / 105.8 / 84.2 / 54.2|[2]
CFCQL|112 / 65.0 / 52.2 / 62.2|- / 68.5 / 71.1 / 78.5|- / - / - / -|[3]
MAC-Flow|101.7 / 80.1 / 50.4 / 31.1|- / - / - / -|- / - / - / -|[4]
CoFlow-D†|110.6 / 50.8 / 33.1 / 14.4|139.4 / 96.1 / 83.9 / 7.9|148.1 / 125.6 / 67.0 / 25.0|[5]
"""
SOURCES = {
    "[1]": "[MADiff](https://arxiv.org/abs/2305.17330) (NeurIPS 2024), Table 1, in part from OMAR",
    "[2]": "[2307.01472](https://arxiv.org/abs/2307.01472)",
    "[3]": "CFCQL (NeurIPS 2023)",
    "[4]": "[2511.05005](https://arxiv.org/abs/2511.05005), via MoSDOT",
    "[5]": "[2605.01457](https://arxiv.org/abs/2605.01457)",
}


# Rows and numbers


def read(name: str) -> list[dict]:
    """The rows of a result file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def group(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    """The rows by their values of some columns; an empty list where there are none."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return groups


def numbers(rows: list[dict], key: str) -> list[float]:
    """A column of the rows."""
    return [float(row[key]) for row in rows]


def averages(cells: dict, method: str, suite: str, key: str = "score") -> list[float]:
    """A method's average over a suite's datasets, one for every seed that has them all.

    `cells` are the rows by method, task and quality.
    """
    datasets = DATASETS[suite]
    columns = [{row["seed"]: float(row[key]) for row in cells[method, *d]} for d in datasets]
    seeds = sorted(set.intersection(*map(set, columns)))
    return [np.mean([column[seed] for column in columns]) for seed in seeds]


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float]:
    """The ends of the mean's 95 % bootstrap interval (percentiles)."""
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    return tuple(np.percentile(means, (2.5, 97.5)))


def mean(values: list[float]) -> str:
    """The mean as text, never -0.0; a dash if there is nothing."""
    return f"{round(float(np.mean(values)), 1) + 0.0:.1f}" if values else "-"


def estimate(values: list[float]) -> str:
    """Mean ± half the width of the 95 % interval; one value alone; a dash if there is none."""
    if len(values) < 2:
        return mean(values)
    low, high = interval(values)
    return f"{mean(values)} ± {mean([(high - low) / 2])}"


def highlight(columns: list[list[float]], text: Callable) -> list[str]:
    """`text` of every list of values; the highest means, equal as printed, are bold."""
    best = max((float(mean(values)) for values in columns if values), default=None)
    return [
        f"**{text(values)}**" if values and float(mean(values)) == best else text(values)
        for values in columns
    ]


def markdown(header: tuple, rows: list) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine_line(grid: str) -> str:
    """What a grid ran on; what a run costs is measured by benchmark/efficiency.py, side by side."""
    machine = json.loads((RESULTS / f"{grid}.json").read_text())
    place = "" if machine["device"] == "cpu" else f", {machine['device']}"
    number = machine["workers"]  # none with Ray
    workers = f"{number} run{'s' * (number != 1)} at a time" if number else "runs spread by Ray"
    number = max(int(row["num_seeds"]) for row in read(f"{grid}.csv"))
    joint = f", up to {number} seeds in one" if number > 1 else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores{place}, {workers} with one thread each"
        f"{joint}, torch {machine['torch']}."
    )


# Tables


def suite_cells(suite: str) -> tuple[dict, dict, dict]:
    """A suite's grid: rows by method, task, quality; one a seed of every dataset; methods' names.

    A method without any row is left out.
    """
    rows = read(f"{suite}.csv")
    cells, present = group(rows, "method", "task", "quality"), group(rows, "method")
    data = {(row["task"], row["quality"], row["seed"]): row for row in rows}
    names = {method: look[0] for method, look in METHODS.items() if (method,) in present}
    return cells, group(data.values(), "task", "quality"), names


def data_table() -> str:
    """Returns of our datasets beside the public ones."""
    rows = []
    for suite in (suite for suite in DATASETS if (RESULTS / f"{suite}.csv").exists()):
        _, data, _ = suite_cells(suite)
        for dataset in filter(data.get, DATASETS[suite]):
            ours, sd = (mean(numbers(data[dataset], key)) for key in ("data_return", "data_sd"))
            task, quality = dataset
            rows.append((task, quality, f"{ours} ± {sd}", PUBLIC_RETURNS[task][quality]))
    return markdown(("task", "quality", "ours, mean ± sd", "public, mean"), rows)


def prey_table() -> str:
    """Hunters' returns against our prey and the original."""
    rows = [tuple(r.values()) for t in ("tag", "world") for r in read(f"prey_simple_{t}.csv")]
    return markdown(tuple(read("prey_simple_tag.csv")[0]), rows)


def chaos_table() -> str:
    """What tests/chaos.py has killed, and what came of it."""
    rows = read("chaos.csv")
    return markdown(tuple(rows[0]), [tuple(row.values()) for row in rows])


def dataset_rows(suite: str, key: str, text: Callable) -> list[tuple]:
    """A row for every dataset: the data's `key` and that of every method, the highest bold."""
    cells, data, names = suite_cells(suite)
    return [
        (
            *dataset,
            mean(numbers(data[dataset], f"data_{key}")),
            *highlight([numbers(cells[method, *dataset], key) for method in names], text),
        )
        for dataset in DATASETS[suite]
    ]


def suite_table(suite: str) -> str:
    """Final scores of all methods on all datasets, and the seeds behind them where they differ."""
    cells, data, names = suite_cells(suite)
    means = highlight([averages(cells, method, suite) for method in names], estimate)
    average = ("average", "", data_average(data, suite), *means)
    rows = [*dataset_rows(suite, "score", estimate), average]
    table = markdown(("task", "data", "data's score", *names.values()), rows)
    counts = {method: {len(cells[method, *d]) for d in DATASETS[suite]} for method in names}
    lines = [table, machine_line(suite)]
    if len(set().union(*counts.values())) > 1:
        ranges = {m: " to ".join(map(str, sorted({min(n), max(n)}))) for m, n in counts.items()}
        seeds = ", ".join(f"{names[method]} {text}" for method, text in ranges.items())
        lines.append(f"Seeds so far: {seeds}; averages are over those that have all datasets.")
    return "\n\n".join(lines)


def data_average(data: dict, suite: str) -> str:
    """The average of the data's scores, each dataset counting once; a dash if one is missing."""
    scores = [numbers(data[dataset], "data_score") for dataset in DATASETS[suite]]
    return mean([np.mean(values) for values in scores]) if all(scores) else "-"


def results_line(method: str) -> str:
    """A method's final scores in one line, a sentence for each suite."""
    text = f"*Results*, {' / '.join(QUALITIES)}:"
    for suite in (suite for suite in DATASETS if (RESULTS / f"{suite}.csv").exists()):
        cells, _, names = suite_cells(suite)
        if method not in names:
            text += f" None yet on {', '.join(dict(DATASETS[suite]))}."
            continue
        scores = {d: mean(numbers(cells[method, *d], "score")) for d in DATASETS[suite]}
        tasks = (
            f"{task} {' / '.join(scores[task, quality] for quality in QUALITIES)}"
            for task in dict(DATASETS[suite])
        )
        average = estimate(averages(cells, method, suite))
        text += f" {', '.join(tasks)}" + ("." if average == "-" else f"; average {average}.")
    return text


def grids_table() -> str:
    """The runs of every grid so far, and the time that they took, evaluations included."""
    rows = []
    for name, what in GRIDS.items():
        if (RESULTS / f"{name}.csv").exists():
            runs = read(f"{name}.csv")
            hours = sum(float(row["seconds"]) / int(row["num_seeds"]) for row in runs) / 3600
            rows.append((f"`{name}`", what, len(runs), f"{hours:.1f}"))
    return markdown(("grid", "what it compares", "runs", "hours of one core"), rows)


def details_table() -> str:
    """What a method's runs end with, and reach in between."""
    cells, _, names = suite_cells("mpe")
    rows = []
    for method, name in names.items():
        runs = [row for dataset in DATASETS["mpe"] for row in cells[method, *dataset]]
        scores = (estimate(averages(cells, method, "mpe", k)) for k in ("score", "best_score"))
        updates = ", ".join(f"{count:,}" for count in sorted({int(r["updates"]) for r in runs}))
        rows.append((name, *scores, updates, len(runs)))
    header = ("method", "final score", "best score during training", "updates", "runs")
    return markdown(header, rows)


def equal_time_table() -> str:
    """Average scores with as many updates as OM2P, from the grid `mpe`, and with as much time."""
    cells, _, names = suite_cells("mpe")
    short = group(read("equal_time.csv"), "method", "task", "quality")
    updates = {method: int(rows[0]["updates"]) for (method, _, _), rows in short.items()}
    updates["om2p"] = int(cells["om2p", *DATASETS["mpe"][0]][0]["updates"])
    short |= {key: rows for key, rows in cells.items() if key[0] == "om2p"}
    methods = [method for method in names if method in updates]
    columns = [
        highlight([averages(part, method, "mpe") for method in methods], estimate)
        for part in (cells, short)
    ]
    own = updates["om2p"]
    rows = [
        (names[method], score, f"{own / updates[method]:.2f}", f"{updates[method]:,}", short_score)
        for method, score, short_score in zip(methods, *columns, strict=True)
    ]
    header = ("method", f"score after {own:,} updates", "their time, OM2P = 1")
    header += ("updates in OM2P's time", "score after these")
    return f"{markdown(header, rows)}\n\n{machine_line('equal_time')}"


def returns_table() -> str:
    """Final returns, mean over the seeds."""
    header = ("task", "data", "data's return", *suite_cells("mpe")[2].values())
    return markdown(header, dataset_rows("mpe", "return", mean))


def published_table() -> str:
    """Scores on the public data, from papers, and MA-TD3+BC here with the settings of OMAR's code.

    The file is that of the grid `published`.
    """
    rows = []
    for line in PUBLISHED.strip().splitlines():
        method, *scores, source = (cell.strip() for cell in line.split("|"))
        values = " / ".join(scores).split(" / ")
        average = "-" if "-" in values else mean([float(value) for value in values])
        rows.append((method, *scores, average, source))
    if (RESULTS / "published.csv").exists():
        ours = {(r["task"], r["quality"]): float(r["score"]) for r in read("published.csv")}
        scores = (" / ".join(mean([ours[task, q]]) for q in QUALITIES) for task in TASKS)
        name = "MA-TD3+BC, here, OMAR's settings"
        rows.append((name, *scores, mean([*ours.values()]), "`--grid published`, seed 0"))
    return (
        f"{markdown(('method', *TASKS, 'average', 'source'), rows)}\n\n"
        f"Each cell: {' / '.join(QUALITIES)}. Context, not a comparison: published scores are on "
        f"the public data, ours on re-collected data. †: converted from the returns that the paper "
        f"prints. "
        f"Sources: {', '.join(f'{mark} {text}' for mark, text in SOURCES.items())}."
    )


def change(setting: str, value: str) -> str:
    """A cell's change from the defaults, as on its command line."""
    pairs = zip(setting.split(), value.split(), strict=True)
    return " ".join(f"--{name} {value.replace(',', ' ')}" for name, value in pairs)


@cache
def is_default(method: str, words: str, suite: str = "mpe") -> bool:
    """Whether these words of a command line are no change of the method's script."""
    path = ROOT / ("" if method == "om2p" else "baselines") / f"{method}_{suite}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return tyro.cli(script.Args, args=words.split()) == script.Args()


def tune_table(grid: str, suite: str) -> str:
    """The settings tried for every method, the best of each and the chosen default marked."""
    rows = read(f"{grid}.csv")
    datasets, table = list(group(rows, "task", "quality")), []
    for (method,), runs in group(rows, "method").items():
        tried, means = [], []
        for (setting, value), cells in group(runs, "setting", "value").items():
            by_data = group(cells, "task", "quality")
            scores = [numbers(by_data[dataset], "score") for dataset in datasets]
            words = change(setting, value)
            mark = ", the default" if is_default(method, words, suite) else ""
            tried.append((f"`{words}`{mark}", *map(mean, scores)))
            means.append([np.mean([*map(np.mean, scores)])] if all(scores) else [])
        for k, (cells, average) in enumerate(zip(tried, highlight(means, mean), strict=True)):
            table.append(("" if k else METHODS[method][0], *cells, average))
    header = ("method", "changed setting", *map(" ".join, datasets), "mean")
    return f"{markdown(header, table)}\n\n{machine_line(grid)}"


def ablation_table(grid: str, suite: str) -> str:
    """Scores of OM2P with one of its ideas changed, on the MPE in several steps, and of the data.

    The defaults' runs are those of the suite's grid.
    """
    rows = read(f"{grid}.csv")
    datasets = list(group(rows, "task", "quality"))
    kept = [row for row in read(f"{suite}.csv") if row["method"] == "om2p"]
    changes = {"the defaults": kept}
    for (setting, value), runs in group(rows, "setting", "value").items():
        changes[f"`{change(setting, value)}`"] = runs
    if suite == "mpe" and (RESULTS / "steps.csv").exists():
        for (steps,), runs in group(read("steps.csv"), "steps").items():
            changes |= {f"the defaults, acting in {steps} steps": runs} if steps != "1" else {}
    table = []
    for name, runs in changes.items():
        cells = group(runs, "task", "quality")
        table.append((name, *(estimate(numbers(cells[dataset], "score")) for dataset in datasets)))
    cells = group(kept, "task", "quality")
    table.append(("the data", *(mean(numbers(cells[d], "data_score")) for d in datasets)))
    header = ("changed setting", *map(" ".join, datasets))
    return f"{markdown(header, table)}\n\n{machine_line(grid)}"


def noise_table() -> str:
    """HalfCheetah teams that act with less noise or with more: what the noise in the data costs."""
    table = []
    for (method, acting), runs in group(read("noise.csv"), "method", "acting").items():
        cells = group(runs, "quality")
        scores = [numbers(cells[(quality,)], "score") for quality in QUALITIES]
        average = mean([np.mean(values) for values in scores])
        spreads = " / ".join(f"{np.mean(numbers(cells[(q,)], 'spread')):.2f}" for q in QUALITIES)
        spreads = spreads if acting.startswith("mean") else "-"
        table.append((METHODS[method][0], acting, *map(estimate, scores), average, spreads))
    return markdown(("method", "acting", *QUALITIES, "average", "spread of the actions"), table)


def frozen_critic_table() -> str:
    """Teams whose policies learned from one frozen critic, beside what that critic prefers."""
    table = []
    for (method,), runs in group(read("frozen_critic.csv"), "method").items():
        name, *settings = method.split(maxsplit=1)
        name = {
            "critic": "best of 64 uniform actions by the critic",
            "om2p-split": "OM2P, a second network near (0, 1)",
        }.get(name) or METHODS[name][0]
        linear = f"{np.mean(numbers(runs, 'linear')):.2f}"
        table.append((", ".join([name, *map("`{}`".format, settings)]), linear))
        table[-1] += (estimate(numbers(runs, "score")),)
    return markdown(("policy", "linear share", "score"), table)


def cost_name(method: str) -> str:
    """A method of benchmark/efficiency.py, as in tables: with its steps, or what is changed."""
    name, _, change = method.partition("-")
    changes = {
        "jvp": ", du/dr exact by `jvp`",
        "jacobian": ", du/dr from the batch's Jacobian",
        "loop": ", agent by agent, nn.Linear",
    }
    steps = f", {change} steps" if change.isdigit() else ""
    return METHODS[name][0] + changes.get(change, steps)


def cost_rows(kind: str, part: str) -> dict[str, dict]:
    """The rows of one part of a result of benchmark/efficiency.py, by method."""
    rows = [row for row in read(f"efficiency_{kind}.csv") if row["part"] == part]
    rows = {row["method"]: row for row in rows}
    if "om2p" not in rows:
        raise SystemExit(f"error: efficiency_{kind}.csv lacks om2p {part}: measure all points")
    return rows


def times(row: dict, reference: dict, key: str) -> float:
    """How many times OM2P's seconds (key updates_per_second) or MiB (memory_mib) a row takes."""
    ratio = float(row[key]) / float(reference[key])
    return 1 / ratio if key == "updates_per_second" else ratio


def shown(value: str, digits: int = 3) -> str:
    """A number with so many digits that count, without an exponent; a dash for NaN."""
    number = float(value)
    if np.isnan(number):
        return "-"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(number)))))
    return f"{round(number, places):,.{places}f}"


def cost_table(kind: str, part: str) -> str:
    """Speed, memory, decision times and FLOPs of all methods, and their ratios to OM2P's.

    A compiled update's memory on the CPU is not counted, and left out.
    """
    rows, table, has_memory = cost_rows(kind, part), [], kind != "cpu_compiled"
    for method, row in rows.items():
        rate = f"{shown(row['updates_per_second'])} ({shown(row['low'])} to {shown(row['high'])})"
        speed, memory = (times(row, rows["om2p"], k) for k in ("updates_per_second", "memory_mib"))
        table.append(
            (
                cost_name(method),
                *((row["hidden_dims"] or "-",) if part == "published" else ()),
                rate,
                shown(speed),
                *((shown(row["memory_mib"]), shown(memory)) if has_memory else ()),
                shown(row["gflop"]),
                shown(row["share_of_product"], 2),
                shown(row["decision_ms"], 2),
                shown(row["decision_1000_ms"], 2),
            )
        )
    header = (
        "method",
        *(("layers",) if part == "published" else ()),
        "updates/s (quartiles)",
        "time, OM2P = 1",
        *(("memory, MiB", "memory, OM2P = 1") if has_memory else ()),
        "GFLOP an update",
        "share of a product's rate",
        "ms a decision",
        "ms for 1,000 at once",
    )
    return markdown(header, table)


def cost_machine(kind: str) -> str:
    """Where the costs were measured, and the largest ratios to the 20-step diffusion policy."""
    machine, points = json.loads((RESULTS / f"efficiency_{kind}.json").read_text()), {}
    for row in read(f"efficiency_{kind}.csv"):
        sizes = tuple(row[key] for key in ("agents", "batch", "hidden_dims"))
        points[row["part"], row["method"], sizes] = row
    text = []
    for key, what in (("updates_per_second", "time"), ("memory_mib", "memory")):
        ratios = {
            (part, *sizes): times(row, points[part, "om2p", sizes], key)
            for (part, method, sizes), row in points.items()
            if method == "diffusion_ql-20"
        }
        _, agents, batch, layers = max(ratios, key=ratios.get)
        low, high = min(ratios.values()), max(ratios.values())
        text.append(
            f"{what} {low:.1f} to {high:.1f} times, the most with {agents} agents, batches of "
            f"{int(batch):,} and layers of {layers}"
        )
    threads = f"{machine['threads']} threads" if machine["device"] == "cpu" else machine["device"]
    compiled = "compiled" if machine["compile"] else "not compiled"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {threads}, torch {machine['torch']}, "
        f"{compiled}. Diffusion-QL with 20 steps against OM2P over all points: {'; '.join(text)}."
    )


COSTS = {  # results of benchmark/efficiency.py -> their parts that are tabulated
    "cpu": ("equal", "default", "published"),
    "cpu_compiled": ("default",),
    "cuda_compiled": ("equal", "default", "published"),
}
TABLES = {  # name -> function and the file that it needs
    "data": (data_table, "mpe.csv"),
    "prey": (prey_table, "prey_simple_tag.csv"),
    "chaos": (chaos_table, "chaos.csv"),
    "mpe": (partial(suite_table, "mpe"), "mpe.csv"),
    "mamujoco": (partial(suite_table, "mamujoco"), "mamujoco.csv"),
    "grids": (grids_table, "mpe.csv"),
    "mpe_details": (details_table, "mpe.csv"),
    "equal_time": (equal_time_table, "equal_time.csv"),
    "returns": (returns_table, "mpe.csv"),
    "published": (published_table, ""),
    "tune": (partial(tune_table, "tune", "mpe"), "tune.csv"),
    "tune_mamujoco": (partial(tune_table, "tune_mamujoco", "mamujoco"), "tune_mamujoco.csv"),
    "ablation": (partial(ablation_table, "ablation", "mpe"), "ablation.csv"),
    "ablation_mamujoco": (
        partial(ablation_table, "ablation_mamujoco", "mamujoco"),
        "ablation_mamujoco.csv",
    ),
    "noise": (noise_table, "noise.csv"),
    "frozen_critic": (frozen_critic_table, "frozen_critic.csv"),
    **{
        f"cost_{part}_{kind}": (partial(cost_table, kind, part), f"efficiency_{kind}.json")
        for kind, parts in COSTS.items()
        for part in parts
    },
    **{
        f"cost_{kind}": (partial(cost_machine, kind), f"efficiency_{kind}.json")
        for kind, parts in COSTS.items()
        if "equal" in parts
    },
    **{f"results_{method}": (partial(results_line, method), "mpe.csv") for method in METHODS},
}


def tables() -> dict[str, str]:
    """The tables of both pages by name, those that have results."""
    return {name: table() for name, (table, file) in TABLES.items() if (RESULTS / file).exists()}


# Figures


def learning_curves() -> None:
    """Draw the scores during training, mean over the seeds; OM2P with the range of its seeds."""
    suites = [suite for suite in DATASETS if (RESULTS / f"{suite}_curves.csv").exists()]
    panels = [(suite, dataset) for suite in suites for dataset in DATASETS[suite]]
    size = {"figsize": (9, 0.6 + 2.1 * len(panels) / 4), "layout": "constrained"}
    figure, axes = plt.subplots(len(panels) // 4, 4, sharex="row", **size)
    cells = {suite: suite_cells(suite) for suite in suites}
    curves = {
        suite: group(read(f"{suite}_curves.csv"), "method", "task", "quality") for suite in suites
    }
    for (suite, dataset), panel in zip(panels, axes.flat, strict=True):
        _, data, names = cells[suite]
        for method, name in names.items():
            rows = curves[suite][method, *dataset]
            points = sorted((int(row["step"]), float(row["score"])) for row in rows)
            steps = sorted({step for step, _ in points})
            scores = [[score for s, score in points if s == step] for step in steps]
            style = {"color": METHODS[method][1], "ls": METHODS[method][2], "lw": 1.3}
            style |= {"lw": 2.8, "zorder": 3} if method == "om2p" else {}
            panel.plot(steps, [*map(np.mean, scores)], label=name, **style)
            if method == "om2p":
                low, high = [*map(min, scores)], [*map(max, scores)]
                panel.fill_between(steps, low, high, color=style["color"], alpha=0.25, lw=0)
        if data[dataset]:
            height = np.mean(numbers(data[dataset], "data_score"))
            panel.axhline(height, color="0.2", ls=":", lw=1.5, label="the data")
        panel.set_title(" ".join(dataset), fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    plt.setp(axes[-1], xlabel="updates")
    plt.setp(axes[:, 0], ylabel="normalised score")
    lines = {line.get_label(): line for panel in axes.flat for line in panel.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(FIGURES / "learning_curves.png", dpi=140)
    plt.close(figure)


def average_bars() -> None:
    """Draw every method's average over the datasets with its interval, and the data's."""
    cells, data, names = suite_cells("mpe")
    bars = [(name, method, averages(cells, method, "mpe")) for method, name in names.items()]
    bars = sorted((bar for bar in bars if bar[2]), key=lambda bar: np.mean(bar[2]))
    if not bars:
        print("averages.png is left as it is: no method has all datasets yet")
        return
    figure, panel = plt.subplots(figsize=(9, 1 + 0.36 * len(bars)), layout="constrained")
    for k, (_, method, values) in enumerate(bars):
        center, (low, high) = np.mean(values), interval(values)
        color = METHODS[method][1] if method == "om2p" else "#8FA8BF"
        panel.barh(k, center, 0.7, color=color)
        if len(values) > 1:
            panel.errorbar(center, k, xerr=[[center - low], [high - center]], color="k", capsize=3)
        place = {"textcoords": "offset points", "va": "center"}
        panel.annotate(mean(values), (max(high, 0), k), (5, 0), **place)
    if (average := data_average(data, "mpe")) != "-":
        panel.axvline(float(average), color="0.2", ls=":")
        note = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        panel.annotate(f"the data {average}", (float(average), 1), **note)
    panel.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    panel.margins(x=0.08)
    panel.set_xlabel("normalised score, average over the twelve datasets")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / "averages.png", dpi=140)
    plt.close(figure)


def time_curves() -> None:
    """Draw average scores against training time, in the time that OM2P's whole training takes.

    Lines are the grid `mpe`'s runs, diamonds those of the grid `equal_time`, both over the
    datasets; an update's time is that of benchmark/efficiency.py on the CPU.
    """
    _, _, names = suite_cells("mpe")
    curves, costs = group(read("mpe_curves.csv"), "method", "step"), cost_rows("cpu", "default")
    rates = {m: float(costs[COSTS_OF_DEFAULTS[m]]["updates_per_second"]) for m in names}
    unit = max(int(step) for method, step in curves if method == "om2p") / rates["om2p"]
    short = group(read("equal_time.csv"), "method", "task", "quality")
    figure, panel = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for method, name in names.items():
        points = sorted((int(step), rows) for (m, step), rows in curves.items() if m == method)
        xs = [step / rates[method] / unit for step, _ in points]
        style = {"color": METHODS[method][1], "ls": METHODS[method][2], "lw": 1.3}
        style |= {"lw": 2.8, "zorder": 3} if method == "om2p" else {}
        panel.plot(xs, [np.mean(numbers(rows, "score")) for _, rows in points], label=name, **style)
        if scores := averages(short, method, "mpe"):
            panel.plot(1, np.mean(scores), "D", color=style["color"], ms=7, zorder=4)
    panel.set_xscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.set_xlabel("training time, OM2P's 4,000 updates = 1")
    panel.set_ylabel("normalised score, average")
    panel.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    figure.savefig(FIGURES / "score_time.png", dpi=140)
    plt.close(figure)


def cost_bars(kind: str) -> None:
    """Draw training time and memory of all methods, OM2P's being 1, with equal networks."""
    rows = cost_rows(kind, "equal")
    names = [method for method in reversed(rows) if method != "om2p-loop"]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, layout="constrained")
    columns = {"updates_per_second": "time of an update", "memory_mib": "memory of training"}
    for panel, (key, title) in zip(panels, columns.items(), strict=True):
        values = [times(rows[method], rows["om2p"], key) for method in names]
        colors = ["#D55E00" if method == "om2p" else "#8FA8BF" for method in names]
        lengths = [value - 1 for value in values]  # from 1: on a log axis there is no zero
        panel.barh(range(len(names)), lengths, 0.7, left=1, color=colors)
        for k, value in enumerate(values):
            place = {"textcoords": "offset points", "va": "center"}
            panel.annotate(shown(value), (max(value, 1), k), (5, 0), **place)
        panel.set_xscale("log")
        panel.set_xlim(min(values) / 1.5, 2.5 * max(values))
        panel.set_xlabel(f"{title}, OM2P = 1")
        panel.axvline(1, color="0.2", lw=1)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [cost_name(name).replace("`", "") for name in names])
    figure.savefig(FIGURES / f"cost_{kind}.png", dpi=140)
    plt.close(figure)


def cost_growth(kind: str) -> None:
    """Draw an update's time against agents, batch, width and steps of the policy."""
    rows = read(f"efficiency_{kind}.csv")
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.6), sharey=True, layout="constrained")
    columns = {"agents": "agents", "batch": "batch", "width": "hidden_dims"}
    for panel, (part, column) in zip(axes, columns.items(), strict=False):
        for (method,), points in group([r for r in rows if r["part"] == part], "method").items():
            color = METHODS[method.partition("-")[0]][1]
            xs = [int(row[column].partition("x")[0]) for row in points]
            ms = [1_000 / value for value in numbers(points, "updates_per_second")]
            style = {"color": color, "ls": "--" if method.endswith("-20") else "-", "marker": "."}
            panel.plot(xs, ms, label=cost_name(method), **style)
        panel.set_xlabel({"width": "width of the two layers"}.get(part, part))
    for method in ("flow_ql", "diffusion_ql"):
        points = [r for r in rows if r["part"] == "default" and r["method"].startswith(method)]
        steps = [int(row["method"].partition("-")[2]) for row in points]
        ms = [1_000 / value for value in numbers(points, "updates_per_second")]
        axes[3].plot(steps, ms, color=METHODS[method][1], marker=".")
    om2p = cost_rows(kind, "default")["om2p"]
    axes[3].axhline(1_000 / float(om2p["updates_per_second"]), color=METHODS["om2p"][1])
    axes[3].set_xlabel("steps of the policy")
    axes[0].set_ylabel("ms an update")
    for panel in axes:
        panel.set(xscale="log", yscale="log")
        ticks = sorted({int(x) for line in panel.get_lines() for x in line.get_xdata() if x > 1})
        panel.set_xticks(ticks, ticks)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(FIGURES / f"growth_{kind}.png", dpi=140)
    plt.close(figure)


def main() -> None:
    """Rewrite all pages' tables, line counts and figures, and name what has no results."""
    mpl.use("Agg")
    texts, found = [page.read_text() for page in PAGES], tables()
    for name, table in found.items():
        place = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", flags=re.S)
        count = sum(len(place.findall(text)) for text in texts)
        if count != 1:
            raise SystemExit(f"error: the pages have {count} places for the table {name}")
        texts = [place.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text) for text in texts]
    lines = re.compile(r"^(\| \[`([^`]+)`\].*\| )\d+ \|$", flags=re.M)  # of every script
    for page, text in zip(PAGES, texts, strict=True):
        page.write_text(
            lines.sub(lambda m: f"{m[1]}{(ROOT / m[2]).read_text().count(chr(10))} |", text)
        )
    missing = [f"{name} (no {TABLES[name][1]})" for name in TABLES if name not in found]
    if "mpe" in found and (RESULTS / "mpe_curves.csv").exists():
        FIGURES.mkdir(exist_ok=True)
        learning_curves()
        average_bars()
        if {"equal_time", "cost_default_cpu"} <= set(found):
            time_curves()
    else:
        missing.append("the figures (no mpe.csv or mpe_curves.csv)")
    for kind, parts in COSTS.items():
        if "equal" in parts and (RESULTS / f"efficiency_{kind}.json").exists():
            FIGURES.mkdir(exist_ok=True)
            cost_bars(kind)
            cost_growth(kind)
    if missing:
        print(f"left as they are: {', '.join(missing)}")


if __name__ == "__main__":
    main()

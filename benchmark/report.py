"""Make the tables and figures of README.md and docs/ from the files under benchmark/results/.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of TABLES. Lines
of scripts are counted, too. Figures go to benchmark/figures/. What has no results is left alone.
"""

import importlib
import json
import re
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy.stats import bootstrap

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "baselines", "benchmark", "data")]
import draw  # noqa: E402
import sketch  # noqa: E402
from card import PUBLIC_RETURNS  # noqa: E402
from run import GRIDS, MPE, QUALITIES, ROBOT, TUNING_DATA  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmark" / "results"
DATASETS = {"mpe": [*map(" ".join, MPE)], "mamujoco": [*map(" ".join, ROBOT)]}
DATASETS["hopper"] = [f"Hopper-3x1 {quality}" for quality in QUALITIES]
DATASETS["mpe_long"] = [*map(" ".join, TUNING_DATA)]  # those of the grid that have run
DEFAULT_STEPS = {"diffusion_ql": "-5", "dom2": "-5", "flow_ql": "-10", "fql": "-10"}


def read(*names: str, **options) -> pd.DataFrame:
    """The rows of result files; `data`: task and quality."""
    options = {"dtype": {"value": str}, "keep_default_na": False, "na_values": ["nan"]} | options
    rows = pd.concat([pd.read_csv(RESULTS / name, **options) for name in names])
    known = {"task", "quality"} <= set(rows)
    return rows.assign(data=rows.task + " " + rows.quality) if known else rows


def table_of(rows: pd.DataFrame, index: list, columns: str, key: str = "score") -> pd.DataFrame:
    """The values of a column, as lists, by those of others; empty where there are none."""
    table = rows.groupby([*index, columns])[key].agg(list).unstack()
    table = table.reindex(rows.set_index(index).index.unique(), columns=rows[columns].unique())
    return table.map(lambda values: values if isinstance(values, list) else [])


def averages(rows: pd.DataFrame, method: str, suite: str, key: str = "score") -> list[float]:
    """A method's average over a suite's datasets, one for every seed that has them all."""
    rows = rows[rows.method == method].pivot(index="seed", columns="data", values=key)
    return rows.reindex(columns=DATASETS[suite]).dropna().mean(axis=1).tolist()


def of_data(rows: pd.DataFrame, key: str) -> pd.Series:
    """The mean of a column for each dataset, every seed counting once."""
    rows = rows.drop_duplicates(["data", "seed"], keep="last")
    return rows.groupby("data", sort=False)[key].mean()


def interval(values) -> tuple[float, float]:
    """The ends of the mean's 95 % bootstrap interval (percentiles)."""
    return tuple(bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval)


def mean(values) -> str:
    """The mean as text, never -0.0; a dash if there is nothing."""
    return f"{round(float(np.mean(values)), 1) + 0.0:.1f}" if np.size(values) else "-"


def estimate(values) -> str:
    """Mean ± half the width of the 95 % interval; one value alone; a dash if there is none."""
    if len(values) < 2:
        return mean(values)
    return f"{mean(values)} ± {mean(np.diff(interval(values)) / 2)}"


def highlight(columns, text=estimate) -> list[str]:
    """`text` of every list of values; the highest means, equal as printed, are bold."""
    means = [float(mean(values)) if values else -np.inf for values in columns]
    texts = zip(means, map(text, columns), strict=True)
    return [f"**{cell}**" if number == max(means) > -np.inf else cell for number, cell in texts]


def shown(number: float, digits: int = 3) -> str:
    """A number with so many digits that count, without an exponent; a dash for NaN."""
    if np.isnan(number):
        return "-"
    places = max(0, digits - 1 - int(np.floor(np.log10(abs(number)))))
    return f"{round(number, places):,.{places}f}"


def markdown(rows, header=None) -> str:
    """A table in Markdown."""
    plain = {"index": False, "disable_numparse": True, "stralign": None}
    return re.sub("-{3,}", " --- ", pd.DataFrame(rows, columns=header).to_markdown(**plain))


def machine_line(grid: str) -> str:
    """What a grid ran on; what a run costs is measured by benchmark/efficiency.py, side by side."""
    machine = json.loads((RESULTS / f"{grid}.json").read_text())
    place = "" if machine["device"] == "cpu" else f", {machine['device']}"
    workers, seeds = machine["workers"], max(read(f"{grid}.csv").num_seeds)
    runs = f"{workers} run{'s' * (workers != 1)} at a time" if workers else "runs spread by Ray"
    joint = f", up to {seeds} seeds in one" if seeds > 1 else ""
    text = f"\n\n{machine['processor']}, {machine['cores']} cores{place}, {runs} with one thread"
    return f"{text} each{joint}, torch {machine['torch']}."


def data_table() -> str:
    """Returns of our datasets beside the public ones."""
    rows = read("mpe.csv", "mamujoco.csv")
    columns = (of_data(rows, key).map(mean) for key in ("data_return", "data_sd"))
    datasets = [data.split() for data in rows.data.unique()]
    lines = [
        (task, quality, f"{ours} ± {sd}", PUBLIC_RETURNS[task][quality])
        for (task, quality), ours, sd in zip(datasets, *columns, strict=True)
    ]
    return markdown(lines, ("task", "quality", "ours, mean ± sd", "public, mean"))


def late_scores(suite: str) -> pd.DataFrame:
    """The mean score of every run's last third of evaluations: how steady learning is."""
    curves = read(f"{suite}_curves.csv")
    late = curves[3 * curves.step > 2 * curves.step.max()]
    return late.groupby(["method", "data", "seed"], sort=False).score.mean().reset_index()


def suite_table(suite: str, key: str = "score", text=estimate, shorter: str = "") -> str:
    """Final scores, or returns, of all methods on all datasets; scores' averages.

    The last row, if any, has the averages over these datasets in the grid `shorter`.
    """
    rows = read(f"{suite}.csv")
    table, data = table_of(rows, ["data"], "method", key), of_data(rows, f"data_{key}")
    lines = [
        (*name.split(), mean(data[name]), *highlight(row, text))
        for name, *row in table.itertuples()
    ]
    header = ("task", "data", f"data's {key}", *(draw.NAMES[method] for method in table))
    if key != "score":
        return markdown(lines, header)
    means = highlight([averages(rows, method, suite) for method in table])
    lines.append(("average", "", mean(data), *means))
    more = {"best in training": (rows, "best_score")}
    more["last third of training"] = late_scores(suite), "score"
    if shorter:
        before = read(f"{shorter}.csv")
        words = f"{before.updates.max():,} updates on 100,000 transitions"
        more[words] = before[before.seed.isin(rows.seed)], "score"
    for words, (part, column) in more.items():
        found = [estimate(averages(part, method, suite, column)) for method in table]
        lines.append((f"average, {words}", "", "", *found))
    return markdown(lines, header) + machine_line(suite)


def replay_table() -> str:
    """Scores during training on a dataset of its usual size, and on one ten times as large."""
    rows, lines = read("replay_curves.csv"), []
    steps = [4_000, 8_000, 14_000, 20_000]
    for method in rows.method.unique():
        for size, part in (("100,000", read("mpe_long_curves.csv")), ("1,000,000", rows)):
            part = part[(part.method == method) & part.data.isin(rows.data)]
            scores = part.groupby("step").score.agg(list)
            lines.append((draw.NAMES[method], size, *scores[steps].map(estimate)))
    return markdown(lines, ("method", "transitions", *map("after {:,} updates".format, steps)))


def q_scale_table() -> str:
    """What trained critics say of the Q term's size, on several tasks."""
    rows = read("q_scale.csv")
    columns = {
        "method": rows.method.map(draw.NAMES),
        "data": rows.data,
        "q_weight": rows.q_weight.map("{:g}".format),
        "mean of abs(Q)": rows.mean_abs_q.map(mean),
        "steepness": rows.steepness.map(partial(shown, digits=2)),
        "move": rows.move.map(partial(shown, digits=2)),
    }
    return markdown(columns)


def against_table() -> str:
    """OM2P's scores beside each other method's, paired by dataset and seed."""
    rows, lines = read("mpe.csv").pivot(index="seed", columns=["method", "data"]).score, []
    for method in list(draw.LOOKS)[1:]:
        gap = (rows["om2p"] - rows[method]).dropna()  # (seeds, datasets)
        better = 100 * (np.sign(gap) + 1) / 2
        wins = f"{(gap.mean() > 0).sum()} of {len(gap.columns)}"
        chance = estimate(better.mean(axis=1))
        lines.append((draw.NAMES[method], estimate(gap.mean(axis=1)), wins, chance))
    header = ("OM2P against", "difference of the averages", "datasets with the higher mean")
    return markdown(lines, (*header, "probability of improvement, %"))


def averages_table() -> str:
    """Average scores of all methods, and what their updates and actions cost."""
    costs = cost_rows("cpu", "default").loc[[x + DEFAULT_STEPS.get(x, "") for x in draw.LOOKS]]
    columns = {"method": [*map(draw.NAMES.get, draw.LOOKS), "the data"]}
    for suite, place in (("mpe", "particles"), ("mamujoco", "HalfCheetah")):
        rows = read(f"{suite}.csv")
        scores = highlight([averages(rows, method, suite) for method in draw.LOOKS])
        columns[f"score, {place}"] = [*scores, mean(of_data(rows, "data_score"))]
    columns |= {f"training {x}, OM2P = 1": [*costs[x].map(shown), ""] for x in ("time", "memory")}
    return markdown(columns | {"ms an action": [*costs.decision_ms.map(shown), ""]})


def grids_table() -> str:
    """The runs of every grid so far, and the time that they took, evaluations included."""
    lines = []
    for name, (what, *_) in GRIDS.items():
        if (RESULTS / f"{name}.csv").exists():
            runs = read(f"{name}.csv")
            hours = (runs.seconds / runs.num_seeds).sum() / 3600
            lines.append((f"`{name}`", what, len(runs), f"{hours:.1f}"))
    return markdown(lines, ("grid", "what it compares", "runs", "hours of one core"))


def last_line(name: str) -> str:
    """What a command printed last, as code on a page."""
    return f"    {(RESULTS / name).read_text().splitlines()[-1]}"


def equal_time_table() -> str:
    """Average scores with as many updates as OM2P, from the grid `mpe`, and with as much time."""
    rows = read("mpe.csv")
    short = pd.concat([rows[rows.method == "om2p"], read("equal_time.csv")])
    updates = short.groupby("method", sort=False)["updates"].first()
    old, new = ([averages(part, key, "mpe") for key in updates.index] for part in (rows, short))
    columns = {
        "method": updates.index.map(draw.NAMES),
        f"score after {updates.om2p:,} updates": highlight(old),
        "their time, OM2P = 1": (updates.om2p / updates).map("{:.2f}".format),
        "updates in OM2P's time": updates.map("{:,}".format),
        "score after these": highlight(new),
    }
    return markdown(columns) + machine_line("equal_time")


def published_table() -> str:
    """Scores on the public data, from papers, and of BC and MA-TD3+BC here by OMAR's settings."""
    papers = read("papers.csv", dtype=str)
    for method, ours in read("published.csv").groupby("method", sort=False):
        texts = ours.groupby("task", sort=False)["score"].agg(
            lambda row: " / ".join(map(mean, row))
        )
        here = f"{draw.NAMES[method]}, here, OMAR's settings", *texts, mean(ours.score)
        papers.loc[len(papers)] = (*here, "`--grid published`, seed 0")
    return f"{markdown(papers)}\n\n{(RESULTS / 'papers.txt').read_text().strip()}"


def change(setting: str, value: str) -> str:
    """A cell's change from the defaults, as on its command line."""
    pairs = zip(setting.split(), value.split(), strict=True)
    words = (f"--{name} {value.replace(',', ' ').removesuffix('yes')}" for name, value in pairs)
    return " ".join(map(str.strip, words))


def is_default(method: str, words: str, suite: str) -> bool:
    """Whether these words of a command line are no change of the method's script."""
    script = importlib.import_module(f"{method}_{suite}")
    return tyro.cli(script.Args, args=words.split()) == script.Args()


def tune_table(grid: str, suite: str) -> str:
    """The settings tried for every method, the best of each and the chosen default marked."""
    table, lines = table_of(read(f"{grid}.csv"), ["method", "setting", "value"], "data"), []
    for method, part in table.groupby("method", sort=False):
        means = highlight([[*chain(*row)] if all(row) else [] for row in part.values], mean)
        for k, (_, *pair) in enumerate(part.index):
            mark = ", the default" if is_default(method, change(*pair), suite) else ""
            name = "" if k else draw.NAMES[method], f"`{change(*pair)}`{mark}"
            lines.append((*name, *map(mean, part.values[k]), means[k]))
    return markdown(lines, ("method", "changed setting", *table, "mean")) + machine_line(grid)


def q_weight_table() -> str:
    """OM2P's scores with several values of `q_weight`, on the datasets that it was tuned on."""
    rows = read("tune_mamujoco.csv", "tune.csv").query("method == 'om2p' and setting == 'q-weight'")
    return markdown(table_of(rows, ["data"], "value").map(mean).reset_index())


def ablation_table() -> str:
    """Scores of OM2P as it is, changed, or in several steps, and of the data."""
    rows, kept = read("ablation.csv"), read("mpe.csv").query("method == 'om2p'")
    kept["name"] = "the defaults"
    rows["name"] = [f"`{change(*pair)}`" for pair in zip(rows.setting, rows.value, strict=True)]
    steps = read("steps.csv").query("steps > 1")
    steps["name"] = steps.steps.map("the defaults, acting in {} steps".format)
    table = table_of(pd.concat([kept, rows, steps]), ["name"], "data")[rows.data.unique()]
    lines = [(name, *map(estimate, row)) for name, *row in table.itertuples()]
    lines.append(("the data", *of_data(kept, "data_score")[table.columns].map(mean)))
    return markdown(lines, ("changed setting", *table)) + machine_line("ablation")


def by_quality(parts, header, grid: str, suite: str = "mpe") -> str:
    """Scores by quality, their average, and that less a reference, paired by seed.

    A part is a method, words, the rows that it is taken from, and the reference, if any.
    """
    lines, data = [], DATASETS[suite]
    for method, words, rows, reference in parts:
        rows = rows[(rows.method == method) & rows.data.isin(data)]
        if found := averages(rows, method, suite):
            scores = rows.groupby(["seed", "quality"]).score.mean().unstack()
            cells = *(estimate(scores[quality].tolist()) for quality in QUALITIES), estimate(found)
            gap = estimate(np.subtract(found, reference)) if reference else ""
            lines.append((draw.NAMES[method], words, *cells, gap))
    means = rows.groupby("quality").data_score.mean()[list(QUALITIES)]
    lines.append(("the data", "", *means.map(mean), mean(means), ""))
    return markdown(lines, (*header[:2], *QUALITIES, "average", header[2])) + machine_line(grid)


def standardised_table(suite: str, plain: str, grid: str) -> str:
    """Methods by observations as recorded and by standardised ones, as far as both have run."""
    old, new, parts = read(f"{plain}.csv"), read(f"{grid}.csv"), []
    old = old[old.seed.isin(new.seed)]
    for method in draw.LOOKS:
        before = averages(old, method, suite)
        if before and averages(new, method, suite):
            parts += [(method, "as recorded", old, []), (method, "standardised", new, before)]
    return by_quality(parts, ("method", "observations", "gain, paired"), grid, suite)


def conservative_table() -> str:
    """Scores by quality with OM2P's conservative term in the critics' loss, and without it."""
    plain, changed = read("mpe.csv"), read("conservative.csv")
    plain, parts = plain[plain.seed.isin(changed.seed)], []
    ours = averages(plain, "om2p", "mpe")
    for method in (name for name in draw.LOOKS if name in {"om2p", *changed.method}):
        pair = (changed, plain) if method == "om2p" else (plain, changed)
        parts += [(method, *x, ours) for x in zip(("without", "with"), pair, strict=True)]
    return by_quality(parts, ("method", "conservative term", "less OM2P's, paired"), "conservative")


def two_networks_table() -> str:
    """OM2P's scores by quality as it is, and with a second network that sees observations alone."""
    plain, changed = read("mpe.csv"), read("two_networks.csv")
    plain = plain[plain.seed.isin(changed.seed)]
    parts = [("om2p", "one", plain, []), ("fql", "two: flow, one step", plain, [])]
    parts += [("om2p", "two", changed, averages(plain, "om2p", "mpe"))]
    return by_quality(parts, ("method", "networks of the policy", "gain, paired"), "two_networks")


def multi_expert_table() -> str:
    """Scores of all methods, and of some of them changed, on data of several conventions."""
    rows = read("multi_expert.csv")
    table, lines = table_of(rows, ["method", "setting", "value"], "task"), []
    for (method, *pair), row in table.iterrows():
        words = change(*pair)
        lines.append((draw.NAMES[method], f"`{words}`" * bool(words), *map(estimate, row)))
    rows["data"] = rows.task
    lines.append(("the data", "", *of_data(rows, "data_score")[table.columns].map(mean)))
    return markdown(lines, ("method", "changed", *table)) + machine_line("multi_expert")


def noise_table(grid: str) -> str:
    """Teams that act with less noise or with more: what the noise in the data costs."""
    rows, lines = read(f"noise_{grid}.csv"), []
    scores = table_of(rows, ["method", "acting"], "data")
    spreads = rows.groupby(["method", "acting", "data"])["spread"].mean()
    for (method, acting), row in scores.iterrows():
        spread = " / ".join(f"{spreads[method, acting, data]:.2f}" for data in scores)
        cells = *map(estimate, row), mean(row.map(np.mean))
        lines.append((draw.NAMES[method], acting, *cells, spread if "mean" in acting else "-"))
    return markdown(lines, ("method", "acting", *scores, "average", "spread of the actions"))


def frozen_critic_table() -> str:
    """Teams whose policies learned from one frozen critic, beside what that critic prefers."""
    lines = []
    for method, runs in read("frozen_critic.csv").groupby("method", sort=False):
        name, *settings = method.split(maxsplit=1)
        name = ", ".join([draw.NAMES[name], *map("`{}`".format, settings)])
        lines.append((name, f"{runs.linear.mean():.2f}", estimate(runs.score)))
    return markdown(lines, ("policy", "linear share", "score"))


def cost_name(method: str) -> str:
    """A method of benchmark/efficiency.py, as in tables: with its steps, or what is changed."""
    name, _, steps = method.partition("-")
    return draw.NAMES.get(method) or f"{draw.NAMES[name]}, {steps} steps"


def cost_rows(kind: str, part: str | None = None) -> pd.DataFrame:
    """A result of benchmark/efficiency.py, or its part by method, with ratios to OM2P's there."""
    rows = read(f"efficiency_{kind}.csv")
    rows["name"] = rows.method.map(cost_name)
    if part is None:
        return rows
    if part not in set(rows.part):
        raise FileNotFoundError(f"efficiency_{kind}.csv has no part {part}")
    rows = rows[rows.part == part].set_index("method")
    times = rows.updates_per_second["om2p"] / rows.updates_per_second
    return rows.assign(time=times, memory=rows.memory_mib / rows.memory_mib["om2p"])


def cost_table(kind: str, part: str) -> str:
    """Speed, memory, decision times and FLOPs of all methods, and their ratios to OM2P's."""
    rows = cost_rows(kind, part)
    rates = (rows[key].map(shown) for key in ("updates_per_second", "low", "high"))
    columns = {
        "method": rows.name,
        "layers": rows.hidden_dims,
        "updates/s (quartiles)": [*map("{} ({} to {})".format, *rates)],
        "time, OM2P = 1": rows.time.map(shown),
        "memory, MiB": rows.memory_mib.map(shown),
        "memory, OM2P = 1": rows.memory.map(shown),
        "GFLOP an update": rows.gflop.map(shown),
        "share of a product's rate": rows.share_of_product.map(partial(shown, digits=2)),
        "ms a decision": rows.decision_ms.map(partial(shown, digits=2)),
        "ms for 1,000 at once": rows.decision_1000_ms.map(partial(shown, digits=2)),
    }
    if part != "published":
        del columns["layers"]
    if kind == "cpu_compiled":  # its memory is not measured
        del columns["memory, MiB"], columns["memory, OM2P = 1"]
    return markdown(columns)


def two_cpus_table() -> str:
    """Every method's time of an update on two processors, OM2P's being 1 on each."""
    columns = {"method": cost_rows("cpu", "equal").name}
    for part, words in (("equal", "equal networks"), ("default", "the scripts' defaults")):
        for kind in ("cpu", "epyc"):
            name = json.loads((RESULTS / f"efficiency_{kind}.json").read_text())["processor"]
            columns[f"{words}, {name.split('(')[0]}"] = cost_rows(kind, part).time.map(shown)
    return markdown(columns)


def cost_machine(kind: str) -> str:
    """Where the costs were measured, and the range of ratios to the 20-step diffusion policy."""
    machine = json.loads((RESULTS / f"efficiency_{kind}.json").read_text())
    keys, text = ["part", "agents", "batch", "hidden_dims"], []
    table = read(f"efficiency_{kind}.csv").pivot(index=keys, columns="method")
    for what, key, power in (("time", "updates_per_second", -1), ("memory", "memory_mib", 1)):
        ratios = (table[key, "diffusion_ql-20"] / table[key, "om2p"]).dropna() ** power
        _, agents, batch, layers = ratios.idxmax()
        text.append(
            f"{what} {ratios.min():.1f} to {ratios.max():.1f} times, the most with {agents} "
            f"agents, batches of {batch:,} and layers of {layers}"
        )
    threads = f"{machine['threads']} threads" if machine["device"] == "cpu" else machine["device"]
    compiled = "compiled" if machine["compile"] else "not compiled"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {threads}, torch {machine['torch']}, "
        f"{compiled}. Diffusion-QL with 20 steps against OM2P over all points: {'; '.join(text)}."
    )


TABLES = {
    "data": data_table,
    "prey": lambda: markdown(read("prey_simple_tag.csv", "prey_simple_world.csv", dtype=str)),
    "chaos": lambda: markdown(read("chaos.csv", dtype=str)),
    "logs": lambda: markdown(read("logs.csv", dtype=str)),
    "mpe": partial(suite_table, "mpe"),
    "mamujoco": partial(suite_table, "mamujoco"),
    "mpe_long": partial(suite_table, "mpe_long", shorter="mpe"),
    "replay": replay_table,
    "q_scale": q_scale_table,
    "standardised": partial(standardised_table, "mpe", "mpe", "standardised"),
    "standardised_hopper": partial(standardised_table, "hopper", "robots", "robots_standardised"),
    "returns": partial(suite_table, "mpe", "return", mean),
    "grids": grids_table,
    "averages": averages_table,
    "against": against_table,
    "first_command": partial(last_line, "first_command.txt"),
    "first_command_mamujoco": partial(last_line, "first_command_mamujoco.txt"),
    "equal_time": equal_time_table,
    "published": published_table,
    "q_weight": q_weight_table,
    "tune": partial(tune_table, "tune", "mpe"),
    "tune_mamujoco": partial(tune_table, "tune_mamujoco", "mamujoco"),
    "ablation": ablation_table,
    "conservative": conservative_table,
    "two_networks": two_networks_table,
    "conventions": lambda: markdown(read("conventions.csv", dtype=str)),
    "multi_expert": multi_expert_table,
    "noise": partial(noise_table, "mamujoco"),
    "noise_long": partial(noise_table, "mpe_long"),
    "frozen_critic": frozen_critic_table,
    "cost_two_cpus": two_cpus_table,
    "cost_default_cpu_compiled": partial(cost_table, "cpu_compiled", "default"),
}
for kind in ("cpu", "cuda_compiled"):
    TABLES[f"cost_{kind}"] = partial(cost_machine, kind)
    for part in ("equal", "default", "published"):
        TABLES[f"cost_{part}_{kind}"] = partial(cost_table, kind, part)


def curves_figure(*grids: str):
    """Scores during training on all datasets of these grids, and the data's."""
    curves, rows = (read(*(f"{grid}{end}.csv" for grid in grids)) for end in ("_curves", ""))
    return draw.learning_curves(curves, of_data(rows, "data_score"))


def averages_figure():
    """Averages over the twelve datasets, with their intervals, and the data's."""
    rows = read("mpe.csv")
    bars = {method: averages(rows, method, "mpe") for method in rows.method.unique()}
    bars = {method: (np.mean(values), *interval(values)) for method, values in bars.items()}
    return draw.average_bars(bars, of_data(rows, "data_score").mean())


def time_figure():
    """Averages against time: the grid `mpe` while it trained, and the grid `equal_time`."""
    costs, short = cost_rows("cpu", "default").time / 4_000, read("equal_time.csv")
    times = {method: costs[method + DEFAULT_STEPS.get(method, "")] for method in draw.LOOKS}
    ends = short.groupby("method")["updates"].first().items()
    ends = {key: (k * times[key], np.mean(averages(short, key, "mpe"))) for key, k in ends}
    return draw.time_curves(read("mpe_curves.csv"), times, ends)


FIGURES = {
    "learning_curves": partial(curves_figure, "mpe", "mamujoco"),
    "learning_curves_long": partial(curves_figure, "mpe_long"),
    "averages": averages_figure,
    "score_time": time_figure,
    "method": sketch.method_figure,
}
for kind in ("cpu", "cuda_compiled"):
    FIGURES[f"cost_{kind}"] = lambda kind=kind: draw.cost_bars(cost_rows(kind, "equal"))
    FIGURES[f"growth_{kind}"] = lambda kind=kind: draw.cost_growth(cost_rows(kind))


def main() -> None:
    """Rewrite all pages' tables, line counts and figures, and name what has no results."""
    missing = []

    def fill(place: re.Match) -> str:
        if place[2] not in TABLES:
            raise SystemExit(f"error: there is no table {place[2]}")
        try:
            return f"{place[1]}{TABLES[place[2]]()}\n{place[3]}"
        except FileNotFoundError:
            missing.append(place[2])
            return place[0]

    def count(line: re.Match) -> str:
        return f"{line[1]}{len((ROOT / line[2]).read_text().splitlines())} |"

    table = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", flags=re.S)
    lines = re.compile(r"^(\| \[`([^`]+)`\].*\| )\d+ \|$", flags=re.M)  # of every script
    for page, text in [(page, page.read_text()) for page in PAGES]:
        page.write_text(lines.sub(count, table.sub(fill, text)))
    for name, make in FIGURES.items():
        try:
            make().savefig(ROOT / "benchmark" / "figures" / f"{name}.png")
        except FileNotFoundError:
            missing.append(f"{name}.png")
    if missing:
        print(f"without results, left as they are: {', '.join(missing)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)

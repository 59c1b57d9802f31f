"""Put the README's tables and figures together from the files under benchmark/results/.

    python benchmark/report.py

A table stands in the README between `<!-- table NAME -->` and `<!-- end -->` and is replaced there.
The learning curves of the default command go to benchmark/figures/learning_curves.png.
"""

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from om2p_mpe import PUBLIC_RETURNS  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
QUALITIES = ("expert", "medium", "medium-replay", "random")
PUBLISHED = {  # normalized scores on the public data, same order; MADiff (NeurIPS 2024), Table 1
    "MA-TD3+BC": {
        "simple_spread": (108.3, 29.3, 15.4, 9.8),
        "simple_tag": (115.2, 65.1, 28.7, 5.7),
        "simple_world": (110.3, 73.4, 17.4, 2.8),
    },
    "OMAR": {
        "simple_spread": (114.9, 47.9, 37.9, 34.4),
        "simple_tag": (116.2, 66.7, 47.1, 11.1),
        "simple_world": (110.4, 74.6, 42.9, 5.9),
    },
    "MADiff-D": {
        "simple_spread": (95.0, 64.9, 30.3, 6.9),
        "simple_tag": (120.9, 77.2, 62.3, 3.2),
        "simple_world": (122.6, 123.5, 57.1, 2.0),
    },
}


def read(name: str) -> list[dict]:
    """The rows of a result file."""
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def interval(values, draws: int = 10_000) -> str:
    """Mean and 95 % bootstrap interval, as text."""
    values = np.array(values, dtype=float)
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return f"{values.mean():.1f} [{low:.1f}, {high:.1f}]"


def markdown(header: tuple, rows: list) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main_groups() -> dict:
    """The rows of main.csv by (task, quality)."""
    groups = defaultdict(list)
    for row in read("main.csv"):
        groups[row["task"], row["quality"]].append(row)
    return groups


def data_table() -> str:
    """Returns of our datasets beside the public ones."""
    rows = []
    for (task, quality), group in main_groups().items():
        ours = np.mean([float(row["data_return"]) for row in group])
        sd = np.mean([float(row["data_sd"]) for row in group])
        public = PUBLIC_RETURNS[task][quality]
        rows.append((task, quality, f"{ours:.1f} ± {sd:.1f}", public))
    return markdown(("task", "quality", "ours, mean ± sd", "public, mean"), rows)


def prey_table() -> str:
    """Hunters' returns against our prey and the original."""
    rows = [tuple(r.values()) for t in ("tag", "world") for r in read(f"prey_simple_{t}.csv")]
    return markdown(tuple(read("prey_simple_tag.csv")[0]), rows)


def main_table() -> str:
    """OM2P's final results, and published scores on the public data as context."""
    rows, scores = [], []
    for (task, quality), group in main_groups().items():
        scores.append([[float(row[key]) for row in group] for key in ("data_score", "score")])
        published = (PUBLISHED[name][task][QUALITIES.index(quality)] for name in PUBLISHED)
        rows.append(
            (
                task,
                quality,
                f"{np.mean(scores[-1][0]):.1f}",
                "**" + interval(scores[-1][1]) + "**",
                f"{np.mean([float(row['return']) for row in group]):.1f}",
                f"{np.mean([float(row['best_score']) for row in group]):.1f}",
                *published,
            )
        )
    data, ours = np.array(scores).mean(axis=(0, 2))
    averages = (np.mean([*PUBLISHED[name].values()]) for name in PUBLISHED)
    rows.append(
        ("average", "", f"{data:.1f}", f"**{ours:.1f}**", "", "", *(f"{a:.1f}" for a in averages))
    )
    header = ("task", "data", "data's score", "OM2P, score", "raw return", "best score")
    return markdown((*header, *PUBLISHED), rows)


def sweep_table() -> str:
    """Scores of the sweep, a row for every change of a setting."""
    groups, columns = defaultdict(dict), []
    for row in read("sweep.csv"):
        column = f"{row['task']} {row['quality']}"
        columns += [column] if column not in columns else []
        default = f"the defaults, seed {row['seed']}"
        change = f"`{row['setting']}` {row['value']}" if row["setting"] else default
        groups["the data"][column] = row["data_score"]
        groups[change][column] = row["score"]
    rows = [
        (change, *(f"{float(scores[column]):.1f}" for column in columns))
        for change, scores in groups.items()
    ]
    return markdown(("changed setting", *columns), rows)


def machine_line(grid: str) -> str:
    """What a grid ran on, and how long a run took."""
    machine = json.loads((RESULTS / f"{grid}.json").read_text())
    seconds = np.median([float(row["seconds"]) for row in read(f"{grid}.csv")])
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['workers']} runs at a time "
        f"with one thread each, torch {machine['torch']}; median {seconds / 60:.1f} minutes a run"
    )


def learning_curves() -> None:
    """Draw the scores of the three seeds during training, and the data's mean as a line."""
    mpl.use("Agg")
    groups, curves = main_groups(), defaultdict(list)
    for row in read("main_curves.csv"):
        curves[row["task"], row["quality"], row["seed"]].append((row["step"], row["score"]))
    tasks = list(PUBLIC_RETURNS)
    figure, axes = plt.subplots(1, len(tasks), figsize=(10, 3.1), layout="constrained")
    for task, panel in zip(tasks, axes, strict=True):
        for k, quality in enumerate(QUALITIES):
            runs = [np.array(c, float) for key, c in curves.items() if key[:2] == (task, quality)]
            steps, scores = runs[0][:, 0], np.stack([run[:, 1] for run in runs])
            panel.plot(steps, scores.mean(axis=0), color=f"C{k}", label=quality)
            panel.fill_between(steps, scores.min(0), scores.max(0), color=f"C{k}", alpha=0.2)
            data = np.mean([float(row["data_score"]) for row in groups[task, quality]])
            panel.axhline(data, color=f"C{k}", ls=":", lw=1)
        panel.set(title=task, xlabel="update")
    axes[0].set_ylabel("normalized score")
    axes[0].legend(fontsize=7)
    (ROOT / "benchmark" / "figures").mkdir(exist_ok=True)
    figure.savefig(ROOT / "benchmark" / "figures" / "learning_curves.png", dpi=110)


def tables() -> dict[str, str]:
    """The README's tables by name."""
    return {
        "data": data_table(),
        "prey": prey_table(),
        "main": f"{main_table()}\n\n{machine_line('main')}.",
        "sweep": f"{sweep_table()}\n\n{machine_line('sweep')}.",
    }


def main() -> None:
    """Rewrite the README's tables and the figure."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in tables().items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"error: README.md has {count} places for the table {name}")
    readme.write_text(text)
    learning_curves()


if __name__ == "__main__":
    main()

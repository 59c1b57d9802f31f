"""Compare runs: a table of their final scores, and a picture of their learning curves.

    python tools/compare.py runs/simple_spread-expert/*/seed-* --out compare.png

Runs that differ in nothing but the seed count as one row, with the mean over the seeds and its 95 %
bootstrap interval. Of the settings those are shown in which rows of one method differ. Bands in the
picture are the range of the seeds. Runs that have not ended yet count as they stand.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy.stats import bootstrap

FREE = {"seed", "num_seeds", "name", "run_dir", "data_dir", "device", "compile", "resume"}


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """run directories of any scripts, of one seed or several"""
    out: Path = Path("compare.png")
    """picture to write"""


def read_run(run_dir: Path) -> tuple[dict, pd.DataFrame]:
    """A run's method and settings, and its metrics.csv: an evaluation of one seed in each row."""
    try:
        settings = json.loads((run_dir / "args.json").read_text())
        (script,) = run_dir.glob("*.py")
        metrics = pd.read_csv(run_dir / "metrics.csv")
        metrics["minutes"] = metrics["seconds"] / 60
    except (OSError, KeyError, ValueError) as problem:
        raise SystemExit(f"error: {run_dir} is no run with an evaluation: {problem}") from None
    settings = {key: str(value) for key, value in settings.items() if key not in FREE}
    return {"method": script.stem, **settings}, metrics


def interval(values: np.ndarray) -> str:
    """Mean and 95 % bootstrap interval of it, from two values on."""
    mean = f"{values.mean():.1f}"
    if len(values) < 2 or np.ptp(values) == 0 or not np.isfinite(values).all():
        return mean
    result = bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return f"{mean} [{result.low:.1f}, {result.high:.1f}]"


def group_runs(runs: list[tuple[dict, pd.DataFrame]]) -> list[tuple[dict, pd.DataFrame]]:
    """Put runs together that differ in the seed alone; of a seed that is there twice, the last."""
    groups = {}
    for settings, metrics in runs:
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append((settings, metrics))
    return [
        (
            group[0][0],
            pd.concat([m for _, m in group]).drop_duplicates(["seed", "step"], keep="last"),
        )
        for group in groups.values()
    ]


def make_table(groups: list[tuple[dict, pd.DataFrame]]) -> tuple[pd.DataFrame, list[str]]:
    """The table of all groups, and a label for each, which says in what it differs from others."""
    settings = pd.DataFrame([settings for settings, _ in groups]).fillna("-")
    counts = settings.groupby("method").nunique().max()  # within a method
    varied = [key for key in counts.index if counts[key] > 1]
    rows = []
    for own, metrics in groups:
        last = metrics.sort_values("step").groupby("seed").last()
        ended = (last["step"] == int(own["num_updates"])).all()
        rows.append(
            {
                "method": own["method"],
                **{key: own.get(key, "-") for key in varied},
                "seeds": len(last),
                "updates": f"{last['step'].min():,}" + ("" if ended else " so far"),
                "return": interval(last["return"].to_numpy()),
                "score": interval(last["score"].to_numpy()),
                "best score": f"{metrics.groupby('seed')['score'].max().mean():.1f}",
                "minutes": f"{last['minutes'].mean():.1f}",
            }
        )
    names = [", ".join([row["method"], *(f"{k} {row[k]}" for k in varied)]) for row in rows]
    return pd.DataFrame(rows), names


def draw(groups: list[tuple[dict, pd.DataFrame]], names: list[str], out: Path) -> None:
    """Score, or return where there is no scale, against updates: a panel for each task's data."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    titles = [f"{settings['task']}, {settings['quality']}" for settings, _ in groups]
    panels = list(dict.fromkeys(titles))
    size = {"figsize": (5 * len(panels), 4), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **size)
    for (_, metrics), name, title in zip(groups, names, titles, strict=True):
        panel = axes[0, panels.index(title)]
        what = "return" if metrics["score"].isna().all() else "score"
        lines = metrics.groupby("step")[what].agg(["mean", "min", "max"])
        (line,) = panel.plot(lines["mean"], label=name)
        panel.fill_between(
            lines.index, lines["min"], lines["max"], color=line.get_color(), alpha=0.2
        )
        panel.set(title=title, xlabel="updates", ylabel="normalised " * (what == "score") + what)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(out, dpi=140)


def main(args: Args) -> None:
    """Print the table and write the picture."""
    if not args.run_dirs:
        raise SystemExit("error: name at least one run directory, as runs/*/*/seed-*")
    groups = group_runs([read_run(run_dir) for run_dir in args.run_dirs])
    table, names = make_table(groups)
    print(table.to_markdown(index=False, disable_numparse=True))
    draw(groups, names, args.out)
    print(f"{args.out}: learning curves")


if __name__ == "__main__":
    main(tyro.cli(Args))

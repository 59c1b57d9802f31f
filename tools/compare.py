"""Compare runs: a table of their final scores, and a picture of their learning curves.

    python tools/compare.py runs/simple_spread-expert/*/seed-* --out compare.png

Runs that differ in nothing but the seed count as one row, with the mean over the seeds and its 95 %
bootstrap interval. Of the settings those are shown in which rows of one method differ. Bands in the
picture are the range of the seeds. Runs that have not ended yet count as they stand. Runs on logs
have no returns; their figures on held-out episodes are shown.
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


def interval(values: np.ndarray, form: str = ".1f") -> str:
    """Mean and 95 % bootstrap interval of it, from two values on."""
    mean = f"{values.mean():{form}}"
    if len(values) < 2 or np.ptp(values) == 0 or not np.isfinite(values).all():
        return mean
    result = bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    return f"{mean} [{result.low:{form}}, {result.high:{form}}]"


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
    several = settings[["task", "quality"]].nunique() > 1  # of any methods
    varied = [key for key in counts.index if counts[key] > 1 or several.get(key)]
    rows = []
    for own, metrics in groups:
        last = metrics.sort_values("step").groupby("seed").last()
        ended = (last["step"] == int(own["num_updates"])).all()
        row = {"method": own["method"], **{key: own.get(key, "-") for key in varied}}
        row |= {"seeds": len(last)}
        row |= {"updates": f"{last['step'].min():,}" + ("" if ended else " so far")}
        row |= {key: interval(last[key].to_numpy()) for key in ("return", "score") if key in last}
        if "score" in last:
            row |= {"best score": f"{metrics.groupby('seed')['score'].max().mean():.1f}"}
        held_out = [key for key in last if key.startswith("held_out_")]
        row |= {key.replace("_", " "): interval(last[key].to_numpy(), ".3g") for key in held_out}
        rows.append(row | {"minutes": f"{last['minutes'].mean():.1f}"})
    names = [", ".join([row["method"], *(f"{k} {row[k]}" for k in varied)]) for row in rows]
    return pd.DataFrame(rows).fillna("-"), names


def draw(groups: list[tuple[dict, pd.DataFrame]], names: list[str], out: Path) -> None:
    """Score, or return without a scale, against updates: a panel for each task's data.

    Of logs it is the distance of held-out actions.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    titles = [f"{settings['task']}, {settings['quality']}" for settings, _ in groups]
    panels = list(dict.fromkeys(titles))
    size = {"figsize": (5 * len(panels), 4), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), squeeze=False, **size)
    for (_, metrics), name, title in zip(groups, names, titles, strict=True):
        panel = axes[0, panels.index(title)]
        curves = [key for key in ("score", "held_out_action_distance") if key in metrics]
        what = next((key for key in curves if metrics[key].notna().any()), "return")
        lines = metrics.groupby("step")[what].agg(["mean", "min", "max"])
        (line,) = panel.plot(lines["mean"], label=name)
        panel.fill_between(
            lines.index, lines["min"], lines["max"], color=line.get_color(), alpha=0.2
        )
        label = "normalised " * (what == "score") + what.replace("_", " ")
        panel.set(title=title, xlabel="updates", ylabel=label)
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

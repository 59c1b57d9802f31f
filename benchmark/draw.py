"""The names and figures of benchmark/report.py, which has the numbers."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

LOOKS = {  # name; colour, Okabe and Ito's for all eyes, and line
    "om2p": ("OM2P", "#D55E00", "-"),
    "bc": ("BC", "#999999", "--"),
    "td3_bc": ("MA-TD3+BC", "#0072B2", "-"),
    "omar": ("OMAR", "#56B4E9", "--"),
    "diffusion_ql": ("Diffusion-QL", "#009E73", "-"),
    "dom2": ("DOM2", "#000000", "--"),
    "flow_ql": ("Flow-QL", "#CC79A7", "-"),
    "fql": ("FQL", "#E69F00", "--"),
}
NAMES = {method: look[0] for method, look in LOOKS.items()} | {
    "om2p-jvp": "OM2P, du/dr exact by `jvp`",
    "om2p-jacobian": "OM2P, du/dr from the batch's Jacobian",
    "om2p-loop": "OM2P, agent by agent, nn.Linear",
    "critic": "best of 64 uniform actions by the critic",
}
OURS, OTHERS = LOOKS["om2p"][1], "#8FA8BF"  # of bars
mpl.use("Agg")
plt.rcParams.update(
    {"figure.constrained_layout.use": True, "savefig.dpi": 140, "axes.axisbelow": True}
)


def style(method: str) -> dict:
    """How a method's line is drawn; OM2P's is thick and on top."""
    name, color, line = LOOKS[method]
    width = {"lw": 2.8, "zorder": 3} if method == "om2p" else {"lw": 1.3}
    return {"label": name, "color": color, "ls": line, **width}


def log_axis(panel, ticks) -> None:
    """Give a panel a logarithmic x axis with these ticks and no others."""
    panel.set_xscale("log")
    panel.set_xticks(ticks, ticks)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def learning_curves(curves: pd.DataFrame, data: pd.Series) -> plt.Figure:
    """Scores during training, mean over the seeds; OM2P with the range of its seeds."""
    size = {"figsize": (9, len(data) // 2 + 1), "sharex": "row", "squeeze": False}
    figure, axes = plt.subplots(len(data) // 4, 4, **size)
    for (name, points), panel in zip(curves.groupby("data", sort=False), axes.flat, strict=True):
        for method, runs in points.groupby("method", sort=False):
            lines = runs.groupby(runs.step / 1_000)["score"].agg(["mean", "min", "max"])
            panel.plot(lines["mean"], **style(method))
            if method == "om2p":
                panel.fill_between(lines.index, lines["min"], lines["max"], color=OURS, alpha=0.25)
        panel.axhline(data[name], color="0.2", ls=":", lw=1.5, label="the data")
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    plt.setp(axes[-1], xlabel="thousands of updates")
    plt.setp(axes[:, 0], ylabel="normalised score")
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def average_bars(bars: dict[str, tuple], data: float) -> plt.Figure:
    """Every method's average (mean, and the ends of its interval), and the data's."""
    figure, panel = plt.subplots(figsize=(9, 4))
    for method, (center, low, high) in sorted(bars.items(), key=lambda bar: bar[1]):
        ends = {"xerr": [[center - low], [high - center]], "capsize": 3}
        color = OURS if method == "om2p" else OTHERS
        bar = panel.barh(LOOKS[method][0], center, 0.7, color=color, **ends)
        panel.bar_label(bar, fmt="%.1f", padding=5)
    panel.axvline(data, color="0.2", ls=":", label=f"the data {data:.1f}")
    panel.legend(loc="lower right")
    panel.margins(x=0.08)
    panel.set_xlabel("normalised score, average over the twelve datasets")
    return figure


def time_curves(curves: pd.DataFrame, times: dict, ends: dict[str, tuple]) -> plt.Figure:
    """Average scores against training time in that of OM2P; `ends`: (time, score) of short runs."""
    figure, panel = plt.subplots(figsize=(9, 4.2))
    for method, points in curves.groupby("method", sort=False):
        scores = points.groupby("step")["score"].mean()
        panel.plot(scores.index * times[method], scores, **style(method))
    for method, point in ends.items():
        panel.plot(*point, "D", color=LOOKS[method][1], ms=7, zorder=4)
    log_axis(panel, (0.05, 0.1, 0.2, 0.5, 1, 2, 5))
    panel.set_xlabel("training time, that of OM2P's 4,000 updates = 1")
    panel.set_ylabel("normalised score, average of 12 datasets")
    figure.legend(loc="outside right center")
    return figure


def cost_bars(rows: pd.DataFrame) -> plt.Figure:
    """Time and memory by method, OM2P's being 1; `name` is how it is called."""
    rows = rows[rows.memory.notna()][::-1]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
    for panel, key in zip(panels, ("time", "memory"), strict=True):
        colors = [OURS if method.startswith("om2p") else OTHERS for method in rows.index]
        panel.barh(rows.name.str.replace("`", ""), rows[key] - 1, 0.7, left=1, color=colors)
        for k, value in enumerate(rows[key]):
            place = (max(value, 1), k), (5, 0), "data", "offset points"
            panel.annotate(f"{value:#.3g}", *place, va="center")
        panel.axvline(1, color=OURS, lw=2.8)
        log_axis(panel, (0.2, 0.5, 1, 2, 5, 10, 20, 50))
        panel.set(xlim=(rows[key].min() / 1.5, 2.5 * rows[key].max()))
    panels[0].set_xlabel("time of an update, OM2P's = 1")
    panels[1].set_xlabel("peak memory of training, OM2P's = 1")
    return figure


def cost_growth(rows: pd.DataFrame) -> plt.Figure:
    """An update's time against agents, batch, width and steps of the policy."""
    names = rows.method.str.split("-")
    rows = rows.assign(key=names.str[0], steps=names.str[1], ms=1_000 / rows.updates_per_second)
    rows["width"] = rows.hidden_dims.str.split("x").str[0]
    default = rows[rows.part == "default"]
    steps = default[default.key.isin(["flow_ql", "diffusion_ql"])]
    rows = pd.concat([rows, steps.assign(part="steps", method=steps.key)])
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), sharey=True)
    labels = ("number of agents", "batch size, transitions of every agent")
    labels += ("width of the two hidden layers", "steps of the policy")
    parts = zip(axes.flat, ("agents", "batch", "width", "steps"), labels, strict=True)
    for panel, part, label in parts:
        for method, points in rows[rows.part == part].groupby("method", sort=False):
            line = style(points.key.iloc[0]) | {"label": points.name.iloc[0]}
            xs, line["ls"] = points[part].astype(int), "--" if method.endswith("-20") else "-"
            panel.semilogy(xs, points.ms, marker=".", **line)
        log_axis(panel, sorted({x for line in panel.get_lines() for x in line.get_xdata()}))
        panel.set_xlabel(label)
    for ms in default.ms[default.method == "om2p"]:
        axes[1, 1].axhline(ms, **style("om2p"))
    plt.setp(axes[:, 0], ylabel="time of an update, ms")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure

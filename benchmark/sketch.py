"""Draw the method: a flow followed in many steps, its mean velocity, and OM2P's one step.

The data are an agent's actions in one situation, of one dimension and of two kinds. Of such data
the flow is known exactly, so what is drawn is computed and no trained network. benchmark/report.py
writes the picture, benchmark/figures/method.png.
"""

import matplotlib.pyplot as plt
import numpy as np
from draw import LOOKS, OURS

MODES, SPREAD, STEPS = np.array([-0.6, 0.7]), 0.06, 1_000  # the actions' two kinds; of the paths
MANY = LOOKS["flow_ql"][1]


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """The flow's velocity at x and t, E[action - noise | x_t = x]: (n,) -> (n,)."""
    variance = (1 - t) ** 2 + (t * SPREAD) ** 2
    offset = x[:, None] - t * MODES  # (n, 2)
    weight = np.exp(-(offset**2 - (offset**2).min(axis=1, keepdims=True)) / (2 * variance))
    speed = MODES + (t * SPREAD**2 - (1 - t)) / variance * offset
    return (weight * speed).sum(axis=1) / weight.sum(axis=1)


def follow(noise: np.ndarray, steps: int) -> np.ndarray:
    """Paths from noise to actions by so many Euler steps: (n,) -> (steps + 1, n)."""
    path = [noise]
    for k in range(steps):
        path.append(path[-1] + velocity(path[-1], k / steps) / steps)
    return np.stack(path)


def method_figure() -> plt.Figure:
    """Three panels: many steps, the mean velocity over an interval, one step."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True)
    noise = np.array([-1.6, -1.0, -0.55, -0.2, 0.12, 0.45, 0.9, 1.5])
    times, paths = np.linspace(0, 1, STEPS + 1), follow(noise, STEPS)
    for panel in panels:
        panel.plot(times, paths, color="0.8", lw=1.2)
        panel.set(xlabel="flow time (0: noise, 1: action)", xlim=(-0.08, 1.08), xticks=(0, 0.5, 1))
        panel.grid(alpha=0.3)
    panels[0].plot(np.linspace(0, 1, 11), follow(noise, 10), ".-", color=MANY, lw=1, ms=6)
    panels[0].set_title("flow matching: ten steps along v", fontsize=10)

    start, end, path = 200, 800, paths[:, 5]
    (r, t), (low, high) = times[[start, end]], path[[start, end]]
    tangent = (path[start + 1] - path[start]) * STEPS
    panels[1].plot(times, path, color="0.2", lw=1.6)
    panels[1].plot([r, t], [low, low + (t - r) * tangent], ls=":", color="0.2", lw=1.8)
    panels[1].plot([r, t], [low, high], "o-", color=OURS, lw=2.8, ms=6)
    names = {"textcoords": "offset points", "ha": "center"}
    panels[1].annotate("$x_r$", (r, low), (0, -15), **names)
    panels[1].annotate(
        "$u(x_r, r, t)$", ((r + t) / 2, (low + high) / 2), (0, 8), **names, color=OURS
    )
    panels[1].annotate("velocity v at r", (t, low + (t - r) * tangent), (0, -14), **names)
    panels[1].set_title("mean velocity u over [r, t]", fontsize=10)

    panels[2].plot([0, 1], [noise, paths[-1]], "o-", color=OURS, lw=2, ms=5)
    panels[2].set_title("OM2P: one step, noise + u(noise, 0, 1)", fontsize=10)
    panels[0].set_ylabel("x, one component")
    return figure

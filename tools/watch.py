"""Watch a trained team: play the policy of any run of any script and write a GIF or MP4.

    python tools/watch.py runs/simple_tag-expert/om2p_mpe/seed-0 --out team.gif

Policy and environment come from the run's own copy of its script. The particle environments are
drawn with matplotlib, four episodes side by side: targets are black, solid obstacles grey, food
green, forests light green, the prey red; who leaves the picture waits at its edge. MuJoCo renders
one episode off screen, by EGL or OSMesa, whichever works, each agent's joints in its colour. Other
environments show themselves by `render()`. MP4 needs `pip install imageio-ffmpeg`.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import torch
import tyro


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """run directory of any script, with args.json and policy.pt"""
    out: Path = Path("team.gif")
    """file to write, .gif or .mp4"""
    seed: int | None = None
    """seed of initial states and noise; in a run of several, whose team; default: the first"""
    steps: int = 200
    """longest film, in steps of the environment"""
    every: int = 2
    """on MuJoCo a frame every so many steps"""
    size: int = 240
    """height of the film, and the width of one episode, in pixels"""
    data_dir: Path | None = None
    """where the prey is, if not in the --data-dir of the run"""


WRITING = {"xycoords": "axes fraction", "fontsize": 4.5}
AGENT_COLORS = ("C0", "C1", "C4", "C5", "C9", "C8", "C6")  # of particles, again from the 8th on


def stop(message: str):
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}".splitlines()[0])


def choose_renderer() -> None:
    """Set MUJOCO_GL to what can draw on this machine, unless it is set or neither can."""
    test = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    for name in () if "MUJOCO_GL" in os.environ else ("egl", "osmesa"):
        setting = {**os.environ, "MUJOCO_GL": name}
        command = [sys.executable, "-c", test]
        if not subprocess.run(command, env=setting, capture_output=True).returncode:
            os.environ["MUJOCO_GL"] = name
            return


def load_team(run_dir: Path, num_episodes=None, seed: int | None = None, data_dir=None):
    """The environment of a run, K episodes at once, and its trained policy.

    Both come from the run's own script, whose environment may be another than this project's. The
    team is that of `seed`, by default of the first one; K is 4, or 1 on MuJoCo, if not given.
    """
    run_dir = run_dir.expanduser()
    try:
        settings = json.loads((run_dir / "args.json").read_text())
        (script,) = (x for x in run_dir.glob("*.py") if "def train(" in x.read_text("utf-8"))
        weights = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
    except Exception as problem:
        stop(f"{run_dir} is not the directory of a finished run: {problem}")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.path.append(os.getcwd())  # where a user's script may have its environment from
    try:
        spec.loader.exec_module(module)
        task, first, count = (settings[key] for key in ("task", "seed", "num_seeds"))
        seed = first if seed is None else seed
        if hasattr(module, "load_log"):  # nothing is played, and the team knows its agents' sizes
            env = policy = module.load_team(run_dir, seed)
            return SimpleNamespace(env=env, policy=policy, settings=settings, module=module)
        suite, episodes = ("MaMuJoCo", 1) if hasattr(module, "MaMuJoCo") else ("MPE", 4)
        env = getattr(module, suite)(task, num_episodes or episodes)
        if task in ("simple_tag", "simple_world") and hasattr(module, "load_prey"):
            data_dir = Path(data_dir or settings["data_dir"]).expanduser()
            env.prey_policy = module.load_prey(data_dir / task / "prey.npz")
        sizes = env.num_agents, max(env.obs_dims), max(env.action_dims)
        policy_class = get_type_hints(module.train)["return"].__args__[0]
        names = list(inspect.signature(policy_class).parameters)[len(sizes) :]
        policy = policy_class(*sizes, *(settings[name] for name in names))
        k = seed - first if count > 1 else 0
        if k not in range(count):
            raise ValueError(f"--seed {seed} is not one of its seeds")
        policy.load_state_dict({key: values.chunk(count)[k] for key, values in weights.items()})
        for i, width in enumerate(env.action_dims):  # agents with fewer actions are padded
            policy.mask[i, :, width:] = 0
    except Exception as problem:
        stop(f"{script} cannot be played by this version of the project: {problem!r}")
    return SimpleNamespace(env=env, policy=policy, settings=settings, module=module, seed=seed)


def agent_color(env, agent: int) -> str:
    """The colour of a particle; the prey, which comes after those that learn, is red."""
    return AGENT_COLORS[agent % len(AGENT_COLORS)] if agent < env.num_agents else "tab:red"


def draw_landmarks(panel, module, env, k: int) -> None:
    """Draw the targets, or obstacles, food and forests, of one particle world."""
    from matplotlib.patches import Circle

    colors = {module.TARGET: "0.2", module.FOOD: "tab:green", module.FOREST: "palegreen"}
    for place, size in zip(env.landmarks[k], env.landmark_size, strict=True):
        above = 4 if size == module.TARGET else 1  # they are smaller than the agents on them
        panel.add_patch(Circle(place, size, color=colors.get(size, "0.75"), zorder=above))
    panel.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")


def draw_particles(team, panels, _):
    """Draw the particle worlds of all episodes, now and whenever the next picture is wanted."""
    from matplotlib.patches import Circle

    env, bodies = team.env, {}
    for k, panel in enumerate(panels):
        draw_landmarks(panel, team.module, env, k)
        for agent, radius in enumerate(env.size):
            disc = Circle((0, 0), radius, color=agent_color(env, agent), zorder=2)
            bodies[k, agent] = panel.add_patch(disc)
    while True:
        for index, body in bodies.items():
            body.center = env.pos[index].clip(-1.6, 1.6)
        yield


def draw_robot(team, panels, size: int):
    """The same for the robot of the first episode, rendered `size` pixels high."""
    import mujoco
    from matplotlib.colors import to_rgba

    robots = team.env.envs[0].unwrapped
    robot = robots.single_agent_env.unwrapped
    model, screen = robot.model, robot.model.vis.global_
    for i, nodes in enumerate(robots.agent_action_partitions):
        place, style = (0.02, 0.84 - 0.08 * i), {"color": f"C{i}", "weight": "bold"}
        panels[0].annotate(f"agent {i}", place, **style, **WRITING)
        for node in nodes:
            moved = model.geom_bodyid == model.jnt_bodyid[model.actuator_trnid[node.act_ids, 0]]
            model.geom_matid[moved], model.geom_rgba[moved] = -1, to_rgba(f"C{i}")
    screen.offwidth = screen.offheight = max(size, screen.offwidth)
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # or -1: free
    with mujoco.Renderer(model, size, size) as renderer:
        while True:
            renderer.update_scene(robot.data, camera)
            panels[0].imshow(renderer.render())
            yield


def draw_other(team, panels, _):
    """The same for any environment whose `render()` gives a picture, of the first episode."""
    env = getattr(team.env, "envs", [team.env])[0]
    getattr(env, "unwrapped", env).render_mode = "rgb_array"  # which PettingZoo's look at
    while True:
        panels[0].imshow(env.render())
        yield


def film(team, size: int):
    """Pictures of the team, one now and one whenever the next is wanted."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    robot = hasattr(getattr(team.env, "envs", [None])[0], "single_agent_env")
    draw, columns = draw_robot if robot else draw_other, 1
    if hasattr(team.env, "landmarks"):
        draw, columns = draw_particles, team.env.num_episodes
    style = {"squeeze": False, "layout": "none", "subplot_kw": {"xticks": [], "yticks": []}}
    figure, (panels,) = plt.subplots(1, columns, figsize=(columns, 1), dpi=size, **style)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0)
    captions = [panel.annotate("", (0.02, 0.92), zorder=5, **WRITING) for panel in panels]
    for _ in draw(team, panels, size):
        for panel, caption, value in zip(panels, captions, team.returns, strict=False):
            panel.spines[:].set_linewidth(0.3)
            caption.set_text(f"step {team.step}, return {value:.1f}")
        figure.canvas.draw()
        yield np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
        for image in [*panels[0].images]:
            image.remove()


@torch.no_grad()
def main(args: Args) -> None:
    """Play, draw and write."""
    out, run_dir = args.out.expanduser(), args.run_dir.expanduser()
    if out.suffix not in (".gif", ".mp4"):
        stop(f"--out {out} must end in .gif or .mp4")
    if min(args.steps, args.every, args.size, (args.seed or 0) + 1) < 1:
        stop("--steps, --every and --size must be 1 or more, --seed 0 or more")
    try:  # here, since others use `load_team`
        imageio, _ = map(importlib.import_module, ("imageio", "matplotlib"))
    except ImportError as problem:
        stop(f"pip install -r requirements-dev.txt: {problem}")
    if any(b"mujoco" in path.read_bytes() for path in run_dir.glob("*.py")):
        choose_renderer()
    team = load_team(run_dir, None, args.seed, args.data_dir)
    if not hasattr(team.env, "reset"):
        stop(f"{run_dir} was learned from logs; there is no simulator to play in")
    env, every = team.env, args.every if hasattr(team.module, "MaMuJoCo") else 1
    torch.manual_seed(team.seed)
    obs = env.reset(team.seed)
    team.step, team.returns, task = 0, np.zeros(obs.shape[1]), ascii(team.settings["task"])
    pictures = film(team, args.size)
    try:
        frames = [next(pictures)]
    except Exception as problem:
        stop(f"{task} cannot be drawn (a robot needs libegl1 or libosmesa6): {problem!r}")
    for step in range(1, min(env.horizon, args.steps) + 1):
        obs, reward = env.step(team.policy.act(torch.from_numpy(obs)).numpy())
        team.step, team.returns = step, team.returns + reward.mean(axis=0)
        if step % every == 0:
            frames.append(next(pictures))
        if np.all(getattr(env, "done", False)):  # the robot lies
            break
    pictures.close()
    rate = 10 if every == 1 else 20
    timing = {"duration": 1000 / rate, "loop": 0} if out.suffix == ".gif" else {"fps": rate}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimsave(out, frames, **timing)
    except Exception as problem:
        stop(f"{out} cannot be written: {problem}")
    returns = ", ".join(f"{value:.1f}" for value in team.returns)
    print(f"{str(out)!a}: {task}, {team.step} steps, return so far {returns}")


if __name__ == "__main__":
    main(tyro.cli(Args))

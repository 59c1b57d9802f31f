"""Watch a trained team: play the policy of any run of any script and write a GIF or MP4.

    python tools/watch.py runs/simple_tag-expert/om2p_mpe/seed-0 --out team.gif

Policy and environment come from the run's own copy of its script. The particle environments are
drawn with matplotlib, four episodes side by side: targets and solid obstacles are grey, food is
green, forests are light green, the prey is red. MuJoCo renders one episode off screen, by EGL or
OSMesa, whichever works. MP4 needs `pip install imageio-ffmpeg`.
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


def stop(message: str):
    """End the program with one line on stderr and exit status 1."""
    raise SystemExit(f"error: {message}".splitlines()[0])


def choose_renderer() -> None:
    """Set MUJOCO_GL to what can draw on this machine, unless it is set."""
    if "MUJOCO_GL" in os.environ:
        return
    test = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    for name in ("egl", "osmesa"):
        os.environ["MUJOCO_GL"] = name
        if not subprocess.run([sys.executable, "-c", test], capture_output=True).returncode:
            return
    stop("MuJoCo can draw neither by EGL nor by OSMesa here: apt install libegl1 or libosmesa6")


def load_team(run_dir: Path, num_episodes: int, seed: int | None = None, data_dir=None):
    """The environment of a run, K episodes at once, and its trained policy.

    Both come from the run's own script; the team is that of `seed`, by default of the first one.
    """
    try:
        settings = json.loads((run_dir / "args.json").read_text())
        (script,) = run_dir.glob("*.py")
        weights = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
    except Exception as problem:
        stop(f"{run_dir} is not the directory of a finished run: {problem}")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        task, first, count = (settings[key] for key in ("task", "seed", "num_seeds"))
        seed = first if seed is None else seed
        suite = "MaMuJoCo" if hasattr(module, "MaMuJoCo") else "MPE"
        env = getattr(module, suite)(task, num_episodes, seed)
        if task in ("simple_tag", "simple_world"):
            data_dir = Path(data_dir or settings["data_dir"])
            env.prey_policy = module.load_prey(data_dir / task / "prey.npz")
        sizes = env.num_agents, max(env.obs_dims), max(env.action_dims)
        policy_class = get_type_hints(module.train)["return"].__args__[0]
        own = {**settings, "steps": settings.get("diffusion_steps")}  # Diffusion-QL's name of it
        names = list(inspect.signature(policy_class).parameters)[len(sizes) :]
        policy = policy_class(*sizes, *(own[name] for name in names))
        k = seed - first if count > 1 else 0
        if not 0 <= k < count:
            raise ValueError(f"--seed {seed} is not one of its seeds")
        policy.load_state_dict({key: values.chunk(count)[k] for key, values in weights.items()})
        for i, width in enumerate(env.action_dims):  # agents with fewer actions are padded
            policy.mask[i, :, width:] = 0
    except Exception as problem:
        stop(f"{script} cannot be played by this version of the project: {problem!r}")
    return SimpleNamespace(env=env, policy=policy, settings=settings, module=module, seed=seed)


def draw_landmarks(panel, module, env, k: int) -> None:
    """Draw the targets, or obstacles, food and forests, of one particle world."""
    from matplotlib.patches import Circle

    for place, size in zip(env.landmarks[k], env.landmark_size, strict=True):
        color = {module.FOOD: "tab:green", module.FOREST: "palegreen"}.get(size, "0.75")
        style = {"color": color, "zorder": 1}
        if env.task == "simple_spread":  # targets are smaller than the agents that cover them
            style = {"color": "0.2", "zorder": 4}
        panel.add_patch(Circle(place, size, **style))
    panel.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")


def agent_color(module, agent: int) -> str:
    """Red for the prey, cool colours for the team."""
    return "tab:red" if agent == module.MPE.num_agents else f"C{(0, 1, 4)[agent]}"


def particle_frames(team, size: int):
    """Pictures of all episodes side by side, one now and one each time the next is asked for."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    env, columns = team.env, team.env.num_episodes
    figure, panels = plt.subplots(1, columns, figsize=(columns, 1), dpi=size, squeeze=False)
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0)
    bodies = []
    for k, panel in enumerate(panels[0]):
        draw_landmarks(panel, team.module, env, k)
        panel.spines[:].set_linewidth(0.3)
        for agent, radius in enumerate(env.size):
            color = agent_color(team.module, agent)
            body = panel.add_patch(plt.Circle((0, 0), radius, color=color, zorder=2))
            bodies.append((body, k, agent))
    while True:
        for body, k, agent in bodies:
            body.center = env.pos[k, agent]
        figure.canvas.draw()
        yield np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def robot_frames(team, size: int):
    """Pictures of the robot of episode 0, one now and one each time the next is asked for."""
    import mujoco

    robot = team.env.envs[0].single_agent_env.unwrapped
    camera = mujoco.mj_name2id(robot.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")  # or -1: free
    with mujoco.Renderer(robot.model, size, size) as renderer:
        while True:
            renderer.update_scene(robot.data, camera)
            yield renderer.render()


@torch.no_grad()
def main(args: Args) -> None:
    """Play, draw and write."""
    if args.out.suffix not in (".gif", ".mp4"):
        stop(f"--out {args.out} must end in .gif or .mp4")
    if min(args.steps, args.every, args.size, (args.seed or 0) + 1) < 1:
        stop("--steps, --every and --size must be 1 or more, --seed 0 or more")
    on_mujoco = any(args.run_dir.glob("*_mamujoco.py"))
    try:  # here, since others use `load_team`
        imageio, _ = map(importlib.import_module, ("imageio", "matplotlib"))
    except ImportError as problem:
        stop(f"pip install -r requirements-dev.txt: {problem}")
    if on_mujoco:
        choose_renderer()
    team = load_team(args.run_dir, 1 if on_mujoco else 4, args.seed, args.data_dir)
    env, draw = team.env, robot_frames if on_mujoco else particle_frames
    torch.manual_seed(team.seed)
    pictures = draw(team, args.size)
    obs, returns, frames = env.reset(team.seed), 0.0, [next(pictures)]
    for step in range(1, min(env.horizon, args.steps) + 1):
        obs, reward = env.step(team.policy.act(torch.from_numpy(obs)).numpy())
        returns = returns + reward.mean(axis=0)
        if not on_mujoco or step % args.every == 0:
            frames.append(next(pictures))
    pictures.close()
    rate = 20 if on_mujoco else 10
    timing = {"duration": 1000 / rate, "loop": 0} if args.out.suffix == ".gif" else {"fps": rate}
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimsave(args.out, frames, **timing)
    except Exception as problem:
        stop(f"{args.out} cannot be written: {problem}")
    returns = ", ".join(f"{value:.1f}" for value in returns)
    print(f"{args.out}: {team.settings['task']}, {step} steps, return so far {returns}")


if __name__ == "__main__":
    main(tyro.cli(Args))

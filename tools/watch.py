"""Watch a trained team: play the policy of any run of any script and write a GIF or MP4.

    python tools/watch.py runs/simple_tag-expert/om2p_mpe/seed-0 --out team.gif

Policy and environment come from the run's own copy of its script. The particle environments are
drawn with matplotlib, four episodes side by side: targets and solid obstacles are grey, food is
green, forests are light green, the prey is red. MuJoCo renders off screen, by EGL or OSMesa,
whichever works (MUJOCO_GL chooses one), one episode. MP4 needs `pip install imageio-ffmpeg`.
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
    seed: int = 1
    """seed of initial states and noise"""
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
    for name in ("egl", "osmesa"):
        test = [sys.executable, "-c", "import mujoco; mujoco.GLContext(8, 8).make_current()"]
        if not subprocess.run(
            test, env={**os.environ, "MUJOCO_GL": name}, capture_output=True
        ).returncode:
            os.environ["MUJOCO_GL"] = name
            return
    stop("MuJoCo can draw neither by EGL nor by OSMesa here: apt install libegl1 or libosmesa6")


def load_team(run_dir: Path, num_episodes: int, seed: int, data_dir: Path | None = None):
    """The environment of a run, K episodes at once, and its trained policy.

    Both are built by the run's own copy of its script. Returns them with `settings`, those of
    args.json, and `module`, the script. Ends the program with a line if something is missing.
    """
    try:
        settings = json.loads((run_dir / "args.json").read_text())
        (script,) = run_dir.glob("*.py")
        weights = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
    except Exception as problem:
        stop(f"{run_dir} is not the directory of a finished run: {problem}")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as problem:
        stop(f"{script} does not stand alone: {problem}")
    if hasattr(module, "MaMuJoCo"):
        env = module.MaMuJoCo(settings["task"], num_episodes, seed)
    else:
        env = module.MPE(settings["task"], num_episodes, seed)
        env.prey_policy = module.find_prey(settings["task"], data_dir or Path(settings["data_dir"]))
    policy_class = get_type_hints(module.train)["return"].__args__[0]
    own = [name for name in inspect.signature(policy_class).parameters if name in settings]
    sizes = env.num_agents, max(env.obs_dims), max(env.action_dims)
    policy = policy_class(*sizes, **{name: settings[name] for name in own})
    policy.load_state_dict(weights)
    for part in policy.modules():  # agents with fewer actions than others are padded
        if "mask" in dict(part.named_buffers(recurse=False)):
            part.mask = getattr(env, "action_mask", part.mask)
    return SimpleNamespace(env=env, policy=policy, settings=settings, module=module)


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
    return "tab:red" if agent == module.LEARNERS else f"C{(0, 1, 4)[agent]}"


def particle_frames(team, size: int):
    """Pictures of all episodes side by side, one now and one each time the next is asked for."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    env, module = team.env, team.module
    figure, panels = plt.subplots(
        1, env.num_episodes, figsize=(env.num_episodes, 1), dpi=size, squeeze=False
    )
    figure.subplots_adjust(0, 0, 1, 1, 0.02, 0)
    bodies = []
    for k, panel in enumerate(panels[0]):
        draw_landmarks(panel, module, env, k)
        panel.spines[:].set_linewidth(0.3)
        for agent, radius in enumerate(env.size):
            color = agent_color(module, agent)
            bodies.append((k, agent, plt.Circle((0, 0), radius, color=color, zorder=2)))
            panel.add_patch(bodies[-1][2])
    while True:
        for k, agent, body in bodies:
            body.center = env.pos[k, agent]
        figure.canvas.draw()
        yield np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def robot_frames(team, size: int):
    """Pictures of the robot of episode 0, one now and one each time the next is asked for."""
    import mujoco

    robot = team.env.envs[0].single_agent_env.unwrapped
    names = [robot.model.camera(k).name for k in range(robot.model.ncam)]
    camera = "track" if "track" in names else -1
    with mujoco.Renderer(robot.model, size, size) as renderer:
        while True:
            renderer.update_scene(robot.data, camera)
            yield renderer.render()


@torch.no_grad()
def main(args: Args) -> None:
    """Play, draw and write."""
    if args.out.suffix not in (".gif", ".mp4"):
        stop(f"--out {args.out} must end in .gif or .mp4")
    for name in ("steps", "every", "size"):
        if getattr(args, name) < 1:
            stop(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    if args.seed < 0:
        stop(f"--seed is {args.seed}; it must be 0 or more")
    on_mujoco = any(path.stem.endswith("_mamujoco") for path in args.run_dir.glob("*.py"))
    try:  # here, since others use `load_team`
        import imageio

        if not on_mujoco:
            importlib.import_module("matplotlib")
    except ImportError as problem:
        stop(f"pip install -r requirements-dev.txt: {problem}")
    if on_mujoco:
        choose_renderer()
    team = load_team(args.run_dir, 1 if on_mujoco else 4, args.seed, args.data_dir)
    env = team.env
    pictures = (robot_frames if on_mujoco else particle_frames)(team, args.size)
    torch.manual_seed(args.seed)
    obs, returns, frames = env.reset(args.seed), 0.0, [next(pictures)]
    length = min(env.horizon, args.steps)
    for step in range(1, length + 1):
        obs, reward = env.step(team.policy.act(torch.from_numpy(obs)).numpy())
        returns = returns + reward.mean(axis=0)
        if not on_mujoco or step % args.every == 0:
            frames.append(next(pictures))
    pictures.close()
    temporary = args.out.with_name(f"{args.out.stem}.tmp{args.out.suffix}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.out.suffix == ".gif":
            imageio.mimsave(temporary, frames, duration=1000 / (20 if on_mujoco else 10), loop=0)
        else:
            imageio.mimsave(temporary, frames, fps=20 if on_mujoco else 10)
        temporary.replace(args.out)
    except Exception as problem:
        stop(f"{args.out} cannot be written: {problem}")
    finally:
        temporary.unlink(missing_ok=True)
    print(
        f"{args.out}: {team.settings['task']}, {length} steps, "
        f"return so far {', '.join(f'{value:.1f}' for value in returns)}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))

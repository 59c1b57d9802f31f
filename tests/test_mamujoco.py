"""MaMuJoCo against plain gymnasium robots, padded teams, and the datasets that are collected."""

import importlib

import collect_mamujoco
import gymnasium
import numpy as np
import pytest
import torch
from conftest import POLICIES, refusal
from numpy.testing import assert_allclose, assert_array_equal

from om2p_mamujoco import MaMuJoCo, normalized_score

# What agents of a cheetah observe, as indices of qpos and qvel, which start with x, z and pitch:
# own joints (OMAR's data: foot, shin and thigh of the back leg, of the front leg), next joints
JOINTS = {
    "HalfCheetah-2x3": ([[5, 4, 3], [8, 7, 6]], None),
    "HalfCheetah-6x1": (
        [[3], [4], [5], [6], [7], [8]],
        [[4, 6], [5, 3], [4], [3, 7], [8, 6], [7]],
    ),
}


def robot(env, k=0):
    """Episode k's gymnasium robot below MaMuJoCo."""
    return env.envs[k].single_agent_env.unwrapped


def random_actions(env, steps, seed=0):
    """Uniform actions in [-1, 1], (steps, N, K, action_dim)."""
    shape = steps, env.num_agents, env.num_episodes, max(env.action_dims)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("task", JOINTS)
def test_observations_are_the_agents_joints(task):
    """Step by step: of its joints qpos and qvel, of the next ones qpos, and the torso but for x."""
    env = MaMuJoCo(task, 2)
    obs = env.reset(3)
    for action in random_actions(env, 100):
        assert obs.dtype == np.float32
        for k in range(2):
            qpos, qvel = robot(env, k).data.qpos, robot(env, k).data.qvel
            own, others = JOINTS[task]
            for i, joints in enumerate(own):
                expected = [value for joint in joints for value in (qpos[joint], qvel[joint])]
                if others:
                    expected += [*qpos[others[i]], *qpos[1:3], *qvel[:3]]
                assert_allclose(obs[i, k, : env.obs_dims[i]], expected, rtol=1e-6, atol=1e-6)
        obs, _ = env.step(action)


@pytest.mark.parametrize(
    ("task", "obs_dims"),
    [
        ("HalfCheetah-2x3", (6, 6)),  # two numbers a joint: position and velocity
        ("Hopper-3x1", (2 + 1 + 5, 2 + 2 + 5, 2 + 1 + 5)),  # next joints, five of the torso
        ("Walker2d-2x3", (6 + 1 + 5, 6 + 1 + 5)),
        ("Ant-2x4", (8 + 2 + 11, 8 + 2 + 11)),  # no contact forces
        ("Humanoid-9|8", (242, 170)),  # and contact forces, inertia, velocities, actuator forces
    ],
)
def test_what_agents_observe(task, obs_dims):
    """Own joints, next joints and torso; in Humanoid contact forces, too; finite numbers."""
    env = MaMuJoCo(task, 1)
    assert env.obs_dims == obs_dims
    obs, reward = env.step(random_actions(env, 1)[0])
    assert obs.shape == (env.num_agents, 1, max(obs_dims))
    assert reward.shape == (env.num_agents, 1)
    assert np.isfinite(obs).all()
    assert env.horizon == 1000


def test_actions_and_rewards_are_gymnasiums():
    """Agent 0 drives the back thigh, shin and foot, agent 1 the front ones; both get the reward."""
    env, plain = MaMuJoCo("HalfCheetah-2x3", 1), gymnasium.make("HalfCheetah-v5").unwrapped
    env.reset(5)
    plain.reset(seed=int(np.random.SeedSequence(5).generate_state(1)[0]))
    for action in random_actions(env, 200):
        _, reward = env.step(action)
        _, expected, *_ = plain.step(np.concatenate(action[:, 0]).astype(float))
        assert_array_equal(reward, [[expected]] * 2)
        assert_array_equal(robot(env).data.qpos, plain.data.qpos)


@pytest.mark.parametrize(
    ("task", "cost"), [("Hopper-3x1", 1e-3), ("Walker2d-2x3", 1e-3), ("Ant-2x4", 0.5)]
)
def test_rewards_are_those_of_the_old_tasks(task, cost):
    """Speed + 1 - cost of control, by the -v2 tasks' rule: no contact cost, 1 for the fall too."""
    env, falls = MaMuJoCo(task, 4), 0
    env.reset(0)
    actions = random_actions(env, 300)
    if task == "Ant-2x4":  # with all its might, which overturns it sooner
        actions = np.sign(actions[::10]).repeat(10, axis=0)

    def place(k):
        """Of the torso, in Ant's rule, or of its joint."""
        data = robot(env, k).data
        return data.body(1).xpos[0] if task == "Ant-2x4" else data.qpos[0]

    for action in actions:
        before, over = [float(place(k)) for k in range(4)], env.done.copy()
        _, reward = env.step(action)
        for k in np.flatnonzero(~over):
            speed = (place(k) - before[k]) / robot(env, k).dt
            expected = speed + 1 - cost * (action[:, k] ** 2).sum()
            assert_allclose(reward[:, k], expected, rtol=1e-5, atol=1e-5)
            falls += env.done[k]
    assert falls > 0


def test_fallen_robots_wait():
    """A finished episode pays nothing and stands still; the others go on as they would alone."""
    env, alone = MaMuJoCo("Hopper-3x1", 3), MaMuJoCo("Hopper-3x1", 3)
    env.reset(0)
    alone.reset(0)
    waited = 0
    for action in random_actions(env, 200):
        over, before = env.done.copy(), env.obs.copy()
        obs, reward = env.step(action)
        assert_array_equal(obs[:, over], before[:, over])
        assert (reward[:, over] == 0).all()
        for k in np.flatnonzero(~over):
            command = {name: action[i, k] for i, name in enumerate(alone.names)}
            single, *_ = alone.envs[k].step(command)
            for i, name in enumerate(alone.names):
                assert_allclose(obs[i, k, : env.obs_dims[i]], single[name], rtol=1e-6, atol=1e-6)
        waited += over.any() and not over.all()
    assert waited > 0
    assert env.done.all()
    env.reset()
    assert not env.done.any()


def test_reset_by_seed():
    """A seed gives the same initial states, each episode another; no seed goes on to new ones."""
    env = MaMuJoCo("HalfCheetah-2x3", 3)
    first, second, other = env.reset(7), env.reset(), env.reset(8)
    assert_array_equal(env.reset(7), first)
    states = np.concatenate([first, second, other], axis=1)[0]
    assert len(np.unique(states, axis=0)) == 9


@pytest.mark.parametrize("task", ["HalfCheetah", "HalfCheetah-5x5", "Unicorn-2x2", ""])
def test_bad_task(task):
    """One line that names the task."""
    assert f"--task {task} is not" in refusal(MaMuJoCo, task, 1)


def test_normalized_score():
    """0 and 100 at the public random and expert returns; no number for a task without a scale."""
    scores = normalized_score("HalfCheetah-2x3", np.array([-284.0, 1642.4, 3568.8]))
    assert_allclose(scores, [0, 50, 100], atol=1e-9)
    assert np.isnan(normalized_score("Walker2d-2x3", 1000.0))


@pytest.mark.parametrize(("task", "largest"), [("Pusher-3p", 2.0), ("Humanoid-9|8", 0.4)])
def test_controls_are_scaled(task, largest):
    """An action of 1 is the robot's largest control."""
    env = MaMuJoCo(task, 1)
    env.step(np.ones((env.num_agents, 1, max(env.action_dims)), np.float32))
    assert_allclose(robot(env).data.ctrl, largest, rtol=1e-6)


# Teams whose agents differ in size


def test_padding_does_not_reach_the_environment():
    """Pusher-3p: arms of 3, 1 and 3 joints. Padded observations are 0, padded actions unread."""
    env = MaMuJoCo("Pusher-3p", 2)
    assert (env.obs_dims, env.action_dims) == ((16, 13, 16), (3, 1, 3))
    actions, seen = random_actions(env, 20), []
    for value in (0.0, 0.7):
        actions[:, 1, :, 1:] = value
        seen.append(np.stack([env.reset(0)] + [env.step(action)[0] for action in actions]))
    assert_array_equal(*seen)
    assert (seen[0][:, 1, :, 13:] == 0).all()


@pytest.mark.parametrize("name", ["om2p", *POLICIES])
def test_critics_see_zeros_in_the_padding(name):
    """No loss asks a critic about actions with anything else there, nor does `act` return any."""
    module = importlib.import_module(f"{name}_mamujoco")
    policy_class = {"om2p": "MeanFlowPolicy", **POLICIES}[name]
    policy = getattr(module, policy_class)(2, 4, 3, (16, 8))
    policy.mask[1, :, 1:] = 0  # as `train` does for agents with 3 and 1 components
    batch = {"obs": torch.randn(2, 8, 4), "next_obs": torch.randn(2, 8, 4)}
    batch |= {"action": policy.mask * torch.rand(2, 8, 3), "reward": torch.randn(2, 8)}
    batch["done"] = torch.zeros(2, 8)
    asked = [policy.act(batch["obs"])]

    def answer(_, action):
        asked.append(action)
        return torch.stack([action.sum(dim=-1), 2 - action.sum(dim=-1)])

    critic = torch.nn.Module()
    critic.forward = answer
    if name != "bc":
        module.policy_loss(policy, critic, batch, module.Args())
        _, q = module.critic_loss(critic, critic, policy, batch, 0.99)
    if name in ("omar", "dom2"):
        module.conservative_term(critic, policy, batch, q, module.Args())
    for action in asked:
        assert (action[0] != 0).any(dim=0).all()
        assert (action[1, :, 0] != 0).any()
        assert (action[1, :, 1:] == 0).all()


# Collecting


def collect(folder, task="Reacher-2x1", quality="random", transitions=500, seed=0):
    """Make a small dataset; its card and its files, {name: array}."""
    args = collect_mamujoco.Args(task, quality, seed, transitions, data_dir=folder)
    card = collect_mamujoco.collect_mamujoco(args)
    folder = folder / task / quality / f"seed_{seed}_data"
    return card, {path.stem: np.load(path) for path in folder.glob("*.npy")}


@pytest.mark.parametrize(
    ("quality", "public"), [("random", -284.0), ("medium", 1568.9), ("expert", 3568.8)]
)
def test_returns_are_near_the_public_ones(quality, public, tmp_path):
    """By ten episodes; the public ones are from OMAR, medium's from OG-MARL's card."""
    card, _ = collect(tmp_path, "HalfCheetah-2x3", quality, 10_000)
    assert card["return mean"] == pytest.approx(public, rel=0.2)

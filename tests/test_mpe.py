"""The particle environments against OMAR's recorded episodes and against PettingZoo's mpe2.

Different from mpe2 on purpose, as in OMAR's fork, and bridged here: positions move by the new
velocity (mpe2: by the old one), forces are 5, 9 and 16 times the action (mpe2's World is given the
force itself), and of the rewards only the counts of contacts are common: OMAR's simple_spread pays
the inverse distance and 5 for a collision, and its hunters share -0.1 times the sum of all their
distances. mpe2's simple_world_comm has a leader who speaks and hidden agents: with leaders only
nobody hides, and the four channels at the end of an observation are cut off.
"""

from copy import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from mpe2.simple_spread.simple_spread import Scenario as Spread
from mpe2.simple_tag.simple_tag import Scenario as Tag
from mpe2.simple_world_comm.simple_world_comm import Scenario as World
from numpy.testing import assert_allclose, assert_array_equal

from om2p_mpe import MPE, evaluate, normalized_score

TASKS = ("simple_spread", "simple_spread-5", "simple_tag", "simple_world")
GOLDEN = [f"{task}{kind}" for task in TASKS if "-" not in task for kind in ("", "_stress")]
SCENARIOS = {
    "simple_spread": (Spread, ()),
    "simple_spread-5": (Spread, (5,)),
    "simple_tag": (Tag, (1, 3, 2)),
    "simple_world": (World, (1, 3, 1, 2, 2)),
}
all_tasks = pytest.mark.parametrize("task", TASKS)


def flee(obs):
    """A prey without randomness: away from where the origin is, with a turn."""
    return np.tanh(obs[..., 2:4] + obs[..., 3:1:-1])


def make_env(task, num_episodes, seed=0):
    """An environment with a prey, if it needs one, that is a function of its observation."""
    return MPE(task, num_episodes, seed, None if "spread" in task else flee)


def crowd(task, num_episodes=40):
    """An environment full of contacts, in motion and partly above the speed limits."""
    env = make_env(task, num_episodes)
    env.pos, env.landmarks = 0.4 * env.pos, 0.4 * env.landmarks
    env.vel = np.random.default_rng(0).normal(0, 1, env.vel.shape)
    return env


# Golden trajectories


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_trajectory(name):
    """Started from OMAR's states and driven by its actions, all that it recorded comes back."""
    gold, prey_obs = np.load(Path(__file__).parent / "golden" / f"{name}.npz"), []

    def prey(obs):
        prey_obs.append(obs[0])
        return gold["actions_3"][None, :, len(prey_obs) - 1]

    prey_policy = prey if "actions_3" in gold else None
    env = MPE(name.removesuffix("_stress"), len(gold["rewards"]), prey_policy=prey_policy)
    env.pos, env.vel = gold["init_pos_agents"].copy(), gold["init_vel_agents"].copy()
    env.landmarks = gold["init_pos_landmarks"].copy()
    obs = env.observe(range(3))
    for t in range(env.horizon + 1):
        assert_allclose(env.pos, gold["pos_agents"][:, t], rtol=0, atol=1e-9)
        assert_allclose(env.vel, gold["vel_agents"][:, t], rtol=0, atol=1e-9)
        for i in range(3):
            assert_allclose(obs[i], gold[f"obs_{i}"][:, t], rtol=0, atol=1e-6)
        if t < env.horizon:
            obs, reward = env.step(np.stack([gold[f"actions_{i}"][:, t] for i in range(3)]))
            assert_allclose(reward.T, gold["rewards"][:, t, :3], rtol=0, atol=1e-9)
    if prey_policy:
        assert_allclose(np.stack(prey_obs, axis=1), gold["obs_3"][:, :-1], rtol=0, atol=1e-6)


# mpe2


def mpe2_world(task):
    """mpe2's scenario and world of a task, with simple_world's agents silent and all leaders."""
    scenario, sizes = SCENARIOS[task]
    scenario = scenario()
    world = scenario.make_world(*sizes)
    scenario.reset_world(world, np.random.default_rng(0))
    for agent in world.agents:
        agent.silent, agent.leader = True, True
    return scenario, world


def copy_state(env, k, world):
    """Put mpe2's world into the state of episode k; copies, because mpe2 adds in place."""
    for i, agent in enumerate(world.agents):
        agent.state.p_pos, agent.state.p_vel = env.pos[k, i].copy(), env.vel[k, i].copy()
    for landmark, pos in zip(world.landmarks, env.landmarks[k], strict=True):
        landmark.state.p_pos = pos.copy()


def step_mpe2(env, world, action):
    """One step of mpe2's world under the forces that actions (A, 2) stand for."""
    for agent, gain, u in zip(world.agents, env.gain, action, strict=True):
        agent.action.u = gain * u
    world.step()


def state_of(world):
    """Positions and velocities of mpe2's agents, (A, 2) each."""
    states = [agent.state for agent in world.agents]
    return np.stack([s.p_pos for s in states]), np.stack([s.p_vel for s in states])


def with_prey(env, action):
    """The learners' actions and the prey's: (N, K, 2) -> (K, A, 2)."""
    if env.prey_policy is not None:
        action = np.concatenate([action, env.prey_policy(env.observe([3]))])
    return action.transpose(1, 0, 2)


@all_tasks
def test_one_step_of_mpe2(task):
    """mpe2's own step gives our velocities; its positions lag, as they move by the old ones."""
    env, (_, world) = crowd(task), mpe2_world(task)
    action = np.random.default_rng(1).uniform(-1, 1, (env.num_agents, env.num_episodes, 2))
    before, everyone = copy(env), with_prey(env, action)
    env.step(action)
    for k in range(env.num_episodes):
        copy_state(before, k, world)
        step_mpe2(env, world, everyone[k])
        pos, vel = state_of(world)
        assert_allclose(env.vel[k], vel, rtol=0, atol=1e-12)
        assert_allclose(pos, before.pos[k] + before.vel[k] * env.dt, rtol=0, atol=1e-12)
        assert_allclose(env.pos[k], before.pos[k] + vel * env.dt, rtol=0, atol=1e-12)


@all_tasks
def test_whole_episodes_of_mpe2(task):
    """25 steps of mpe2's World, told to move by the new velocity: states, observations, rewards.

    The prey's observation has mpe2's layout, too.
    """
    env, (scenario, world) = crowd(task, num_episodes=6), mpe2_world(task)
    integrate, first, records = world.integrate_state, copy(env), []
    shape = env.horizon, env.num_agents, env.num_episodes, 2

    def velocity_first(force):
        before = [agent.state.p_pos.copy() for agent in world.agents]
        integrate(force)
        for agent, pos in zip(world.agents, before, strict=True):
            agent.state.p_pos = pos + agent.state.p_vel * world.dt

    world.integrate_state = velocity_first
    for action in np.random.default_rng(2).uniform(-1, 1, shape):
        everyone = with_prey(env, action)
        _, reward = env.step(action)
        obs = [env.observe([i])[0] for i in range(len(world.agents))]
        records.append((everyone, env.pos, env.vel, obs, reward))
    for k in range(env.num_episodes):
        copy_state(first, k, world)
        for everyone, pos, vel, obs, reward in records:
            step_mpe2(env, world, everyone[k])
            assert_allclose(state_of(world), (pos[k], vel[k]), rtol=0, atol=1e-9)
            for i, agent in enumerate(world.agents):
                expected = scenario.observation(agent, world)[: obs[i].shape[-1]]
                assert_allclose(obs[i][k], expected, rtol=0, atol=1e-6)
                expected = omar_reward(task, scenario, world, agent)
                assert i == env.num_agents or reward[i, k] == pytest.approx(expected)


def omar_reward(task, scenario, world, agent):
    """OMAR's reward with mpe2's count of contacts; see the top of this file."""
    points = np.stack([entity.state.p_pos for entity in world.entities])
    if "spread" in task:
        agents, targets = np.split(points, 2)
        gap = np.linalg.norm(targets[:, None] - agents, axis=-1).min(axis=-1)
        return np.minimum(1 / gap, 10).sum() + 5 * scenario.reward(agent, world)
    contacts = sum(scenario.benchmark_data(hunter, world) for hunter in world.agents[:3])
    gap = np.linalg.norm(points[:3] - points[3], axis=-1).sum()
    return {"simple_tag": 10, "simple_world": 5}[task] * contacts - 0.1 * gap


@all_tasks
def test_initial_states_are_distributed_as_in_mpe2(task):
    """Everything starts at rest and uniformly, landmarks of tag and world in a smaller square."""
    env, (scenario, world) = make_env(task, 4_000), mpe2_world(task)
    rng, agents, landmarks = np.random.default_rng(0), [], []
    for _ in range(2_000):
        scenario.reset_world(world, rng)
        agents.append([agent.state.p_pos for agent in world.agents])
        landmarks.append([landmark.state.p_pos for landmark in world.landmarks])
    assert not env.vel.any()
    levels = np.linspace(0, 1, 9)
    for ours, theirs in ((env.pos, np.array(agents)), (env.landmarks, np.array(landmarks))):
        assert ours.shape[1:] == theirs.shape[1:]
        ours, theirs = (np.quantile(x, levels, axis=0) for x in (ours, theirs))
        assert_allclose(ours, theirs, rtol=0, atol=0.12)
        assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), abs=0.005)


# The contract


@all_tasks
def test_shapes_and_types(task):
    """What the scripts rely on: names, shapes, float32 observations, float64 states."""
    env, N = make_env(task, 7), 5 if task == "simple_spread-5" else 3
    assert (env.num_agents, env.horizon, env.action_dims) == (N, 25, (2,) * N)
    obs = env.reset(0)
    next_obs, reward = env.step(np.zeros((N, 7, 2), np.float32))
    widths = {"simple_spread": 18, "simple_spread-5": 30, "simple_tag": 16, "simple_world": 24}
    assert env.obs_dims == (widths[task],) * N
    assert obs.shape == next_obs.shape == (N, 7, widths[task])
    assert obs.dtype == next_obs.dtype == np.float32
    assert reward.shape == (N, 7)
    assert env.pos.dtype == env.vel.dtype == env.landmarks.dtype == np.float64


@all_tasks
def test_reset_repeats_with_its_seed(task):
    """A seed gives one sequence of initial states, whatever was played before."""
    env = make_env(task, 5, seed=3)
    first = env.observe(range(env.num_agents))
    second = env.reset()
    assert_array_equal(env.reset(3), first)
    assert_array_equal(env.reset(), second)
    assert not np.allclose(first, second)
    assert not np.allclose(env.reset(4), first)


@all_tasks
def test_episodes_at_once_equal_episodes_alone(task):
    """K episodes in one environment are K environments of one episode."""
    env, rng = crowd(task, num_episodes=5), np.random.default_rng(1)
    alone = [make_env(task, 1) for _ in range(5)]
    for k, single in enumerate(alone):
        for name in ("pos", "vel", "landmarks"):
            setattr(single, name, getattr(env, name)[k : k + 1])
    for _ in range(env.horizon):
        action = rng.uniform(-1, 1, (env.num_agents, 5, 2))
        obs, reward = env.step(action)
        for k, single in enumerate(alone):
            one_obs, one_reward = single.step(action[:, k : k + 1])
            assert_allclose(obs[:, k : k + 1], one_obs, rtol=0, atol=1e-6)
            assert_allclose(reward[:, k : k + 1], one_reward, rtol=0, atol=1e-9)


@all_tasks
def test_everybody_in_one_place(task):
    """Coincident bodies push nobody and divide by no zero; a covered target pays 10 a step."""
    env, N = make_env(task, 2), 5 if task == "simple_spread-5" else 3
    env.pos, env.landmarks = np.zeros_like(env.pos), np.zeros_like(env.landmarks)
    with np.errstate(all="raise", under="ignore"):
        obs, reward = env.step(np.zeros((N, 2, 2)))
    assert np.isfinite(obs).all()
    expected = {"simple_tag": 30, "simple_world": 15}.get(task, 10 * N - 5 * (N - 1))
    assert_allclose(reward, np.full((N, 2), expected))


@pytest.mark.parametrize("N", [1, 2, 7])
def test_teams_of_other_sizes(N):
    """Each agent sees N targets, the N - 1 others and two zeros for each of these."""
    env = MPE(f"simple_spread-{N}", 4)
    obs, reward = env.step(np.zeros((N, 4, 2)))
    assert (obs.shape, reward.shape) == ((N, 4, 4 + 2 * N + 4 * (N - 1)), (N, 4))
    for i in range(N):
        others = [j for j in range(N) if j != i]
        parts = [env.vel[:, i], env.pos[:, i]]
        parts += [env.landmarks[:, k] - env.pos[:, i] for k in range(N)]
        parts += [env.pos[:, j] - env.pos[:, i] for j in others]
        parts += [np.zeros((4, 2)) for _ in others]
        assert_allclose(obs[i], np.concatenate(parts, axis=1), rtol=0, atol=1e-6)


def test_three_agents_by_number():
    """simple_spread-3 is simple_spread under another name."""
    one, two = (MPE(task, 5) for task in ("simple_spread", "simple_spread-3"))
    action = np.random.default_rng(0).uniform(-1, 1, (3, 5, 2))
    for x, y in zip(one.step(action), two.step(action), strict=True):
        assert_array_equal(x, y)


UNKNOWN = ("", "simple", "simple_push", "simple_tag-5", "simple_world-3", "spread-5")
UNKNOWN += tuple(f"simple_spread{end}" for end in ("-", "-x", "-0", "-05", "--5", "-5-5", "5"))


@pytest.mark.parametrize("task", UNKNOWN)
def test_unknown_task(task):
    """One line names it, and the ones that there are."""
    message = refusal(MPE, task, 1)
    assert f"--task {task} is not simple_spread, simple_tag, simple_world or" in message


# Returns


def test_random_policy_on_simple_spread():
    """Uniform actions return 160.7 with sd 60.8, as measured in OMAR's own environment."""
    policy = SimpleNamespace(act=lambda obs: 2 * torch.rand(*obs.shape[:-1], 2) - 1)
    (returns,) = evaluate(policy, [MPE("simple_spread", 4_000)])
    assert abs(returns.mean() - 160.7) < 3 * 60.8 / 4_000**0.5
    assert returns.std() == pytest.approx(60.8, rel=0.05)


SCALE = {"simple_spread": (159.8, 516.8), "simple_tag": (-4.1, 185.6), "simple_world": (-6.8, 79.5)}


def test_no_score_without_public_data():
    """The score of a team of another size is NaN."""
    assert np.isnan(normalized_score("simple_spread-5", 300.0))


@pytest.mark.parametrize("task", SCALE)
def test_normalized_score(task):
    """0 for the public random data, 100 for the public expert data, linear in between."""
    low, high = SCALE[task]
    scores = normalized_score(task, np.array([low, (low + high) / 2, high]))
    assert_allclose(scores, [0, 50, 100], atol=1e-9)

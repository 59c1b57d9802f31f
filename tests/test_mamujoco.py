"""MaMuJoCo against plain gymnasium robots, padded teams, and the datasets that are collected."""

import importlib
import json
from types import SimpleNamespace

import collect_mamujoco
import collect_mpe
import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from conftest import POLICIES as BASELINE_POLICIES
from conftest import refusal
from numpy.testing import assert_allclose, assert_array_equal

import om2p_mamujoco
from om2p_mamujoco import MaMuJoCo, squared_error

# HalfCheetah-2x3 in the public data: (qpos, qvel) of foot, shin and thigh, as indices of qpos and
# of qvel, which start with x, z and pitch; back leg, front leg
JOINTS = {
    "HalfCheetah-2x3": [[5, 4, 3], [8, 7, 6]],
    "HalfCheetah-6x1": [[3], [4], [5], [6], [7], [8]],
}
FALL_PAYS = {"Hopper": 1e-3, "Walker2d": 1e-3, "Ant": 0.5}  # cost of control; 1 a step for living


def robot(env, k=0):
    """Episode k's gymnasium robot below MaMuJoCo."""
    return env.envs[k].single_agent_env.unwrapped


def random_actions(env, seed=0, steps=500):
    """Uniform actions in [-1, 1], (steps, N, K, action_dim)."""
    shape = steps, env.num_agents, env.num_episodes, max(env.action_dims)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("task", JOINTS)
def test_observations_are_the_agents_joints(task):
    """500 steps: every agent sees qpos and qvel of its own joints, in the public data's order."""
    env = MaMuJoCo(task, 2)
    obs = env.reset(3)
    for action in random_actions(env):
        assert obs.dtype == np.float32
        for k in range(2):
            qpos, qvel = robot(env, k).data.qpos, robot(env, k).data.qvel
            for i, joints in enumerate(JOINTS[task]):
                expected = [value for joint in joints for value in (qpos[joint], qvel[joint])]
                assert_allclose(obs[i, k], expected, rtol=1e-6, atol=1e-6)
        obs, _ = env.step(action)


def test_actions_and_rewards_are_gymnasiums():
    """Agent 0 drives the back thigh, shin and foot, agent 1 the front ones; both get the reward."""
    env, plain = MaMuJoCo("HalfCheetah-2x3", 1), gymnasium.make("HalfCheetah-v5").unwrapped
    env.reset(5)
    plain.reset(seed=int(np.random.SeedSequence(5).generate_state(1)[0]))
    assert env.horizon == 1000
    for action in random_actions(env):
        _, reward = env.step(action)
        _, expected, *_ = plain.step(np.concatenate(action[:, 0]).astype(float))
        assert_array_equal(reward, [[expected]] * 2)
        assert_array_equal(robot(env).data.qpos, plain.data.qpos)


@pytest.mark.parametrize("task", ["Hopper-3x1", "Walker2d-2x3", "Ant-2x4"])
def test_rewards_are_those_of_the_old_tasks(task):
    """Speed + 1 - cost of control, by the -v2 tasks' rule: no contact cost, 1 for the fall too."""
    env = MaMuJoCo(task, 2)
    cost, falls = FALL_PAYS[env.robot], 0
    for episode in range(4):
        env.reset(episode)
        actions = random_actions(env, episode, 1000) if env.robot != "Ant" else None
        for step in range(1000):
            before = [robot(env, k).data.qpos[0] for k in range(2)]
            torso = [robot(env, k).data.body(1).xpos[0] for k in range(2)]
            over = env.done.copy()
            if actions is None:  # with all its might, which overturns it sooner
                sign = np.sign(np.random.default_rng((episode, step // 10)).normal(size=(2, 2, 4)))
                actions_now = sign.astype(np.float32)
            else:
                actions_now = actions[step]
            _, reward = env.step(actions_now)
            for k in np.flatnonzero(~over):
                body, dt = robot(env, k), robot(env, k).dt
                moved = body.data.body(1).xpos[0] - torso[k]
                if env.robot != "Ant":
                    moved = body.data.qpos[0] - before[k]
                expected = moved / dt + 1 - cost * (actions_now[:, k] ** 2).sum()
                assert_allclose(reward[:, k], expected, rtol=1e-5, atol=1e-5)
                falls += env.done[k]
            if env.done.all():
                break
    assert falls > 0


def test_fallen_robots_wait():
    """A finished episode pays nothing and stands still; the others go on as they would alone."""
    env, alone = MaMuJoCo("Hopper-3x1", 3), MaMuJoCo("Hopper-3x1", 3)
    env.reset(0)
    alone.reset(0)
    waited = 0
    for action in random_actions(env, steps=200):
        over = env.done.copy()
        before = env.obs.copy()
        obs, reward = env.step(action)
        assert_array_equal(obs[:, over], before[:, over])
        assert (reward[:, over] == 0).all()
        for k in np.flatnonzero(~over):
            names = alone.names
            command = {name: action[i, k] for i, name in enumerate(names)}
            single, *_ = alone.envs[k].step(command)
            assert_allclose(obs[:, k], [single[name] for name in names], rtol=1e-6, atol=1e-6)
        waited += bool(over.any() and not over.all())
        if env.done.all():
            break
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


@pytest.mark.parametrize(
    "task", ["HalfCheetah", "HalfCheetah-5x5", "Unicorn-2x2", "", "-", "ManySegmentAnt-2xtwo"]
)
def test_bad_task(task):
    """One line that names the task."""
    assert f"--task {task} is not" in refusal(MaMuJoCo, task, 1)


@pytest.mark.parametrize("task", ["Swimmer-2x1", "Humanoid-9|8", "CoupledHalfCheetah-1p1"])
def test_other_tasks_run(task):
    """Any task of MaMuJoCo has its sizes, its horizon and finite observations."""
    env = MaMuJoCo(task, 1)
    obs, reward = env.step(random_actions(env, steps=1)[0])
    assert obs.shape == (env.num_agents, 1, max(env.obs_dims))
    assert reward.shape == (env.num_agents, 1)
    assert env.horizon == 1000
    assert np.isfinite(obs).all()
    assert np.isfinite(reward).all()


@pytest.mark.parametrize(
    ("task", "version", "warned"),
    [
        ("Hopper-3x1", "3.5.0", True),
        ("Ant-2x4", "4.0.0", True),
        ("Hopper-3x1", "3.4.0", False),
        ("HalfCheetah-2x3", "4.0.0", False),
    ],
)
def test_warning_about_the_version(task, version, warned, monkeypatch, capsys):
    """From MuJoCo 3.5 on Ant and Hopper move otherwise than in older data; HalfCheetah does not."""
    monkeypatch.setattr(mujoco, "__version__", version)
    MaMuJoCo(task, 1)
    error = capsys.readouterr().err
    assert ("warning" in error) == (version in error) == warned


def test_normalized_score():
    """0 and 100 at the public random and expert returns; no number for a task without a scale."""
    score = om2p_mamujoco.normalized_score
    assert score("HalfCheetah-2x3", -284.0) == 0
    assert score("HalfCheetah-2x3", 3568.8) == 100
    assert_allclose(score("HalfCheetah-2x3", np.array([1642.4, 3568.8])), [50, 100])
    assert np.isnan(score("Hopper-3x1", 1000.0))


# Teams whose agents differ in size


def test_padding_does_not_reach_the_environment():
    """Pusher-3p: arms of 3, 1 and 3 joints. Padded observations are 0, padded actions unread."""
    env = MaMuJoCo("Pusher-3p", 2)
    assert env.action_dims == (3, 1, 3)
    assert env.action_mask[:, 0].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 1]]
    padded = [(i, slice(None), slice(dim, None)) for i, dim in enumerate(env.obs_dims) if dim < 6]
    actions = random_actions(env, steps=20)
    seen = []
    for value in (0.0, 0.7):
        actions[:, 1, :, 1:] = value
        obs = [env.reset(0)] + [env.step(action)[0] for action in actions]
        seen.append(np.stack(obs))
        assert padded
        for where in padded:
            assert all((o[where] == 0).all() for o in obs)
    assert_array_equal(*seen)


def test_controls_are_scaled():
    """An action of 1 is the robot's largest control: 2 for Pusher's motors, 0.4 for Humanoid's."""
    for task, largest in (("Pusher-3p", 2.0), ("Humanoid-9|8", 0.4)):
        env = MaMuJoCo(task, 1)
        env.step(np.ones((env.num_agents, 1, max(env.action_dims)), np.float32))
        assert_allclose(robot(env).data.ctrl, largest, rtol=1e-6)


POLICIES = {"om2p": "MeanFlowPolicy", **BASELINE_POLICIES}


@pytest.mark.parametrize("name", POLICIES)
def test_padding_does_not_reach_the_loss(name):
    """Whatever the padding holds, losses are the same, and no gradient makes it."""
    module = importlib.import_module(f"{name}_mamujoco")

    def losses(value: float):
        """Of the policy and the critic, for agents with 3 and 1 components; and the policy."""
        torch.manual_seed(0)
        policy = getattr(module, POLICIES[name])(2, 4, 3, (16, 8))
        mask = torch.tensor([[[1.0, 1, 1]], [[1, 0, 0]]])
        (policy.flow if name == "fql" else policy).mask = mask
        batch = {"obs": torch.randn(2, 8, 4), "action": torch.rand(2, 8, 3) * 2 - 1}
        batch |= {"next_obs": torch.randn(2, 8, 4)}
        batch |= {"reward": torch.randn(2, 8), "done": torch.zeros(2, 8)}
        batch["action"][1, :, 1:] = value
        torch.manual_seed(1)
        if name == "bc":
            loss = (module.policy_loss(policy, batch),)
        else:
            critic = module.Critic(2, 4, 3, (16,))
            critic.mask = mask
            loss = (module.policy_loss(policy, critic, batch, module.Args())[0],)
            td, q = module.critic_loss(critic, critic, policy, batch, 0.99)
            loss += (td, q.sum())
        loss[0].backward()
        return loss, policy

    (one, policy), (two, _) = losses(0.0), losses(0.9)
    assert one == two
    layer = policy.last if name == "dom2" else policy.net[-1]
    assert (layer.weight.grad[1, :, 1:] == 0).all()
    assert (layer.weight.grad[1, :, :1] != 0).any()
    assert (layer.bias.grad[0] != 0).all()


def test_masked_error_is_the_mean_over_own_components():
    """An agent of one component has its squared error, not a third of it."""
    x, y = torch.randn(2, 8, 3), torch.randn(2, 8, 3)
    mask = torch.tensor([[[1.0, 1, 1]], [[1, 0, 0]]])
    expected = ((x[0] - y[0]) ** 2).mean() + ((x[1, :, 0] - y[1, :, 0]) ** 2).mean()
    torch.testing.assert_close(squared_error(x, y, mask), expected)
    torch.testing.assert_close(squared_error(x, y), 2 * ((x - y) ** 2).mean())


# Collecting


def collect(folder, task="HalfCheetah-2x3", quality="random", transitions=10_000, seed=0):
    """Make a small dataset; its card and its files, {name: array}."""
    card = collect_mamujoco.collect(
        collect_mamujoco.Args(task, quality, seed, transitions, 0.1, folder)
    )
    folder = folder / task / quality / f"seed_{seed}_data"
    return card, {path.stem: np.load(path) for path in folder.glob("*.npy")}


def test_collected_files(tmp_path):
    """OMAR's files, float32; every agent's own widths; episodes that go on from row to row."""
    card, files = collect(tmp_path, "Reacher-2x1", transitions=1_025)
    shapes = {"obs": [(3,), (6,)], "acs": [(1,)] * 2, "rews": [()] * 2, "dones": [()] * 2}
    shapes["next_obs"] = shapes["obs"]
    assert {name: (array.shape, array.dtype) for name, array in files.items()} == {
        f"{name}_{i}": ((1_025, *shape[i]), np.float32)
        for name, shape in shapes.items()
        for i in (0, 1)
    }
    inside = np.arange(1, 1_025) % 50 != 0
    for i in (0, 1):
        goes_on = (files[f"next_obs_{i}"][:-1] == files[f"obs_{i}"][1:]).all(axis=-1)
        assert_array_equal(goes_on, inside)
        assert not files[f"dones_{i}"].any()
    returns = files["rews_0"][:1_000].reshape(20, 50).sum(axis=-1)
    assert (card["transitions"], card["episodes"]) == (1_025, 20)
    assert card["return mean"] == pytest.approx(returns.mean(), abs=0.01)
    assert card["return sd"] == pytest.approx(returns.std(), abs=0.01)
    assert json.loads((tmp_path / "Reacher-2x1/random/seed_0_data/card.json").read_text()) == card


def test_falls_are_recorded(tmp_path):
    """`dones` is 1 in the row in which Hopper falls, and the next row starts an episode."""
    _, files = collect(tmp_path, "Hopper-3x1", transitions=500)
    done = files["dones_0"].astype(bool)
    assert 5 < done.sum() < 100
    obs = np.concatenate([files[f"obs_{i}"] for i in range(3)], axis=1)
    next_obs = np.concatenate([files[f"next_obs_{i}"] for i in range(3)], axis=1)
    assert_array_equal((next_obs[:-1] == obs[1:]).all(axis=-1), ~done[:-1])


def test_same_seed_same_bytes(tmp_path):
    """A seed decides every byte; another seed changes states, actions and rewards."""
    _, one = collect(tmp_path / "1", "Reacher-2x1", transitions=500, seed=3)
    torch.rand(7)
    _, two = collect(tmp_path / "2", "Reacher-2x1", transitions=500, seed=3)
    _, other = collect(tmp_path / "3", "Reacher-2x1", transitions=500, seed=4)
    for name, array in one.items():
        assert array.tobytes() == two[name].tobytes()
        assert name.startswith("dones") or not np.array_equal(array, other[name])


# Mean returns of the public data: the ends of the scale from OMAR, the middle from OG-MARL's card
PUBLIC = {"random": -284.0, "medium-replay": 423.5, "medium": 1568.9, "expert": 3568.8}


@pytest.mark.parametrize("quality", PUBLIC)
def test_returns_are_near_the_public_ones(quality, tmp_path):
    """Within 15 %, by 24 episodes; medium-replay and medium vary more from episode to episode."""
    card, _ = collect(tmp_path, quality=quality, transitions=24_000)
    assert card["public data's return mean"] == PUBLIC[quality]
    share = 0.4 if quality == "medium-replay" else 0.15
    assert card["return mean"] == pytest.approx(PUBLIC[quality], rel=share)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_transitions": 0}, "--num-transitions"),
        ({"seed": -1}, "--seed"),
        ({"noise": 1.5}, "--noise"),
        ({"train_steps": 1}, "--train-steps"),
        ({"task": "Cat-2x2"}, "--task Cat-2x2"),
        ({"task": "Hopper-3x2"}, "--task Hopper-3x2"),
        ({"task": "Swimmer-2x1", "quality": "expert"}, "--train"),
    ],
    ids=str,
)
def test_bad_settings_of_the_collector(changes, reason, tmp_path):
    """One line, and nothing is written."""
    args = collect_mamujoco.Args(**{"data_dir": tmp_path, **changes})
    assert reason in refusal(collect_mamujoco.collect, args)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_starts_where_no_data_do(tmp_path):
    """With the dataset's seed, no evaluation episode begins as a recorded one."""
    _, files = collect(tmp_path, "Reacher-2x1", transitions=500, seed=3)
    seen = []

    def act(obs):
        seen.append(obs.numpy().copy())
        return torch.zeros(*obs.shape[:-1], 1)

    om2p_mamujoco.evaluate(SimpleNamespace(act=act), [MaMuJoCo("Reacher-2x1", 20)], [3])
    recorded = {tuple(obs) for obs in files["obs_1"][::50]}
    assert len(recorded) == 10
    assert not recorded & {tuple(obs[:6]) for obs in seen[0][1]}


def test_training_with_other_settings_is_refused(tmp_path, monkeypatch):
    """A stopped training goes on with its own settings alone, and stays as it is otherwise."""
    monkeypatch.setattr(collect_mamujoco, "BEHAVIOR_DIR", tmp_path)
    path = tmp_path / "Reacher-2x1.training.pt"
    torch.save({"settings": {"seed": 3, "noise": 0.1, "train-steps": 20_000}}, path)
    before = path.read_bytes()
    for change, reason in (
        ({"seed": 4}, "--seed was 3, now 4"),
        ({"seed": 3, "train_steps": 10_000}, "--train-steps was 20000, now 10000"),
    ):
        args = collect_mamujoco.Args(**{"train_steps": 20_000, "task": "Reacher-2x1"} | change)
        assert reason in refusal(collect_mamujoco.train_behavior, args)
    assert path.read_bytes() == before


@pytest.mark.parametrize("script", [collect_mamujoco, collect_mpe], ids=lambda s: s.__name__)
def test_training_needs_a_place_for_its_result(script, tmp_path, monkeypatch):
    """A folder that cannot be made ends it before it begins; one that is missing is made."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "BEHAVIOR_DIR", tmp_path / "file")
    assert "file cannot be written" in refusal(script.train_behavior, script.Args())
    monkeypatch.setattr(script, "BEHAVIOR_DIR", tmp_path / "folder")
    script.check_behavior_dir()
    assert list((tmp_path / "folder").iterdir()) == []


def test_training_resumes_and_its_policies_play(tmp_path, monkeypatch, capsys):
    """A stopped training goes on from its last save; the three stages can then be recorded."""
    monkeypatch.setattr(collect_mamujoco, "BEHAVIOR_DIR", tmp_path)
    monkeypatch.setattr(collect_mamujoco, "WARM_UP", 1_000)
    monkeypatch.setattr(collect_mamujoco, "CHECK_INTERVAL", 250)
    calls, roll_out = [], collect_mamujoco.roll_out

    def stop_at_the_sixth(*args):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return roll_out(*args)

    monkeypatch.setattr(collect_mamujoco, "roll_out", stop_at_the_sixth)
    args = collect_mamujoco.Args(task="Reacher-2x1", train=True, train_steps=2_000)
    with pytest.raises(SystemExit) as stop:
        collect_mamujoco.main(args)
    assert "goes on" in stop.value.code
    assert [path.name for path in tmp_path.iterdir()] == ["Reacher-2x1.training.pt"]
    collect_mamujoco.main(args)
    assert len(calls) == 5 + 1 + (8 - 4) + 1  # the fifth check, after the save, is done again
    assert [path.name for path in tmp_path.iterdir()] == ["Reacher-2x1.npz"]
    assert "2,000 steps" in capsys.readouterr().out
    means = {}
    for quality in ("random", "medium-replay", "expert"):
        card, _ = collect(tmp_path / "data", "Reacher-2x1", quality, 2_000)
        means[quality] = card["return mean"]
    assert means["random"] < means["medium-replay"] <= means["expert"]

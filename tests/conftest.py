"""Shared by all tests: one thread, the repository's scripts importable, and tiny datasets."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "baselines"), str(ROOT / "data"), str(ROOT / "tools")]
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


def write_prey(folder: Path, obs_dim: int, seed: int = 0) -> Path:
    """Write a random prey in this project's format, folder/prey.npz."""
    rng, sizes = np.random.default_rng(seed), (obs_dim, 8, 8, 2)
    arrays = {f"bias_{k}": rng.normal(size=sizes[k + 1]) for k in range(3)}
    arrays |= {f"weight_{k}": rng.normal(size=sizes[k : k + 2]) for k in range(3)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "prey.npz", **{key: x.astype(np.float32) for key, x in arrays.items()})
    return folder / "prey.npz"


def reference_prey(obs_dim, seed=0):
    """OMAR's prey as a torch module in evaluation mode, and the checkpoint that it would write."""
    torch.manual_seed(seed)
    norm = torch.nn.BatchNorm1d(obs_dim)
    layers = [torch.nn.Linear(*sizes) for sizes in ((obs_dim, 64), (64, 64), (64, 2))]
    relu = torch.nn.ReLU()
    net = torch.nn.Sequential(norm, layers[0], relu, layers[1], relu, layers[2], torch.nn.Tanh())
    for _ in range(3):
        net(2 + 3 * torch.randn(50, obs_dim))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    policy = {f"in_fn.{key}": value for key, value in norm.state_dict().items()}
    for k, layer in enumerate(layers, start=1):
        policy |= {f"fc{k}.{key}": value for key, value in layer.state_dict().items()}
    hunters = [{"policy": {"fc1.weight": torch.zeros(1)}}] * 3
    return net.eval(), {"init_dict": {"lr": 0.01}, "agent_params": [*hunters, {"policy": policy}]}


class Code:
    """What a hostile file may contain: an object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def refusal(function, *args):
    """Check that a call ends the program with an error in one line, and return that line."""
    with pytest.raises(SystemExit) as stop:
        function(*args)
    message = stop.value.code
    assert isinstance(message, str), f"a message, not the exit status {message}"
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


POLICIES = {  # of the baselines
    "bc": "DeterministicPolicy",
    "td3_bc": "DeterministicPolicy",
    "omar": "DeterministicPolicy",
    "diffusion_ql": "DiffusionPolicy",
    "dom2": "ScorePolicy",
    "flow_ql": "FlowPolicy",
    "fql": "OneStepPolicy",
}


def make_policy(name: str, obs_dim: int = 3, widths=(16, 8)):
    """A baseline's policy of two agents with two-dimensional actions, and its default steps."""
    return getattr(importlib.import_module(f"{name}_mpe"), POLICIES[name])(2, obs_dim, 2, widths)


@pytest.fixture
def double():
    """Numbers are float64 by default, so that formulas can be compared to many digits."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def make_data():
    """A function that writes a tiny dataset in OMAR's layout: random actions in the real MPE.

    make_data(folder, task, quality, transitions, seed) fills folder/<task>/<quality>/
    seed_<seed>_data/, where folder is a --data-dir, and adds a random prey where the task needs
    one. It returns the float32 arrays (N, T, ...) under the files' names: obs, acs, rews, ...
    """
    import om2p_mpe

    def write(folder, task="simple_spread", quality="expert", transitions=500, seed=0):
        folder, seeds = Path(folder) / task, [seed, *quality.encode()]
        env = om2p_mpe.MPE(task, -(-transitions // om2p_mpe.MPE.horizon), seeds)
        rng = np.random.default_rng(seeds)
        if not env.spread:
            path = write_prey(folder, env.observe([3]).shape[-1])
            env.prey_policy = om2p_mpe.load_prey(path)
        obs, rows = env.reset(), []
        for _ in range(env.horizon):
            action = rng.uniform(-1, 1, (env.num_agents, env.num_episodes, 2))
            next_obs, reward = env.step(action)
            rows.append((obs, action, reward, next_obs, np.zeros_like(reward)))
            obs = next_obs
        data = {}
        names = ("obs", "acs", "rews", "next_obs", "dones")
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            column = np.stack(column, axis=2)  # (N, K, 25, ...)
            column = column.reshape(env.num_agents, -1, *column.shape[3:])[:, :transitions]
            data[name] = column.astype(np.float32)
        seed_folder = folder / quality / f"seed_{seed}_data"
        seed_folder.mkdir(parents=True)
        for name, column in data.items():
            for i, values in enumerate(column):
                np.save(seed_folder / f"{name}_{i}.npy", values)
        return data

    return write


@pytest.fixture(scope="session")
def make_mujoco_data():
    """A function that writes a tiny MuJoCo dataset in OMAR's layout: random actions.

    make_mujoco_data(folder, task, quality, transitions, seed), as `make_data`.
    """
    from collect_mpe import roll_out, write_dataset

    from om2p_mamujoco import FILES, MaMuJoCo

    def write(folder, task, quality="expert", transitions=500, seed=0):
        env, parts = MaMuJoCo(task, 1, seed), []
        torch.manual_seed(seed)
        while sum(part["reward"].shape[1] for part in parts) < transitions:
            parts.append(roll_out(env, None, 0.0))
        data = {key: np.concatenate([x[key] for x in parts], axis=1) for key in FILES}
        data = {key: list(values[:, :transitions]) for key, values in data.items()}
        for i in range(env.num_agents):
            for key in ("obs", "next_obs"):
                data[key][i] = data[key][i][:, : env.obs_dims[i]]
            data["action"][i] = data["action"][i][:, : env.action_dims[i]]
        write_dataset(Path(folder) / task / quality / f"seed_{seed}_data", data, {})
        return {f"{FILES[key]}_{i}": x for key in FILES for i, x in enumerate(data[key])}

    return write

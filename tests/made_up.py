"""What this project's functions and the authors' get alike: test_authors.py, benchmark/authors.py.

The last four are for test_authors.py alone.
"""

import json
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

FIXTURE = Path(__file__).resolve().parent / "fixtures/authors.json"
N, B, OBS_DIM, D, J = 2, 8, 3, 2, 10  # agents, batch, dimensions, sampled actions
GAMMA, Q_WEIGHT, OMAR_COE = 0.9, 3.0, 0.7


def numbers(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    """Uniform in [-scale, scale], float64; they depend on nothing but the name."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))  # the same stream in every version
    return torch.from_numpy(rng.uniform(-scale, scale, shape))


def layer(name: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Weight (*stack, in, out) and bias (*stack, 1, out) of a layer, `shape` the weight's."""
    (*stack, in_dim, out_dim), scale = shape, 2 / shape[-2] ** 0.5
    bias = numbers(f"{name} bias", *stack, 1, out_dim, scale=scale)
    return numbers(f"{name} weight", *stack, in_dim, out_dim, scale=scale), bias


def make_batch() -> dict[str, Tensor]:
    """A batch of this project's form: obs, next_obs, action (N, B, dim), reward, done (N, B)."""
    batch = {key: numbers(key, N, B, OBS_DIM, scale=2) for key in ("obs", "next_obs")}
    batch |= {"action": numbers("action", N, B, D), "reward": numbers("reward", N, B)}
    return batch | {"done": (numbers("done", N, B) > 0.5).double()}


def draws(name: str, count: int, *first: int) -> list[Tensor]:
    """So many draws (*first, N, B, D) in the place of Gaussian ones."""
    return [numbers(f"{name} {k}", *first, N, B, D, scale=2) for k in range(count)]


def uniform() -> Tensor:
    """J actions for each observation, (J, N, B, D)."""
    return numbers("uniform", J, N, B, D)


def times() -> Tensor:
    """Times in [0, 1], (N, B, 1)."""
    return numbers("times", N, B, 1).abs()


def steps(count: int) -> Tensor:
    """Integers (N, B) from 0 to count - 1."""
    return (count * numbers("steps", N, B).abs()).long()


@contextmanager
def feed(owner, **values):
    """Let functions of a module or class return these values, one a call, and all of them."""
    fakes = {key: mock.Mock(side_effect=list(value)) for key, value in values.items()}
    with ExitStack() as stack:
        for key, fake in fakes.items():
            stack.enter_context(mock.patch.object(owner, key, fake))
        yield
    assert all(fakes[key].call_count == len(value) for key, value in values.items())


def fill(owner, name: str, activation: nn.Module, norm: nn.Module | None = None):
    """Give `owner.net` the weights of this name, and another activation and norm, or no norm."""
    layers = [part for part in owner.net if list(part.parameters())]
    for k, part in enumerate(layers):
        part.weight.data, part.bias.data = layer(f"{name} {k}", *part.weight.shape)
    for k, part in enumerate(owner.net):
        if isinstance(part, nn.GELU | nn.LayerNorm):
            owner.net[k] = activation if isinstance(part, nn.GELU) else norm or nn.Identity()
    return owner


def norms(net: nn.Module) -> Tensor:
    """Norms of an agent's gradients, (N, ...): weight, bias, layer by layer, critic by critic."""
    found = [part.grad.norm(dim=(-2, -1)) for part in net.parameters()]  # each ([2,] N)
    return torch.stack(found, dim=-1).movedim(-2, 0).flatten(1)


def theirs(name: str, key: str) -> Tensor:
    """What the authors' code computes, (N, ...)."""
    return torch.tensor([agent[key] for agent in json.loads(FIXTURE.read_text())[name]["agents"]])


def same(ours: Tensor, expected: Tensor) -> None:
    """Equal, up to the rounding of float32 constants in the authors' code."""
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)

"""The authors' TD3+BC, Diffusion-QL and OMAR on the inputs of tests/made_up.py; see authors.py.

Each function makes one of the authors' updates for agent i and returns what it computes.
"""

import importlib
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import made_up
from made_up import GAMMA, OBS_DIM, OMAR_COE, Q_WEIGHT, B, D, J, N, draws, feed


def original(folder: Path, module: str):
    """Import a module of a clone, where other clones have modules of the same names."""
    for name in [x for x in sys.modules if x.split(".")[0] in ("utils", "agents", "algorithms")]:
        del sys.modules[name]
    with patch.object(sys, "path", [str(folder), *sys.path]):
        return importlib.import_module(module)


def fill(i: int, order=slice(None), **nets: nn.Module) -> None:
    """Give agent i's networks, and pairs of critics, their weights; `order` is of the inputs."""
    for name, net in nets.items():
        linear = [part for part in net.modules() if isinstance(part, nn.Linear)]
        half, pair = (len(linear) // 2, (2,)) if "critic" in name else (len(linear), ())
        for k, part in enumerate(linear):
            dims = part.in_features, part.out_features
            weight, bias = made_up.layer(f"{name} {k % half}", *pair, N, *dims)
            weight, bias = (x[k // half, i] if pair else x[i] for x in (weight, bias))
            part.weight.data = (weight if k % half else weight[order]).T.contiguous()
            part.bias.data = bias[0]


class Watch:
    """Stands for an optimizer: keeps the loss's gradient, as norms, and moves nothing."""

    def __init__(self, net: nn.Module):
        self.net, self.zero_grad = net, net.zero_grad

    def step(self) -> None:
        self.norms = [parameter.grad.norm().item() for parameter in self.net.parameters()]


def watch(agent, critic: nn.Module, policy: nn.Module, update) -> dict:
    """Targets, losses and gradients of one update of an agent that has both optimizers."""
    squares, losses, mse_loss, backward = [], [], F.mse_loss, torch.Tensor.backward

    def square(x, y, **settings):
        squares.append((y.flatten().tolist(), mse_loss(x, y, **settings)))
        return squares[-1][1]

    agent.critic_optimizer, actor = Watch(critic), Watch(policy)
    agent.actor_optimizer = agent.policy_optimizer = actor
    with (
        patch.object(F, "mse_loss", square),
        patch.object(torch.Tensor, "backward", lambda x: losses.append(x.item()) or backward(x)),
    ):
        update()
    (target, first), (_, second), *others = squares
    result = {"target": target, "td": (first + second).item(), "critic": losses[0]}
    result |= {"policy": losses[1], "data": float(sum(x.mean() for _, x in others))}
    return result | {"critic_grad": agent.critic_optimizer.norms, "policy_grad": actor.norms}


def td3_bc(folder: Path, batch, i: int) -> dict:
    """No noise on the target action, and the policy learns at once."""
    settings = {"policy_noise": 0.0, "policy_freq": 1, "alpha": Q_WEIGHT}
    agent = original(folder, "TD3_BC").TD3_BC(OBS_DIM, D, 1.0, GAMMA, **settings)
    fill(i, critic=agent.critic, target_critic=agent.critic_target)
    fill(i, policy=agent.actor, target_policy=agent.actor_target)
    update = partial(agent.train, SimpleNamespace(sample=lambda _: batch))
    return watch(agent, agent.critic, agent.actor, update)


def diffusion_ql(folder: Path, batch, i: int) -> dict:
    """Also what the time's network makes of each step; both agents have the same one."""
    settings = {"eta": Q_WEIGHT, "beta_schedule": "vp", "n_timesteps": 5, "grad_norm": 0.0}
    module = original(folder, "agents.ql_diffusion")
    agent = module.Diffusion_QL(OBS_DIM, D, 1.0, "cpu", GAMMA, 0.005, **settings)
    fill(i, critic=agent.critic, target_critic=agent.critic_target)
    order, result = [*range(OBS_DIM, OBS_DIM + D + 16), *range(OBS_DIM)], {}
    for name, net in (("target_policy", agent.ema_model.model), ("policy", agent.model)):
        layers = nn.ModuleList([net.mid_layer, net.final_layer])
        fill(i, order, **{name: layers})
        fill(0, **{f"{name} time": net.time_mlp})
        result[f"{name}_embedding"] = net.time_mlp(torch.arange(5)).tolist()
    result["embedding"] = net.time_mlp[0](torch.arange(5)).tolist()
    update = partial(agent.train, SimpleNamespace(sample=lambda _: batch), 1)
    normal = {"randn": draws("start", 2), "randn_like": draws("chain", 11)}
    normal = {key: [x[i] for x in values] for key, values in normal.items()}
    with (
        feed(torch, randint=[made_up.steps(5)[i]], **normal),
        feed(np.random, uniform=[0.75 - i / 2]),  # agent 0 climbs the first critic
    ):
        return result | watch(agent, agent.critic, layers, update)


def omar(folder: Path, batch, i: int, env_id: str = "simple_spread") -> dict:
    """With the search; for HalfCheetah-v2 without, and the density gives way to its log."""
    module, spread = original(folder, "algorithms.maddpg"), env_id == "simple_spread"
    density, searched = module.MATD3.calc_gaussian_pdf, iter(draws("search", 3, J))
    sizes = {"num_in_pol": OBS_DIM, "num_out_pol": D, "num_in_critic": OBS_DIM + D}
    settings = {"omar_mu": 0.0, "omar_sigma": 2.0, "omar_num_samples": J, "omar_iters": 3}
    settings |= {"omar": spread, "omar_coe": OMAR_COE, "env_id": env_id}
    settings |= {"hidden_dim": 16, "batch_size": B}
    settings |= {"cql": True, "cql_alpha": 1.0, "num_sampled_actions": J, "gamma": GAMMA}
    obs, action, next_obs, reward, not_done = ([x] for x in batch)
    sample = [obs, action, reward, next_obs, [1 - not_done[0]]]
    sample = sample if spread else [None, *sample[:3], None, *sample[3:]]
    samples = {"uniform_": [made_up.uniform()], "normal_": [] if spread else draws("own", 2, J)}
    samples = {
        key: [x[:, i].transpose(0, 1).reshape(-1, D) for x in samples[key]] for key in samples
    }

    def normal(mean, std):  # laid out so that today's torch can do the `view` that follows
        draw = mean + std * next(searched)[:, i]
        return draw.transpose(0, 1).contiguous().transpose(0, 1)

    with ExitStack() as stack:
        for owner, name, fake in (
            (torch, "FloatTensor", torch.DoubleTensor),
            (torch.cuda, "FloatTensor", torch.DoubleTensor),
            (torch.Tensor, "cuda", lambda x: x),
            (torch, "normal", normal),
            (torch.nn.utils, "clip_grad_norm", lambda *_: None),
            (module.MATD3, "calc_gaussian_pdf", lambda *x: density(*x).log()),
        ):
            stack.enter_context(patch.object(owner, name, fake, create=True))
        matd3 = module.MATD3([sizes], ["TD3"], agent_max_actions=[1.0], **settings)
        agent = matd3.agents[0]
        for name in ("critic", "target_critic", "policy", "target_policy"):
            getattr(agent, name).in_fn = nn.Identity()
            fill(i, **{name: getattr(agent, name)})
        stack.enter_context(feed(torch.Tensor, **samples))
        return watch(agent, agent.critic, agent.policy, partial(matd3.update, sample, 0))

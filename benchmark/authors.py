"""Run the authors' code on made-up numbers and keep what it computes, for tests/test_authors.py.

    python benchmark/authors.py --checkouts CHECKOUTS

CHECKOUTS has clones of the repositories in `SOURCES`, by their names. What the authors import is
needed beside this project's packages: jax, flax, optax, distrax, ml_collections, tabulate.

The authors' functions are called as they are, in float64, for one agent after the other, on the
inputs of tests/made_up.py. To compare what is comparable, critics stand still, TD3+BC's target
action gets no noise, gradients are not clipped, and OMAR's batch norm is off.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock, patch

import torch
import tyro
from authors_torch import diffusion_ql, fill, made_up, omar, original, td3_bc


@dataclass
class Args:
    checkouts: Path
    """folder of the clones: TD3_BC, fql, OMAR, ..."""


def fql(folder: Path, batch, i: int) -> dict:
    """The weight of the distillation is 1 / Q_WEIGHT, and Q is normalised."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    module = original(folder, "agents.fql")
    config, names = module.get_config(), ("observations", "actions", "next_observations")
    config.update(actor_hidden_dims=(16, 16), value_hidden_dims=(16, 16), normalize_q_loss=True)
    config.update(alpha=1 / made_up.Q_WEIGHT, discount=made_up.GAMMA)
    obs, action, next_obs, reward, not_done = (x.numpy() for x in batch)
    batch = dict(zip(names, (obs, action, next_obs), strict=True))
    batch |= {"rewards": reward[:, 0], "masks": not_done[:, 0]}
    agent = module.FQLAgent.create(0, obs, action, config)
    params = jax.tree.map(jnp.asarray, agent.network.params)
    nets = {"critic": "critic", "target_critic": "target_critic"}
    nets |= {"actor_bc_flow": "flow", "actor_onestep_flow": "policy"}
    for key, name in nets.items():
        (net,) = params[f"modules_{key}"].values()
        for k in range(3):
            stack = (2, made_up.N) if "critic" in name else (made_up.N,)
            shape = net[f"Dense_{k}"]["kernel"].shape[-2:]
            kernel, bias = (x.numpy() for x in made_up.layer(f"{name} {k}", *stack, *shape))
            net[f"Dense_{k}"] = {"kernel": kernel[..., i, :, :], "bias": bias[..., i, 0, :]}
    agent = agent.replace(network=agent.network.replace(params=params))

    def norms(grads, key):
        (net,) = grads[f"modules_{key}"].values()
        grads = [net[f"Dense_{k}"][part] for k in range(3) for part in ("kernel", "bias")]
        parts = [x[e] for e in range(2) for x in grads] if "critic" in key else grads
        return [float(jnp.linalg.norm(x)) for x in parts]

    normal = [x[i].numpy() for x in made_up.draws("normal", 3)]
    grad = partial(jax.value_and_grad, argnums=1, has_aux=True)
    rng, result = jax.random.PRNGKey(0), {}
    with jax.disable_jit(), patch.object(jnp, "square", wraps=jnp.square) as square:
        with made_up.feed(jax.random, normal=normal[:1]):
            agent.critic_loss(batch, params, rng)
        q = agent.network.select("critic")(obs, actions=action)
        result["target"] = (q - square.call_args.args[0])[0].tolist()
        with made_up.feed(jax.random, normal=normal[:1]):
            (loss, _), grads = grad(agent.critic_loss)(batch, params, rng)
        result |= {"critic": float(loss), "critic_grad": norms(grads, "critic")}
        times = [made_up.times()[i].numpy()]  # the last of the normal draws is for its log alone
        with made_up.feed(jax.random, normal=normal, uniform=times):
            (loss, logs), grads = grad(agent.actor_loss)(batch, params, rng)
    result |= {key: float(logs[key]) for key in ("bc_flow_loss", "distill_loss", "q_loss")}
    result |= {"flow_grad": norms(grads, "actor_bc_flow"), "policy": float(loss)}
    return result | {"policy_grad": norms(grads, "actor_onestep_flow")}


def score_net(folder: Path, obs, i: int):
    """SfBC's package and its score network, which knows the observations."""
    with patch.dict(sys.modules, gym=MagicMock(), d4rl=MagicMock()):
        model, schedule = (original(folder, f"diffusion_SDE.{x}") for x in ("model", "schedule"))
    std = partial(schedule.marginal_prob_std, sigma=25.0, device="cpu")
    args = MagicMock(device="cpu", critic_type="small")
    net = model.ScoreNet(made_up.OBS_DIM + made_up.D, made_up.D, std, args=args)
    fill(i, score=net)
    net.embed[0].W.data = made_up.numbers("frequency", made_up.N, 16, scale=30)[i]
    net.condition = obs
    return net


def dom2(folder: Path, batch, i: int) -> dict:
    """SfBC's diffusion loss."""
    net = score_net(folder, batch[0], i)
    loss_fn = original(folder, "diffusion_SDE.loss").loss_fn
    normal, times = made_up.draws("normal", 1)[0][i], made_up.times()[i, :, 0]
    with made_up.feed(torch, rand=[times], randn_like=[normal]):
        loss = loss_fn(net, batch[1], net.marginal_prob_std)
    loss.backward()
    norms = [p.grad.norm().item() for p in net.parameters() if p.requires_grad]
    return {"data": loss.item(), "policy_grad": norms}


def solver(folder: Path, batch, i: int) -> dict:
    """First-order steps with SfBC's network, and the predicted action clipped in each."""
    net = score_net(folder.parent / "SfBC", batch[0], i)
    module = original(folder, "dpm_solver_pytorch")
    clip = {"correcting_x0_fn": lambda x0, _: x0.clamp(-1, 1)}
    steps = module.DPM_Solver(net.forward_dmp_wrapper_fn, module.NoiseScheduleVP("linear"), **clip)
    start, settings = made_up.draws("start", 1)[0][i], {"order": 1, "method": "singlestep"}
    action = steps.sample(start, steps=5, t_start=1.0, t_end=1e-3, **settings)
    return {"action": action.tolist()}


QL, MATD3 = "Zhendong-Wang/Diffusion-Policies-for-Offline-RL", "algorithms/maddpg.py: MATD3.update"
CHEETAH = f"{MATD3}, HalfCheetah-v2, with the log of calc_gaussian_pdf"
SOURCES = {  # repository, file and what is called; by what
    "td3_bc": ("sfujim/TD3_BC", "TD3_BC.py: TD3_BC.train", td3_bc),
    "diffusion_ql": (QL, "agents/ql_diffusion.py: Diffusion_QL.train", diffusion_ql),
    "fql": ("seohongpark/fql", "agents/fql.py: FQLAgent.critic_loss, actor_loss", fql),
    "omar_mpe": ("ling-pan/OMAR", f"{MATD3}, simple_spread", omar),
    "omar_mamujoco": ("ling-pan/OMAR", CHEETAH, partial(omar, env_id="HalfCheetah-v2")),
    "dom2": ("ChenDRAG/SfBC", "diffusion_SDE/loss.py: loss_fn; model.py: ScoreNet", dom2),
    "solver": ("LuChengTHU/dpm-solver", "dpm_solver_pytorch.py: DPM_Solver.sample", solver),
}


def main(args: Args) -> None:
    """Write tests/fixtures/authors.json."""
    torch.set_default_dtype(torch.float64)
    values, packages = made_up.make_batch(), ("torch", "numpy", "jax", "flax", "distrax")
    batch = [values[key] for key in ("obs", "action", "next_obs")]
    batch += [values["reward"][..., None], 1 - values["done"][..., None]]
    fixture = {"versions": {"python": sys.version.split()[0], **{x: version(x) for x in packages}}}
    for name, (repository, called, run) in SOURCES.items():
        folder = args.checkouts / repository.split("/")[1]
        commit = subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True)
        agents = [run(folder, [value[i] for value in batch], i) for i in range(made_up.N)]
        origin = {"repository": f"github.com/{repository}", "commit": commit.strip()}
        fixture[name] = {**origin, "called": called, "agents": agents}
    made_up.FIXTURE.write_text(json.dumps(fixture, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))

"""Convert OMAR's prey of simple_tag or simple_world, a torch checkpoint, to the scripts' prey.npz.

    python data/convert_prey.py data/simple_tag/pretrained_adv_model.pt data/simple_tag/prey.npz

`bash data/download.sh simple_tag` fetches the checkpoint and runs this. Its network is a batch
norm, which is folded into the first layer, two ReLU layers, and a tanh at the end.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from om2p_mpe import fail_as


@dataclass
class Args:
    source: tyro.conf.Positional[Path]
    """OMAR's pretrained_adv_model.pt"""
    target: tyro.conf.Positional[Path]
    """the prey.npz to write, in place of one that is there"""


def read_original(path: Path) -> dict[str, np.ndarray]:
    """The prey, last of the checkpoint's agents, as weight_k (in, out) and bias_k (out,), k < 3."""
    with fail_as(f"{path} is not OMAR's prey"):
        agents = torch.load(path, map_location="cpu", weights_only=True)["agent_params"]
        net = {key: value.double().numpy() for key, value in agents[-1]["policy"].items()}
        arrays = {f"weight_{k}": net[f"fc{k + 1}.weight"].T for k in range(3)}
        arrays |= {f"bias_{k}": net[f"fc{k + 1}.bias"] for k in range(3)}
        scale = net["in_fn.weight"] / np.sqrt(net["in_fn.running_var"] + 1e-5)
        shift = net["in_fn.bias"] - net["in_fn.running_mean"] * scale
        arrays["bias_0"] = arrays["bias_0"] + shift @ arrays["weight_0"]
        arrays["weight_0"] = scale[:, None] * arrays["weight_0"]
    return arrays


def write_prey(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a prey as `om2p_mpe.load_prey` reads it, in float32."""
    with fail_as(f"{path} cannot be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp.npz")
        np.savez(part, **{key: values.astype(np.float32) for key, values in arrays.items()})
        part.replace(path)


if __name__ == "__main__":
    args = tyro.cli(Args)
    write_prey(args.target, read_original(args.source))

"""Act with a team that tools/export.py wrote: copy this file to where it acts, it needs only torch.

    from team import Team

    team = Team("team.pt2")
    action = team(obs)

The class tells what it takes and what it knows of the team.
"""

import json

import torch
from torch import Tensor


class Team:
    """A trained team: observations of all agents to actions in [-1, 1], or in a log's own units.

    Attributes, from the file:
        task: its name
        obs_dims, action_dims: sizes of each agent
        action_low, action_high: limits of its actions in the environment or the log
        raw: whether actions are in the units of these limits
        noise: whether a call takes noise
        samples, noise_scale: as it was exported with
    """

    raw = False  # in files that do not tell

    def __init__(self, path):
        extra = {"team.json": ""}
        self.program = torch.export.load(path, extra_files=extra).module()
        vars(self).update(json.loads(extra["team.json"]))

    @torch.no_grad()
    def __call__(self, obs, noise=None) -> Tensor:
        """(N, B, obs_dim) -> (N, B, action_dim), or without B: (N, obs_dim) -> (N, action_dim).

        Arrays, tensors or a list of the agents', of any float type, an agent's own size or padded.
        The same noise gives the same actions: standard normal, shaped as they are, with K samples
        (K, N, B, action_dim). Without it torch's generator draws it. The actions are float32.
        """
        rows = [torch.as_tensor(row) for row in obs]
        width = max(self.obs_dims)
        if any(x.shape[-1] not in (d, width) for x, d in zip(rows, self.obs_dims, strict=True)):
            raise ValueError(f"observations must have {self.obs_dims} numbers, or be padded")
        pad = torch.nn.functional.pad
        obs = torch.stack([pad(row, (0, width - row.shape[-1])) for row in rows])
        shape, alone, inputs = (*obs.shape[:-1], max(self.action_dims)), obs.ndim == 2, [obs]
        if self.noise:
            shapes = [(self.samples, *shape), *([shape] if self.samples == 1 else [])]
            noise = torch.randn(shapes[0]) if noise is None else torch.as_tensor(noise)
            if noise.shape not in shapes:
                raise ValueError(f"noise must be of shape {shapes[0]}")
            inputs += [noise.reshape(shapes[0])]
        elif noise is not None:
            raise ValueError("this policy takes no noise")
        action = self.program(*(x.unsqueeze(-2) if alone else x for x in inputs))
        return action.squeeze(-2) if alone else action

    def in_environment(self, action: Tensor) -> list[Tensor]:
        """Each agent's action in the environment's or the log's own units and without padding."""
        limits = zip(action, self.action_low, self.action_high, strict=True)
        if self.raw:
            return [x[..., : len(low)] for x, low, _ in limits]
        low_high = [(x[..., : len(a)], x.new_tensor(a), x.new_tensor(b)) for x, a, b in limits]
        return [low + (high - low) * (x + 1) / 2 for x, low, high in low_high]

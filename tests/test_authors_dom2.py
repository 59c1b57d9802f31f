"""DOM2's network, loss and steps against SfBC's and DPM-Solver's own; see test_authors.py."""

import dom2_mpe as dom2
import pytest
from made_up import OBS_DIM, D, N, draws, layer, make_batch, norms, numbers, same, theirs, times
from torch import nn

pytestmark = pytest.mark.usefixtures("double")


def test_dom2():
    """SfBC's network and loss, which is summed over the action's numbers, and DPM-Solver's steps.

    SfBC's network predicts the noise with the other sign. Its smallest time is 1e-5.
    """
    policy, batch = dom2.ScorePolicy(N, OBS_DIM, D, (512, 256, 128)), make_batch()
    parts = [policy.embed_time, policy.embed_obs[1], policy.embed[0], policy.embed[2]]
    for block in (*policy.down, policy.middle, *policy.up):
        parts += [block.time, block.first, block.second, block.skip]
    parts = nn.ModuleList(part for part in [*parts, policy.last] if list(part.parameters()))
    for k, part in enumerate(parts):
        part.weight.data, part.bias.data = layer(f"score {k}", *part.weight.shape)
    policy.last.weight.data.neg_()
    policy.last.bias.data.neg_()
    policy.frequency = numbers("frequency", N, 16, scale=30)[:, None]
    t = 1e-5 + (1 - 1e-5) * times()
    loss = D * dom2.diffusion_loss(policy, batch["obs"], batch["action"], draws("normal", 1)[0], t)
    same(loss, theirs("dom2", "data").sum())
    loss.backward()
    same(norms(parts), theirs("dom2", "policy_grad"))
    action = policy.act(batch["obs"], draws("start", 1)[0])
    assert (action.abs() < 1).any()
    same(action, theirs("solver", "action").clamp(-1, 1))

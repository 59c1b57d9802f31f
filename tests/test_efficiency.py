"""benchmark/efficiency.py: what it counts and what it measures."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refusal

import om2p_mpe

sys.path.append(str(ROOT / "benchmark"))
import itertools

import efficiency

N, B = 2, 16  # agents and batch
TINY = {"agents": N, "batch": B, "hidden_dims": (8, 4)}
ARGS = efficiency.Args(device="cpu", compile=False, seconds=0.01)


@pytest.mark.parametrize("method", efficiency.METHODS)
def test_every_method_is_measured(method):
    """All columns are positive numbers; only memory is not measured agent by agent."""
    row = efficiency.measure(efficiency.Point("equal", method, **TINY), ARGS)
    values = {key: value for key, value in row.items() if isinstance(value, float)}
    assert len(values) == 10
    missing = {"memory_mib", "allocated_mib"} if method == "om2p-loop" else set()
    assert {key for key, value in values.items() if not value > 0} == missing
    assert row["low"] <= row["updates_per_second"] <= row["high"]
    assert row["hidden_dims"] == "8x4"


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compiled(tmp_path):
    """The script's functions, imported by their file alone, compile, each point for its sizes.

    PyTorch, which would make sizes variable when they change, tells of every such size.
    """
    code = (
        "import efficiency\n"
        "for sizes in ((2, 16, (8, 4)), (2, 12, (6, 4))):\n"
        "    point = efficiency.Point('equal', 'bc', *sizes)\n"
        "    efficiency.measure(point, efficiency.Args(device='cpu', compile=True, seconds=0.01))"
    )
    command = [sys.executable, "-c", code]
    place = {"cwd": ROOT / "benchmark", "env": os.environ | {"TORCH_LOGS": "dynamic"}}
    process = subprocess.run(command, **place, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "create_env" in process.stderr
    assert "create_symbol" not in process.stderr


def products(in_dim, out_dim, networks=N):
    """FLOPs of all layers of a forward pass, and those of its first layer."""
    dims = (in_dim, *TINY["hidden_dims"], out_dim)
    layers = [2 * networks * B * a * b for a, b in itertools.pairwise(dims)]
    return sum(layers), layers[0]


def test_flops_of_an_update():
    """By hand: which of OM2P's forward and backward passes there are.

    A backward pass costs one product for the weights and one for the inputs; the first layer of
    the policy, and of the critic in its own step, needs none for its inputs; the critic in the
    policy's step none for its weights.
    """
    P, P1 = products(18 + 2 + 2, 2)
    C, C1 = products(18 + 2, 1, networks=2 * N)
    policy = 4 * P + 2 * (2 * P - P1)  # u, u', a_pi and a_pi(o'), and back through u and a_pi
    critic = 3 * C + (2 * C - C1) + C  # target, Q, Q of a_pi; back to the weights; to the action
    row = efficiency.measure(efficiency.Point("equal", "om2p", **TINY), ARGS)
    assert row["gflop"] * 1e9 == pytest.approx(policy + critic, rel=1e-4)


def test_agent_by_agent_is_the_same_work():
    """Separate networks of nn.Linear do the same operations, and have the same shapes."""
    rows = [
        efficiency.measure(efficiency.Point("equal", method, **TINY), ARGS)
        for method in ("om2p", "om2p-loop")
    ]
    assert rows[0]["gflop"] == pytest.approx(rows[1]["gflop"])
    assert rows[0]["policy_weights"] == rows[1]["policy_weights"]
    torch.manual_seed(0)
    layer = efficiency.SeparateLinear((2, 1), 5, 3)
    x = torch.randn(2, 1, 4, 5)
    for k, linear in enumerate(layer.layers):
        torch.testing.assert_close(layer(x)[k], linear(x[k]))
        torch.testing.assert_close(layer(x[0])[k], linear(x[0]))


def test_batch_jacobian_is_the_exact_derivative(double):
    """The loss with the whole Jacobian is that with jvp, and so are the gradients."""
    torch.manual_seed(0)
    policy = om2p_mpe.MeanFlowPolicy(N, 3, 2, (8, 8))
    obs, action, noise = torch.randn(N, 5, 3), torch.rand(N, 5, 2), torch.randn(N, 5, 2)
    r, t = torch.rand(2, N, 5, 1).sort(dim=0).values
    losses = [
        efficiency.jacobian_loss(policy, obs, action, noise, r, t),
        om2p_mpe.mean_flow_loss(policy, obs, action, noise, r, t, derivative="jvp"),
    ]
    torch.testing.assert_close(*losses)
    for one, two in zip(
        *(torch.autograd.grad(x, policy.parameters()) for x in losses), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_peak_memory():
    """Two tensors of 1 MiB at once, then a third after they are gone: 2 MiB."""

    def update():
        one, two = torch.ones(2**18), torch.ones(2**18)
        one.add_(two)
        del one, two
        torch.ones(2**18).sum()

    assert efficiency.cpu_peak(update) == pytest.approx(2 * 2**20, rel=0.01)
    kept = []

    def update_that_keeps():
        kept[:] = [torch.ones(2**18)]  # while the one of the update before is there

    assert efficiency.cpu_peak(update_that_keeps) == pytest.approx(2 * 2**20, rel=0.01)
    net = torch.nn.Linear(10, 10)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(10)).sum().backward()
    optimizer.step()
    assert efficiency.state_bytes(net, optimizer) == 4 * (3 * 110 + 2)


def test_score_network_of_equal_size():
    """DOM2's policy has the others' number of weights, to a tenth."""
    import dom2_mpe

    for hidden_dims in ((128, 128), (512,) * 4):
        point = efficiency.Point("equal", "dom2-5", hidden_dims=hidden_dims)
        wide, narrow = efficiency.equal_score_dims(dom2_mpe, point)
        assert wide == 2 * narrow
        policies = (
            dom2_mpe.ScorePolicy(1, 18, 2, (wide, narrow)),
            om2p_mpe.MeanFlowPolicy(1, 18, 2, hidden_dims),
        )
        ours, others = (sum(w.numel() for w in policy.parameters()) for policy in policies)
        assert ours == pytest.approx(others, rel=0.1)


def test_a_method_that_fails(tmp_path):
    """The others are measured all the same, and one line names each that failed."""
    methods = ("bc", "om2p")
    args = efficiency.Args(("default",), methods, device="meta", results_dir=tmp_path)
    with pytest.raises(SystemExit) as stop:
        efficiency.main(args)
    for line, method in zip(stop.value.code.splitlines(), methods, strict=True):
        assert line.startswith(f"error: {method} could not be measured: error: --device meta")


@pytest.mark.parametrize("wrong", [{"methods": ("om2q",)}, {"parts": ("everything",)}])
def test_unknown_names_are_refused(wrong):
    """The line has the wrong name and the right ones."""
    message = refusal(lambda: efficiency.main(efficiency.Args(**wrong)))
    (value,) = wrong.values()
    assert value[0] in message
    assert ("om2p" if "methods" in wrong else "published") in message

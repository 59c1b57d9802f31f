"""benchmark/efficiency.py: what it counts and what it measures."""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, refusal

import om2p_mpe

sys.path.append(str(ROOT / "benchmark"))
import efficiency

N, B, DIMS = 2, 16, (8, 4)  # agents, batch and hidden layers
ARGS = efficiency.Args(device="cpu", compile=False, seconds=0.001)


def measure(method):
    """A method's row, with tiny sizes and the script's own score network."""
    return efficiency.measure(efficiency.Point("default", method, N, B, "8x4"), ARGS)


@pytest.mark.parametrize(
    "method",
    ["om2p", "om2p-jacobian", "bc", "td3_bc", "omar", "fql-10", "diffusion_ql-5", "dom2-5"],
)
def test_every_script_is_measured(method):
    """All numbers are positive, and the quartiles are in order."""
    row = measure(method)
    values = [value for value in row.values() if isinstance(value, float)]
    assert len(values) == 9
    assert all(value > 0 for value in values)
    assert row["low"] <= row["updates_per_second"] <= row["high"]


def products(in_dim, out_dim, networks=N):
    """FLOPs of a forward pass, and of its first layer; one of one column is no matrix product."""
    pairs = itertools.pairwise((in_dim, *DIMS, out_dim))
    layers = [2 * networks * B * a * b for a, b in pairs if b > 1]
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
    # Target, Q, Q of a', Q of a_pi; back to the weights twice; to the action
    critic = 4 * C + 2 * (2 * C - C1) + C
    assert measure("om2p")["gflop"] * 1e9 == pytest.approx(policy + critic, rel=1e-4)


def test_agent_by_agent_is_the_same_work():
    """Separate networks of nn.Linear do the same, the critics' last layers by products, too."""
    # Four times forward, three times to inputs, twice to weights
    last = 9 * 2 * 2 * N * B * DIMS[-1] / 1e9
    loop, stacked = (measure(name)["gflop"] for name in ("om2p-loop", "om2p"))
    assert loop == pytest.approx(stacked + last, rel=1e-4)


def test_separate_linear():
    """Each of two critics has its layer, for one input or for an input of its own."""
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
    inputs = policy, obs, action, noise, r, t
    losses = [efficiency.jacobian_loss(*inputs)]
    losses.append(om2p_mpe.mean_flow_loss(*inputs, derivative="jvp"))
    gradients = [torch.autograd.grad(loss, policy.parameters()) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def test_peak_memory():
    """Three of 1 MiB at once: two that come and go, and what the update before has left."""
    kept = []

    def update():
        torch.ones(2**18).add(1)
        kept[:] = [torch.ones(2**18)]

    assert efficiency.cpu_peak(update) == pytest.approx(3 * 2**20, rel=0.01)


def test_table(tmp_path, monkeypatch):
    """A point's row is written, and another machine's table is left alone."""
    args = efficiency.Args(("default",), ("bc",), "cpu", False, 0.001, tmp_path)
    efficiency.main(args)
    table = (tmp_path / "efficiency_cpu.csv").read_bytes()
    assert table.splitlines()[1].startswith(b"default,bc,3,128,128x128,,")
    machine = json.loads((tmp_path / "efficiency_cpu.json").read_text())
    monkeypatch.setattr(efficiency, "machine", lambda *_, **__: machine | {"cores": -1})
    assert "another machine" in refusal(efficiency.main, args)
    assert (tmp_path / "efficiency_cpu.csv").read_bytes() == table


def test_rounds(tmp_path, monkeypatch):
    """All points are measured in turn, each as often as asked for; the table has the medians."""
    monkeypatch.setattr(efficiency, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    rates, order = {"bc": iter((3.0, 7.0, 1.0)), "td3_bc": iter((20.0, 40.0, 90.0))}, []

    def measured(point, _):
        order.append(point.method)
        return point._asdict() | {"updates_per_second": next(rates[point.method]), "gflop": 0.5}

    monkeypatch.setattr(efficiency, "measure", measured)
    args = efficiency.Args(("default",), ("bc", "td3_bc"), "cpu", False, rounds=3)
    efficiency.main(replace(args, results_dir=tmp_path))
    assert order == ["bc", "td3_bc"] * 3
    table = (tmp_path / "efficiency_cpu.csv").read_text().splitlines()
    assert table[1:] == [
        "default,bc,3,128,128x128,3.0,0.5",
        "default,td3_bc,3,128,128x128,40.0,0.5",
    ]


def test_a_method_that_fails(tmp_path, monkeypatch):
    """Each that failed is named in a line, with the reason."""
    monkeypatch.setattr(efficiency, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    args = efficiency.Args(("default",), ("bc", "om2p"), "abacus", False, 0.001, tmp_path)
    with pytest.raises(SystemExit) as stop:
        efficiency.main(args)
    for line, method in zip(stop.value.code.splitlines(), ("bc", "om2p"), strict=True):
        assert line.startswith(f"error: {method}: ")
        assert "abacus" in line

"""benchmark/gpu.py: what it writes, and that no stage stops the next; rehearsed on the CPU."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "benchmark"))
import efficiency
import gpu
import gpu_checks
import report


def fails(args):
    """A stage that writes something and fails."""
    gpu.note(args, "a finding", "failed", "the reason")
    raise RuntimeError("this stage is broken")


def hangs(args):
    """A stage that never ends."""
    time.sleep(600)


def works(args):
    """A stage that leaves a finding."""
    gpu.note(args, "time of five seeds", 1.6)


def test_each_stage_has_its_turn(tmp_path, monkeypatch, capsys):
    """One that fails and one that runs out of time do not stop the last; all is in the summary."""
    stages = {"fails": (fails, 0.05), "hangs": (hangs, 0.001), "works": (works, 0.949)}
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setattr(gpu, "SPAWN", get_context("fork"))  # it need not import all anew
    gpu.main(gpu.Args(tmp_path, "cpu", True, tuple(stages), minutes=1))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["status"] for row in summary["stages"]] == [1, "out of time", 0]
    assert summary["failed"] == [["a finding", "failed", "the reason"]]
    assert (tmp_path / "log.txt").exists()
    (target,) = summary["targets: at least, found, met"]
    assert target == ["one seed's time, five seeds' = 1", 0.5, 0.625, True]
    assert json.loads(capsys.readouterr().out) == summary


@pytest.fixture
def claimed(tmp_path, monkeypatch):
    """The folder after the rehearsal of `claim`, with OM2P and its rival, measured in here."""
    monkeypatch.setattr(efficiency, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    args = gpu.Args(out, "cpu", True, methods=(), work=work)
    gpu.claim(args)
    gpu.summarize(args, [])
    return out


def test_tables_of_a_gpu(claimed, monkeypatch):
    """The pages' tables can be made from what `claim` writes; without a part, those are missing."""
    found = {path.name for path in claimed.iterdir()}
    tables = {f"efficiency_cpu.{end}" for end in ("csv", "json")}
    assert found == tables | {"notes.csv", "summary.json", "variants.csv"}
    for name in tables:
        (claimed / name).rename(claimed / name.replace("cpu", "cuda_compiled"))
    path = claimed / "efficiency_cuda_compiled.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "Fake GPU"}))
    monkeypatch.setattr(report, "RESULTS", claimed)
    equal = report.TABLES["cost_equal_cuda_compiled"]()
    assert "| OM2P | " in equal
    assert "| Diffusion-QL, 20 steps | " in equal
    assert "Fake GPU" in report.TABLES["cost_cuda_compiled"]()
    assert report.FIGURES["cost_cuda_compiled"]().axes
    assert report.FIGURES["growth_cuda_compiled"]().axes
    with pytest.raises(FileNotFoundError):
        report.TABLES["cost_default_cuda_compiled"]()
    targets = json.loads((claimed / "summary.json").read_text())["targets: at least, found, met"]
    assert [wanted for _, wanted, *_ in targets] == [5, 2, 10.8, 3.8, 10, 2000, None, None]


def test_checks(make_data, tmp_path):
    """Resuming and two seeds pass; losses that differ, and what is broken, are found out."""
    for seed in (0, 1):
        make_data(tmp_path / "few", seed=seed)
    args = gpu.Args(tmp_path, "cpu", True, work=tmp_path)
    for kind in ("resume", "seeds"):
        result, numbers = gpu_checks.check(args, kind, "om2p", "captured")
        assert result == "passed", numbers
    losses = torch.rand(50, 3)
    assert "in 50" in gpu_checks.compared(losses, losses)
    with pytest.raises(ValueError, match="in ten"):
        gpu_checks.compared(losses + 0.1 * (torch.arange(50) == 5)[:, None], losses)
    assert gpu_checks.check(args, "resume", "no such method", "captured")[0] == "failed"


def test_limits_of_what_comes_back():
    """At most eight files: those of all stages."""
    text = Path(gpu.__file__).read_text()
    names = ("notes.csv", "summary.json", "log.txt", "variants.csv", "mpe.csv", "mpe.json")
    assert all(f'"{name}"' in text for name in names)
    assert len(names) + 2 <= 8
    assert sum(minutes for _, minutes in gpu.STAGES.values()) <= 12

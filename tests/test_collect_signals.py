"""Making and converting datasets ends in one line at Ctrl-C and SIGTERM, and leaves nothing behind.

Scripts run as programs of their own, which send themselves the signal at a given call.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import os, runpy, signal, sys
import numpy as np

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
_, function, number, *sys.argv = sys.argv
original = getattr(np, function)

def stop(*args, **kwargs):
    result = original(*args, **kwargs)
    os.kill(os.getpid(), int(number))
    return result

setattr(np, function, stop)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = {
    "collect_mpe.py": ("--num-transitions", "50"),
    "collect_mamujoco.py": ("--num-transitions", "50", "--task", "Reacher-2x1"),
    "convert_og_marl.py": ("mastars/simple_tag/medium/seed_0_data", "--task", "simple_tag"),
}


def check(folder, function, number, script, *options):
    """Run a script that gets the signal when it calls a function of NumPy; nothing is left."""
    command = [sys.executable, "-c", PROGRAM, function, str(number), ROOT / "data" / script]
    command += [*options, "--data-dir", "data"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 1
    assert run.stderr.startswith("stopped")
    assert run.stderr.count("\n") == 1
    assert [path for path in (folder / "data").rglob("*") if "seed" in path.name] == []


@pytest.mark.parametrize("script", SMALL)
def test_terminated_while_writing(script, make_data, tmp_path):
    """As Ctrl-C: what was begun is taken away again."""
    if script == "convert_og_marl.py":
        make_data(tmp_path / "mastars", "simple_tag", "medium", 100)
        next_obs = (tmp_path / SMALL[script][0]).glob("next_obs_*.npy")
        for path in next_obs:
            path.unlink()
    check(tmp_path, "save", 15, script, *SMALL[script], "--quality", "random")


@pytest.mark.parametrize("script", ["collect_mpe.py", "collect_mamujoco.py"])
def test_interrupted_while_loading(script, tmp_path):
    """Before anything is begun, too, there is no traceback."""
    check(tmp_path, "load", 2, script)

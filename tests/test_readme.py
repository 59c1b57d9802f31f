"""What the pages say can be done and seen: commands, files, tables, code."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("b*/README.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted(FILES)}
COMMANDS = re.findall(r"python ([\w./]+\.py)((?: [\w./:-]+)*)", "\n".join(PAGES.values()))
READERS_OWN = {"record.py", "om2p_mpe2.py"}  # tests/test_own_env.py writes and runs these


def load(path: str):
    """Import a script by its path."""
    folder = str((ROOT / path).parent)
    sys.path.insert(0, folder)
    try:
        name = "readme_" + Path(path).stem
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@pytest.mark.parametrize(
    ("script", "options"), [x for x in sorted(set(COMMANDS)) if x[0] not in READERS_OWN]
)
def test_commands_parse(script, options):
    """Every script that a page calls exists and takes the options given there."""
    module = load(script)
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=shlex.split(options))
    else:
        assert not options or "argparse" in (ROOT / script).read_text()


def test_the_two_commands_are_there():
    """The first things a newcomer sees."""
    assert "pip install -r requirements.txt && python om2p_mpe.py --seed 0\n" in README
    assert "pip install -r requirements-dev.txt && pytest -n 2\n" in README


def test_size():
    """README is read in a few minutes."""
    assert len(README.split()) <= 2_000
    assert README.count("\n") <= 250


def test_code():
    """The lines of Python in README are the script's, in its order."""
    script = [line.strip() for line in (ROOT / "om2p_mpe.py").read_text().splitlines()]
    for block in re.findall(r"(?s)```python\n(.*?)```", README):
        places = [script.index(line.strip()) for line in block.splitlines()]
        assert places == sorted(places)
        assert places[-1] - places[0] < 15
    assert "target = v + (t - r) * du_dr" in README


def test_packages_without_mujoco():
    """README's line for the particle scripts has what requirements.txt has before MuJoCo."""
    text = (ROOT / "requirements.txt").read_text()
    needed = re.findall(r"^[\w-]+", text[: text.index("# For the MuJoCo scripts")], flags=re.M)
    assert f"    pip install {' '.join(needed)}\n" in README
    imported = re.findall(r"^(?:import|from) (\w+)", (ROOT / "om2p_mpe.py").read_text(), re.M)
    assert set(imported) - sys.stdlib_module_names == set(needed) - {"tensorboard"}  # by torch


def anchors(text: str) -> set[str]:
    """The names that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    """Every relative link leads to a file, and to a heading there if it names one."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert links
    for link in links:
        name, _, heading = link.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists()
        assert not heading or heading in anchors(file.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page):
    """So do the files that are named in the text, unless a command makes them."""
    folders = "baselines|benchmark|data|docs|examples|tests|tools"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_main_settings():
    """The table of main settings has the defaults of the scripts."""
    page = PAGES["docs/baselines.md"]
    scripts = dict(re.findall(r"^## `([\w/]+)_mpe\.py`: ([\w-]+)", page, flags=re.M))
    scripts = {method: script for script, method in scripts.items()}
    rows = re.findall(r"^\| ([\w+-]+) \| (`.*) \| (`.*) \|$", page, flags=re.M)
    assert len(rows) == 7
    for method, *cells in rows:
        for suite, cell in zip(("mamujoco", "mpe"), cells, strict=True):
            defaults = load(f"{scripts[method.removesuffix('+BC')]}_{suite}.py").Args()
            for name, value in re.findall(r"`(\w+)` ([\d.]+)", cell):
                assert getattr(defaults, name) == float(value), (method, suite, name)


def test_line_counts():
    """The table of scripts tells the length of each."""
    rows = re.findall(r"^\| \[`([^`]+)`\].*\| (\d+) \|$", README, flags=re.M)
    assert rows
    assert rows == [(name, str((ROOT / name).read_text().count("\n"))) for name, _ in rows]


LINE = """
class MPE:
    horizon, num_agents, obs_dims, action_dims, collector = 5, 2, (3, 3), (1, 1), "line.py"

    def __init__(self, task, num_episodes):
        self.shape = num_episodes, 3

    def reset(self, seed=0):
        self.obs = np.random.default_rng(seed).uniform(-1, 1, (2, *self.shape)).astype(np.float32)
        return self.obs

    def step(self, action):
        reward = -((action - self.obs[..., :1]) ** 2).sum(axis=-1)
        return self.reset(1), reward


def normalized_score(task, returns):
    return 100 + 10 * returns
"""


def test_another_environment(tmp_path):
    """With the region `mpe` replaced as docs/your-data.md tells, it learns another task."""
    script = (ROOT / "om2p_mpe.py").read_text()
    script, count = re.subn(r"    for env in envs if .*\n.*prey_policy.*\n", "", script)
    assert count == 1
    script, count = re.subn(r"(?s)(?<=# region mpe\n).*?(?=# endregion mpe\n)", LINE, script)
    assert count == 1
    (tmp_path / "line.py").write_text(script)
    folder = tmp_path / "data" / "line" / "expert" / "seed_0_data"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        obs, action = rng.uniform(-1, 1, (500, 3)), rng.uniform(-1, 1, (500, 1))
        arrays = {"obs": obs, "acs": action, "rews": -((action - obs[:, :1]) ** 2).sum(axis=1)}
        arrays |= {"next_obs": obs[::-1], "dones": np.zeros(500)}
        for name, array in arrays.items():
            np.save(folder / f"{name}_{i}.npy", array)
    options = "--task line --num-updates 300 --eval-interval 300 --batch-size 64 --hidden-dims 32"
    options += " --gamma 0 --device cpu --no-compile"
    result = subprocess.run(
        [sys.executable, "-I", "line.py", *options.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    final = float(re.search(r"final return (-?[\d.]+)", result.stdout)[1])
    assert final > -0.5  # actions of 0 return -1.7, random ones -3.3
    assert (tmp_path / "runs" / "line-expert" / "line" / "seed-0" / "policy.pt").exists()

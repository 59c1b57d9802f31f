"""What the README says can be done and seen: commands parse, files exist, tables match results."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python ([\w./]+\.py)((?: [\w./-]+)*)", README)


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


@pytest.mark.parametrize(("script", "options"), sorted(set(COMMANDS)))
def test_commands_parse(script, options):
    """Every script that the README calls exists and takes the options given there."""
    module = load(script)
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=shlex.split(options))
    else:
        assert not options or "argparse" in (ROOT / script).read_text()


def test_the_two_commands_are_there():
    """The first things a newcomer sees."""
    assert "pip install -r requirements.txt && python om2p_mpe.py --seed 0\n" in README
    assert "pip install -r requirements-dev.txt && pytest -n 2\n" in README


def test_links_and_pictures_exist():
    """Every relative link leads to a file."""
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.split("#")[0]).exists()] == []


def test_tables_are_those_of_the_results():
    """benchmark/report.py would write the tables that are there."""
    for name, table in load("benchmark/report.py").tables().items():
        assert f"<!-- table {name} -->\n{table}\n<!-- end -->" in README


def test_line_counts():
    """The table of scripts tells the length of each."""
    rows = re.findall(r"^\| \[`([^`]+)`\].*\| (\d+) \|$", README, flags=re.M)
    assert rows
    assert rows == [(name, str((ROOT / name).read_text().count("\n"))) for name, _ in rows]

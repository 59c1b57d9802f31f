"""The regions that the standalone scripts share, and that the scripts do stand alone."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("om2p_*.py", "baselines/*.py", "data/collect_*.py")
SCRIPTS = [path.relative_to(ROOT) for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
BASELINES = [script for script in SCRIPTS if script.parent == Path("baselines")]
FRAME = {"args", "args_training", "networks", "ranges", "dataset", "evaluate", "compile", "write"}
FRAME |= {"setup", "prepare", "loop", "stop"}
CRITIC = {"imports", "args_critic", "td"}
CONSERVATIVE = CRITIC | {"args_conservative", "q_of_samples", "update_conservative"}
METHODS = {  # exactly these, the frame and those of the suite
    "om2p": CRITIC | {"om2p", "args_om2p", "update"},
    "bc": {"bc", "deterministic", "update_bc"},  # without a critic it needs fewer imports
    "td3_bc": CRITIC | {"td3_bc", "deterministic", "update_with_target_policy"},
    "omar": CONSERVATIVE | {"conservative", "omar", "args_omar", "deterministic"},
    "diffusion_ql": CRITIC | {"diffusion_ql", "args_diffusion_ql", "update_with_target_policy"},
    "dom2": CONSERVATIVE | {"conservative", "dom2", "args_dom2"},
    "flow_ql": CRITIC | {"flow_ql", "flow", "args_flow", "update"},
    "fql": CRITIC | {"fql", "flow", "args_flow", "update"},
}
SUITES = ("mpe", "mamujoco")
ANEW = {"imports", "args_training", "args_critic"}  # on MuJoCo with other imports and defaults


def expected_regions(script: Path) -> set[str]:
    """Names of the regions that a script must have, no more and no less."""
    method, suite = script.stem.rsplit("_", 1)
    if method == "collect":
        return {"networks", "stop", "behavior", suite}
    names = FRAME | METHODS[method] | {suite, f"args_{suite}"}
    if suite == "mamujoco":
        names = {f"{name}_mamujoco" if name in ANEW else name for name in names}
    if script.stem == "omar_mamujoco":  # has a term of its own
        names -= {"conservative"}
    return names


def load_tool():
    """Import tools/sync_regions.py."""
    spec = importlib.util.spec_from_file_location("sync_regions", ROOT / "tools/sync_regions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def regions_of(script: Path) -> set[str]:
    """Names of a script's regions."""
    return set(load_tool().find_regions((ROOT / script).read_text().splitlines(keepends=True)))


def run(root: Path, *options: str) -> tuple[int, str]:
    """Run the tool of the tree under `root`; exit status and output."""
    command = [sys.executable, root / "tools/sync_regions.py", *options]
    process = subprocess.run(command, capture_output=True, text=True)
    assert not process.stderr
    return process.returncode, process.stdout


@pytest.fixture
def tree(tmp_path):
    """A copy of the tool and the scripts."""
    for path in (Path("tools/sync_regions.py"), *SCRIPTS):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_repository_is_in_sync():
    """The repository's own copies agree."""
    assert run(ROOT) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_expected_regions(script):
    """Each script has the regions that its algorithm and suite ask for, and no others."""
    assert regions_of(script) == expected_regions(script)


@pytest.mark.parametrize("suite", SUITES)
def test_every_method_is_there(suite):
    """The tests of scripts go by what they find; so let everything be found."""
    names = {script.stem for script in SCRIPTS if script.stem.endswith(f"_{suite}")}
    assert names == {f"{method}_{suite}" for method in ("collect", *METHODS)}


def test_every_region_is_shared():
    """A region occurs in two scripts at least, else it is none."""
    count = Counter(name for script in SCRIPTS for name in regions_of(script))
    assert {name for name, number in count.items() if number < 2} == set()


@pytest.mark.parametrize("script", BASELINES, ids=str)
def test_baseline_is_short(script):
    """A baseline is 150 lines at most that are its own, docstring included, blank ones not."""
    lines = (ROOT / script).read_text().splitlines(keepends=True)
    for first, last in load_tool().find_regions(lines).values():
        lines[first:last] = ["\n"] * (last - first)
    assert 20 < sum(bool(line.strip()) for line in lines) <= 150


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_stand_alone(script):
    """No script imports anything from the repository, or by a relative import."""
    folders = ("", "baselines", "benchmark", "data", "tests", "tools")
    own = {path.stem for folder in folders for path in (ROOT / folder).glob("*.py")} | {*folders}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}"
            names = [node.module]
        else:
            continue
        assert not {name.split(".")[0] for name in names} & own, f"line {node.lineno}"


def test_changed_copy_is_named_and_fixed(tree):
    """A copy that drifts is reported with file, line and region, and --fix restores it."""
    copy = tree / "data/collect_mpe.py"
    intact = copy.read_text()
    changed = intact.replace("class Critic(", "class Judge(", 1)
    assert changed != intact
    copy.write_text(changed)
    line = changed[: changed.index("class Judge(")].count("\n") + 1

    status, output = run(tree)
    assert status == 1
    assert output.startswith(
        f"data/collect_mpe.py:{line}: region networks differs from om2p_mpe.py"
    )
    assert copy.read_text() == changed

    status, output = run(tree, "--fix")
    assert (status, output.count("fixed")) == (0, 1)
    assert copy.read_text() == intact
    assert run(tree) == (0, "")


def test_owner_is_the_first_script(tree):
    """A change in om2p_mpe.py flows to the copies: indented regions and added lines too."""
    owner, copy = tree / "om2p_mpe.py", tree / "baselines/copy_mpe.py"
    copy.parent.mkdir(exist_ok=True)
    shutil.copy(owner, copy)
    text = owner.read_text()
    for name in ("args", "networks", "loop"):
        start = next(line for line in text.splitlines() if line.strip() == f"# region {name}")
        text = text.replace(start + "\n", f"{start}\n{start.replace('region', 'new line')}\n")
    owner.write_text(text)

    status, output = run(tree)
    assert status == 1
    assert {line.split(":")[0] for line in output.splitlines()} > {"baselines/copy_mpe.py"}
    assert all(f"region {name} differs" in output for name in ("args", "networks", "loop"))
    assert run(tree, "--fix")[0] == 0
    assert copy.read_text() == text == owner.read_text()
    assert run(tree) == (0, "")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("# region a\n", "line 1: region a does not end"),
        ("x = 1\n# endregion a\n", "line 2: endregion a, but None is open"),
        (
            "# region a\n# region b\n# endregion b\n# endregion a\n",
            "line 2: region b starts inside",
        ),
        ("# region a\n# endregion b\n", "line 2: endregion b, but a is open"),
        ("# region a\n# endregion a\n# region a\n# endregion a\n", "line 3: region a starts a sec"),
    ],
)
def test_unbalanced_markers(tree, lines, problem):
    """Markers without their counterpart are an error, and then --fix touches nothing."""
    (tree / "om2p_mamujoco.py").write_text(lines)
    copy = tree / "data/collect_mpe.py"
    copy.write_text(copy.read_text().replace("class Critic(", "class Judge(", 1))
    changed = copy.read_text()
    for options in ((), ("--fix",)):
        status, output = run(tree, *options)
        assert status == 1
        assert output.startswith(f"om2p_mamujoco.py: {problem}")
    assert copy.read_text() == changed

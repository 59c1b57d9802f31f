"""What the scripts look like: short, alone, and the same where they share a region."""

import ast
import difflib
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT
from sync_regions import PATTERNS, find_regions

SCRIPTS = {path.stem: path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))}
BASELINES = [name for name in SCRIPTS if not name.startswith("om2p")]
FRAME = {"args", "networks", "dataset", "evaluate", "loop"}  # of every script
CONSERVATIVE = {"critic", "conservative", "q_of_samples", "update_conservative"}
METHODS = {  # exactly these, the frame, and the suite's environment and set-up
    "om2p": {"critic", "om2p", "update_om2p"},
    "bc": {"deterministic", "bc", "update_bc"},
    "td3_bc": {"critic", "deterministic", "first_critic", "td3_bc", "update_with_target_policy"},
    "omar": CONSERVATIVE | {"deterministic", "first_critic", "omar", "args_omar"},
    "diffusion_ql": {"critic", "diffusion_ql", "update_with_target_policy"},
    "dom2": CONSERVATIVE | {"dom2", "args_dom2"},
    "flow_ql": {"critic", "flow", "flow_ql", "update"},
    "fql": {"critic", "flow", "fql", "update"},
}
LOGS = {"args", "networks", "om2p", "critic", "logs", "update_om2p"}  # no environment
# Of other scripts 640
MAX_LINES = {"om2p_mpe": 600, "om2p_mamujoco": 560, "om2p_logs": 600, "bc": 480, "dom2": 690}
MAX_OWN_LINES = {"dom2": 200, "omar": 200}  # of other baselines 150


def expected_regions(name: str) -> set[str]:
    """The regions that a script must have, no more and no less."""
    method, suite = name.rsplit("_", 1)
    regions = FRAME | METHODS[method] | {suite, f"setup_{suite}"}
    return regions - {"conservative"} if name == "omar_mamujoco" else regions  # has its own


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_short(name):
    """Few lines, few ways to fail, four levels of indentation in `train` at most."""
    text, method = SCRIPTS[name].read_text(), name.rsplit("_", 1)[0]
    assert text.count("\n") <= MAX_LINES.get(name, MAX_LINES.get(method, 640))
    nodes = list(ast.walk(ast.parse(text)))
    assert sum(isinstance(node, ast.Try) for node in nodes) <= 3
    assert sum(isinstance(node, ast.Name) and node.id == "SystemExit" for node in nodes) <= 10
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    train = [node for node in ast.walk(functions["train"]) if isinstance(node, ast.stmt)]
    assert max(node.col_offset for node in train) <= 16
    if method == "om2p":
        assert functions["mean_flow_loss"].lineno < 190


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_adds_little(name):
    """`diff` of OM2P's script and a baseline shows the method: so many lines are added at most."""
    method, suite = name.rsplit("_", 1)
    lines = [SCRIPTS[key].read_text().splitlines() for key in (f"om2p_{suite}", name)]
    blocks = difflib.SequenceMatcher(None, *lines, autojunk=False).get_matching_blocks()
    added = len(lines[1]) - sum(block.size for block in blocks)
    assert 10 < added <= MAX_OWN_LINES.get(method, 150)


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_stands_alone(name):
    """No script imports anything from the repository, or by a relative import."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    own = {file.stem for file in files} | {file.parent.name for file in files}
    for node in ast.walk(ast.parse(SCRIPTS[name].read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & own
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module.split(".")[0] not in own


def test_expected_regions():
    """Every method is there in both suites, with the regions that it needs, all of them shared."""
    found = {
        name: set(find_regions(path.read_text().splitlines())) for name, path in SCRIPTS.items()
    }
    names = [f"{method}_{suite}" for method in METHODS for suite in ("mpe", "mamujoco")]
    assert found == {name: expected_regions(name) for name in names} | {"om2p_logs": LOGS}
    counts = Counter(region for regions in found.values() for region in regions)
    assert [region for region, count in counts.items() if count < 2] == ["logs"]


@pytest.mark.parametrize("name", ["fail_as", "read_array", "compiled"])
def test_functions_outside_regions_agree(name):
    """The script for logs has these of other scripts' regions, and nothing else of those."""
    texts = [SCRIPTS[script].read_text() for script in ("om2p_mpe", "om2p_logs")]
    functions = [re.search(rf"(?ms)^def {name}\(.*?(?=\n\n\n|\n\n# end)", text) for text in texts]
    assert functions[0][0] == functions[1][0]


def sync(root, *options):
    """Run the tool of the tree under `root`; exit status and output."""
    command = [sys.executable, root / "tools/sync_regions.py", *options]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.returncode, process.stdout + process.stderr


@pytest.fixture
def tree(tmp_path):
    """A copy of the tool and the scripts."""
    for path in (ROOT / "tools/sync_regions.py", *SCRIPTS.values()):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


def test_repository_is_in_sync():
    """The repository's own copies agree."""
    assert sync(ROOT) == (0, "")


def test_changed_copy_is_named_and_fixed(tree):
    """A copy that drifts is reported with file, line and region, and --fix restores it."""
    copy = tree / "baselines/fql_mpe.py"
    intact = copy.read_text()
    changed = intact.replace("class Critic(", "class Judge(")
    copy.write_text(changed)
    line = changed[: changed.index("class Judge(")].count("\n") + 1
    problem = f"baselines/fql_mpe.py:{line}: region critic differs from om2p_mpe.py\n"
    assert sync(tree) == (1, problem)
    assert copy.read_text() == changed
    assert sync(tree, "--fix") == (0, problem)
    assert copy.read_text() == intact


def test_first_script_is_the_owner(tree):
    """Lines that are added in om2p_mpe.py flow to all copies, in indented regions too."""
    owner = tree / "om2p_mpe.py"
    added = owner.read_text().replace("# region loop\n", "# region loop\n    # a new line\n")
    owner.write_text(added)
    assert sync(tree, "--fix")[0] == 0
    assert sync(tree) == (0, "")
    assert owner.read_text() == added
    assert all("# a new line\n" in path.read_text() for path in tree.glob("*/*_mamujoco.py"))


@pytest.mark.parametrize("lines", ["<a", ">a", "<a <b >b >a", "<a >b", "<a >a <a >a"])
def test_unbalanced_markers(lines):
    """Markers without their counterpart, nested or twice the same, are an error."""
    lines = lines.replace("<", "# region ").replace(">", "# endregion ").split(" # ")
    with pytest.raises(ValueError, match=r"^line \d: "):
        find_regions([f"# {line.removeprefix('# ')}\n" for line in lines])

"""Keep the regions that the standalone scripts share byte-identical.

A region is what stands between the lines `# region NAME` and `# endregion NAME`, indented or not.
The first script that has a region owns it: om2p_mpe.py, om2p_mamujoco.py, the baselines, examples.

    python tools/sync_regions.py          name the copies that differ from their owner, exit with 1
    python tools/sync_regions.py --fix    overwrite them
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("om2p_mpe.py", "om2p_mamujoco.py", "baselines/*.py", "examples/om2p_*.py")
MARKER = re.compile(r"\s*# (region|endregion) (\w+)\s*")


def find_regions(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Map the name of every region to its lines [first, last), both markers included.

    Raises ValueError, with the line's number, if the markers are not balanced.
    """
    regions, name, first = {}, None, 0
    for k, line in enumerate(lines):
        marker = MARKER.fullmatch(line)
        if not marker:
            continue
        kind, found = marker.groups()
        if kind == "region" and name is None and found not in regions:
            name, first = found, k
        elif kind == "endregion" and name == found:
            regions[name], name = (first, k + 1), None
        else:
            raise ValueError(f"line {k + 1}: {kind} {found} does not belong here")
    if name is not None:
        raise ValueError(f"line {first + 1}: region {name} does not end")
    return regions


def main(fix: bool) -> int:
    """Check, or with `fix` repair, all scripts; return the exit status."""
    scripts, owners, status = {}, {}, 0
    for path in (path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))):
        lines = path.read_bytes().decode().splitlines(keepends=True)  # as it is, line ends too
        try:
            scripts[path] = lines, find_regions(lines)
        except ValueError as problem:  # nothing is overwritten then
            sys.exit(f"{path.relative_to(ROOT).as_posix()}: {problem}")
    for path, (lines, regions) in scripts.items():
        for name, (first, last) in reversed(regions.items()):  # from below: indices stay valid
            owner, source = owners.setdefault(name, (path, lines[first:last]))
            if lines[first:last] == source:
                continue
            same = [a == b for a, b in zip(lines[first:last], source, strict=False)]
            number = first + same.index(False) + 1
            names = [item.relative_to(ROOT).as_posix() for item in (path, owner)]
            print(f"{names[0]}:{number}: region {name} differs from {names[1]}")
            status = 1
            if fix:
                lines[first:last] = source
                path.write_bytes("".join(lines).encode())
    return 0 if fix else status


if __name__ == "__main__":
    sys.exit(main(fix=sys.argv[1:] == ["--fix"]))

"""Keep the regions that the standalone scripts share byte-identical.

A region is what stands between the lines `# region NAME` and `# endregion NAME`, indented or not.
The first script that has a region owns it: om2p_mpe.py, om2p_mamujoco.py, baselines, collectors.

    python tools/sync_regions.py          name the copies that differ from their owner, exit with 1
    python tools/sync_regions.py --fix    overwrite them
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("om2p_mpe.py", "om2p_mamujoco.py", "baselines/*.py", "data/collect_*.py")
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
        if marker[1] == "region":
            if name is not None:
                raise ValueError(f"line {k + 1}: region {marker[2]} starts inside region {name}")
            if marker[2] in regions:
                raise ValueError(f"line {k + 1}: region {marker[2]} starts a second time")
            name, first = marker[2], k
        else:
            if marker[2] != name:
                raise ValueError(f"line {k + 1}: endregion {marker[2]}, but {name} is open")
            regions[name], name = (first, k + 1), None
    if name is not None:
        raise ValueError(f"line {first + 1}: region {name} does not end")
    return regions


def first_difference(lines: list[str], owner: list[str]) -> int:
    """Number of leading lines that two different regions have in common."""
    return next(k for k, pair in enumerate(zip(lines, owner, strict=False)) if pair[0] != pair[1])


def main(fix: bool) -> int:
    """Check, or with `fix` repair, all scripts; return the exit status."""
    scripts, problems = {}, []  # path -> (lines, regions)
    for path in (path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))):
        lines = path.read_bytes().decode().splitlines(keepends=True)  # as it is, line ends too
        try:
            scripts[path] = lines, find_regions(lines)
        except ValueError as problem:
            problems.append(f"{path.relative_to(ROOT).as_posix()}: {problem}")
    if problems:  # without its markers a file may lose its regions to another owner
        print("\n".join(problems))
        return 1

    owners, status = {}, 0  # region -> (owner's path, its lines)
    for path, (lines, regions) in scripts.items():
        old = list(lines)
        for name, (first, last) in reversed(regions.items()):  # from below: indices stay valid
            owner, source = owners.setdefault(name, (path, lines[first:last]))
            if lines[first:last] == source:
                continue
            k = first + first_difference(lines[first:last], source)
            print(
                f"{path.relative_to(ROOT).as_posix()}:{k + 1}: region {name} differs from "
                f"{owner.relative_to(ROOT).as_posix()}, here first: {lines[k].strip()!r}"
                f"{'; fixed' if fix else ''}"
            )
            lines[first:last] = source
        if lines != old:
            status = 1
            if fix:
                path.write_bytes("".join(lines).encode())
    return 0 if fix else status


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fix", action="store_true", help="overwrite the copies that differ")
    sys.exit(main(parser.parse_args().fix))

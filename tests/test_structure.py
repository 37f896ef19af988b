"""The tree reads in one direction: no package imports one above it, and the floors are few."""

import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import spinlab
from spinlab.code import imports_of

ROOT = Path(spinlab.__file__).parent
MOST_FLOORS = 13
MOST_LINES = 300


def rooms() -> dict[str, set[str]]:
    """Return what each package or module right below spinlab imports of the others."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(("spinlab", *path.relative_to(ROOT).with_suffix("").parts))
        room = name.removesuffix(".__init__").split(".")[1:2]
        if room:
            others = {
                n.split(".")[1] for n in imports_of(name.removesuffix(".__init__")) if "." in n
            }
            found.setdefault(room[0], set()).update(others - set(room))
    return found


def test_imports_go_one_way_over_few_floors():
    graph = rooms()
    floors: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():  # raises CycleError where it is a circle
        floors[room] = 1 + max((floors[other] for other in graph.get(room, ())), default=0)
    assert {"formats", "stages", "learn", "__main__"} <= floors.keys()
    assert max(floors.values()) <= MOST_FLOORS, sorted(floors.items(), key=lambda item: item[1])


def test_every_module_fits_on_a_few_screens():
    sizes = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")
    }
    assert [path.name for path, lines in sizes.items() if lines > MOST_LINES] == []


def test_every_file_that_is_no_module_is_packed_with_the_package():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]
    packed = {
        path
        for package, names in patterns.items()
        for name in names
        for path in ROOT.parent.joinpath(*package.split(".")).glob(name)
    }
    found = {p for p in ROOT.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert found == packed

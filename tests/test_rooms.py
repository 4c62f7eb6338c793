"""The library keeps its shape: imports go down only, and nothing grows too long to read."""

import ast

import pytest

from lib.records import ROOT

LIB = ROOT / "lib"
FILES = {path.relative_to(LIB).as_posix(): path for path in sorted(LIB.rglob("*.py"))}
CORE = {"taps", "cka", "measure", "records", "intervals", "processes", "plots"}
# What each room may import beside itself.
BELOW = {
    "core": set(),
    "measurements": {"core"},
    "studies": {"core"},
    "findings": {"core", "measurements"},
    "site": {"core", "measurements", "findings", "studies"},
    "__main__": {"core", "measurements", "findings", "studies", "site"},
}


def room(parts):
    """The room of a module, from its dotted name below ``lib``."""
    return "core" if parts[0] in CORE else parts[0]


def imported(tree):
    """What a module imports of the library: lists of the parts of names below ``lib``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1:] for name in names if name.startswith("lib."))


def wrong_way(name, tree):
    """Rooms that a module imports and may not."""
    own = room(name.removesuffix(".py").split("/"))
    return {room(parts) for parts in imported(tree)} - BELOW[own] - {own}


def too_long(tree, most=50):
    """Functions that are longer than they may be, their docstrings not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > most:
                yield f"{node.name}: {lines}"


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__.py"])
def test_imports_go_down_only(name):
    assert not wrong_way(name, ast.parse(FILES[name].read_text("utf-8")))


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_too_long(name):
    text = FILES[name].read_text("utf-8")
    assert len(text.splitlines()) <= 350
    assert not list(too_long(ast.parse(text)))


def test_what_goes_the_wrong_way_or_is_too_long_is_noticed():
    up = ast.parse("from lib.measurements.probes import Probes\nfrom lib import taps")
    assert wrong_way("cka.py", up) == wrong_way("studies/masked.py", up) == {"measurements"}
    assert not wrong_way("findings/places.py", up)
    assert wrong_way("findings/places.py", ast.parse("import lib.site.run")) == {"site"}
    body = "\n".join(["    pass"] * 50)
    assert list(too_long(ast.parse(f"def f():\n{body}"))) == ["f: 51"]
    assert not list(too_long(ast.parse(f'def f():\n    """Two\n    lines."""\n{body[9:]}')))


def test_the_map_names_every_room_and_every_file_of_the_core():
    said = (LIB / "__init__.py").read_text("utf-8")
    rooms = {name.split("/")[0].removesuffix(".py") for name in FILES} - {"__init__", "__main__"}
    assert rooms == CORE | set(BELOW) - {"core", "__main__"}
    for one in rooms:
        assert f"\n    {one} " in said

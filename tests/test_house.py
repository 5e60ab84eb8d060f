"""The storeys of the house (CONTRIBUTING.md): each room imports from those below it alone.

import-linter takes packages, not modules beside one another, as roots.
"""

import ast

import pytest
from conftest import ROOT

STOREYS = [{"tools"}, {"train"}, {"predict", "endpoint"}, {"results"}, {"engine"},
           {"dataset", "sample_data"}, {"data_processing", "parallel"},
           {"model", "radiographs", "release"}, {"metrics", "cli"}]
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}
WINGS = {"radiographs", "results"}
FILES = [path for folder in (".", "tools", *WINGS) for path in ROOT.glob(f"{folder}/*.py")]


def imports_of(path):
    """Names, with dots, of what a file imports from other rooms, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_from_the_storeys_below_it_alone(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imports_of(path):
        other, *inner = name.split(".")
        if other in LEVEL:
            assert LEVEL[other] > LEVEL[room], f"{room} imports {other}, which is not below it"
            assert room != "radiographs", f"radiographs stands alone, but imports {other}"
            assert not (inner and other in WINGS), f"{room} passes the face of {other}: {name}"

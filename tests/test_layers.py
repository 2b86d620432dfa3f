"""The layers of docs/design.md, held against the imports that there are."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in (ROOT / "l2l_fast").rglob("*.py")}
MODULES = {".".join(parts).removesuffix(".__init__"): path for parts, path in FILES.items()}


def imports(module):
    """Modules of ours that a module imports anywhere in it; the compiled one is none."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name != "l2l_fast._C":
                    found.add(name if name in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys() - {module}


def unit(module):
    """What stands in the picture: a file or a folder of the package, or its ``__init__``."""
    return [*module.split("."), "l2l_fast"][1]


def rows():
    (picture,) = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    return [names for line in picture.splitlines() if (names := re.findall(r"\w+", line))]


def level():
    return {name: number for number, names in enumerate(rows()) for name in names}


def test_the_picture_has_everything_once():
    names = [name for row in rows() for name in row]
    assert sorted(names) == sorted({unit(module) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_downwards(module):
    levels = level()
    for other in imports(module):
        within = unit(module) == unit(other)
        assert within or levels[unit(module)] < levels[unit(other)], f"{module} imports {other}"


def test_there_are_no_circles():
    graphlib.TopologicalSorter({module: imports(module) for module in MODULES}).prepare()


def test_an_import_is_seen_wherever_it_stands():
    assert "l2l_fast.ops" in imports("l2l_fast._native")
    assert "l2l_fast.cli.app" in imports("l2l_fast.cli")  # within a function

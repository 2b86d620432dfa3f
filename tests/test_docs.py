"""Every example that a person may copy runs: docstrings, and the README's Python from top to bottom."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import l2l_fast

ROOT = Path(__file__).parent.parent
MODULES = [
    module.name
    for module in pkgutil.walk_packages(l2l_fast.__path__, "l2l_fast.")
    if not module.name.startswith(("l2l_fast.cli", "l2l_fast._C"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failures = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(module, name):
        if "mnist(" in (example.docstring or ""):
            continue  # needs files; tests/data runs it on real ones
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


def test_readme_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    l2l_fast.CoordinatewiseLSTM(hidden_size=4, num_layers=1).save_pretrained("runs/demo/network")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    code = "\n".join(blocks).replace("meta_steps=1000", "meta_steps=2").replace("seeds=10", "seeds=2")
    exec(compile(code, "README.md", "exec"), {})
    assert Path("runs/mine/comparison.png").stat().st_size > 5000


@pytest.mark.mnist
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(path):
    command = [sys.executable, path, "--steps", "60", "--seeds", "2", "--activation", "relu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(.*?)  +[\d.]+ +([\d.]+)% +[\d.]+$", done.stdout, re.MULTILINE))
    assert len(rows) == 8
    assert float(rows["l2l-base-v1"]) > 70


def test_readme_names_only_commands_that_exist():
    from l2l_fast.cli.app import app

    known = {command.name for command in app.registered_commands}
    used = set(re.findall(r"^\s*l2l-fast ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= known


def test_the_recipe_of_the_docs_is_one(tmp_path):
    from l2l_fast.cli.training import prepare, read_recipe, stages

    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    (tmp_path / "my.json").write_text(block)
    parts = stages(read_recipe(str(tmp_path / "my.json")))
    assert len(parts) == 2
    for part in parts:
        network, tasks, training = prepare(part, "digits", 0)
        l2l_fast.MetaTrainer(network, tasks, progress=False, **training)


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "csrc" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
DOCUMENTS += [*sorted(ROOT.glob("l2l_fast/weights/*/README.md")), *sorted(ROOT.glob("bench/results/*/notes.md"))]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@each_document
def test_no_sentence_stands_twice(path):
    """As a merge leaves it: a long line, or the end of one, again within the next two."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    for number, line in enumerate(lines, 1):
        after = lines[number : number + 2]
        twice = len(line) > 40 and not line.startswith("|") and any(later.endswith(line[-40:]) for later in after)
        assert not twice, f"line {number} again: {line}"


@each_document
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```|^ {4}.*?$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)  # without code
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if "://" in target or "[" in target:  # elsewhere, or mathematics
            continue
        document = (path.parent / place).resolve() if place else path
        assert document.exists(), f"{target}: no such file"
        if anchor and document.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
            found = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in found, f"{target}: no such heading among {found}"

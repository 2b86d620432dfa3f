"""Every example that a person may copy runs: docstrings, and the README's Python from top to bottom."""

import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def run_example(name, *arguments, folder=None):
    """What an example prints."""
    command = [sys.executable, ROOT / "examples" / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.mnist
def test_the_example_of_mnist_runs():
    printed = run_example("mnist_accuracy.py", "--steps", "60", "--seeds", "2", "--activation", "relu")
    rows = dict(re.findall(r"^(.*?)  +[\d.]+ +([\d.]+)% +[\d.]+$", printed, re.MULTILINE))
    assert len(rows) == 8
    assert float(rows["l2l-base-v1"]) > 70


def test_the_example_of_a_loop_runs():
    printed = run_example("own_loop.py", "--steps", "100")
    right = dict(re.findall(r"^(\S+) .* ([\d.]+)%$", printed, re.MULTILINE))
    assert right.keys() == {"l2l-base", "AdamW"}
    assert min(map(float, right.values())) > 70


def test_the_example_of_meta_training_runs(tmp_path):
    text = (ROOT / "examples" / "meta_train_your_own.py").read_text()
    for constant, value in {"META_STEPS": 2, "HORIZON": 10, "SEEDS": 2}.items():
        text, found = re.subn(rf"^{constant} = \d+", f"{constant} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    (tmp_path / "example.py").write_text(text)
    assert "LSTM against the best tuned baselines" in run_example(tmp_path / "example.py", folder=tmp_path)
    model = torch.nn.Linear(3, 2)
    l2l_fast.LSTMOptimizer(model.parameters(), tmp_path / "runs" / "own" / "network")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_the_example_of_fsdp2_runs_and_resumes(tmp_path):
    def run(folder, steps):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, ROOT / "examples" / "fsdp2.py", "--folder", tmp_path / folder, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return re.findall(r"^step \d+ loss [\d.]+$", done.stdout, re.MULTILINE)

    unbroken = run("unbroken", 6)
    assert len(unbroken) == 6
    assert run("resumed", 4) + run("resumed", 6) == unbroken


@pytest.mark.slow
def test_the_example_of_hugging_faces_trainer_runs_and_resumes(tmp_path):
    pytest.importorskip("transformers", reason="pip install l2l_fast[frameworks]")
    pytest.importorskip("accelerate", reason="pip install l2l_fast[frameworks]")
    arguments = ["--steps", "20", "--out", str(tmp_path)]
    first, last = _first_and_last(run_example("hf_trainer.py", *arguments))
    assert last < first
    shutil.rmtree(tmp_path / "checkpoint-20")  # as if it had been stopped after step 10
    assert _first_and_last(run_example("hf_trainer.py", *arguments, "--resume")) == [first, last]


@pytest.mark.slow
def test_the_example_of_lightning_runs(tmp_path):
    pytest.importorskip("lightning", reason="pip install l2l_fast[frameworks]")
    first, last = _first_and_last(run_example("lightning_module.py", "--epochs", "2", folder=tmp_path))
    assert last < 0.7 * first


def _first_and_last(printed):
    (found,) = re.findall(r"^loss ([\d.]+) at the first step, ([\d.]+) at the last", printed, re.MULTILINE)
    return [float(loss) for loss in found]


def test_every_example_is_in_the_readme_and_short():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"(examples/{path.name})" in readme
        assert len(path.read_text().splitlines()) < 70


def test_readme_names_only_commands_that_exist():
    from l2l_fast.cli.app import app

    known = {command.name for command in app.registered_commands}
    used = set(re.findall(r"^\s*l2l-fast ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= known


def test_the_recipe_of_the_docs_is_one(tmp_path):
    from l2l_fast.meta.recipes import prepare, read, stages

    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    (tmp_path / "my.json").write_text(block)
    parts = stages(read(str(tmp_path / "my.json")))
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

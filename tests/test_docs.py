"""Every example that a person may copy runs: docstrings, and the Python of every page; the commands exist."""

import doctest
import functools
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import typer

import l2l_fast
from l2l_fast.cli.app import app

ROOT = Path(__file__).parent.parent
MODULES = [
    module.name
    for module in pkgutil.walk_packages(l2l_fast.__path__, "l2l_fast.")
    if not module.name.startswith(("l2l_fast.cli", "l2l_fast._C"))
]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "csrc" / "README.md",
    ROOT / "bench" / "ladder" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("l2l_fast/weights/*/README.md"))]
DOCUMENTS += sorted(ROOT.glob("bench/results/*/notes.md"))


def name_of(path):
    return str(path.relative_to(ROOT))


each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failures = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(module, name):
        if "mnist(" in (example.docstring or ""):
            continue  # needs files; tests/data runs it on real ones
        if "l2l_fast.studies" in (example.docstring or "") and importlib.util.find_spec("optuna") is None:
            continue  # pip install l2l_fast[sweep]
        runner.run(example, out=failures.append)
    assert not failures, "".join(failures)


def blocks_of(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [page for page in PAGES if blocks_of(page)], ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks_of(path))
    for module in re.findall(r"^import (accelerate|lightning|transformers)$", code, re.MULTILINE):
        pytest.importorskip(module, reason="pip install l2l_fast[frameworks]")
    shorter = re.sub(r"\bmeta_steps=\d+", "meta_steps=2", re.sub(r"\bseeds=10\b", "seeds=2", code))
    exec(compile(shorter, path.name, "exec"), {"__name__": "__page__"})
    for picture in re.findall(r'\.plot\("(.*?)"\)', code):
        assert Path(picture).stat().st_size > 5000


def test_the_pages_have_python():
    assert len(blocks_of(ROOT / "README.md")) >= 2
    assert len([page for page in PAGES if blocks_of(page)]) >= 6


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


def test_the_example_of_the_proposal_trains_all_three(tmp_path):
    text = (ROOT / "examples" / "proposal_online.py").read_text()
    few = 'FIRST, SECOND = 2, {"backpropagation": 2, "pes": 2}'
    text, found = re.subn(r"^FIRST, SECOND = \d+, {.*}", few, text, flags=re.MULTILINE)
    assert found == 1
    (tmp_path / "example.py").write_text(text)
    for kind, *stage in (("", "mlp"), ("", "pair"), ("", "alone"), ("-pes", "pair", "--gradient", "pes")):
        assert f"quadratic{kind} {stage[0]}: validations" in run_example(
            tmp_path / "example.py", "quadratic", *stage, "--out", "runs", folder=tmp_path
        )
    first, alone = (l2l_fast.CoordinatewiseMLP.from_pretrained(tmp_path / "runs" / name)
                    for name in ("mlp-quadratic-start", "mlp-quadratic"))  # fmt: skip
    assert first.options == alone.options
    for name in ("online-quadratic", "online-quadratic-pes"):
        assert l2l_fast.AdaptiveMLP.from_pretrained(tmp_path / "runs" / name).mlp.options == first.options


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


def test_the_recipe_of_the_docs_is_one(tmp_path):
    from l2l_fast.meta.recipes import prepare, read, stages

    (block,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    (tmp_path / "my.json").write_text(block)
    parts = stages(read(str(tmp_path / "my.json")))
    assert len(parts) == 2
    for part in parts:
        network, tasks, training = prepare(part, "digits", 0)
        l2l_fast.MetaTrainer(network, tasks, progress=False, **training)


# ---------------------------------------------------------------- commands


def lines_of_shell(text):
    """Commands in a document: lines of blocks that are of no other language, and what stands in the text as code."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    fenced = [block for language, block in blocks if language in ("", "sh")]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4}(.*)$", rest, re.MULTILINE)
    inline = [" ".join(part.split()) for part in re.findall(r"(?<!`)`([^`]+)`(?!`)", rest)]
    text = "\n".join([*fenced, *indented, *inline]).replace("\\\n", " ")
    for line in text.splitlines():
        for command in re.split(r"&&|;|\|| do ", line.partition(" #")[0]):
            yield re.sub(r"\$\(.*?\)", "X", command).strip()


def options_of(words):
    return [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]


COMMANDS = {
    name: [option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)]
    for name, command in typer.main.get_command(app).commands.items()
}


def check_l2l_fast(name=None, *rest):
    """That the command exists and has these options."""
    if name in ("--version", "--help"):
        return
    assert name is None or name in COMMANDS, f"l2l-fast has no command {name}"
    assert {*options_of(rest)} <= {*COMMANDS.get(name, [])}, f"l2l-fast {name} lacks one of {options_of(rest)}"


def check_make(*words):
    folder, words = (words[1], words[2:]) if words[:1] == ("-C",) else (".", words)
    text = (ROOT / folder / "Makefile").read_text()
    for word in words:
        variable = word.partition("=")[0] if "=" in word else None
        assert re.search(rf"^{variable} *\?=" if variable else rf"^{re.escape(word)}:", text, re.MULTILINE), word


def check_python(*words):
    """That the file exists and has these options; of pytest, that its files do."""
    if words[0] == "-m":
        files = [word.partition("::")[0] for word in words[2:] if "/" in word and "=" not in word]
        assert all((ROOT / file).exists() for file in files), words
        return
    text = (ROOT / words[0]).read_text()
    for option in options_of(words[1:]):
        assert f'"{option}"' in text or words[0] == "setup.py", f"{words[0]} has no option {option}"


def check_pip(*words):
    for extras in re.findall(r"\[([a-z,]+)\]", " ".join(words)):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert {*extras.split(",")} <= known.keys(), extras


def check_file(path, *rest):
    path = ROOT / path.partition("::")[0]
    assert path.exists(), path
    assert not rest or os.access(path, os.X_OK), f"{path} cannot be run"
    assert all(option in path.read_text() for option in options_of(rest)), rest


CHECKS = {"l2l-fast": check_l2l_fast, "make": check_make, "python": check_python, "pip": check_pip}


@each_document
def test_commands_and_their_options_exist(path):
    for line in lines_of_shell(path.read_text()):
        if not re.match(r"(?:[A-Z_0-9]+=\S* )*(?:l2l-fast|make|python|pip)( |$)|(csrc|bench|tests)/\S+\.(sh|py)", line):
            continue
        if "NAME" in line:  # of a file that a reader is to write
            continue
        words = [word for word in shlex.split(line) if not re.match(r"[A-Z_0-9]+=", word) or line.startswith("make")]
        CHECKS.get(words[0], functools.partial(check_file, words[0]))(*words[1:])


def test_the_readme_has_commands():
    lines = [*lines_of_shell((ROOT / "README.md").read_text())]
    assert {line.split()[0] for line in lines if line} >= {"l2l-fast", "make", "pip"}


# ---------------------------------------------------------------- prose


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

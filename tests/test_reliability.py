"""docs/reliability.md and the tests in step, and the bad days that no other file of tests has."""

import ast
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import l2l_fast as l2l
from l2l_fast.evaluate import plot_curves, tune

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"
X = torch.linspace(-1, 1, 20).unsqueeze(1)


def network():
    torch.manual_seed(0)
    return l2l.CoordinatewiseLSTM("moments", 3, 1)


# ---------------------------------------------------------------- the page


def rows():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if row[0] != "what" and set(row[0]) != {"-"}]


@functools.cache
def functions_in(path):
    """Functions by name, and the file's text."""
    text = (TESTS / path).read_text(encoding="utf-8")
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}, text


def test_there_are_rows_enough_and_none_twice():
    assert len(rows()) >= 80
    assert all(len(row) == 3 and all(row) for row in rows())
    assert len({row[0] for row in rows()}) == len(rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_is_held_by_tests_that_exist(row):
    named = re.findall(r"`([^`]+)`", row[2])
    assert named
    assert ", ".join(f"`{name}`" for name in named) == row[2]
    for name in named:
        path, test, case = re.fullmatch(r"([\w/]+\.py)::(test_\w+)(?:\[(.+)\])?", name).groups()
        functions, text = functions_in(path)
        assert test in functions, name
        assert case is None or f'"{case}"' in text, name


# ---------------------------------------------------------------- values of another kind


def module_task(**options):
    return l2l.tasks.ModuleTask(
        **{"make_module": lambda: nn.Linear(1, 1), "data": (X, X), "loss_fn": F.mse_loss} | options
    )


def compare(task="quadratic", **options):
    return l2l.compare(task, network(), **{"horizon": 2, "seeds": 2} | options)


def trainer(**options):
    return l2l.MetaTrainer(network(), "quadratic", progress=False, **options)


ANOTHER_KIND = [
    (lambda: compare(horizon=2.5), "horizon must be an int of at least 1, got 2.5"),
    (lambda: compare(horizon="5"), "horizon must be an int of at least 1, got '5'"),
    (lambda: compare(seeds=2.5), "seeds must be an int of at least 1, got 2.5"),
    (lambda: compare(seed=1.5), "seed must be an int from 0 to 9999, got 1.5"),
    (lambda: compare(task=5), "task must be a task or the name of one, got 5"),
    (lambda: compare(baselines=5), "baselines must be a sequence of names, got 5"),
    (lambda: compare(device="tpu9"), "device must be one that this torch can use, got 'tpu9' ("),
    (lambda: tune(l2l.tasks.Quadratic(), "adam", horizon=2.5), "horizon must be an int of at least 1, got 2.5"),
    (lambda: tune(l2l.tasks.Quadratic(), "adam", device="tpu9"), "device must be one that this torch can use"),
    (lambda: l2l.tasks.get(5), "there is no task 5. Known: quadratic"),
    (lambda: l2l.tasks.Quadratic(2.5), "dimension must be an int of at least 1, got 2.5"),
    (lambda: l2l.tasks.Quadratic("3"), "dimension must be an int of at least 1, got '3'"),
    (lambda: l2l.tasks.Quadratic(start_scale=math.nan), "start_scale must be a number of at least 0, got nan"),
    (lambda: l2l.tasks.Classifier("digits", 20), "hidden must be a sequence of widths, got 20"),
    (lambda: l2l.tasks.Classifier("digits", (2.5,)), "hidden must be an int of at least 1, got 2.5"),
    (lambda: l2l.tasks.Classifier("digits", batch_size=1.5), "batch_size must be an int of at least 1, got 1.5"),
    (lambda: l2l.tasks.Classifier("digits", pool=True), "pool must be an int of at least 1, got True"),
    (lambda: l2l.tasks.MetaTraining(hidden=2.5), "hidden must be an int of at least 1, got 2.5"),
    (lambda: l2l.tasks.MetaTraining(unroll="3"), "unroll must be an int of at least 1, got '3'"),
    (lambda: l2l.tasks.MetaTraining(output_scale=None), "output_scale must be a positive number, got None"),
    (lambda: module_task(batch_size=1.5), "batch_size must be an int of at least 1, got 1.5"),
    (lambda: module_task(make_module=None), "make_module must be a function that makes a module, got None"),
    (
        lambda: module_task(loss_fn="mse"),
        "loss_fn must be a function of the module's output and the targets",
    ),
    (lambda: l2l.CoordinatewiseLSTM(["both"]), "features must be one of 'identity', "),
    (lambda: l2l.CoordinatewiseLSTM(output=3), "output must be one of 'linear', 'tanh', got 3"),
    (lambda: l2l.CoordinatewiseLSTM(betas=0.9), "betas must be two numbers in [0, 1), got 0.9"),
    (lambda: l2l.CoordinatewiseLSTM(betas=("a", "b")), "betas must be two numbers in [0, 1), got ('a', 'b')"),
    (lambda: l2l.CoordinatewiseLSTM(output_scale="a"), "output_scale must be a positive number, got 'a'"),
    (lambda: l2l.CoordinatewiseLSTM(eps=math.nan), "eps must be a positive number, got nan"),
    (lambda: l2l.CoordinatewiseLSTM(preprocess_p=None), "preprocess_p must be a number in (0, 80], got None"),
    (lambda: network().load_flat_weights_("a"), "flat must be a tensor [88], got 'a'"),
    (lambda: trainer(device="tpu9"), "device must be one that this torch can use, got 'tpu9'"),
    (lambda: trainer(checkpoint=5), "checkpoint must be a folder or None, got 5"),
    (lambda: trainer(teacher="adam"), "teacher must be a function that makes an optimizer, or None, got 'adam'"),
    (
        lambda: trainer(meta_optimizer=lambda params: None),
        "meta_optimizer must be a function that makes a torch.",
    ),
    (lambda: trainer().fit(1, on_step=5), "on_step must be a function of the meta-step, or None, got 5"),
]


@pytest.mark.parametrize(("call", "message"), ANOTHER_KIND, ids=[message[:60] for _, message in ANOTHER_KIND])
def test_values_of_another_kind_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("name", [3, b"l2l-base", None])
def test_a_network_is_named_by_text_or_a_path(name):
    with pytest.raises(TypeError, match="name_or_folder must be a name or a path, got"):
        l2l.CoordinatewiseLSTM.from_pretrained(name)


def test_whole_numbers_of_numpy_are_whole_numbers():
    import numpy as np

    found = compare(horizon=np.int64(2), seeds=np.int32(2), baselines=["sgd"], tuning_seeds=np.int64(1))
    assert found.horizon == 2
    assert l2l.tasks.Classifier("digits", np.array([3, 4])).hidden == (3, 4)


# ---------------------------------------------------------------- files


def test_a_network_is_not_saved_over_a_file(tmp_path):
    (tmp_path / "mine").write_text("of mine")
    with pytest.raises(OSError, match=r"File exists: .*mine"):
        network().save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "of mine"


def test_a_checkpoint_folder_that_is_removed_is_made_again(tmp_path):
    options = {"instances": 2, "unroll": 4, "horizon": 8, "checkpoint_every": 2}

    def remove(step):
        if step == 3:
            shutil.rmtree(tmp_path / "checkpoint")

    trainer(checkpoint=tmp_path / "checkpoint", **options).fit(6, on_step=remove)
    found = trainer(checkpoint=tmp_path / "checkpoint", **options).fit(8)
    assert found.meta_losses == trainer(**options).fit(8).meta_losses


@pytest.mark.parametrize("text", ["", "no JSON", "[]", '{"task": "quadratic"}', '{"optimizers": {"a": {}}}'])
def test_a_file_that_is_no_comparison_is_refused(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ValueError, match=r"comparison\.json is not what Comparison\.to_json writes: .*; compare again"):
        l2l.Comparison.from_json(tmp_path / "comparison.json")


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        plot_curves({"a": torch.rand(3)}, tmp_path / "a.xyz", "title")
    assert list(tmp_path.iterdir()) == []
    plot_curves({"a": torch.rand(3)}, tmp_path / "a.png", "title")
    before = (tmp_path / "a.png").read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device, so it stays as it was before"):
            plot_curves({"b": torch.rand(3)}, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# ---------------------------------------------------------------- threads and forks


def steps(number):
    param = nn.Parameter(torch.linspace(-1, 1, 3000) * number)
    optimizer = l2l.LSTMOptimizer([param], network="l2l-small")
    for _ in range(20):
        param.grad = param.detach() ** 3
        optimizer.step()
    return param.tolist()


def meta_steps(number):
    learner = l2l.CoordinatewiseLSTM.from_pretrained("l2l-small")
    options = {"instances": 2, "unroll": 4, "horizon": 8, "seed": number, "progress": False}
    history = l2l.MetaTrainer(learner, "quadratic", **options).fit(5)
    return repr(history), learner.flat_weights().tolist()


def module_starts(number):
    task = module_task()
    return [task.init(torch.Generator().manual_seed(seed + number))["weight"].item() for seed in range(20)]


@pytest.mark.parametrize("work", [steps, meta_steps, module_starts])
def test_threads_do_not_meet(work):
    alone, together, failed = {number: work(number) for number in range(1, 6)}, {}, []

    def run(number):
        try:
            together[number] = work(number)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert together == alone


_FORK = """
import os, signal, sys, torch, l2l_fast as l2l
sys.path.insert(0, sys.argv[1])
from test_reliability import meta_steps, steps
torch.set_num_threads(2)  # as in most programs, whose pool the child does not have
expected = steps(1), meta_steps(1)
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    os._exit(0 if (steps(1), meta_steps(1)) == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_steps_on():
    done = subprocess.run([sys.executable, "-c", _FORK, TESTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

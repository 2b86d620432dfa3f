"""Meta-training on a GPU: captured in CUDA graphs it is what it is eagerly. tests/meta has the same without a GPU."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from l2l_fast import CoordinatewiseLSTM, MetaTrainer
from l2l_fast.meta import LogUniform
from l2l_fast.meta.graphs import CudaCapture, Graphs
from l2l_fast.tasks import Quadratic

pytestmark = pytest.mark.cuda

TASKS = {"quadratic": 128, "digits-mlp": 1}


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """torch's deterministic algorithms would ask cuBLAS for a setting made before it starts."""
    torch.use_deterministic_algorithms(False)


def make_trainer(task, features="both", **options):
    torch.manual_seed(0)
    defaults = {"instances": TASKS.get(task, 2), "horizon": 50, "validate_every": 10, "validation_instances": 4}
    network = CoordinatewiseLSTM(features, 20, 2)
    return MetaTrainer(network, task, device="cuda", progress=False, **defaults | options)


def assert_same_run(graphs, eager):
    for name in ("meta_losses", "validations", "best_score"):
        found, expected = (torch.tensor(getattr(trainer.history, name)) for trainer in (graphs, eager))
        assert_close(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert graphs.history.skipped == eager.history.skipped
    assert_close(graphs.weights.current, eager.weights.current, rtol=1e-3, atol=1e-5)


OPTIONS = {
    "plain": {},
    "clipped at the horizon's end": {"unroll": 20, "horizon": 50, "clip": 0.1, "schedule": "cosine"},
    "scaled, parallel, random": {"unroll": 5, "parallel": 2, "scaling": 1.0, "horizon": LogUniform(5, 20)},
    "log": {"objective": "log", "lr": 0.5, "weight_decay": 0.1},
    "relative": {"objective": "relative", "clip": None},
    "sgd": {"meta_optimizer": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9)},
    "windows": {"clip_windows": 0.1, "parallel": 2},
    "some coordinates": {"coordinates": 50, "unroll": 10},
    "led": {"imitation": 0.5, "parallel": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("task", TASKS)
def test_captured_meta_training_is_the_eager_one(task, name):
    graphs, eager = make_trainer(task, **OPTIONS[name]), make_trainer(task, graphs=False, **OPTIONS[name])
    graphs.fit(30)
    eager.fit(30)
    assert graphs.graphs.captured
    assert not eager.graphs.captured
    assert_same_run(graphs, eager)


@pytest.mark.parametrize("task", TASKS)
def test_a_meta_step_waits_for_the_device_once(task):
    trainer = make_trainer(task, horizon=40, unroll=20, scaling=0.5, schedule="cosine", validate_every=1000)
    trainer.fit(12)  # captured by now
    launch, ahead = trainer.launch, trainer.streams.draw_ahead

    def watched(work):
        def run(*arguments):
            try:
                torch.cuda.set_sync_debug_mode("error")
                work(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    trainer.launch, trainer.streams.draw_ahead = watched(launch), watched(ahead)
    for _ in range(6):  # new trajectories among them
        trainer.step()


def test_nothing_is_allocated_from_step_to_step():
    trainer = make_trainer("quadratic", horizon=40, validate_every=1000)
    trainer.fit(30)
    before = torch.cuda.memory_reserved()
    for _ in range(50):
        trainer.step()
    assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize("task", TASKS)
def test_a_run_resumed_between_validations_is_captured_anew(task, tmp_path):
    options = {"unroll": 10, "horizon": 25, "validate_every": 5}
    make_trainer(task, checkpoint=tmp_path, **options).fit(17)
    resumed, unbroken = make_trainer(task, checkpoint=tmp_path, **options), make_trainer(task, **options)
    resumed.fit(40)
    unbroken.fit(17)  # which validates at its end, as the first run did
    unbroken.fit(40)
    assert_same_run(resumed, unbroken)
    unbroken.fit(60)  # and one that goes on in the same process
    resumed.fit(60)
    assert_same_run(resumed, unbroken)


def test_a_checkpoint_of_the_cpu_goes_on_on_the_gpu(tmp_path):
    def make(device):
        torch.manual_seed(0)
        options = {"instances": 4, "horizon": 50, "validation_instances": 2, "checkpoint": tmp_path}
        return MetaTrainer(CoordinatewiseLSTM("moments", 4, 1), "quadratic", device=device, progress=False, **options)

    make("cpu").fit(6)
    on_gpu = make("cuda")
    on_gpu.fit(20)
    assert on_gpu.graphs.captured
    on_cpu = make("cpu")
    assert len(on_cpu.fit(24).meta_losses) == 24


def test_diverged_meta_steps_are_skipped_on_the_device():
    class Cliff(Quadratic):
        def loss(self, params, batch):
            return torch.where(batch[1][0] > 1.0, float("nan"), super().loss(params, batch))

    graphs, eager = (make_trainer(Cliff(3), validate_every=1000, graphs=graphs) for graphs in (None, False))
    graphs.fit(40)
    eager.fit(40)
    assert 0 < graphs.history.skipped < 40
    assert_same_run(graphs, eager)


_WAITS = """
import torch
from l2l_fast import CoordinatewiseLSTM, MetaTrainer
from l2l_fast.tasks import Quadratic

class Waits(Quadratic):
    def loss(self, params, batch):
        torch.cuda.current_stream().synchronize()  # as .item() would, which torch.vmap refuses before
        return super().loss(params, batch)

here, options = torch.cuda.current_stream(), {"device": "cuda", "progress": False}
MetaTrainer(CoordinatewiseLSTM(), Waits(3), graphs=False, **options).fit(4)
try:
    MetaTrainer(CoordinatewiseLSTM(), Waits(3), **options).fit(10)
except RuntimeError as error:
    assert torch.cuda.current_stream() == here
    print(error)
"""


def test_a_task_that_waits_for_the_device_is_told_so():
    """In a process of its own: what a broken capture leaves behind is torch's affair."""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", _WAITS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "MetaTrainer(graphs=False) runs it eagerly" in run.stdout


def test_graphs_share_memory_and_keep_their_results_apart():
    graphs, device = Graphs(CudaCapture(torch.device("cuda"))), torch.device("cuda")
    x = torch.zeros(1000, device=device)
    results = [torch.zeros(1000, device=device) for _ in range(3)]

    def work(index):
        results[index].copy_((x + index).square().sqrt())

    for number in range(6):
        x.fill_(float(number))
        for index in range(3):
            graphs(index, lambda: work(index))  # noqa: B023
        for index, result in enumerate(results):
            assert (result == number + index).all()
    assert graphs.captured == 3

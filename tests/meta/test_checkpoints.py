"""The checkpoint of a run: refused for its real reason when it cannot be gone on from, and whole at every moment."""

import errno
import functools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import l2l_fast as l2l
from l2l_fast import files
from l2l_fast.meta import Horizon, LogUniform, MetaTrainer, checkpoints
from l2l_fast.meta.identity import describe_optimizer, differences

SMALL = {"instances": 2, "unroll": 5, "horizon": 10, "validate_every": 4, "validation_instances": 1, "progress": False}


def make_trainer(folder=None, **options):
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("moments", 3, 1)
    return MetaTrainer(network, "quadratic", checkpoint=folder, **SMALL | options)


def losses(steps, folder=None, **options):
    """What a run has seen by then; between, it may have stopped and been taken up again."""
    return make_trainer(folder, **options).fit(steps).meta_losses


def state_of(trainer):
    """Everything that a refusal must not change."""
    found = [trainer.meta_step, trainer.streams.started, repr(trainer.history), list(trainer.streams.running)]
    return [*found, trainer.network.flat_weights().tolist(), repr(trainer.meta_optimizer.state_dict())]


# ---------------------------------------------------------------- other options


class Slow(torch.optim.SGD):
    """An option that no param group shows."""

    def __init__(self, params, factor):
        super().__init__(params, lr=0.1)
        self.factor = factor

    def step(self):
        for group in self.param_groups:
            group["lr"] = 0.1 * self.factor
        super().step()


def hidden(rate):
    """Optimizers of one class and without options, whose rule only their steps show."""

    class Rule(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for param in self.param_groups[0]["params"]:
                param.sub_(rate * param.grad)

    return Rule


class Every(Horizon):
    """A curriculum that does not write itself out."""

    def __init__(self, steps, share):
        super().__init__(steps)
        self.share = share


class Drawing(Horizon):
    def __init__(self, steps, draw):
        super().__init__(steps)
        self._draw = draw

    def draw(self, rng, progress):
        return self._draw(progress)


def sgd(**options):
    return lambda params: torch.optim.SGD(params, **options)


LED = {"imitation": 0.5}
CHANGES = {
    "meta_optimizer's rate": (
        {"meta_optimizer": sgd(lr=0.1)}, {"meta_optimizer": sgd(lr=1e-3, momentum=0.9)},
        r"meta_optimizer\.lr=0\.1 \(now 0\.001\), meta_optimizer\.momentum=0 \(now 0\.9\)",
    ),
    "meta_optimizer's attribute": (
        {"meta_optimizer": lambda params: Slow(params, 1.0)}, {"meta_optimizer": lambda params: Slow(params, 0.5)},
        r"meta_optimizer\.factor=1\.0 \(now 0\.5\)",
    ),
    "meta_optimizer's code": (
        {"meta_optimizer": hidden(0.1)}, {"meta_optimizer": hidden(0.2)}, r"meta_optimizer\.first_steps=-?\d",
    ),
    "meta_optimizer's kind": (
        {"meta_optimizer": "soap"}, {"meta_optimizer": sgd(lr=0.1)}, r"meta_optimizer='soap' \(now 'SGD'\)",
    ),
    "a second group": (
        {"meta_optimizer": sgd(lr=0.1)},
        {"meta_optimizer": lambda params: torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)},
        r"meta_optimizer\.group 1\.lr=None \(now 0\.1\)",
    ),
    "teacher's class": (
        LED | {"teacher": functools.partial(torch.optim.Adam, lr=0.01)}, LED | {"teacher": sgd(lr=0.01, momentum=0.9)},
        r"teacher\.class='Adam' \(now 'SGD'\)",
    ),
    "teacher's rate": (LED, LED | {"teacher": functools.partial(torch.optim.Adam, lr=0.02)}, r"teacher\.lr=0\.01"),
    "teacher's code": (LED | {"teacher": hidden(0.1)}, LED | {"teacher": hidden(0.2)}, r"teacher\.first_steps=-?\d"),
    "horizon": ({"horizon": LogUniform(2, 10)}, {"horizon": LogUniform(3, 10)}, r"horizon\.name='LogUniform\(2, 10"),
    "horizon's attribute": ({"horizon": Every(9, 1)}, {"horizon": Every(9, 2)}, r"horizon\.share=1 \(now 2\)"),
    "horizon's code": (
        {"horizon": Drawing(9, lambda progress: 7)}, {"horizon": Drawing(9, lambda progress: 8)},
        r"horizon\.first_lengths='\[7, 7, 7\]' \(now '\[8, 8, 8\]'\)",
    ),
    "clip": ({"clip": 1.0}, {"clip": 2.0}, r"clip=1\.0 \(now 2\.0\)"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_options_are_refused_and_the_same_go_on(tmp_path, change):
    before, after, message = CHANGES[change]
    make_trainer(tmp_path, **before).fit(3)
    saved, other = (tmp_path / "trainer.pt").read_bytes(), make_trainer(tmp_path, **after)
    untouched = state_of(other)
    with pytest.raises(ValueError, match=f"belongs to a run with .*{message}") as caught:
        other.fit(5)
    assert "\n" not in str(caught.value)
    assert state_of(other) == untouched
    assert (tmp_path / "trainer.pt").read_bytes() == saved
    assert losses(5, tmp_path, **before) == losses(5, **before)


def test_frozen_parameters_are_part_of_a_run(tmp_path):
    make_trainer(tmp_path).fit(2)
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("moments", 3, 1)
    network.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen=\[\] \(now \['head.weight', 'head.bias'\]\)"):
        MetaTrainer(network, "quadratic", checkpoint=tmp_path, **SMALL).fit(3)


def test_what_does_not_decide_a_number_may_change(tmp_path):
    options = LED | {"teacher": functools.partial(torch.optim.Adam, lr=0.01, foreach=False)}
    make_trainer(tmp_path, **LED).fit(3)
    more = {"checkpoint_every": 1, "log_dir": tmp_path / "logs", "graphs": False}
    assert losses(5, tmp_path, **options, **more) == losses(5, **LED)


def test_an_optimizer_is_described_without_a_trace():
    parameters = [torch.ones(2, 3), torch.ones((), dtype=torch.float64)]
    random, before = torch.random.get_rng_state(), [parameter.clone() for parameter in parameters]
    rate = torch.tensor(0.1)
    one, two = (
        describe_optimizer(lambda params, lr=lr: torch.optim.SGD(params, lr=lr, weight_decay=0.1), parameters)
        for lr in (0.1, rate)
    )
    assert not differences(one, two)  # 0.1 in float32 is not 0.1, but a rate is a rate
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(map(torch.equal, parameters, before))
    assert all(parameter.grad is None for parameter in parameters)


# ---------------------------------------------------------------- of an earlier version


def test_a_checkpoint_of_an_earlier_version_goes_on_with_the_same_numbers(tmp_path):
    """Saved by the code of format 3's first day, after 6 meta-steps; beside it, what that code made of 4 more."""
    folder = pathlib.Path(__file__).parent / "data"
    shutil.copy(folder / "checkpoint.pt", tmp_path / "trainer.pt")
    expected = json.loads((folder / "checkpoint.json").read_text())
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("moments", 2, 1)
    trainer = MetaTrainer(
        network, l2l.tasks.Quadratic(2), unroll=3, horizon=LogUniform(2, 9), instances=1, parallel=2, scaling=0.5,
        objective="relative", imitation=0.5, schedule="cosine", average=0.5, loss_weights=[0.1, 1, 1],
        validate_every=4, validation_instances=1, progress=False, checkpoint=tmp_path,
    )  # fmt: skip
    history = trainer.fit(10)
    assert history.meta_losses == pytest.approx(expected["meta_losses"], rel=1e-4)
    assert [score for _, score in history.validations] == pytest.approx(
        [score for _, score in expected["validations"]], rel=1e-4
    )
    torch.testing.assert_close(trainer.weights.current, torch.tensor(expected["weights"]), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- wrong files


def damage(folder, change):
    path = folder / "trainer.pt"
    if isinstance(change, bytes):
        path.write_bytes(change)
        return
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


WRONG = {
    "foreign": (b"not a checkpoint", "is not a checkpoint of MetaTrainer"),
    "empty": (b"", "is not a checkpoint of MetaTrainer"),
    "of an earlier format": (lambda saved: saved.update(format_version=2), "has format 2, this l2l_fast reads 3: give"),
    "of a later format": (lambda saved: saved.update(format_version=4), "has format 4, this l2l_fast reads 3: give"),
    "another program's": (lambda saved: saved.clear(), "is not a checkpoint of MetaTrainer .*format_version"),
    "without a part": (lambda saved: saved.pop("started"), r"is damaged \(KeyError: 'started'\)"),
    "without a stream": (lambda saved: saved.update(streams=[]), r"is damaged \(IndexError"),
    "with other weights": (lambda saved: saved.update(best=torch.zeros(3)), r"is damaged \(RuntimeError"),
    "with another trajectory": (
        lambda saved: saved["streams"][0][0]["trajectory"].update(theta=torch.zeros(7)), r"is damaged \(RuntimeError",
    ),
    "with another optimizer": (
        lambda saved: saved["meta_optimizer"]["param_groups"].clear(), r"is damaged \(ValueError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_is_refused_by_name_and_nothing_is_changed(tmp_path, wrong):
    change, message = WRONG[wrong]
    make_trainer(tmp_path).fit(3)
    damage(tmp_path, change)
    contents, trainer = (tmp_path / "trainer.pt").read_bytes(), make_trainer(tmp_path)
    untouched = state_of(trainer)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{message}"):
        trainer.fit(5)
    assert state_of(trainer) == untouched
    assert (tmp_path / "trainer.pt").read_bytes() == contents


def test_a_truncated_file_is_refused(tmp_path):
    make_trainer(tmp_path).fit(3)
    whole = (tmp_path / "trainer.pt").read_bytes()
    for kept in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "trainer.pt").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="is not a checkpoint of MetaTrainer"):
            make_trainer(tmp_path).fit(5)


@pytest.mark.parametrize("place", [".", "below"])
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path, place):
    file = tmp_path / "file"
    file.write_text("of mine")
    trainer = make_trainer(file / place)
    with pytest.raises(ValueError, match=r"checkpoint must be a folder, .*file.*\((File exists|Not a directory)\)"):
        trainer.fit(2)
    assert (trainer.meta_step, file.read_text()) == (0, "of mine")


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to every folder
    trainer = make_trainer(tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match=r"checkpoint must be a folder, .*\(it cannot be written to\): name another"):
        trainer.fit(2)
    assert trainer.meta_step == 0


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(tmp_path):
    """The file size limit of the process is as real as a full disk."""
    trainer = make_trainer(tmp_path, checkpoint_every=1)
    trainer.fit(3)
    before, limit = (tmp_path / "trainer.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large, so it stays as it was before: .*trainer.pt") as caught:
            trainer.fit(8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.errno == errno.EFBIG
    assert (tmp_path / "trainer.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "trainer.pt"]
    assert torch.equal(trainer.network.flat_weights().detach(), trainer.weights.best)
    assert trainer.meta_step == 4
    assert trainer.fit(8).meta_losses == losses(8)
    assert losses(10, tmp_path) == losses(10)


# ---------------------------------------------------------------- one run at a time


def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(tmp_path):
    second = make_trainer(tmp_path)
    untouched = state_of(second)

    def intrude(step):
        if step == 4:
            with pytest.raises(RuntimeError, match=f"another run .*is using {re.escape(str(tmp_path))}: wait for it"):
                second.fit(5)

    assert make_trainer(tmp_path, checkpoint_every=1).fit(8, on_step=intrude) == make_trainer().fit(8)
    assert state_of(second) == untouched
    assert second.fit(10).meta_losses == losses(10)  # the folder is free by now


def test_a_run_that_another_has_gone_on_from_is_refused(tmp_path):
    first = make_trainer(tmp_path)
    first.fit(3)
    make_trainer(tmp_path).fit(6)
    saved = (tmp_path / "trainer.pt").read_bytes()
    with pytest.raises(RuntimeError, match=r"another run has written .*trainer.pt since this one did: go on from it"):
        first.fit(5)
    assert (tmp_path / "trainer.pt").read_bytes() == saved


_HOLD = """
import sys, time, os
from l2l_fast.files import locked
with locked(sys.argv[1]):
    if "fork" in sys.argv:  # a child that outlives us
        if os.fork() == 0:
            time.sleep(30)
    print(os.getpid(), flush=True)
    time.sleep(30)
"""


@pytest.mark.parametrize("fork", [(), ("fork",)])
def test_a_killed_run_holds_nothing(tmp_path, fork):
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path, *fork], stdout=subprocess.PIPE, text=True)
    try:
        number = holder.stdout.readline().strip()
        with pytest.raises(files.HeldError, match=rf"another run \(process {number} on .*\) is using"):
            make_trainer(tmp_path).fit(2)
        holder.kill()
        holder.wait()
        assert len(make_trainer(tmp_path).fit(2).meta_losses) == 2
    finally:
        holder.kill()
        holder.stdout.close()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", lockf)
    with pytest.warns(UserWarning, match="file system of .* has no locks"):
        make_trainer(tmp_path).fit(3)
    monkeypatch.setattr(files, "fcntl", None)  # as on Windows
    assert losses(5, tmp_path) == losses(5)


# ---------------------------------------------------------------- kill -9

_MANY = """
import os, random, signal, sys, time
import torch, l2l_fast as l2l
torch.set_num_threads(1)
folder, moments = sys.argv[1], int(sys.argv[2])

def run(steps, folder):
    torch.manual_seed(0)
    network = l2l.CoordinatewiseLSTM("moments", 3, 1)
    options = dict(instances=2, unroll=3, horizon=9, validate_every=7, validation_instances=1, progress=False)
    trainer = l2l.MetaTrainer(network, "quadratic", checkpoint=folder, checkpoint_every=1, **options)
    return trainer.fit(steps).meta_losses

def written():
    path = folder + "/trainer.pt"
    return os.path.exists(path) and os.stat(path).st_mtime_ns

rng, before = random.Random(0), 0
run(1, folder + "/warm")  # libraries load before the forks
for moment in range(moments):
    found, child = written(), os.fork()
    if child == 0:
        try:
            run(10**6, folder)
        finally:
            os._exit(1)  # it was not killed
    while written() == found:  # until it has written once
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the run has ended by itself"
    saved = torch.load(folder + "/trainer.pt", weights_only=True)  # whole
    assert before <= saved["meta_step"] == len(saved["history"]["meta_losses"]), (before, saved["meta_step"])
    before = saved["meta_step"]
left = [name for name in os.listdir(folder) if name.endswith(".part")]
assert len(left) <= 1, left  # of the last kill alone
steps = before + 3
assert run(steps, folder) == run(steps, None)
assert sorted(os.listdir(folder)) == [".lock", "trainer.pt", "warm"]
print(before)
"""


@pytest.mark.parametrize("moments", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_goes_on_from_a_whole_checkpoint_whenever_it_is_killed(tmp_path, moments):
    command = [sys.executable, "-c", _MANY, str(tmp_path), str(moments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= moments


def test_long_meta_steps_are_saved_by_the_clock(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    trainer = make_trainer(tmp_path, checkpoint_every=10**6)
    trainer.fit(3, on_step=lambda step: written.append((tmp_path / "trainer.pt").stat().st_mtime_ns))
    assert len(set(written)) == 3
    monkeypatch.setattr(checkpoints, "SECONDS", 3600.0)
    trainer.fit(6, on_step=lambda step: written.append((tmp_path / "trainer.pt").stat().st_mtime_ns))
    assert written[3] == written[4] == written[5]
    assert losses(9, tmp_path) == losses(9)


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path, checkpoint_every=10**6)

    def interrupt(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"stopped at meta-step 5 of 9: saved to .*run the same command again"):
        trainer.fit(9, on_step=interrupt)
    assert losses(9, tmp_path) == losses(9)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_interrupts_at_once():
    trainer = make_trainer()

    def interrupt(step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not at once")

    with pytest.raises(KeyboardInterrupt):
        trainer.fit(9, on_step=interrupt)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_whoever_ignores_or_handles_ctrl_c_otherwise_means_it(handler):
    before = signal.signal(signal.SIGINT, handler)
    seen = set()
    try:
        history = make_trainer().fit(3, on_step=lambda step: seen.add(signal.getsignal(signal.SIGINT)))
        assert seen == {handler}
        if handler is not signal.SIG_DFL:
            send = lambda step: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
            assert make_trainer().fit(3, on_step=send) == history
    finally:
        signal.signal(signal.SIGINT, before)


def test_numbers_of_numpy_are_numbers_in_a_checkpoint_too(tmp_path):
    options = {"meta_lr": np.float64(0.01), "scaling": np.float32(0.5), "imitation": np.float64(0.5)}
    make_trainer(tmp_path, **options).fit(2)
    assert len(make_trainer(tmp_path, **options).fit(3).meta_losses) == 3

"""The meta-trainer: trains a learned optimizer by gradient descent on the losses of the trajectories it makes."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from l2l_fast import reference
from l2l_fast import tasks as task_names
from l2l_fast.checks import is_number, is_whole, require, usable_device
from l2l_fast.meta import progress as bars
from l2l_fast.meta import ranks
from l2l_fast.meta.checkpoints import CheckpointFolder
from l2l_fast.meta.curricula import Horizon
from l2l_fast.meta.graphs import CudaCapture, Graphs
from l2l_fast.meta.identity import describe, describe_horizon, describe_optimizer
from l2l_fast.meta.soap import Soap
from l2l_fast.meta.unroll import (
    OBJECTIVES,
    Rule,
    Trajectory,
    advance_,
    imitate,
    unroll_second_derivatives,
    window_,
)
from l2l_fast.meta.update import MetaUpdate
from l2l_fast.modes import plain
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.tasks import Instances, Task
from l2l_fast.tasks.base import Batch, send

SCHEDULES = ("constant", "cosine")
META_OPTIMIZERS = ("adam", "soap")
MAX_SCALING = 10.0  # factors from 5e-5 to 2e4; far beyond it, losses and gradients leave float32
# What a seed is for; the first word of every seed sequence, so that no two purposes share random numbers.
_INSTANCE, _SCALING, _TRAJECTORY, _VALIDATION = range(4)


@dataclass
class History:
    """What a meta-training run saw.

    Attributes:
        meta_losses: one a meta-step, the mean over the parallel trajectories.
        validations: (meta-step, score) pairs; lower is better.
        best_score: the lowest score, that of the weights which ``fit`` leaves in the network.
        skipped: meta-steps whose losses or gradient were not finite; the network was left as it was.
    """

    meta_losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_score: float = math.inf
    skipped: int = 0


class _Stream:
    """One running trajectory, with what is needed to name it and to go on with it."""

    def __init__(self, number: int, task_index: int, horizon: int, trajectory: Trajectory, teacher) -> None:
        self.number, self.task_index, self.horizon = number, task_index, horizon
        self.trajectory, self.teacher = trajectory, teacher


class MetaTrainer:
    r"""Trains a network by truncated backpropagation through time of the optimizer's own trajectories.

    phi <- phi - meta_optimizer(d/dphi sum_{t in window} w[t] f_t(theta[t])),   theta[t+1] = theta[t] + u[t](phi)

    One meta-step is one window of ``unroll`` steps on each of ``parallel`` trajectories. Under ``torchrun``, where the
    script has called ``torch.distributed.init_process_group()``, every rank runs its own ``instances`` of each
    trajectory and the gradients are averaged: W ranks of B equal one of W * B.

    Args:
        network: the :class:`CoordinatewiseLSTM`, float32; trained in place, but for parameters that are frozen by
            ``requires_grad_(False)``.
        tasks: a task or its name, or a sequence of them to mix.
        unroll: steps a window, T.
        horizon: steps a trajectory; an int, or a curriculum of :mod:`l2l_fast.meta.curricula`.
        instances: of the task, side by side in one trajectory, B.
        coordinates: how many of a trajectory's are drawn in each window to stand for all in the meta-gradient, without
            bias (:func:`~l2l_fast.meta.sampling.sample_coordinates`); None for all. 512 of an MNIST network's 15,910
            leave an error of a few per cent, less than batches do, in half of the time.
        parallel: trajectories, each with its own task and horizon, that one meta-step averages over.
        meta_lr: learning rate of the meta-optimizer.
        meta_optimizer: "adam"; "soap", Adam in the eigenbasis of the meta-gradients' covariance
            (:class:`~l2l_fast.meta.soap.Soap`), which needs fewer meta-steps; or a callable that makes one from a list
            of the network's parameters, those that are not frozen.
        schedule: of the meta learning rate over ``fit``'s steps: "constant", or "cosine" down to a hundredth.
        warmup: meta-steps over which the rate comes up linearly. A trained network that goes on with a new
            meta-optimizer needs them: the first updates follow a gradient or two, at full length.
        objective: "sum", "relative" (f_t / f_0) or "log".
        loss_weights: w, ``unroll`` numbers; ones if None.
        average: decay rate of a running average of the weights, which is what validation sees and ``fit`` leaves in the
            network; 0 for none. Meta-gradients are noisy, and an average over the last 50 weights (0.98) is less so.
        clip: largest norm of the meta-gradient; None for no clipping.
        clip_windows: largest norm of each window's meta-gradient (each rank's share of it), before the mean over
            ``parallel`` of them; None for no clipping. With second derivatives a trajectory's first window often has a
            hundred times the norm of a later one, which ``clip`` alone would then silence.
        scaling: r of the random scaling theta -> c theta, c = exp(U(-r, r)) a coordinate; 0 for none, at
            most 10.
        imitation: share of trajectories led by ``teacher``, whose updates the network then fits; a number, or
            (first, last) for a share that changes linearly over ``fit``.
        teacher: makes the teacher from a list of parameters; ``torch.optim.Adam(lr=0.01)`` if None. With a
            ``checkpoint`` it is known, as a ``meta_optimizer`` of one's own is, by its class, its options and its first
            steps on a copy of such parameters.
        lr, weight_decay: of the learned update, as :class:`LSTMOptimizer` has them; so is a network's ``update_rms``.
        second_derivatives: keep the gradients' dependence on theta; needs twice differentiable tasks, every coordinate.
            Slower to learn at first, and what moves a network on that first-order training has brought to rest.
        validate_every: meta-steps between validations; the weights with the best score are kept.
        validation_instances: instances of each task in a validation, on seeds of their own.
        checkpoint: folder for exact resume; an unfinished run found there is continued, if all that decides its
            numbers is the same: the tasks and every option but ``device``, ``graphs``, ``progress``, ``log_dir`` and
            those of the checkpoint itself. One run uses a folder at a time.
        checkpoint_every: meta-steps between checkpoints.
        log_dir: folder for TensorBoard.
        seed: of everything random.
        device: where to train; for each rank a GPU of its own.
        graphs: capture each window and the meta-update in CUDA graphs and replay them; None does where the device is a
            GPU. A small problem waits for launches, hundreds a window; a graph is one. A task whose loss waits for the
            device or copies to it needs False. Eager all the same: imitation, second derivatives, windows of rare
            lengths, and a ``meta_optimizer`` that is not made with ``fused=True, capturable=True``.
        progress: show a progress bar (needs rich).

    Raises:
        ValueError: an option out of its range, a network that cannot be trained, or a checkpoint of a run with other
            options; the message names it.
        RuntimeError: ``WORLD_SIZE`` is above 1 and there is no process group.

    Example:
        >>> import l2l_fast as l2l
        >>> network = l2l.CoordinatewiseLSTM("moments", hidden_size=4, num_layers=1, output="tanh")
        >>> trainer = l2l.MetaTrainer(network, "quadratic", instances=8, horizon=40, progress=False)
        >>> history = trainer.fit(meta_steps=4)
        >>> len(history.meta_losses)
        4

    References:
        Andrychowicz et al. 2016, https://arxiv.org/abs/1606.04474; random scaling: Lv et al. 2017,
        https://arxiv.org/abs/1703.03633; imitation and staged horizons: Chen et al. 2020, https://arxiv.org/abs/2010.09089.
    """

    def __init__(
        self,
        network: CoordinatewiseLSTM,
        tasks: Task | str | Sequence[Task | str],
        *,
        unroll: int = 20,
        horizon: int | Horizon = 100,
        instances: int = 1,
        coordinates: int | None = None,
        parallel: int = 1,
        meta_lr: float = 3e-3,
        meta_optimizer: str | Callable[[list], torch.optim.Optimizer] = "adam",
        schedule: str = "constant",
        warmup: int = 0,
        objective: str = "sum",
        loss_weights: Sequence[float] | None = None,
        clip: float | None = 1.0,
        clip_windows: float | None = None,
        average: float = 0.0,
        scaling: float = 0.0,
        imitation: float | tuple[float, float] = 0.0,
        teacher: Callable[[list], torch.optim.Optimizer] | None = None,
        lr: float | None = None,
        weight_decay: float = 0.0,
        second_derivatives: bool = False,
        validate_every: int = 100,
        validation_instances: int = 8,
        checkpoint: str | PathLike | None = None,
        checkpoint_every: int = 100,
        log_dir: str | PathLike | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        graphs: bool | None = None,
        progress: bool = True,
    ) -> None:
        require(isinstance(network, CoordinatewiseLSTM), "network", type(network), "a CoordinatewiseLSTM")
        dtype = network.head.weight.dtype
        require(dtype == torch.float32, "network", dtype, "of dtype float32, as network.float() makes it")
        tasks = [tasks] if isinstance(tasks, str | Task) or not isinstance(tasks, Iterable) else list(tasks)
        if not tasks:
            raise ValueError("tasks must name at least one task")
        self.tasks = [task_names.get(task) if isinstance(task, str) else task for task in tasks]
        for task in self.tasks:
            require(isinstance(task, Task), "tasks", task, "a task, its name, or a sequence of them")
        counts = {"unroll": unroll, "instances": instances, "parallel": parallel, "validate_every": validate_every,
                  "validation_instances": validation_instances, "checkpoint_every": checkpoint_every}  # fmt: skip
        for name, value in counts.items():
            require(is_whole(value, 1), name, value, "an int of at least 1")
        for name, value in {"warmup": warmup, "seed": seed}.items():
            require(is_whole(value, 0), name, value, "an int of at least 0")
        lr = network.default_lr if lr is None else lr
        for name, value in {"meta_lr": meta_lr, "lr": lr}.items():
            require(is_number(value) and value > 0, name, value, "a positive number")
        for name, value in {"clip": clip, "clip_windows": clip_windows}.items():
            require(value is None or (is_number(value) and value > 0), name, value, "a positive number or None")
        require(is_number(weight_decay) and weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
        require(schedule in SCHEDULES, "schedule", schedule, f"one of {SCHEDULES}")
        require(objective in OBJECTIVES, "objective", objective, f"one of {OBJECTIVES}")
        known = meta_optimizer in META_OPTIMIZERS if isinstance(meta_optimizer, str) else callable(meta_optimizer)
        require(known, "meta_optimizer", meta_optimizer,
                f"one of {META_OPTIMIZERS}, or a callable")  # fmt: skip
        require(is_number(average) and 0 <= average < 1, "average", average, "a number in [0, 1)")
        require(is_number(scaling) and 0 <= scaling <= MAX_SCALING, "scaling", scaling, f"in [0, {MAX_SCALING:g}]")
        require(coordinates is None or is_whole(coordinates, 1), "coordinates", coordinates,
                "an int of at least 1, or None")  # fmt: skip
        require(not (second_derivatives and coordinates), "coordinates", coordinates, "None with second_derivatives")
        if loss_weights is not None:
            loss_weights = list(loss_weights) if isinstance(loss_weights, Iterable) else [loss_weights]
            require(len(loss_weights) == unroll, "loss_weights", loss_weights, f"of length unroll = {unroll}")
            require(all(map(is_number, loss_weights)), "loss_weights", loss_weights, "finite numbers")
        share = tuple(imitation) if isinstance(imitation, Iterable) else (imitation, imitation)
        require(len(share) == 2 and all(is_number(p) and 0 <= p <= 1 for p in share), "imitation", imitation,
                "in [0, 1], or two numbers that are")  # fmt: skip
        require(not (second_derivatives and any(share)), "imitation", imitation, "0 with second_derivatives=True")
        require(isinstance(horizon, Horizon) or is_whole(horizon, 1), "horizon", horizon,
                "an int of at least 1, or a curriculum of l2l_fast.meta.curricula")  # fmt: skip
        device = usable_device(device)
        require(teacher is None or callable(teacher), "teacher", teacher, "a function that makes an optimizer, or None")
        for name, value in {"checkpoint": checkpoint, "log_dir": log_dir}.items():
            require(value is None or isinstance(value, str | PathLike), name, value, "a folder or None")
        graphs = device.type == "cuda" if graphs is None else graphs
        require(not graphs or device.type == "cuda", "graphs", graphs, f"False or None on {device}")
        ranks.require_group()
        # NumPy's numbers could be saved in a checkpoint, but not loaded from it.
        meta_lr, average, scaling, lr, weight_decay = map(float, (meta_lr, average, scaling, lr, weight_decay))
        clip, clip_windows = (None if value is None else float(value) for value in (clip, clip_windows))
        share = tuple(map(float, share))
        self.network = network.to(device)
        self.horizon = horizon if isinstance(horizon, Horizon) else Horizon(horizon)
        self.unroll, self.instances, self.parallel, self.coordinates = unroll, instances, parallel, coordinates
        self.meta_lr, self.schedule, self.objective, self.clip = meta_lr, schedule, objective, clip
        self.average, self.warmup, self.clip_windows = average, warmup, clip_windows
        self.loss_weights = None if loss_weights is None else torch.tensor(loss_weights, dtype=dtype, device=device)
        self.scaling, self.imitation, self.lr, self.weight_decay = scaling, share, lr, weight_decay
        self.teacher = teacher or (lambda params: torch.optim.Adam(params, lr=0.01))
        self.second_derivatives = second_derivatives
        self.validate_every, self.validation_instances = validate_every, validation_instances
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self._folder = None if checkpoint is None else CheckpointFolder(checkpoint, device)
        self.checkpoint_every, self.log_dir, self.seed = checkpoint_every, log_dir, seed
        self.device, self.progress = device, progress

        with plain(device):  # tensors that were made for inference alone could not be trained with
            makers = {"adam": partial(torch.optim.Adam, lr=meta_lr, fused=True, capturable=graphs),
                      "soap": partial(Soap, lr=meta_lr)}  # fmt: skip
            named = isinstance(meta_optimizer, str)
            make_optimizer = makers[meta_optimizer] if named else meta_optimizer
            # A name and the other options say everything; what a callable makes has to be looked at.
            self._optimizer_facts = (lambda: meta_optimizer) if named else partial(self._describe, make_optimizer)
            self._update = MetaUpdate(network, make_optimizer, clip, parallel, clip_windows)
            self.meta_optimizer, self.parameters = self._update.optimizer, self._update.parameters
            rated = all("lr" in group for group in self.meta_optimizer.param_groups)
            require(rated or (schedule == "constant" and not warmup), "schedule", schedule,
                    '"constant", without warmup, for a meta_optimizer whose param groups have no lr')  # fmt: skip
            self._rule = Rule(network.config, self._update.weights, lr, weight_decay, network.update_rms)
            self._graphs, self._eager = Graphs(CudaCapture(device) if graphs else None), Graphs()
            # Trajectories that have ended: in their memory the next ones find the graphs that were captured on it.
            self._ended: defaultdict[tuple, list[Trajectory]] = defaultdict(list)
            self._drawn: tuple | None = None  # the number of a trajectory to come, and what :meth:`_draw` gives for it
            self._meta_loss = self._update.weights.new_zeros(())  # of the window just run
            self._ratios = self._update.weights.new_zeros(validation_instances)  # sums of f_t / f_0

            self.meta_step, self.started, self.history = 0, 0, History()
            self.streams: list[_Stream | None] = [None] * parallel
            self._best = self._weights()
            self._averaged = self._weights()
            self._current = self._weights()  # under training, while the network holds the best ones between two fits
            self._total = 1

    # ------------------------------------------------------------ the loop

    def fit(
        self,
        meta_steps: int,
        *,
        max_seconds: float = math.inf,
        on_step: Callable[[int], None] | None = None,
    ) -> History:
        """Train until ``meta_steps`` meta-steps have been made in all, and leave the best weights in the network.

        Ctrl-C stops after the meta-step in progress; with a ``checkpoint`` folder nothing is lost, and the same call
        goes on from there. After an exception too the network holds the best weights and the next call goes on from
        the last; a meta-step that failed is made again, on new trajectories. Other weights loaded into the network
        between two calls are trained from there: the average, the best and the trajectories begin anew with them.

        Args:
            meta_steps: in all, those of earlier calls and of a resumed checkpoint included.
            max_seconds: stop earlier after this time.
            on_step: called with the number of meta-steps done, after each.

        Raises:
            ValueError: an argument out of its range, a network that was changed since the trainer was made, or a
                ``checkpoint`` of a run with other options or tasks; the message names it, and nothing is changed.
            RuntimeError: another run is using the ``checkpoint`` folder; nothing is changed.
            OSError: a checkpoint cannot be written, such as for a full disk; the same call goes on with the next
                meta-step, and the last checkpoint is there still.
            KeyboardInterrupt: after Ctrl-C, once everything is saved.

        Warns:
            UserWarning: the network is as it was, since every meta-step was skipped or no validation was finite.
        """
        require(is_whole(meta_steps, 1), "meta_steps", meta_steps, "an int of at least 1")
        require(max_seconds == math.inf or is_number(max_seconds), "max_seconds", max_seconds, "a number")
        require(on_step is None or callable(on_step), "on_step", on_step, "a function of the meta-step, or None")
        self._update.check()
        with plain(self.device) as as_before, self._folder.held() if self._folder else nullcontext():
            self._take_up()
            try:
                interrupted = self._run(meta_steps, max_seconds, on_step and _within(as_before, on_step))
            finally:  # whatever a task, on_step or a second Ctrl-C raises
                self._current = self._weights()
                self.network.load_flat_weights_(self._best)
        if interrupted:
            where = f"saved to {self.checkpoint}; run the same command again to go on" if self.checkpoint else (
                "the network holds the best weights so far; give checkpoint=FOLDER to be able to go on"
            )  # fmt: skip
            raise KeyboardInterrupt(f"stopped at meta-step {self.meta_step} of {meta_steps}: {where}")
        self._warn()
        return self.history

    def _take_up(self) -> None:
        """The weights under training into the network, unless it holds others than the best by now: then those."""
        found = self._weights()
        if torch.equal(found, self._best):
            self.network.load_flat_weights_(self._current)
        else:
            self._begin_from(found)

    def _begin_from(self, weights: Tensor) -> None:
        """Train these from now on: the average starts from them, and no score or trajectory of others counts."""
        self.network.load_flat_weights_(weights)
        self._averaged.copy_(weights)
        self._best, self.history.best_score = weights, math.inf
        self.horizon.forget()
        self._end_all()

    def _run(self, meta_steps: int, max_seconds: float, on_step: Callable[[int], None] | None) -> bool:
        """The loop of :meth:`fit`; says whether Ctrl-C has ended it."""
        self._total = meta_steps
        if self._folder is not None and self.meta_step == 0:
            self._resume()
        deadline, shown = time.monotonic() + max_seconds, self.progress and ranks.rank() == 0
        with _DeferredInterrupt() as interrupt, self._writer() as writer, bars.meta_training(shown, meta_steps) as bar:
            if self._due(meta_steps):  # one that an exception has prevented
                self._validate()
            while self.meta_step < meta_steps:
                if ranks.any_rank(interrupt.requested or time.monotonic() > deadline, self.device):
                    break
                try:
                    self._step()
                except BaseException:
                    self._end_all()  # some of the trajectories have gone on, one of them stands within its window
                    raise
                if self._due(meta_steps):
                    self._validate()
                if writer:
                    self._log(writer)
                if self._folder is not None and self.meta_step % self.checkpoint_every == 0:
                    self._save()
                bar(self.meta_step, self.history.meta_losses[-1], self.history.best_score)
                if on_step:
                    on_step(self.meta_step)
        if self._folder is not None:
            self._save()
        if self.meta_step < meta_steps and not interrupt.requested:
            self._validate()  # after saving: a run that goes on later is the same as one never stopped
        return interrupt.requested

    def _due(self, meta_steps: int) -> bool:
        """Whether there should be a validation of this meta-step, and is none."""
        last = self.history.validations[-1][0] if self.history.validations else 0
        return self.meta_step > last and (self.meta_step % self.validate_every == 0 or self.meta_step == meta_steps)

    def _warn(self) -> None:
        """If training has left the network as it was, which the losses alone do not show."""
        scores, steps = [score for _, score in self.history.validations], self.meta_step
        if steps and self.history.skipped == steps:
            what = f"all {steps} meta-steps were skipped, a loss or the meta-gradient of each being not finite"
        elif scores and not any(map(math.isfinite, scores)):
            what = f"none of {len(scores)} validations was finite"
        else:
            return
        if ranks.rank() == 0:
            cure = "lower lr, meta_lr, scaling or horizon, or mend the loss of the task"
            warnings.warn(f"the network is as it was before training: {what}; {cure}", stacklevel=3)

    def _step(self) -> None:
        """One window on every parallel trajectory, then one update of the network."""
        self._launch(self.meta_step / self._total)
        if self._graphs.capture is not None:
            self._draw_ahead()  # while the device works
        # The one wait for the device. It cannot be put off: a trajectory that has diverged must not run on.
        *losses, norm = self._update.results.tolist()
        for slot, (stream, loss) in enumerate(zip(self.streams, losses, strict=True)):
            if stream.trajectory.steps_done >= stream.horizon or not math.isfinite(loss):
                self._end(slot)  # at its horizon, or beyond use
        if not all(map(math.isfinite, [*losses, norm])):
            self.history.skipped += 1
        elif not self._update.skips:
            self._update.step()
        self.meta_step += 1
        # At first over few weights, so that it forgets where the network started.
        decay = min(self.average, self.meta_step / (self.meta_step + 9))
        self._averaged.lerp_(self._weights(), 1 - decay)
        self.history.meta_losses.append(sum(losses) / len(losses))

    def _launch(self, progress: float) -> None:
        """All of a meta-step that nobody waits for: windows, the mean over the ranks, and the update if it can be."""
        update = self._update
        update.begin()
        for slot, stream in enumerate(self.streams):
            if stream is None:
                stream = self.streams[slot] = self._start(progress)
            self._window(stream)
            update.results[slot].copy_(self._meta_loss)
        ranks.average_(update.gradient, update.results[:-1])
        if self.schedule != "constant" or self.warmup:  # a meta-optimizer of one's own may have a rate of its own
            update.set_lr(self._rate(progress))
        if update.skips:
            run = self._graphs if update.capturable else self._eager
            run("update", update.measure_and_step)
        else:
            update.measure()

    def _rate(self, progress: float) -> float:
        """The meta learning rate of this meta-step."""
        rate = self.meta_lr * min(1.0, (self.meta_step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return rate

    def _window(self, stream: _Stream) -> None:
        """Adds one window's share to the gradient, and leaves its meta-loss in its place."""
        trajectory = stream.trajectory
        length = min(self.unroll, stream.horizon - trajectory.steps_done)
        weights = None if self.loss_weights is None else self.loss_weights[:length]
        if stream.teacher is not None:
            self._collect(imitate(trajectory, self._rule, length, stream.teacher))
        elif self.second_derivatives:
            options = {"objective": self.objective, "weights": weights}
            self._collect(unroll_second_derivatives(trajectory, self._rule, length, **options))
        else:
            batches = trajectory.next(length)
            self._graphs((trajectory, length), partial(self._unroll, trajectory, batches, length, weights))

    def _unroll(self, trajectory: Trajectory, batches: Batch, length: int, weights: Tensor | None) -> None:
        options = {"objective": self.objective, "weights": weights, "coordinates": self.coordinates}
        self._collect(window_(trajectory, self._rule, batches, length, **options))

    def _collect(self, window: tuple[Tensor, Tensor, Tensor]) -> None:
        _, meta_loss, d_weights = window
        self._update.add(d_weights)
        self._meta_loss.copy_(meta_loss)

    def _start(self, progress: float) -> _Stream:
        """A new trajectory; its task, horizon and seeds follow from its number alone."""
        number, self.started = self.started, self.started + 1
        rng = np.random.default_rng((_TRAJECTORY, self.seed, number))
        horizon = self.horizon.draw(rng, progress)
        if number < self.parallel:
            # The first trajectories end one after another, so that from then on a meta-step averages over early and
            # late windows. In step, they would pull the network to and fro between what the two ask of it.
            horizon = max(1, round(horizon * (number + 1) / self.parallel))
        first, last = self.imitation
        led = rng.random() < first + (last - first) * progress
        return self._make_stream(number, number % len(self.tasks), horizon, led)

    def _make_stream(self, number: int, task_index: int, horizon: int, led: bool) -> _Stream:
        if self._drawn is None or self._drawn[0] != number:
            self._drawn = number, *self._draw(number, task_index)
        (_, instances, scaling), self._drawn = self._drawn, None
        trajectory = self._trajectory(("training", task_index), instances, scaling)
        return _Stream(number, task_index, horizon, trajectory, self.teacher([trajectory.theta]) if led else None)

    def _draw(self, number: int, task_index: int) -> tuple[Instances, Tensor | None]:
        """Everything random of a trajectory but what it meets on its way: instances and scaling."""
        ids = range(ranks.rank() * self.instances, (ranks.rank() + 1) * self.instances)
        seeds = [_seed(_INSTANCE, self.seed, number, i) for i in ids]
        instances, scaling = self._instances(task_index, seeds), None
        if self.scaling:
            size = sum(math.prod(shape) for shape in instances.shapes.values())
            generators = [torch.Generator().manual_seed(_seed(_SCALING, self.seed, number, i)) for i in ids]
            exponents = torch.stack([
                torch.rand(size, generator=generator, dtype=torch.float32, device="cpu") for generator in generators
            ])  # fmt: skip
            scaling = send(((2 * exponents - 1) * self.scaling).exp(), self.device)
        return instances, scaling

    def _instances(self, task_index: int, seeds: list[int]) -> Instances:
        instances, task = Instances(self.tasks[task_index], seeds, self.device), self.tasks[task_index]
        if instances.start().dtype != torch.float32:
            raise ValueError(
                f"the task {task.name} must start from float32 tensors, as a network is trained on, got "
                f"{instances.start().dtype}: name the dtype in its init, whatever torch's default is"
            )
        return instances

    def _draw_ahead(self) -> None:
        """Draw the next trajectory to start, which depends on its number alone, before it is needed."""
        if self._drawn is None:
            self._drawn = self.started, *self._draw(self.started, self.started % len(self.tasks))

    def _trajectory(self, kind: tuple, instances: Instances, scaling: Tensor | None = None) -> Trajectory:
        """A trajectory at its start, in the place of one that has ended if there is one."""
        ended = self._ended[kind, tuple(instances.shapes.items())]
        if not ended:
            return Trajectory(instances, self.network.config, self._rule.weights.dtype, scaling, self.unroll)
        trajectory = ended.pop()
        trajectory.place(instances, scaling)
        self._graphs((trajectory, 0), trajectory.evaluate_start_)
        return trajectory

    def _leave(self, kind: tuple, trajectory: Trajectory) -> None:
        """Keep an ended trajectory's memory for the next of its kind, where graphs may have been captured on it."""
        if self._graphs.capture is not None:
            self._ended[kind, tuple(trajectory.instances.shapes.items())].append(trajectory)

    def _end(self, slot: int) -> None:
        stream, self.streams[slot] = self.streams[slot], None
        if stream is not None:
            self._leave(("training", stream.task_index), stream.trajectory)

    def _end_all(self) -> None:
        for slot in range(self.parallel):
            self._end(slot)

    def _validate(self) -> None:
        """Mean of f_t / f_0 over the horizon, the instances and the tasks; keeps the best weights."""
        self._update.weights.copy_(self._averaged)
        scores = [self._score(index) for index in range(len(self.tasks))]
        score = sum(scores) / len(scores)
        score = score if math.isfinite(score) else math.inf
        self.history.validations.append((self.meta_step, score))
        if score < self.history.best_score:
            self.history.best_score, self._best = score, self._averaged.clone()
        if self.horizon.validated(score):
            self._begin_from(self._best)

    def _score(self, index: int) -> float:
        """Of one task."""
        seeds = [_seed(_VALIDATION, self.seed, index, i) for i in range(self.validation_instances)]
        trajectory = self._trajectory(("validation", index), self._instances(index, seeds))
        self._ratios.zero_()
        while left := self.horizon.validation - trajectory.steps_done:
            batches = trajectory.next(length := min(left, self.unroll))
            self._graphs((trajectory, length), partial(self._walk, trajectory, batches, length))
        self._leave(("validation", index), trajectory)
        return self._ratios.mean().item() / self.horizon.validation

    def _walk(self, trajectory: Trajectory, batches: Batch, length: int) -> None:
        """Steps without a meta-gradient; adds their f_t / f_0."""
        grads = trajectory.grad.expand(length, -1, -1)  # each step's in the place of the one before
        self._ratios += (advance_(trajectory, self._rule, batches, grads) / trajectory.first_losses).sum(0)

    def _weights(self) -> Tensor:
        return self.network.flat_weights().detach()

    # ------------------------------------------------------------ checkpoints and logs

    @cached_property
    def _settings(self) -> dict:
        """Everything that must be the same for a resumed run to be the same run, as it is before the run."""
        names = ("unroll", "instances", "coordinates", "parallel", "meta_lr", "schedule", "warmup", "objective",
                 "clip", "clip_windows", "average", "scaling", "lr", "weight_decay", "second_derivatives",
                 "validate_every", "validation_instances", "seed")  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        settings["horizon"], settings["imitation"] = describe_horizon(self.horizon), list(self.imitation)
        settings |= {f"tasks[{number}]": describe(task, self.device) for number, task in enumerate(self.tasks)}
        *config, linear_path = self.network.config
        settings["network"], settings["frozen"] = config, self._update.frozen
        settings["linear_path"] = linear_path or None  # runs begun before there was one go on
        settings["update_rms"] = self.network.update_rms
        settings["loss_weights"] = None if self.loss_weights is None else self.loss_weights.tolist()
        settings["meta_optimizer"] = self._optimizer_facts()
        led = any(self.imitation)
        settings["teacher"] = describe_optimizer(self.teacher, [self._weights()[None]]) if led else None
        settings["ranks"] = ranks.world()
        return settings

    def _describe(self, make_optimizer: Callable[[list], torch.optim.Optimizer]) -> dict:
        return describe_optimizer(make_optimizer, self.parameters)

    def _save(self) -> None:
        streams = [
            stream and {
                "number": stream.number, "task_index": stream.task_index, "horizon": stream.horizon,
                "teacher": stream.teacher and stream.teacher.state_dict(),
                "trajectory": stream.trajectory.state_dict(),
            }
            for stream in self.streams
        ]  # fmt: skip
        every_rank, saved = ranks.gather(streams, self.device), None
        if ranks.rank() == 0:
            saved = {
                "settings": self._settings,
                "meta_step": self.meta_step,
                "started": self.started,
                "weights": self._weights(),
                "best": self._best,
                "averaged": self._averaged,
                "meta_optimizer": self.meta_optimizer.state_dict(),
                "horizon": self.horizon.state_dict(),
                "streams": every_rank,
                "history": vars(self.history),
            }
        self._folder.write(saved)

    def _resume(self) -> None:
        """Go on from the checkpoint if there is one, or leave everything as it is."""
        saved = self._folder.read(self._settings)
        if saved is None:
            return
        before = self.meta_optimizer.state_dict(), self.horizon.state_dict(), self._drawn
        refusal = None
        try:
            weights = [saved[name] for name in ("weights", "best", "averaged")]
            for flat in weights:
                reference.split_weights(flat, self.network.config)
            streams = [entry and self._restore_stream(entry) for entry in saved["streams"][ranks.rank()]]
            numbers, history = (saved["meta_step"], saved["started"]), History(**saved["history"])
            self.horizon.load_state_dict(saved["horizon"])
            self._update.load_state_dict(saved["meta_optimizer"])
        except Exception as error:
            self._update.load_state_dict(before[0])
            self.horizon.load_state_dict(before[1])
            self._drawn = before[2]
            refusal = ValueError(
                f"{self._folder.path} is damaged ({type(error).__name__}: {error}): give another checkpoint folder"
            )
        ranks.raise_together(refusal, self.device)
        self.network.load_flat_weights_(weights[0])
        self._best, self._averaged = weights[1:]
        (self.meta_step, self.started), self.history, self.streams = numbers, history, streams

    def _restore_stream(self, entry: dict) -> _Stream:
        led = entry["teacher"] is not None
        stream = self._make_stream(entry["number"], entry["task_index"], entry["horizon"], led)
        stream.trajectory.load_state_dict(entry["trajectory"])
        if led:
            stream.teacher = self.teacher([stream.trajectory.theta])
            stream.teacher.load_state_dict(entry["teacher"])
        return stream

    @contextmanager
    def _writer(self):
        """TensorBoard's, if it is asked for."""
        if self.log_dir is None or ranks.rank() != 0:
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("log_dir needs TensorBoard: pip install 'l2l_fast[tensorboard]'") from None
        writer = SummaryWriter(self.log_dir, purge_step=self.meta_step + 1)
        try:
            yield writer
        finally:
            writer.close()

    def _log(self, writer) -> None:
        writer.add_scalar("meta_loss", self.history.meta_losses[-1], self.meta_step)
        if self.history.validations and self.history.validations[-1][0] == self.meta_step:
            writer.add_scalar("validation", self.history.validations[-1][1], self.meta_step)


class _DeferredInterrupt:
    """Turns Ctrl-C into a request that the loop reads between meta-steps; a second one interrupts at once.

    Only where Ctrl-C would raise KeyboardInterrupt. Whoever ignores it (a shell does for a job in the background), or
    has a handler of another kind, means that.
    """

    def __enter__(self) -> _DeferredInterrupt:
        self.requested, main = False, threading.current_thread() is threading.main_thread()
        self._installed = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._installed:
            signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *error) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _within(modes: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    """A caller's function, called in the caller's modes."""

    def call(*arguments):
        with modes():
            return function(*arguments)

    return call


def _seed(*words: int) -> int:
    """A generator seed from what it is for; unlike a sum, no two different sequences of words share one."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))

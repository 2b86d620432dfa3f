"""The meta-trainer: trains a learned optimizer by gradient descent on the losses of the trajectories it makes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from l2l_fast.checks import is_number, is_whole, require
from l2l_fast.meta import ranks
from l2l_fast.meta.checkpoints import CheckpointFolder
from l2l_fast.meta.display import progress_bar, tensorboard
from l2l_fast.meta.estimators import Estimate, Imitation, estimator
from l2l_fast.meta.graphs import CudaCapture, Graphs
from l2l_fast.meta.interrupt import DeferredInterrupt
from l2l_fast.meta.mixtures import mixture
from l2l_fast.meta.options import TrainerOptions, documented, takes
from l2l_fast.meta.run import History, Run, meta_optimizer_maker
from l2l_fast.meta.streams import Stream, Streams, TrajectoryPool, task_list
from l2l_fast.meta.unroll import Rule
from l2l_fast.meta.update import MetaUpdate
from l2l_fast.meta.validation import Validation
from l2l_fast.meta.weights import RunWeights
from l2l_fast.modes import plain
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.tasks import Task


@documented
class MetaTrainer:
    r"""Trains a network along the optimizer's own trajectories, by truncated backpropagation through time or by ES.

    phi <- phi - meta_optimizer(d/dphi sum_{t in window} w[t] f_t(theta[t])),   theta[t+1] = theta[t] + u[t](phi)

    One meta-step is one window of ``unroll`` steps on each of ``parallel`` trajectories. Under ``torchrun``, where the
    script has called ``torch.distributed.init_process_group()``, every rank runs its own ``instances`` of each
    trajectory and the gradients are averaged: W ranks of B equal one of W * B.

    Args:
        network: the :class:`CoordinatewiseLSTM`, float32; trained in place, but for parameters that are frozen by
            ``requires_grad_(False)``.
        tasks: a task or its name, or a sequence of them to mix.
        {options}

    Attributes:
        network, tasks: as they were given.
        options: the :class:`~l2l_fast.meta.options.TrainerOptions`, checked.
        weights: the network's weights under training, averaged and best.
        history: what the run saw; what :meth:`fit` returns.
        meta_step: meta-steps made.
        meta_optimizer: the optimizer of the network's weights.

    Raises:
        ValueError: an option out of its range, a network that cannot be trained, or a checkpoint of a run with other
            options; the message names it.
        TypeError: there is no such option; the message names the nearest.
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

    @takes(TrainerOptions)
    def __init__(
        self, network: CoordinatewiseLSTM, tasks: Task | str | Sequence[Task | str], options: TrainerOptions
    ) -> None:
        require(isinstance(network, CoordinatewiseLSTM), "network", type(network), "a CoordinatewiseLSTM")
        dtype = network.head.weight.dtype
        require(dtype == torch.float32, "network", dtype, "of dtype float32, as network.float() makes it")
        self.tasks = task_list(tasks)
        self.options = options = options.of(network)
        ranks.require_group()
        self.network, self.device = network.to(options.device), options.device
        self._folder = None if options.checkpoint is None else CheckpointFolder(options.checkpoint, self.device)

        with plain(self.device):  # tensors that were made for inference alone could not be trained with
            make = meta_optimizer_maker(options)
            self.update = MetaUpdate(
                network, make, options.clip, options.parallel, options.clip_windows, partial(mixture, options)
            )
            self.meta_optimizer, self.parameters = self.update.optimizer, self.update.parameters
            rated = all("lr" in group for group in self.meta_optimizer.param_groups)
            require(rated or (options.schedule == "constant" and not options.warmup), "schedule", options.schedule,
                    '"constant", without warmup, for a meta_optimizer whose param groups have no lr')  # fmt: skip
            scheduled = options.rates(1) is not None  # trajectories then have the rates themselves
            lr = 1.0 if scheduled else options.lr
            self.rule = Rule.of(network, self.update.weights, lr, options.weight_decay)
            self.estimator = estimator(options, self.rule, self.update.trains)
            self.graphs, self._eager = Graphs(CudaCapture(self.device) if options.graphs else None), Graphs()
            pool = TrajectoryPool(self.rule, options.unroll, self.graphs)
            self.streams = Streams(self.tasks, options, pool, self.estimator.copies)
            self.validation = Validation(self.tasks, options, pool)
            self.weights = RunWeights(network)
            self.run = Run(self.tasks, options, self.update, self.weights, self.streams)
            self._meta_loss = self.update.weights.new_zeros(())  # of the window just run
            self._total = 1  # meta-steps that this fit is to end at

    @property
    def history(self) -> History:
        return self.run.history

    @property
    def meta_step(self) -> int:
        return self.run.meta_step

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
        self.update.check()
        with plain(self.device) as as_before, self._folder.held() if self._folder else nullcontext():
            others = self.weights.take_up()
            if others is not None:
                self._begin_from(others)
            try:
                interrupted = self._loop(meta_steps, max_seconds, on_step and _within(as_before, on_step))
            finally:  # whatever a task, on_step or a second Ctrl-C raises
                self.weights.lay_down()
        if interrupted:
            folder = self.options.checkpoint
            where = f"saved to {folder}; run the same command again to go on" if folder else (
                "the network holds the best weights so far; give checkpoint=FOLDER to be able to go on"
            )  # fmt: skip
            raise KeyboardInterrupt(f"stopped at meta-step {self.meta_step} of {meta_steps}: {where}")
        self._warn()
        return self.history

    def _begin_from(self, weights: Tensor) -> None:
        """Train these from now on: no average, score or trajectory of others counts."""
        self.weights.begin_from(weights)
        self.history.best_score = math.inf
        self.options.horizon.forget()
        self.streams.end_all()

    def _loop(self, meta_steps: int, max_seconds: float, on_step: Callable[[int], None] | None) -> bool:
        """The loop of :meth:`fit`; says whether Ctrl-C has ended it."""
        self._total, options, leads = meta_steps, self.options, ranks.rank() == 0
        if self._folder is not None and self.meta_step == 0:
            self.run.resume(self._folder)
        deadline = time.monotonic() + max_seconds
        history = self.history
        bar = progress_bar(options.progress and leads, meta_steps, history.meta_losses, history.validations)
        logs = tensorboard(options.log_dir if leads else None, self.meta_step)
        with DeferredInterrupt() as interrupt, logs as log, bar as show:

            def tell(doing: str) -> None:
                losses = self.history.meta_losses
                show(self.meta_step, losses[-1] if losses else math.nan, self.history.best_score, doing)

            if self._due(meta_steps):  # one that an exception has prevented
                self.validate(tell)
            while self.meta_step < meta_steps:
                if ranks.any_rank(interrupt.requested or time.monotonic() > deadline, self.device):
                    break
                try:
                    self.step()
                except BaseException:
                    self.streams.end_all()  # some have gone on, one of them stands within its window
                    raise
                if due := self._due(meta_steps):
                    self.validate(tell)
                loss = self.history.meta_losses[-1]
                log(self.meta_step, loss, self.history.validations[-1][1] if due else None)
                if self._folder is not None and self._folder.due(self.meta_step, options.checkpoint_every):
                    self.run.save(self._folder)
                show(self.meta_step, loss, self.history.best_score)
                if on_step:
                    on_step(self.meta_step)
        if self._folder is not None:
            self.run.save(self._folder)
        if self.meta_step < meta_steps and not interrupt.requested:
            self.validate()  # after saving: a run that goes on later is the same as one never stopped
        return interrupt.requested

    def _due(self, meta_steps: int) -> bool:
        """Whether there should be a validation of this meta-step, and is none."""
        last = self.history.validations[-1][0] if self.history.validations else 0
        step = self.meta_step
        return step > last and (step % self.options.validate_every == 0 or step == meta_steps)

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

    def validate(self, tell: Callable[[str], None] = lambda doing: None) -> None:
        """Score the averaged weights and keep them if they are the best; :meth:`fit` does when it is time.

        Args:
            tell: is told what is being done.
        """
        self.update.weights.copy_(self.weights.averaged)
        score = self.validation(tell)
        self.history.validations.append((self.meta_step, score))
        if score < self.history.best_score:
            self.history.best_score = score
            self.weights.keep_best()
        if self.options.horizon.validated(score):
            self._begin_from(self.weights.best)

    # ------------------------------------------------------------ one meta-step

    def step(self) -> None:
        """One window on every parallel trajectory, then one update of the network; the loop of :meth:`fit` is of it."""
        self.launch(self.meta_step / self._total)
        if self.graphs.capture is not None:
            self.streams.draw_ahead()  # while the device works
        # The one wait for the device. It cannot be put off: a trajectory that has diverged must not run on.
        *losses, norm = self.update.results.tolist()
        for slot, (stream, loss) in enumerate(zip(self.streams.running, losses, strict=True)):
            if stream.steps_left <= 0 or not math.isfinite(loss):
                self.streams.end(slot)  # at its horizon, or beyond use
        if not all(map(math.isfinite, [*losses, norm])):
            self.history.skipped += 1
        elif not self.update.skips:
            self.update.step()
        self.run.meta_step += 1
        self.weights.average(self.options.average, self.meta_step)
        self.history.meta_losses.append(sum(losses) / len(losses))

    def launch(self, fraction: float) -> None:
        """All of a meta-step that nobody waits for: windows, the mean over the ranks, and the update if it can be.

        Args:
            fraction: how much of the training is done, 0 to 1.
        """
        update = self.update
        update.begin()
        for slot in range(self.options.parallel):
            self._window(self.streams.in_slot(slot, fraction))
            update.results[slot].copy_(self._meta_loss)
        ranks.average_(update.gathered, update.results[:-1])
        # A meta-optimizer of one's own may have a rate of its own.
        if self.options.schedule != "constant" or self.options.warmup:
            update.set_lr(self.options.meta_rate(self.meta_step, fraction))
        if update.skips:
            run = self.graphs if update.capturable else self._eager
            run("update", update.measure_and_step)
        else:
            update.measure()

    def _window(self, stream: Stream) -> None:
        """Adds one window's share to the gradient, and leaves its meta-loss in its place."""
        estimator = self.estimator if stream.teacher is None else Imitation(self.rule, stream.teacher)
        length = min(self.options.unroll, stream.steps_left)
        run = self.graphs if estimator.capturable else self._eager
        run((stream.trajectory, length), partial(self._add, estimator.prepare(stream.trajectory, length)))

    def _add(self, estimate: Callable[[], Estimate]) -> None:
        meta_loss, gradient = estimate()
        self.update.add(gradient)
        self._meta_loss.copy_(meta_loss)


def _within(modes: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    """A caller's function, called in the caller's modes."""

    def call(*arguments):
        with modes():
            return function(*arguments)

    return call

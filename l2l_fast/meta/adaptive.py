"""The trainer of the online reading: it learns where an MLP starts, and the LSTM that changes it on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from l2l_fast import mlp
from l2l_fast.adaptive import AdaptiveMLP
from l2l_fast.checks import is_number, is_whole, require
from l2l_fast.config import weight_shapes
from l2l_fast.meta import seeds
from l2l_fast.meta.checkpoints import CheckpointFolder
from l2l_fast.meta.display import progress_bar
from l2l_fast.meta.identity import describe, describe_horizon
from l2l_fast.meta.interrupt import DeferredInterrupt
from l2l_fast.meta.online import OnlineBackpropagation, OnlineTrajectory, Perturbations, advance_
from l2l_fast.meta.options import COUNT, POSITIVE, TrainerOptions, one_of, option, takes
from l2l_fast.meta.run import History
from l2l_fast.meta.streams import Streams, float32_instances, task_list
from l2l_fast.meta.weights import RunWeights
from l2l_fast.modes import plain
from l2l_fast.tasks import Task

GRADIENTS = ("backpropagation", "es", "pes")
# What of the MetaTrainer's options has a meaning here.
TAKEN = (
    "unroll", "horizon", "instances", "parallel", "meta_lr", "schedule", "warmup", "objective", "clip", "average",
    "scaling", "validate_every", "validation_instances", "checkpoint", "checkpoint_every", "seed", "device", "progress",
)  # fmt: skip
OWN = ("gradient", "pairs", "sigma")


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions(TrainerOptions):
    """Options of :class:`AdaptiveTrainer`: some of the :class:`~l2l_fast.meta.MetaTrainer`'s, and these."""

    gradient: str = option(
        "backpropagation", one_of(GRADIENTS),
        """"backpropagation" through each window; "pes", persistent evolution strategies, forward alone and without a
        bias of truncation; "es", the same within each window.""",
    )  # fmt: skip
    pairs: int = option(4, COUNT, "of perturbed copies, for the last two.")
    sigma: float = option(0.01, POSITIVE, "standard deviation of the perturbations.")

    @property
    def unheeded(self) -> list[str]:
        """Options of the MetaTrainer's own estimators; ``sigma`` is of both."""
        return ["perturbations", "perturbed_share"]

    def __post_init__(self) -> None:
        super().__post_init__()
        for one in fields(self):
            value, default = getattr(self, one.name), one.metadata["kind"].convert(one.default)
            # Graphs follow from the device.
            fits = one.name in (*TAKEN, *OWN, "graphs") or value == default
            require(fits, one.name, value, f"{default!r} here, as it has no meaning for an AdaptiveMLP")


class AdaptiveTrainer:
    r"""Trains an :class:`~l2l_fast.AdaptiveMLP`: phi_0, where the MLP starts, and psi, the LSTM that changes it.

    (phi_0, psi) <- (phi_0, psi) - Adam(d/d(phi_0, psi) sum_{t in window} f_t(theta[t]))

    One meta-step is one window on each of ``parallel`` trajectories, as :class:`~l2l_fast.meta.MetaTrainer` has them;
    :mod:`l2l_fast.meta.online` derives the gradient. A module whose parameters are frozen by ``requires_grad_(False)``
    stays: with the LSTM frozen at its head of zeros the MLP learns alone.

    Args:
        network: the :class:`~l2l_fast.AdaptiveMLP`, float32; trained in place.
        tasks: a task or its name, or a sequence of them to mix.
        gradient: "backpropagation" through each window; "pes", persistent evolution strategies, forward alone and
            without a bias of truncation; "es", the same within each window.
        pairs: of perturbed copies, for the last two.
        sigma: standard deviation of the perturbations.
        options: any of the :class:`~l2l_fast.meta.MetaTrainer`'s ``unroll``, ``horizon``, ``instances``, ``parallel``,
            ``meta_lr``, ``schedule``, ``warmup``, ``objective``, ``clip``, ``average``, ``scaling``,
            ``validate_every``, ``validation_instances``, ``checkpoint``, ``checkpoint_every``, ``seed``, ``device`` and
            ``progress``.

    Attributes:
        history: what the run saw.
        meta_step: meta-steps made.

    Raises:
        ValueError: an option out of its range, or without a meaning here; the message names it.
        TypeError: there is no such option; the message names the nearest.

    Example:
        >>> import l2l_fast as l2l
        >>> network = l2l.AdaptiveMLP()
        >>> trainer = l2l.AdaptiveTrainer(network, "quadratic", instances=8, horizon=40, progress=False)
        >>> len(trainer.fit(meta_steps=4).meta_losses)
        4
    """

    @takes(AdaptiveOptions)
    def __init__(
        self, network: AdaptiveMLP, tasks: Task | str | Sequence[Task | str], options: AdaptiveOptions
    ) -> None:
        require(isinstance(network, AdaptiveMLP), "network", type(network).__name__, "an AdaptiveMLP")
        dtype = network.mlp.head.weight.dtype
        require(dtype == torch.float32, "network", dtype, "of dtype float32, as network.float() makes it")
        self.tasks = task_list(tasks)
        self.options, self.device, self.network = options, options.device, network.to(options.device)
        self._folder = None if options.checkpoint is None else CheckpointFolder(options.checkpoint, self.device)
        self.estimator = (
            OnlineBackpropagation(options.objective) if options.gradient == "backpropagation" else
            Perturbations(options.objective, options.pairs, options.sigma, options.gradient == "pes", options.seed)
        )  # fmt: skip
        self.history, self.meta_step = History(), 0
        with plain(self.device):
            self.weights = RunWeights(network)
            self._flat = self.weights.read().requires_grad_()
            flags = [torch.full_like(one.detach(), one.requires_grad).view(-1) for one in self._ordered()]
            self._trained = torch.cat(flags)  # 1 where a weight is trained, 0 where it is frozen
            require(bool(self._trained.any()), "network", "one whose parameters all are frozen", "one to train")
            self.meta_optimizer = torch.optim.Adam([self._flat], lr=options.meta_lr)
            self.streams = Streams(self.tasks, options, self)

    def _ordered(self) -> list[torch.nn.Parameter]:
        """The parameters in the order of the flat weights."""
        network = self.network
        first = [network.mlp.get_parameter(name) for name in mlp.weight_shapes(network.mlp.hidden_size)]
        return first + [network.lstm.get_parameter(name) for name in weight_shapes(network.lstm.config)]

    # ------------------------------------------------------------ what Streams asks of a pool

    def start(self, kind, instances, scaling=None, schedule=None, copies=1) -> OnlineTrajectory:
        """A trajectory at its start."""
        return OnlineTrajectory(instances, self.network, scaling, self.estimator.copies)

    def leave(self, kind, trajectory) -> None:
        """Of one that has ended nothing is kept."""

    # ------------------------------------------------------------ the loop

    def fit(
        self, meta_steps: int, *, max_seconds: float = math.inf, on_step: Callable[[int], None] | None = None
    ) -> History:
        """Train until ``meta_steps`` meta-steps have been made in all, and leave the best weights in the network.

        Ctrl-C stops after the meta-step in progress; with a ``checkpoint`` folder nothing is lost, and the same call
        goes on from there.

        Args:
            meta_steps: in all, those of earlier calls and of a resumed checkpoint included.
            max_seconds: stop earlier after this time.
            on_step: called with the number of meta-steps done, after each.

        Raises:
            ValueError: an argument out of its range, or a ``checkpoint`` of a run with other options or tasks; nothing
                is changed then.
            RuntimeError: another run is using the ``checkpoint`` folder; nothing is changed.
            KeyboardInterrupt: after Ctrl-C, once everything is saved.
        """
        require(is_whole(meta_steps, 1), "meta_steps", meta_steps, "an int of at least 1")
        require(max_seconds == math.inf or is_number(max_seconds), "max_seconds", max_seconds, "a number")
        require(on_step is None or callable(on_step), "on_step", on_step, "a function of the meta-step, or None")
        with plain(self.device) as as_before, self._folder.held() if self._folder else nullcontext():
            others = self.weights.take_up()
            if others is not None:
                self.weights.begin_from(others)
                self.history.best_score = math.inf
                self.streams.end_all()
            if self._folder is not None and self.meta_step == 0:
                self._resume()
            with torch.no_grad():
                self._flat.copy_(self.weights.read())
            try:
                interrupted = self._loop(meta_steps, max_seconds, as_before, on_step)
            finally:
                self.weights.lay_down()
        if interrupted:
            where = f"saved to {self.options.checkpoint}; run the same again to go on" if self._folder else (
                "the network holds the best weights so far; give checkpoint=FOLDER to be able to go on"
            )  # fmt: skip
            raise KeyboardInterrupt(f"stopped at meta-step {self.meta_step} of {meta_steps}: {where}")
        return self.history

    def _loop(self, meta_steps: int, max_seconds: float, as_before, on_step) -> bool:
        options, deadline = self.options, time.monotonic() + max_seconds
        bar = progress_bar(options.progress, meta_steps, self.history.meta_losses, self.history.validations)
        with DeferredInterrupt() as interrupt, bar as show:
            while self.meta_step < meta_steps:
                if interrupt.requested or time.monotonic() > deadline:
                    break
                try:
                    self.step(self.meta_step / meta_steps)
                except BaseException:
                    self.streams.end_all()
                    raise
                if self.meta_step % options.validate_every == 0 or self.meta_step == meta_steps:
                    self.validate()
                if self._folder is not None and self._folder.due(self.meta_step, options.checkpoint_every):
                    self._save()
                show(self.meta_step, self.history.meta_losses[-1], self.history.best_score)
                if on_step:
                    with as_before():
                        on_step(self.meta_step)
        if self._folder is not None:
            self._save()
        return interrupt.requested

    def step(self, fraction: float) -> None:
        """One window on every trajectory, then one update of the network.

        Args:
            fraction: how much of the training is done, 0 to 1.
        """
        options, losses = self.options, []
        weights, gradient = self._flat.detach().clone(), torch.zeros_like(self._flat)
        for slot in range(options.parallel):
            stream = self.streams.in_slot(slot, fraction)
            length = min(options.unroll, stream.steps_left)
            estimate = self.estimator.window(stream.trajectory, weights, length)
            losses.append(estimate.meta_loss.item())
            gradient += estimate.gradient / options.parallel
            if stream.steps_left <= 0 or not math.isfinite(losses[-1]):
                self.streams.end(slot)
        gradient *= self._trained
        norm = gradient.norm().item()
        if all(map(math.isfinite, [*losses, norm])):
            self._update(gradient, norm, fraction)
        else:
            self.history.skipped += 1
        self.meta_step += 1
        self.weights.average(options.average, self.meta_step)
        self.history.meta_losses.append(sum(losses) / len(losses))

    def _update(self, gradient: Tensor, norm: float, fraction: float) -> None:
        options = self.options
        if options.clip is not None:
            gradient = gradient * min(1.0, options.clip / max(norm, 1e-30))
        self.meta_optimizer.param_groups[0]["lr"] = options.meta_rate(self.meta_step, fraction)
        self._flat.grad = gradient
        self.meta_optimizer.step()
        self.network.load_flat_weights_(self._flat.detach())

    def validate(self) -> None:
        """Score the averaged weights, by the mean of f_t / f_0, and keep them if they are the best."""
        scores = [self._score(index) for index in range(len(self.tasks))]
        score = sum(scores) / len(scores)
        score = score if math.isfinite(score) else math.inf
        self.history.validations.append((self.meta_step, score))
        if score < self.history.best_score:
            self.history.best_score = score
            self.weights.keep_best()

    def _score(self, index: int) -> float:
        options, horizon = self.options, self.options.horizon.validation
        chosen = [seeds.seed(seeds.VALIDATION, options.seed, index, i) for i in range(options.validation_instances)]
        trajectory = OnlineTrajectory(float32_instances(self.tasks[index], chosen, options.device), self.network)
        losses = advance_(trajectory, self.weights.averaged[None], trajectory.next(horizon), horizon)
        return (losses / trajectory.first_losses).mean().item()

    # ------------------------------------------------------------ what is saved

    def _settings(self) -> dict:
        """Everything that must be the same for a resumed run to be the same run."""
        settings = {name: value for name, value in self.options.deciding().items()
                    if name in (*TAKEN, *OWN)}  # fmt: skip
        settings["horizon"], settings["network"] = describe_horizon(self.options.horizon), self.network.rule
        settings["trained"] = "".join(str(int(flag)) for flag in self._trained)
        return settings | {f"tasks[{k}]": describe(task, self.device) for k, task in enumerate(self.tasks)}

    def _save(self) -> None:
        self._folder.write({
            "settings": self._settings(), "meta_step": self.meta_step, "started": self.streams.started,
            "weights": self._flat.detach(), "best": self.weights.best, "averaged": self.weights.averaged,
            "meta_optimizer": self.meta_optimizer.state_dict(), "streams": self.streams.state_dict(),
            "horizon": self.options.horizon.state_dict(), "history": vars(self.history),
        })  # fmt: skip

    def _resume(self) -> None:
        saved = self._folder.read(self._settings())
        if saved is None:
            return
        try:
            history, streams = History(**saved["history"]), self.streams.restored(saved["streams"])
            weights = [saved[name] for name in ("weights", "averaged", "best")]
            for flat in weights:
                require(flat.shape == self._flat.shape, "weights", flat.shape, str(self._flat.shape))
            numbers = saved["meta_step"], saved["started"]
            self.meta_optimizer.load_state_dict(saved["meta_optimizer"])
        except Exception as error:
            self.meta_optimizer = torch.optim.Adam([self._flat], lr=self.options.meta_lr)
            raise ValueError(
                f"{self._folder.path} is damaged ({type(error).__name__}: {error}): give another checkpoint folder"
            ) from None
        self.weights.restore(*weights)
        self.meta_step, self.streams.started = numbers
        self.history, self.streams.running = history, streams

"""The options of the meta-trainer, each said once: its name, type, default, check and meaning.

The checks, the signature and the docstring of :class:`~l2l_fast.meta.MetaTrainer` follow from here, and so does what a
checkpoint has to agree with.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch

from l2l_fast.checks import is_number, is_whole, require, usable_device
from l2l_fast.meta import seeds
from l2l_fast.meta.curricula import Horizon
from l2l_fast.meta.unroll import OBJECTIVES
from l2l_fast.networks import CoordinatewiseLSTM
from l2l_fast.schedule import warm_cosine

SCHEDULES = ("constant", "cosine")
META_OPTIMIZERS = ("adam", "soap")
ESTIMATORS = ("backpropagation", "es", "pes", "es+backpropagation", "pes+backpropagation")
MAX_SCALING = 10.0  # factors from 5e-5 to 2e4; far beyond it, losses and gradients leave float32

MakeOptimizer = Callable[[list], torch.optim.Optimizer]


class Kind(NamedTuple):
    """What an option may be.

    ``convert`` gives the value that is kept, of the types that a checkpoint can hold: NumPy's numbers could be saved in
    one, but not loaded from it.
    """

    good: Callable[[Any], bool]
    allowed: str
    convert: Callable[[Any], Any] = lambda value: value


def _or_none(kind: Kind, allowed: str | None = None) -> Kind:
    return Kind(
        lambda value: value is None or kind.good(value),
        allowed or f"{kind.allowed} or None",
        lambda value: None if value is None else kind.convert(value),
    )


def _numbers(value: object) -> list:
    return list(value) if isinstance(value, Iterable) else [value]


def _share(value: object) -> tuple:
    return tuple(value) if isinstance(value, Iterable) else (value, value)


def one_of(names: Sequence[str]) -> Kind:
    return Kind(lambda value: isinstance(value, str) and value in names, f"one of {names}")


COUNT = Kind(lambda value: is_whole(value, 1), "an int of at least 1")
COUNT_FROM_0 = Kind(lambda value: is_whole(value, 0), "an int of at least 0")
POSITIVE = Kind(lambda value: is_number(value) and value > 0, "a positive number", float)
NOT_NEGATIVE = Kind(lambda value: is_number(value) and value >= 0, "a number of at least 0", float)
BELOW_1 = Kind(lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)", float)
SCALING = Kind(lambda value: is_number(value) and 0 <= value <= MAX_SCALING, f"in [0, {MAX_SCALING:g}]", float)
FLAG = Kind(lambda value: isinstance(value, bool | np.bool_), "True or False", bool)
FOLDER = Kind(lambda value: isinstance(value, str | PathLike), "a folder", Path)
HORIZON = Kind(
    lambda value: isinstance(value, Horizon) or is_whole(value, 1),
    "an int of at least 1, or a curriculum of l2l_fast.meta.curricula",
    lambda value: value if isinstance(value, Horizon) else Horizon(value),
)
META_OPTIMIZER = Kind(
    lambda value: value in META_OPTIMIZERS if isinstance(value, str) else callable(value),
    f"one of {META_OPTIMIZERS}, or a callable",
)
WEIGHTS = Kind(  # rounded to float32, in which they are used
    lambda value: all(map(is_number, _numbers(value))),
    "finite numbers",
    lambda value: torch.tensor(_numbers(value), dtype=torch.float32, device="cpu").tolist(),
)
SHARE = Kind(
    lambda value: len(_share(value)) == 2 and all(is_number(part) and 0 <= part <= 1 for part in _share(value)),
    "in [0, 1], or two numbers that are",
    lambda value: tuple(map(float, _share(value))),
)
RATES = Kind(
    lambda value: (
        len(_share(value)) == 2
        and all(is_number(part) and part > 0 for part in _share(value))
        and _share(value)[0] <= _share(value)[1]
    ),
    "a positive number, or two with the lower first",
    lambda value: float(value) if is_number(value) else tuple(map(float, value)),
)
EVEN = Kind(lambda value: is_whole(value, 2) and value % 2 == 0, "an even int of at least 2")
PERTURBED_SHARE = Kind(
    lambda value: value == "variance" if isinstance(value, str) else is_number(value) and 0 <= value <= 1,
    'in [0, 1], or "variance"',
    lambda value: value if isinstance(value, str) else float(value),
)
FUNCTION = Kind(callable, "a function that makes an optimizer")
DEVICE = Kind(lambda value: True, "a device", usable_device)


def option(default: object, kind: Kind, meaning: str, *, decides: bool = True) -> Any:
    """A field; ``decides`` says whether a run's numbers depend on it."""
    meaning = " ".join(meaning.split())
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "decides": decides})


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Options of :class:`~l2l_fast.meta.MetaTrainer`, checked and converted when they are made."""

    unroll: int = option(20, COUNT, "steps per window, T.")
    horizon: int | Horizon = option(
        100, HORIZON, "steps per trajectory; an int, or a curriculum of :mod:`l2l_fast.meta.curricula`."
    )
    instances: int = option(1, COUNT, "of the task, side by side in one trajectory, B.")
    coordinates: int | None = option(
        None, _or_none(COUNT, "an int of at least 1, or None"),
        """how many of a trajectory's are drawn in each window to stand for all in the meta-gradient, without bias
        (:func:`~l2l_fast.meta.sampling.sample_coordinates`); None for all. 512 of an MNIST network's 15,910 leave an
        error of a few per cent, less than batches do, in half of the time.""",
    )  # fmt: skip
    parallel: int = option(
        1, COUNT, "trajectories, each with its own task and horizon, that one meta-step averages over."
    )
    meta_lr: float = option(3e-3, POSITIVE, "learning rate of the meta-optimizer.")
    meta_optimizer: str | MakeOptimizer = option(
        "adam", META_OPTIMIZER,
        """"adam"; "soap", Adam in the eigenbasis of the meta-gradients' covariance
        (:class:`~l2l_fast.meta.soap.Soap`), which needs fewer meta-steps; or a callable that makes one from a list of
        the network's parameters, those that are not frozen.""",
    )  # fmt: skip
    schedule: str = option(
        "constant", one_of(SCHEDULES),
        """of the meta learning rate over ``fit``'s steps: "constant", or "cosine" down to a hundredth.""",
    )  # fmt: skip
    warmup: int = option(
        0, COUNT_FROM_0,
        """meta-steps over which the rate comes up linearly. A trained network that goes on with a new meta-optimizer
        needs them: the first updates follow a gradient or two, at full length.""",
    )  # fmt: skip
    objective: str = option("sum", one_of(OBJECTIVES), """"sum", "relative" (f_t / f_0) or "log".""")
    loss_weights: Sequence[float] | None = option(
        None, _or_none(WEIGHTS, "finite numbers"), "w, ``unroll`` numbers; ones if None."
    )
    clip: float | None = option(1.0, _or_none(POSITIVE), "largest norm of the meta-gradient; None for no clipping.")
    clip_windows: float | None = option(
        None, _or_none(POSITIVE),
        """largest norm of each window's meta-gradient (each rank's share of it), before the mean over ``parallel`` of
        them; None for no clipping. With second derivatives a trajectory's first window often has a hundred times the
        norm of a later one, which ``clip`` alone would then silence.""",
    )  # fmt: skip
    average: float = option(
        0.0, BELOW_1,
        """decay rate of a running average of the weights, which is what validation sees and ``fit`` leaves in the
        network; 0 for none. Meta-gradients are noisy, and an average over the last 50 weights (0.98) is less so.""",
    )  # fmt: skip
    scaling: float = option(
        0.0, SCALING,
        """r of the random scaling theta -> c theta, c = exp(U(-r, r)) for each coordinate; 0 for none, at most 10.""",
    )  # fmt: skip
    imitation: float | tuple[float, float] = option(
        0.0, SHARE,
        """share of trajectories led by ``teacher``, whose updates the network then fits; a number, or (first, last) for
        a share that changes linearly over ``fit``.""",
    )  # fmt: skip
    teacher: MakeOptimizer | None = option(
        None, _or_none(FUNCTION, "a function that makes an optimizer, or None"),
        """makes the teacher from a list of parameters; ``torch.optim.Adam(lr=0.01)`` if None. With a ``checkpoint`` it
        is known, as a ``meta_optimizer`` of one's own is, by its class, its options and its first steps on a copy of
        such parameters.""",
    )  # fmt: skip
    lr: float | tuple[float, float] | None = option(
        None, _or_none(RATES),
        """of the learned update, as :class:`LSTMOptimizer` has it; (low, high): drawn log-uniformly between them
        for each trajectory, validation having their geometric mean; the network's ``default_lr`` if None.""",
    )  # fmt: skip
    lr_schedule: str = option(
        "constant", one_of(SCHEDULES),
        """of ``lr`` along a trajectory: "constant", or "cosine", up over the first twentieth of its horizon and down to
        0 at the end.""",
    )  # fmt: skip
    weight_decay: float = option(0.0, NOT_NEGATIVE, "of the learned update, as :class:`LSTMOptimizer` has it.")
    second_derivatives: bool = option(
        False, FLAG,
        """keep the gradients' dependence on theta; needs twice differentiable tasks, every coordinate. Slower to learn
        at first, and what moves a network on that first-order training has brought to rest.""",
    )  # fmt: skip
    estimator: str = option(
        "backpropagation", one_of(ESTIMATORS),
        """of the meta-gradient: "backpropagation", truncated; "es", antithetic evolution strategies, of each window by
        itself; "pes", persistent ones, whose copies of the network go on from window to window, without bias by
        truncation (:class:`~l2l_fast.meta.estimators.EvolutionStrategies`); or one of them mixed with backpropagation,
        "es+backpropagation" or "pes+backpropagation".""",
    )  # fmt: skip
    perturbations: int = option(
        16, EVEN, "perturbed copies of the network for each instance, in pairs, with an estimator that has them."
    )
    sigma: float = option(0.01, POSITIVE, "standard deviation of the perturbations.")
    perturbed_share: float | str = option(
        0.5, PERTURBED_SHARE,
        """of the perturbed gradient where it is mixed with backpropagation's; "variance" weighs the two by the inverse
        of their variances, each weight by itself.""",
    )  # fmt: skip
    validate_every: int = option(
        100, COUNT, "meta-steps between validations; the weights with the best score are kept."
    )
    validation_instances: int = option(8, COUNT, "instances of each task in a validation, on seeds of their own.")
    checkpoint: str | PathLike | None = option(
        None, _or_none(FOLDER),
        """folder for exact resume; an unfinished run found there is continued, if all that decides its numbers is the
        same: the tasks and every option but {free}. One run uses a folder at a time.""",
        decides=False,
    )  # fmt: skip
    checkpoint_every: int = option(100, COUNT, "meta-steps between checkpoints, at most a minute.", decides=False)
    log_dir: str | PathLike | None = option(None, _or_none(FOLDER), "folder for TensorBoard.", decides=False)
    seed: int = option(0, COUNT_FROM_0, "of everything random.")
    device: torch.device | str = option("cpu", DEVICE, "where to train; for each rank a GPU of its own.", decides=False)
    graphs: bool | None = option(
        None, _or_none(FLAG),
        """capture each window and the meta-update in CUDA graphs and replay them; None does where the device is a GPU.
        A small problem waits for launches, hundreds a window; a graph is one. A task whose loss waits for the device or
        copies to it needs False. Eager all the same: imitation, second derivatives, windows of rare lengths, and a
        ``meta_optimizer`` that is not made with ``fused=True, capturable=True``.""",
        decides=False,
    )  # fmt: skip
    progress: bool = option(True, FLAG, "show a progress bar (needs rich).", decides=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), one.metadata["kind"]
            require(kind.good(value), one.name, value, kind.allowed)
            self._keep(one.name, kind.convert(value))
        for one in fields(self):
            given = one.name in self.unheeded and getattr(self, one.name) != one.default
            require(not given, one.name, getattr(self, one.name), f"left out with estimator={self.estimator!r}")
        second, alone = self.second_derivatives, self.estimator == "backpropagation"
        require(alone or not second, "second_derivatives", second, f"False with estimator={self.estimator!r}")
        sampled = alone or self.mixes or self.coordinates is None
        require(sampled, "coordinates", self.coordinates, f"None with estimator={self.estimator!r}")
        require(not (second and self.coordinates), "coordinates", self.coordinates, "None with second_derivatives")
        require(not (second and any(self.imitation)), "imitation", self.imitation, "0 with second_derivatives=True")
        length = self.loss_weights is None or len(self.loss_weights) == self.unroll
        require(length, "loss_weights", self.loss_weights, f"of length unroll = {self.unroll}")
        on_gpu = self.device.type == "cuda"
        require(on_gpu or not self.graphs, "graphs", self.graphs, f"False or None on {self.device}")
        self._keep("graphs", on_gpu if self.graphs is None else self.graphs)

    @property
    def mixes(self) -> bool:
        """Whether there are two estimates of the meta-gradient."""
        return self.estimator.endswith("+backpropagation")

    @property
    def unheeded(self) -> list[str]:
        """Options that the estimator does not ask for."""
        perturbed = [] if self.estimator != "backpropagation" else ["perturbations", "sigma"]
        return perturbed + ([] if self.mixes else ["perturbed_share"])

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def of(self, network: CoordinatewiseLSTM) -> TrainerOptions:
        """The same for a network, whose ``default_lr`` is the rate where none is given.

        Raises:
            ValueError: the network's options and these do not go together.
        """
        imitates = any(self.imitation) and network.orthogonalize
        require(not imitates, "imitation", self.imitation, "0 for a network with orthogonalize")
        second = self.second_derivatives and network.input_rms is not None
        require(not second, "second_derivatives", True, "False for a network with input_rms")
        return replace(self, lr=network.default_lr) if self.lr is None else self

    def peak(self, number: int | None = None) -> float:
        """The highest rate of a trajectory, by its number in the run, or of those that validate."""
        if not isinstance(self.lr, tuple):
            return self.lr
        low, high = map(math.log, self.lr)
        part = 0.5 if number is None else np.random.default_rng((seeds.RATE, self.seed, number)).random()
        return math.exp(low + part * (high - low))

    def rates(self, horizon: int, number: int | None = None) -> Callable[[int], float] | None:
        """The rate of each step, counted from 0, of a trajectory; None where it is the same for all of them."""
        peak = self.peak(number)
        if self.lr_schedule == "constant":
            return (lambda step: peak) if isinstance(self.lr, tuple) else None
        return partial(warm_cosine, peak, horizon)

    def meta_rate(self, meta_step: int, fraction: float) -> float:
        """The meta learning rate of a meta-step, counted from 0, when ``fraction`` of the training is done."""
        rate = self.meta_lr * min(1.0, (meta_step + 1) / (self.warmup + 1))
        if self.schedule == "cosine":
            rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, fraction)))
        return rate

    def deciding(self) -> dict:
        """Those that a run's numbers depend on, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["decides"]}


# ---------------------------------------------------------------- on a function that takes them

P, Made, First, Second = ParamSpec("P"), TypeVar("Made"), TypeVar("First"), TypeVar("Second")


def takes(options: Callable[P, TrainerOptions]):
    """A decorator of ``__init__(self, network, tasks, options)``, which then takes the options as keywords.

    The signature, for people, their editors and ``inspect``, is that of the two together; a keyword that there is not
    is refused with the nearest one.
    """
    names = [one.name for one in fields(options)]

    def decorate(
        function: Callable[[Made, First, Second, TrainerOptions], None],
    ) -> Callable[Concatenate[Made, First, Second, P], None]:
        @functools.wraps(function)
        def init(self, network, tasks, **given):
            for name in given:
                if name not in names:
                    close = difflib.get_close_matches(name, names, n=1)
                    hint = f": did you mean {close[0]!r}?" if close else ""
                    raise TypeError(f"{type(self).__name__}() has no option {name!r}{hint}")
            function(self, network, tasks, options(**given))

        own = list(inspect.signature(function).parameters.values())[:3]
        keywords = inspect.signature(options).parameters.values()
        init.__signature__ = inspect.Signature([*own, *keywords], return_annotation=None)
        return init

    return decorate


def documented(cls: type) -> type:
    """Puts the options' meanings in the place of ``{options}`` in a class's docstring."""
    free = [one.name for one in fields(TrainerOptions) if not one.metadata["decides"]]
    listed = f"{', '.join(f'``{name}``' for name in free[:-1])} and ``{free[-1]}``"
    entries = [f"{one.name}: {one.metadata['meaning'].replace('{free}', listed)}" for one in fields(TrainerOptions)]
    wrapped = [
        textwrap.fill(entry, 120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_long_words=False)
        for entry in entries
    ]
    cls.__doc__ = cls.__doc__.replace("        {options}", "\n".join(wrapped))
    return cls

"""Where a run of meta-training stands: what is saved of it, and how a run goes on from that."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from l2l_fast.config import split_weights
from l2l_fast.meta import ranks
from l2l_fast.meta.checkpoints import CheckpointFolder
from l2l_fast.meta.identity import describe, describe_horizon, describe_optimizer
from l2l_fast.meta.options import MakeOptimizer, TrainerOptions
from l2l_fast.meta.soap import Soap
from l2l_fast.meta.streams import Streams, teacher_maker
from l2l_fast.meta.update import MetaUpdate
from l2l_fast.meta.weights import RunWeights
from l2l_fast.networks import SURROUNDINGS
from l2l_fast.tasks import Task


@dataclass
class History:
    """What a meta-training run saw.

    Attributes:
        meta_losses: one per meta-step, the mean over the parallel trajectories.
        validations: (meta-step, score) pairs; lower is better.
        best_score: the lowest score, that of the weights which ``fit`` leaves in the network.
        skipped: meta-steps whose losses or gradient were not finite; the network was left as it was.
    """

    meta_losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_score: float = math.inf
    skipped: int = 0


@dataclass
class Run:
    """All that changes while a network is trained.

    Attributes:
        tasks, options: what decides the run's numbers.
        update: the meta-optimizer and the network.
        weights: under training, averaged and best.
        streams: the trajectories that are under way.
        history: what was seen.
        meta_step: meta-steps made.
    """

    tasks: Sequence[Task]
    options: TrainerOptions
    update: MetaUpdate
    weights: RunWeights
    streams: Streams
    history: History = field(default_factory=History)
    meta_step: int = 0

    @cached_property
    def settings(self) -> dict:
        """Everything that must be the same for a resumed run to be the same run, as it is before the run."""
        options, network, settings = self.options, self.update.network, self.options.deciding()
        # A name and the other options say everything; what a callable makes has to be looked at.
        if not isinstance(options.meta_optimizer, str):
            settings["meta_optimizer"] = describe_optimizer(options.meta_optimizer, self.update.parameters)
        led, starts = any(options.imitation), [self.weights.read()[None]]
        settings["teacher"] = describe_optimizer(teacher_maker(options), starts) if led else None
        settings["horizon"], settings["imitation"] = describe_horizon(options.horizon), list(options.imitation)
        settings |= {f"tasks[{number}]": describe(task, options.device) for number, task in enumerate(self.tasks)}
        *config, linear_path = network.config
        settings["network"], settings["update_rms"] = config, network.update_rms
        # What earlier versions had none of is named where it is used, so that their checkpoints go on.
        if settings["lr_schedule"] == "constant":
            del settings["lr_schedule"]
        for name in options.unheeded + ["estimator"] * (options.estimator == "backpropagation"):
            del settings[name]
        settings |= {
            name: getattr(network, name) for name in SURROUNDINGS if name != "update_rms" and getattr(network, name)
        }
        settings |= {"linear_path": True} if linear_path else {}
        settings["frozen"], settings["ranks"] = self.update.frozen, ranks.world()
        return settings

    def save(self, folder: CheckpointFolder) -> None:
        """Put what the run needs to go on into the folder, from all ranks."""
        every_rank, saved = ranks.gather(self.streams.state_dict(), self.options.device), None
        if ranks.rank() == 0:
            saved = {
                "settings": self.settings,
                "meta_step": self.meta_step,
                "started": self.streams.started,
                "weights": self.weights.read(),
                "best": self.weights.best,
                "averaged": self.weights.averaged,
                "meta_optimizer": self.update.optimizer.state_dict(),
                "horizon": self.options.horizon.state_dict(),
                "mixture": self.update.mixture and self.update.mixture.state_dict(),
                "streams": every_rank,
                "history": vars(self.history),
            }
        folder.write(saved)

    def resume(self, folder: CheckpointFolder) -> None:
        """Go on from the checkpoint if there is one, or leave everything as it is.

        Raises:
            ValueError: the checkpoint is of another run, or damaged; the message says how.
        """
        saved, horizon = folder.read(self.settings), self.options.horizon
        if saved is None:
            return
        before, refusal = (self.update.optimizer.state_dict(), horizon.state_dict()), None
        mixed = self.update.mixture and copy.deepcopy(self.update.mixture.state_dict())
        try:
            weights = [saved[name] for name in ("weights", "averaged", "best")]
            for flat in weights:
                split_weights(flat, self.update.network.config)
            numbers, history = (saved["meta_step"], saved["started"]), History(**saved["history"])
            streams = self.streams.restored(saved["streams"][ranks.rank()])
            horizon.load_state_dict(saved["horizon"])
            if self.update.mixture is not None:
                self.update.mixture.load_state_dict(saved["mixture"])
            self.update.load_state_dict(saved["meta_optimizer"])
        except Exception as error:
            self.update.load_state_dict(before[0])
            horizon.load_state_dict(before[1])
            if mixed is not None:
                self.update.mixture.load_state_dict(mixed)
            refusal = ValueError(
                f"{folder.path} is damaged ({type(error).__name__}: {error}): give another checkpoint folder"
            )
        ranks.raise_together(refusal, self.options.device)
        self.weights.restore(*weights)
        self.meta_step, self.streams.started = numbers
        self.history, self.streams.running = history, streams


def meta_optimizer_maker(options: TrainerOptions) -> MakeOptimizer:
    """What makes the meta-optimizer."""
    makers: dict[str, Callable] = {
        "adam": partial(torch.optim.Adam, lr=options.meta_lr, fused=True, capturable=options.graphs),
        "soap": partial(Soap, lr=options.meta_lr),
    }
    named = isinstance(options.meta_optimizer, str)
    return makers[options.meta_optimizer] if named else options.meta_optimizer

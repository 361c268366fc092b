"""One training step after another, with the validation and the checkpoint between them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.loader import Batch
from net.layers import Array, fuse
from net.network import Descent, prediction, training_step
from pipeline.progress import Progress
from pipeline.ranks import Ranks
from stages.batches import Part
from stages.eval import accuracy, evaluate
from stages.losses import Losses
from stages.setup import decays, jittered, learning_rates, preparation
from stages.start import Begun, State, Training


@dataclass(frozen=True)
class Records:
    """What of a run outlives its process: lines of metrics, and checkpoints. Only the first rank keeps any."""

    write: Callable[[dict[str, Any]], None]
    save: Callable[[State, dict[str, Any]], None]


class Trainer:
    """The state of a training run, and what can be done with it."""

    def __init__(self, training: Training, begun: Begun, records: Records, progress: Progress, last: int) -> None:
        self.state = begun.state
        self._config, self._dataset, self._ranks = training.config, training.dataset, training.ranks
        self._plan, self._steps_per_epoch = training.plan, training.plan.steps_per_epoch
        self._ops, self._reduce, self._layers = begun.ops, begun.reduce, fuse(training.layers, begun.ops)
        self._records, self._progress = records, progress
        self._losses = Losses(training, begun.ops, records.write, progress, last)
        self._names = list(self.state.parameters)
        frozen = frozenset(name for name in self._names if name.split(".")[0] in self._config.train.frozen)
        self._descent = Descent(self._config.train.momentum, decays(self._config, self._names), frozen)
        self._function: Callable[[dict[str, Array]], Array] | None = None
        self._jittered: bool | None = None

    def step(self, batch: Batch) -> None:
        """Start the step of this batch, then look at the loss of the one before."""
        epoch, part = batch.number // self._steps_per_epoch, self._plan.part(batch.number)
        arrays = {
            **batch.arrays,
            "rates": learning_rates(self._config, self._names, epoch),
            "step": np.array([batch.number], dtype=np.uint64),
            **_place(part, self._ranks),
        }
        # A device that exchanges gradients by itself waits for the other ranks, and the host for the device: here, and
        # where a loss is read.
        with self._ranks.watched():
            inputs = self._ops.upload(arrays)
        loss = self._step_function(epoch)(inputs)
        self._losses.note(batch.number + 1, epoch, loss, part, batch.waited)
        self.state.step = batch.number + 1
        self._progress.advance(1)

    def validate(self) -> dict[str, float]:
        """Accuracy and loss on the validation pictures, centre view, at the end of an epoch."""
        self._finish_steps()
        ops, config = self._ops, self._config
        prepared = preparation(config, self._dataset.mean, ops, jittered=False)
        predict = prediction(ops, self._layers, self.state.parameters, prepared, views=1)
        result = evaluate(ops, predict, self._dataset.val, config, config.eval.batch_size, 1, ranks=self._ranks)
        epochs = self.state.step // self._steps_per_epoch
        scores = {"top1": result.top1, "top5": result.top5, "validation_loss": float(result.loss.mean())}
        self._records.write({"step": self.state.step, "epochs_done": epochs, **scores, "seconds": result.seconds})
        self._progress.say(
            f"epoch {epochs} done: validation {accuracy(result, len(self._dataset.classes))}, "
            f"loss {scores['validation_loss']:.4f}"
        )
        self._losses.restart_clock()
        return scores

    def save(self, header: dict[str, Any]) -> None:
        """Write a checkpoint, once all ranks have been found to have the same weights."""
        self._finish_steps()
        start = time.perf_counter()
        ops, parameters = self._ops, self.state.parameters
        self._ranks.require_same(
            lambda: b"".join(hashlib.sha256(ops.to_host(value)).digest() for value in parameters.values()),
            f"the ranks' weights have come apart at step {self.state.step}, which a sound machine does not do; "
            "the last checkpoint is kept",
        )
        self._records.save(self.state, header)
        self._ranks.wait()
        self._losses.leave_out(time.perf_counter() - start)

    def _finish_steps(self) -> None:
        with self._ranks.watched():
            self._ops.synchronize()
        self._losses.settle()

    def _step_function(self, epoch: int) -> Callable[[dict[str, Array]], Array]:
        now = jittered(self._config, epoch)
        if self._function is None or now != self._jittered:
            self._jittered = now
            prepared = preparation(self._config, self._dataset.mean, self._ops, jittered=now)
            self._function = training_step(
                self._ops,
                self._layers,
                self.state.parameters,
                self.state.momenta,
                prepared,
                self._descent,
                self._config.seed,
                self._reduce,
            )
        return self._function


def _place(part: Part, ranks: Ranks) -> dict[str, np.ndarray]:
    """What a training step must know of a rank's place in the batch; nothing for a process on its own."""
    if ranks.size == 1:
        return {}
    share = np.array([part.counted / part.total], dtype=np.float32)
    return {"first": np.array([part.first], dtype=np.uint64), "share": share}

"""The losses of training steps as they become known: looked at, and written as lines of metrics with the speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import numpy as np

from net.layers import Array
from pipeline.errors import PipelineError
from pipeline.progress import Progress
from stages.batches import Part
from stages.setup import learning_rate
from stages.start import Training


class Losses:
    """What happens to each step's loss, and the clock by which speed is measured from one line to the next."""

    def __init__(
        self,
        training: Training,
        ops: ModuleType,
        write: Callable[[dict[str, Any]], None],
        progress: Progress,
        last: int,
    ) -> None:
        self._config, self._ranks, self._last = training.config.train, training.ranks, last
        self._ops, self._write, self._progress = ops, write, progress
        self._plateau = Plateau(len(training.dataset.classes), self._config.plateau_steps)
        self._pending: tuple[int, int, Array, int] | None = None
        self.restart_clock()

    def note(self, step: int, epoch: int, loss: Array, part: Part, waited: float) -> None:
        """Take the losses (N,) of the step that has just been started, and look at those of the one before.

        On a device of its own, reading a loss makes the host wait: only the losses that are logged are read, each
        after the next step has been started. On the host every loss is there to look at.
        """
        self.settle()
        self._waited += waited
        self._images += part.total
        on_host = isinstance(loss, np.ndarray)
        if on_host or self._is_logged(step):
            self._pending = step, epoch, loss, part.counted
        if on_host:
            self.settle()

    def settle(self) -> None:
        """Look at the loss that is still pending: stop on NaN, warn of a plateau, write the metrics line."""
        if self._pending is None:
            return
        step, epoch, loss_each, counted = self._pending
        self._pending = None
        with self._ranks.watched():
            losses = self._ops.to_host(loss_each)[:counted]
        loss = self._ranks.mean(losses)
        if not math.isfinite(loss):
            raise PipelineError(
                f"the loss is {loss} at step {step}: training has diverged; the last good checkpoint is kept. "
                "Lower train.lr (--set train.lr=...) or look at the weights' start, in a new run (--run)"
            )
        if self._plateau.stays(step, loss):
            self._progress.say(self._plateau.advice(loss))
        if self._is_logged(step):
            self._write_line(step, epoch, loss)

    def restart_clock(self) -> None:
        """Measure the speed from here on."""
        self._clock = time.perf_counter()
        self._images, self._waited = 0, 0.0

    def leave_out(self, seconds: float) -> None:
        """Do not count so much of the time until now: rates are those of steps."""
        self._clock += seconds

    def _is_logged(self, step: int) -> bool:
        return step % self._config.log_every == 0 or step == self._last

    def _write_line(self, step: int, epoch: int, loss: float) -> None:
        elapsed = max(time.perf_counter() - self._clock, 1e-9)
        rate, wait = self._images / elapsed, min(self._waited / elapsed, 1.0)
        self._write(
            {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "lr": learning_rate(self._config, epoch),
                "images_per_second": round(rate, 2),
                "data_wait": round(wait, 5),
            }
        )
        self._progress.show(f"loss {loss:.4f}, {rate:.1f} images/s, waiting for data {wait:.1%}")
        self.restart_clock()


class Plateau:
    """Notices a loss that stays at ln(classes), what a network scores that says the same of every picture."""

    WIDTH: Final = 0.02

    def __init__(self, classes: int, patience: int) -> None:
        self._level, self._patience = math.log(classes), patience
        self._since: int | None = None
        self._told = False

    def stays(self, step: int, loss: float) -> bool:
        """True once, when the loss has been within 0.02 of ln(classes) for ``patience`` steps."""
        if abs(loss - self._level) > self.WIDTH or self._level == 0:  # a single class has no other loss
            self._since = None
            return False
        if self._since is None:
            self._since = step
        if self._told or step - self._since < self._patience:
            return False
        self._told = True
        return True

    def advice(self, loss: float) -> str:
        return (
            f"warning: the loss has stayed at {loss:.3f}, which is ln(classes) = {self._level:.3f}, for "
            f"{self._patience} steps: the network says the same of every picture. Known causes are initial biases of "
            "1 together with weights of standard deviation 0.01 everywhere (the paper's text), or scores that have all "
            "become negative before a last ReLU (network.final_relu; the loss is then exactly ln(classes)); try "
            "--recipe original or --recipe caffe, --set network.weight_std=[0,0,0,0,0,0,0,0] (He's rule), or another "
            "--seed, each in a new run (--run)"
        )

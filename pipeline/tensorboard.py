"""Metrics as TensorBoard event files, when asked for; the JSON lines stay what the program itself reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.metrics import Record
from pipeline.run_dir import make_folder, remove


def require_tensorboard() -> None:
    """Refuse event files where the package that writes them is missing."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise PipelineError("--tensorboard needs tensorboardX: pip install '.[tensorboard]'") from error


@contextlib.contextmanager
def events(folder: Path, before: list[Record]) -> Iterator[Callable[[Record], None]]:
    """Write an event file anew: the records so far at once, further ones through the function this yields.

    Writing anew keeps the curves free of what a run that was taken up again has cut back.

    Raises
    ------
    PipelineError
        The package tensorboardX is not installed, or the folder cannot be written.
    """
    require_tensorboard()
    from tensorboardX import SummaryWriter

    for old in make_folder(folder).glob("events.out.tfevents.*"):
        remove(old)
    writer = SummaryWriter(logdir=str(folder), flush_secs=10)

    def write(record: Record) -> None:
        group = "validation" if "top1" in record else "train"
        for name, value in record.items():
            if name not in ("step", "epoch", "epochs_done", "seconds") and isinstance(value, int | float):
                writer.add_scalar(f"{group}/{name.removeprefix('validation_')}", value, record["step"])

    try:
        for record in before:
            write(record)
        yield write
    finally:
        writer.close()

#!/usr/bin/env python
"""AlexNet by hand: flags -> configuration -> stages in order.

python run_pipeline.py                      every stage in order, on the built-in demo set where no data are found
python run_pipeline.py --stage preprocess   pictures -> shards
python run_pipeline.py --stage train        shards -> checkpoints
python run_pipeline.py --stage eval         a checkpoint -> accuracy
python run_pipeline.py --stage predict IMAGE...   the five most probable classes of pictures of your own
python run_pipeline.py --stage report       one HTML page about a run
python run_pipeline.py --stage X --help     the flags of one stage, with examples
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from pipeline.checkpoint import checkpoints, newest_sound, remedy_of_config
from pipeline.command_line import IN_ORDER, parse
from pipeline.config import Config, changes, from_dict, load_config, to_dict, with_values
from pipeline.errors import PipelineError, StoppedError
from pipeline.ranks import Ranks, joined
from pipeline.run_dir import RunDir, locked, read_sealed, write_sealed
from pipeline.signals import Interruption

_CONFIGURED = frozenset(("preprocess", "train"))
_READING = frozenset(("predict", "watch"))
_BESIDE = frozenset(("export", "report"))
_BEGINNING = frozenset((None, "preprocess", "import"))  # these make a run where there is none
_SHARED = frozenset(("train", "eval"))  # stages that several processes can share


def main(arguments: list[str] | None = None) -> int:
    """Run the stages the command line asks for; returns the exit status."""
    options = parse(arguments)
    try:
        # Outside the loops that save before they stop, a signal makes a stage leave with temporary files removed.
        with Interruption(), joined() as ranks:
            _run(options, ranks)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted; everything finished so far is kept", file=sys.stderr)
        return 130
    except _plain_errors() as error:
        if isinstance(error, BrokenPipeError) and _unread():  # as in `--stage predict ... | head`
            if options.stage != "predict":
                with contextlib.suppress(BrokenPipeError):
                    print("the output has no reader any more; everything finished so far is kept", file=sys.stderr)
            # Python flushes standard output once more when it ends, and would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if options.debug:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _unread() -> bool:
    """Whether what is printed has no reader any more; else it was another pipe that broke, such as one to a cluster."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)  # errors are told unasked
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _run(options: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.size > 1 and options.stage not in _SHARED:
        raise PipelineError(
            f"{ranks.size} ranks can share --stage {' and --stage '.join(sorted(_SHARED))} only; run the other stages "
            "without mpiexec or srun (--stage preprocess has --jobs and --scheduler)"
        )
    run = RunDir(Path(options.run))
    if options.stage not in _BEGINNING and not run.root.is_dir():  # a mistyped --run leaves no folder behind
        raise PipelineError(
            f"there is no run {run.root}; name one with --run, or begin it: "
            f"python run_pipeline.py --stage preprocess --run {run.root}"
        )
    stages = [options.stage] if options.stage else list(IN_ORDER)
    if options.stage == "import":
        for file in (Path(options.files[0]), options.mean):
            if file is not None and not file.is_file():
                raise PipelineError(f"there is no file {file}; check the path")
    source = _source(options.source, must_exist="preprocess" in stages)
    change = changes(options.config, options.set, options.seed)
    # The other stages find their configuration in a checkpoint.
    config = making = None
    if _CONFIGURED.intersection(stages):
        recipe = _recipe(options, run, demo=source is None)
        config = change(_as_made(recipe, run, seeded=False))
        if "preprocess" in stages:  # a recipe named for it asks for shards of its own
            making = change(recipe if options.recipe else _as_made(recipe, run, seeded=True))
    with _lock(options.stage, run) if ranks.leads else contextlib.nullcontext():
        for stage in stages:
            if stage == "preprocess":
                _preprocess(options, making, config, run, source)
            else:
                _stage(stage, options, change, config, run, ranks)
    if not options.stage and config is not None:
        _summary(run, config)


def _lock(stage: str | None, run: RunDir) -> contextlib.AbstractContextManager[None]:
    """One writer at a time; what only reads, or writes beside the run's own files, need not wait for training."""
    if stage in _READING:
        return contextlib.nullcontext()
    if stage == "verify" and not os.access(run.root, os.W_OK):
        return contextlib.nullcontext()  # a run on a read-only disk: nobody writes there
    return locked(RunDir(run.root / stage) if stage in _BESIDE else run)


def _stage(
    stage: str,
    options: argparse.Namespace,
    change: Callable[[Config], Config],
    config: Config | None,
    run: RunDir,
    ranks: Ranks,
) -> None:
    # Each stage is imported when it runs: preprocessing needs no network, and none should wait for the others' imports.
    if stage == "import":
        from stages import import_weights

        import_weights.run(run, Path(options.files[0]), mean=options.mean, recipe=options.recipe, change=change)
    elif stage == "verify":
        from stages import verify

        verify.run(run)
    elif stage == "watch":
        from stages import watch

        watch.run(run)
    elif stage == "report" and options.compare:
        from stages import report

        report.compare([run, *(RunDir(Path(other)) for other in options.compare)])
    else:
        _computing_stage(stage, options, change, config, run, ranks)


def _preprocess(
    options: argparse.Namespace, making: Config | None, config: Config | None, run: RunDir, source: Path | None
) -> None:
    import joblib

    from stages import preprocess

    if options.check_archives:
        preprocess.check_archives(source)
    jobs = options.jobs or joblib.cpu_count()  # the cores this process may use, not all there are
    preprocess.run(making, run, source=source, jobs=jobs, scheduler=options.scheduler)
    if not checkpoints(run.train):  # what a network was trained with stays
        write_sealed(run.config, to_dict(config))


def _computing_stage(
    stage: str,
    options: argparse.Namespace,
    change: Callable[[Config], Config],
    config: Config | None,
    run: RunDir,
    ranks: Ranks,
) -> None:
    """A stage that puts a network to work, on the device asked for."""
    from net.backend import choose, load

    device, why = choose(options.device)

    def load_backend() -> ModuleType:
        ops = load(device, options.precision)
        name = device.upper() if device != "reference" else device
        # predict's standard output belongs to its results
        where = sys.stderr if stage == "predict" else sys.stdout
        print(f"computing on the {name} in {options.precision} ({why})", file=where)
        return ops

    if stage == "train":
        from stages import train

        train.run(
            config,
            run,
            load_backend,
            resume=options.resume,
            restart=options.restart,
            goal=train.Goal(options.steps, options.epochs),
            device=device,
            precision=options.precision,
            tensorboard=options.tensorboard,
            ranks=ranks,
        )
    elif stage == "eval":
        from stages import eval as evaluation

        evaluation.run(
            run,
            load_backend(),
            checkpoint=options.checkpoint,
            views=options.views,
            change=lambda own: change(load_config(options.recipe) if options.recipe else own),
            ranks=ranks,
        )
    elif stage == "predict":
        from stages import predict

        predict.run(
            run,
            load_backend(),
            files=options.files,
            checkpoint=options.checkpoint,
            views=options.views,
            as_json=options.json,
        )
    elif stage == "report":
        from stages import report

        report.run(run, load_backend(), checkpoint=options.checkpoint)
    elif stage == "export":
        from stages import export

        export.run(run, load_backend(), checkpoint=options.checkpoint, format=options.format)


def _source(named: str | None, *, must_exist: bool) -> Path | None:
    """The pictures' folder: as named, else $ILSVRC2012_ROOT, else datasets/ilsvrc2012, else None for the demo set."""
    if named is not None:
        path, origin = Path(named), "--source"
    elif "ILSVRC2012_ROOT" in os.environ:
        path, origin = Path(os.environ["ILSVRC2012_ROOT"]), "the environment variable ILSVRC2012_ROOT"
    else:
        path = Path("datasets/ilsvrc2012")
        return path if path.exists() else None
    if must_exist and not path.is_dir():
        raise PipelineError(f"{origin} names {path}, which is not a folder; check the path")
    return path


def _recipe(options: argparse.Namespace, run: RunDir, *, demo: bool) -> Config:
    """What the changes are made to: the recipe named, else the run's own settings, else the default for its data."""
    if options.recipe is not None:
        return load_config(options.recipe)
    if run.config.exists():
        return from_dict(read_sealed(run.config, remedy_of_config(run)), str(run.config))
    if checkpoints(run.train):
        return _saved_config(run)
    return load_config("demo" if demo else "seed")


def _saved_config(run: RunDir) -> Config:
    """The settings of the newest sound checkpoint, for a run that has lost its own."""
    saved, complaints = newest_sound(run.train)
    if saved is None:
        for complaint in complaints:
            print(f"warning: {complaint}")
        raise PipelineError(
            f"{run.config} is missing, and no checkpoint in {run.train} can be read to take the settings from; "
            "name the recipe with --recipe and changes with --set, and start over with --restart"
        )
    print(f"{run.config} is missing: the settings are those of {saved.path}")
    values = saved.header.get("config")
    return from_dict(values if isinstance(values, dict) else {}, str(saved.path))


def _as_made(config: Config, run: RunDir, *, seeded: bool) -> Config:
    """The configuration with the ``preprocess`` settings of the run's shards, where there are any.

    ``seeded`` is with their seed too: whoever mends them needs it, while training may have another.
    """
    from data.shards import made_with

    made = made_with(run)
    if not seeded:
        made.pop("seed", None)
    return with_values(config, made, str(run.preprocess))


def _summary(run: RunDir, config: Config) -> None:
    metrics = json.loads((run.eval / "metrics.json").read_text())
    views = "centre view" if metrics["views"] == 1 else f"{metrics['views']} views"
    print(
        f"\nAll stages are done. In {run.root}:\n"
        f"  preprocess/  the pictures as HDF5 shards, their colour statistics and what was rejected\n"
        f"  train/       checkpoints and metrics.jsonl, {metrics['step']} steps of recipe {config.recipe}\n"
        f"  eval/        metrics.json, per_class.csv, predictions.npz\n"
        f"  report/      index.html, a page about this run to open in a browser\n"
        f"The network names {metrics['top1']:.1%} of {metrics['images']} pictures it never saw correctly "
        f"(top-1, {views}); the right class is among its first five for {metrics['top5']:.1%}.\n"
        f"Next: train on with   python run_pipeline.py --stage train --resume --epochs 1 --run {run.root}\n"
        f"or on ILSVRC-2012:    python run_pipeline.py --source DIR --run runs/ilsvrc"
    )


def _plain_errors() -> tuple[type[Exception], ...]:
    from net.backend import BackendUnavailableError

    return PipelineError, BackendUnavailableError, OSError, MemoryError


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error}); lower train.batch_size, eval.batch_size or --jobs"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; --debug shows where this happened"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())

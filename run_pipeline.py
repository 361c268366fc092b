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

import os
import signal
import sys
from importlib.util import find_spec

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C while the rest is imported has nothing to stop yet; in main() pipeline.signals.Interruption sees to it.
    signal.signal(signal.SIGINT, lambda signum, frame: os._exit(130))
if __name__ == "__main__" and (find_spec("numpy") is None or find_spec("safetensors") is None):
    # What is imported below ends in a traceback where the environment has not been made active.
    sys.exit(
        f"error: the packages are not installed for {sys.executable}; activate their environment "
        "(. .venv/bin/activate), or make it: python3 -m venv .venv && .venv/bin/pip install ."
    )

import argparse
import contextlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Final

from pipeline.checkpoint import checkpoints
from pipeline.command_line import IN_ORDER, parse, without_effect
from pipeline.config import SEED
from pipeline.config_values import changes, to_dict
from pipeline.errors import PipelineError, StoppedError
from pipeline.mpi import joined
from pipeline.ranks import Ranks
from pipeline.run_dir import RunDir, locked, write_sealed
from pipeline.settings import Request, Settled, settle
from pipeline.signals import Interruption
from pipeline.streams import discard_output, open_streams, unread, unwritable

_CHECKOUT: Final = Path(__file__).resolve().parent
_SETTLED: Final = frozenset(("preprocess", "train"))  # these need settings of their own; others have a checkpoint's
_BEGINNING: Final = frozenset((None, "preprocess", "import"))  # these make a run where there is none
_SHARED: Final = frozenset(("train", "eval"))  # several processes can share these
_READING: Final = frozenset(("predict", "watch"))  # these write nothing, and need no lock
_BESIDE: Final = frozenset(("export", "report"))  # these write to a folder of their own, and lock that
_UNCOMPILED: Final = frozenset(("import", "verify", "watch"))  # these use no compiled code


@dataclass(frozen=True)
class _Job:
    """What the command line asks for, checked, with the paths and settings it stands for."""

    options: argparse.Namespace
    run: RunDir
    source: Path | None  # the pictures' folder, None for the demo set
    request: Request
    settled: Settled | None  # None where no stage of the job needs settings of its own
    ranks: Ranks


def main(arguments: list[str] | None = None) -> int:
    """Run the stages the command line asks for; returns the exit status."""
    open_streams()
    options = parse(arguments)
    try:
        # Outside the loops that save before they stop, a signal makes a stage leave with temporary files removed.
        with Interruption(), joined() as ranks:
            _run(options, ranks)
            sys.stdout.flush()  # where that fails Python would only say so at its end
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("interrupted; everything finished so far is kept", file=sys.stderr)
        return 130
    except _plain_errors() as error:
        if isinstance(error, BrokenPipeError) and unread():  # as in `--stage predict ... | head`
            if options.stage != "predict":
                with contextlib.suppress(BrokenPipeError):
                    print("the output has no reader any more; everything finished so far is kept", file=sys.stderr)
            discard_output()
            return 128 + signal.SIGPIPE
        if options.debug:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, ranks: Ranks) -> None:
    """From flags to settings, then the stages in order."""
    run, stages = RunDir(Path(options.run)), [options.stage] if options.stage else list(IN_ORDER)
    _refuse(options, run, ranks)
    unused = without_effect(options)
    if unused and ranks.leads:
        what = f"--stage {options.stage} makes" if options.stage else "the stages that run make"
        print(f"note: {what} no use of {', '.join(unused)}", file=sys.stderr)
    source = _source(options.source, must_exist="preprocess" in stages)
    if source is not None and "preprocess" in stages:
        _refuse_among_pictures(run, source)
    weights = options.weights if "train" in stages else None
    request = Request(options.recipe, changes(options.config, options.set, options.seed, weights))
    settled = _settled(run, request, stages, demo=source is None) if _SETTLED.intersection(stages) else None
    if settled is not None and "train" in stages and (options.restart or not checkpoints(run.train)):
        settled = _fitted(settled, request, ranks)
    job = _Job(options, run, source, request, settled, ranks)
    with _lock(options.stage, run) if ranks.leads else contextlib.nullcontext():
        for stage in stages:
            late = _stage(stage, job)
            if late is not None and stage != stages[-1]:
                raise StoppedError(late, f"stopped after the stage {stage}; everything finished so far is kept")
    if not options.stage and settled is not None:
        _summary(run, settled.train.recipe, compared=bool(options.compare))


def _refuse(options: argparse.Namespace, run: RunDir, ranks: Ranks) -> None:
    """Refuse what can be seen to fail from the command line alone."""
    if ranks.size > 1 and options.stage not in _SHARED:
        raise PipelineError(
            f"{ranks.size} ranks can share --stage {' and --stage '.join(sorted(_SHARED))} only; run the other stages "
            "without mpiexec or srun (--stage preprocess has --jobs and --scheduler)"
        )
    named = [(run, "--run")] if options.stage not in _BEGINNING else []
    named += [(RunDir(Path(other)), "--compare") for other in options.compare if options.stage in (None, "report")]
    for one, flag in named:  # a mistyped --run leaves no folder behind
        if not one.root.is_dir():
            # Who starts the program from elsewhere may look for the runs in the checkout.
            here = "" if one.root.is_absolute() or Path.cwd() == _CHECKOUT else f" in {Path.cwd()}"
            raise PipelineError(
                f"there is no run {one.root}{here}; name one with {flag}, or begin it: "
                f"python run_pipeline.py --stage preprocess {one.flag}"
            )
    if options.stage not in _UNCOMPILED and os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise PipelineError(
            "NUMBA_DISABLE_JIT is set, and the loops over pixels and layers work compiled only: unset it "
            "(unset NUMBA_DISABLE_JIT) and run the same command again"
        )
    if options.stage == "import":
        for file in (Path(options.files[0]), options.mean):
            if file is not None and not file.is_file():
                raise PipelineError(f"there is no file {file}; check the path")


def _refuse_among_pictures(run: RunDir, source: Path) -> None:
    """Refuse a run whose folders would be taken for classes, or whose train/ is the pictures': --restart moves that."""
    from data.ilsvrc import TRAIN
    from data.listing import SPLITS
    from data.sources import split_folders

    root, folders = run.root.resolve(), [path.resolve() for split in SPLITS for path in split_folders(source, split)]
    shared = run.train.resolve() in folders and run.train.is_dir() and not (source / TRAIN).exists()
    if shared or any(root.is_relative_to(folder) for folder in folders):
        raise PipelineError(
            f"the run {run.root} would lie among the pictures of {source}, and its folders would mix with theirs; "
            "name another directory with --run"
        )


def _settled(run: RunDir, request: Request, stages: list[str], *, demo: bool) -> Settled:
    from data.manifest import made_with

    default = "demo" if demo else "seed"
    return settle(run, request, made_with(run), default=default, preprocess="preprocess" in stages)


def _fitted(settled: Settled, request: Request, ranks: Ranks) -> Settled:
    """For a training that begins with weights from a file, and with no recipe named: the settings of their network."""
    file = settled.train.train.weights
    if file is None or request.recipe is not None:
        return settled
    from stages.pretrained import with_network_of

    return replace(settled, train=with_network_of(Path(file), settled.train, request.change, tell=ranks.leads))


def _lock(stage: str | None, run: RunDir) -> contextlib.AbstractContextManager[None]:
    """One writer at a time; what only reads, or writes beside the run's own files, need not wait for training."""
    if stage in _READING:
        return contextlib.nullcontext()
    if stage == "verify" and not os.access(run.root, os.W_OK):
        return contextlib.nullcontext()  # a run on a read-only disk: nobody writes there
    return locked(RunDir(run.root / stage) if stage in _BESIDE else run)


def _stage(stage: str, job: _Job) -> int | None:
    """Run a stage; returns the signal that came when it had nothing left to stop, None for none."""
    # Each stage is imported when it runs: preprocessing needs no network, and none should wait for the others' imports.
    options, run = job.options, job.run
    match stage:
        case "preprocess":
            return _preprocess(job)
        case "train":
            return _train(job)
        case "watch":
            from stages import watch

            watch.run(run)
        case "eval":
            from stages import eval as evaluation

            evaluation.run(
                run,
                _backend(options),
                checkpoint=options.checkpoint,
                views=options.views,
                request=job.request,
                ranks=job.ranks,
            )
        case "verify":
            from stages import verify

            verify.run(run)
        case "predict":
            from stages import predict

            predict.run(
                run,
                _backend(options),
                files=options.files,
                checkpoint=options.checkpoint,
                views=options.views,
                as_json=options.json,
            )
        case "report":
            from stages import report

            if options.compare:
                report.compare([run, *(RunDir(Path(other)) for other in options.compare)])
            else:
                report.run(run, _backend(options), checkpoint=options.checkpoint)
        case "export":
            from stages import export

            export.run(run, _backend(options), checkpoint=options.checkpoint, format=options.format)
        case "import":
            from stages import import_weights

            import_weights.run(run, Path(options.files[0]), mean=options.mean, request=job.request)
    return None


def _preprocess(job: _Job) -> int | None:
    import joblib

    from stages import preprocess

    options, settled = job.options, job.settled
    assert settled is not None  # see _SETTLED
    assert settled.preprocess is not None
    if options.check_archives:
        preprocess.check_archives(job.source)
    if _by_default(job):
        print(
            f"preprocess: note: no --recipe is named, so it is {SEED.recipe}, which learns worse than original or "
            "caffe, whose results are known; for real work add --recipe original, here or at the first training"
        )
    jobs = options.jobs or joblib.cpu_count()  # the cores this process may use, not all there are
    late = preprocess.run(settled.preprocess, job.run, source=job.source, jobs=jobs, scheduler=options.scheduler)
    if not checkpoints(job.run.train):  # what a network was trained with stays
        write_sealed(job.run.config, to_dict(settled.train))
    return late


def _by_default(job: _Job) -> bool:
    """Whether the run's network is the default one because nobody has named another, now or before."""
    options, run, settled = job.options, job.run, job.settled
    assert settled is not None  # see _SETTLED
    named = options.recipe is not None or run.config.exists() or bool(checkpoints(run.train))
    if options.config is not None or settled.train.train.weights is not None:
        named |= (settled.train.network, settled.train.input) != (SEED.network, SEED.input)
    return not named and job.source is not None  # the demo set has a recipe that suits it


def _train(job: _Job) -> int | None:
    from net.backend import choose
    from stages import train

    options, settled = job.options, job.settled
    assert settled is not None  # see _SETTLED
    device, why = choose(options.device)
    return train.run(
        settled.train,
        job.run,
        partial(_loaded, options, device, why),
        resume=options.resume,
        restart=options.restart,
        goal=train.Goal(options.steps, options.epochs),
        device=device,
        precision=options.precision,
        tensorboard=options.tensorboard,
        ranks=job.ranks,
    )


def _backend(options: argparse.Namespace) -> ModuleType:
    """The backend of the device asked for."""
    from net.backend import choose

    return _loaded(options, *choose(options.device))


def _loaded(options: argparse.Namespace, device: str, why: str) -> ModuleType:
    """The device's backend, with a line that says what computes, in which precision and why, and on which card."""
    from net.backend import load

    ops = load(device, options.precision)
    name = device.upper() if device != "reference" else device
    # predict's standard output belongs to its results
    where = sys.stderr if options.stage == "predict" else sys.stdout
    card = f": {ops.card()}" if hasattr(ops, "card") else ""
    print(f"computing on the {name} in {options.precision} ({why}){card}", file=where)
    return ops


def _source(named: str | None, *, must_exist: bool) -> Path | None:
    """The pictures' folder: as named, else $ILSVRC2012_ROOT, else datasets/ilsvrc2012, else None for the demo set."""
    if named is not None:
        path, origin = Path(named), "--source"
    elif os.environ.get("ILSVRC2012_ROOT"):
        path, origin = Path(os.environ["ILSVRC2012_ROOT"]), "the environment variable ILSVRC2012_ROOT"
    else:
        path = Path("datasets/ilsvrc2012")
        return path if path.exists() else None
    if must_exist and not path.is_dir():
        raise PipelineError(f"{origin} names {path}, which is not a folder; check the path")
    return path


def _summary(run: RunDir, recipe: str, *, compared: bool) -> None:
    metrics = json.loads((run.eval / "metrics.json").read_text())
    views = "centre view" if metrics["views"] == 1 else f"{metrics['views']} views"
    classes = len(json.loads((run.preprocess / "classes.json").read_text())["classes"])
    # Of five classes or fewer the right one always is.
    among = f"; the right class is among its first five for {metrics['top5']:.1%}" if classes > 5 else ""
    page = "compare.html, this run beside others" if compared else "index.html, a page about this run"
    print(
        f"\nAll stages are done. In {run.root}:\n"
        f"  preprocess/  the pictures as HDF5 shards, their colour statistics and what was rejected\n"
        f"  train/       checkpoints and metrics.jsonl, {metrics['step']} steps of recipe {recipe}\n"
        f"  eval/        metrics.json, per_class.csv, predictions.npz\n"
        f"  report/      {page} to open in a browser\n"
        f"Of {metrics['images']} pictures it never saw, the network names {metrics['top1']:.1%} correctly "
        f"(top-1, {views}){among}.\n"
        f"Next: train on with   python run_pipeline.py --stage train --resume --epochs 1 {run.flag}\n"
        f"or on ILSVRC-2012:    python run_pipeline.py --source DIR --run runs/ilsvrc"
    )


def _plain_errors() -> tuple[type[Exception], ...]:
    """The errors that are told in a sentence. Asked for when one has come: a start need not wait for ``net``."""
    from net.backend import BackendUnavailableError

    return PipelineError, BackendUnavailableError, OSError, MemoryError


def _sentence(error: Exception) -> str:
    """What a person is told of an error; where standard output is what failed, nothing more is sent there."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({error}); lower train.batch_size, eval.batch_size or --jobs"
    if isinstance(error, OSError):
        if error.filename is None and unwritable():
            discard_output()
            return (
                f"standard output cannot be written: {error.strerror or error}; send it elsewhere, or make room where "
                "it goes; everything finished so far is kept"
            )
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; --debug shows where this happened"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())

"""The exceptions that reach the user as a plain sentence."""

from __future__ import annotations


class PipelineError(Exception):
    """Something the user can mend: the message says what is wrong with which file, and what to do.

    ``run_pipeline.py`` prints the message and exits with status 1; with ``--debug`` it shows the traceback as well.
    """


class UsageError(PipelineError):
    """A command line that asks for what there is not, such as an unknown recipe or key: status 2, as a wrong flag."""


class StoppedError(Exception):
    """A signal asked the stage to stop, and everything worth keeping has been saved.

    ``signum`` is the signal's number; the process exits with 128 + signum (130 for SIGINT, 143 for SIGTERM).
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum

"""The long forms: ``python -m tests.crash --kills 200``, ``--cases 10000`` and ``--fuzz 20000``.

``--kills`` goes on until so many kills have happened; ``--stages train`` kills in that stage alone, ``--seed`` draws
other moments, so a long run can be made in pieces.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path

from tests.crash.damage import damage_many
from tests.crash.fuzz import fuzz_all
from tests.crash.kills import STAGES, kill_many


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="SIGKILLs, over --stages")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to kill; all if left out"
    )
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="damaged files")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="changed files for each parser")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments and places")
    options = parser.parse_args()
    stages = [stage for stage in STAGES if stage in options.stages]
    if STAGES.index(stages[-1]) - STAGES.index(stages[0]) >= len(stages):
        parser.error("--stages must be neighbours: a stage between them would be missing")
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    print(f"working in {folder}, which stays where a promise is broken", flush=True)
    if options.kills:
        kill_many(folder / "kills", options.kills, options.seed, stages, say=partial(print, flush=True))
    if options.cases:
        damage_many(folder / "damage", options.cases, options.seed)
    if options.fuzz:
        fuzz_all(folder / "fuzz", options.fuzz)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

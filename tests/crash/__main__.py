"""The long forms: ``python -m tests.crash --kills 200``, ``--cases 10000`` and ``--fuzz 20000``."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.crash.damage import damage_many
from tests.crash.fuzz import fuzz_all
from tests.crash.kills import kill_many


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="SIGKILLs, over all stages")
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="damaged files")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="changed files for each parser")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random moments and places")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    print(f"working in {folder}, which stays where a promise is broken", flush=True)
    if options.kills:
        kill_many(folder / "kills", options.kills, options.seed)
    if options.cases:
        damage_many(folder / "damage", options.cases, options.seed)
    if options.fuzz:
        fuzz_all(folder / "fuzz", options.fuzz)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""From naive to fast, operation by operation: ``python -m bench.kernels``.

Every step is checked against a float64 oracle before it is timed; the table shows its largest error relative to the
oracle's largest value, its best time, and how many times faster it is than the first step. The code of the steps is
short on purpose and stands in the files of this folder; the last step of each is what ``net.cpu`` does.
"""

from __future__ import annotations

from bench import command
from bench.kernels import convolution, finish, linear, pool, update
from bench.kernels.exhibit import show
from pipeline.command_line import at_least_one

EXHIBITS = {
    "convolution": lambda scale: convolution.exhibit(max(1, 16 // scale)),
    "finish": lambda scale: finish.exhibit(max(1, 16 // scale)),
    "linear": lambda scale: linear.exhibit(max(2, 16 // scale), 4096 // scale),
    "linear-one": lambda scale: linear.exhibit(1, 4096 // scale),
    "pool": lambda scale: pool.exhibit(max(1, 16 // scale)),
    "update": lambda scale: update.exhibit(4096 * 4096 // scale),
}


def main() -> int:
    parser = command("kernels", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(EXHIBITS)}; default all")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--scale", type=at_least_one, default=1, help="divide the sizes by this")
    options = parser.parse_args()
    unknown = set(options.names) - set(EXHIBITS)
    if unknown:
        parser.error(f"names are of {', '.join(EXHIBITS)}")
    for name in options.names or EXHIBITS:
        exhibit = EXHIBITS[name](options.scale)
        rows = show(exhibit, options.rounds)
        print(f"\n{exhibit.title}\n| step | ms | times faster | error | what is new |\n|---|---|---|---|---|")
        for row in rows:
            faster = rows[0].seconds / row.seconds
            print(f"| {row.step.name} | {row.seconds * 1e3:.1f} | {faster:.1f} | {row.error:.0e} | {row.step.why} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What 90 epochs of ILSVRC-2012 take: hours and euros on common cards, and what the disk must deliver.

    python -m bench.full_run                 the table of docs/full_run.md
    python -m bench.full_run --rate 30000    the same for a rate of your own in images/s, as --stage train prints it

Where a card's training rate has been measured (``python -m bench.gpu --fed``) it stands below, the others are
predictions of ``bench.gpu_model``; prices are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bench import command
from bench.gpu_model import (
    A100,
    CROP,
    EPOCH,
    H100,
    H200,
    LAYERS,
    RTX4090,
    SHAPE,
    Card,
    Setting,
    prediction,
    training_step,
)

EPOCHS: Final = 90
VALIDATION: Final = 50_000  # pictures, once an epoch
STORED: Final = 256 * 256 * 3  # bytes of a picture in a shard
BATCH: Final = 128

# Euros an hour, assumed: rented by the hour in 2026, towards the cheaper end of what is asked.
PRICES: Final = ((H200, 3.5), (H100, 2.7), (A100, 1.3), (RTX4090, 0.4))
# Images/s of training steps fed by the loader from memory, by card, precision and batch: python -m bench.gpu --fed,
# NVIDIA H100 80GB HBM3, 12 loader threads, CuPy 14.2 for CUDA 13, 2026-11-26.
MEASURED: Final = {(H100.name, "bf16", 128): 37_860, (H100.name, "bf16", 1024): 53_984}


@dataclass(frozen=True)
class Plan:
    """A full run at a rate of images a second."""

    rate: float
    forward: float

    @property
    def hours(self) -> float:
        """Of training and of the validation after each epoch; reading the pictures is assumed to keep up."""
        return EPOCHS * (EPOCH / self.rate + VALIDATION / self.forward) / 3600

    @property
    def gigabytes(self) -> float:
        """Read from the shards in a second."""
        return self.rate * STORED / 1e9


def plan(card: Card, precision: str, batch: int) -> Plan:
    """At the measured training rate where there is one; the validation's rate is a prediction always."""
    s = Setting(card, precision, batch)
    step, forward = (
        sum(kernel.seconds(s.card, s.precision) for kernel in made(LAYERS, SHAPE, CROP, s))
        for made in (training_step, prediction)
    )
    return Plan(MEASURED.get((card.name, precision, batch), batch / step), batch / forward)


def table() -> str:
    lines = [
        "| card | precision, batch | images/s | the rate is | hours | euros an hour, assumed | euros "
        "| GB/s from the shards |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card, price in PRICES:
        other = [batch for name, _, batch in MEASURED if name == card.name and batch != BATCH]
        for precision, batch in [("bf16", BATCH), *(("bf16", batch) for batch in other), ("fp32", BATCH)]:
            full = plan(card, precision, batch)
            known = "**measured**" if (card.name, precision, batch) in MEASURED else "predicted"
            lines.append(
                f"| {card.name} | {precision}, {batch} | {full.rate:,.0f} | {known} | {full.hours:.2f} | {price:.2f} "
                f"| {full.hours * price:.1f} | {full.gigabytes:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = command("full_run", __doc__)
    parser.add_argument("--rate", type=float, help="training images/s that were measured")
    rate = parser.parse_args().rate
    if rate is None:
        print(table())
        return
    if not rate > 0:
        parser.error("argument --rate: takes a number above 0")
    full = Plan(rate, 3 * rate)  # a forward pass is a third of a step's arithmetic
    print(f"{EPOCHS} epochs: {full.hours:,.1f} hours; the shards must deliver {full.gigabytes:.2f} GB/s")


if __name__ == "__main__":
    main()

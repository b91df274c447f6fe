"""Graphics cards by name, for estimates: the peak of their bfloat16 products and their memory, as the vendor says."""

from __future__ import annotations

from dataclasses import dataclass

UTILISATION = 0.35  # of the peak: assumed, what well-tuned transformer training reaches. Nothing here has measured it


@dataclass(frozen=True)
class Card:
    """``peak``: FLOP/s of dense bfloat16 products that are summed in float32. ``memory``: bytes."""

    peak: float
    memory: int

    def seconds(self, flops: float) -> float:
        """Of so many FLOPs at UTILISATION."""
        return flops / (UTILISATION * self.peak)


# From NVIDIA's data sheets (without sparsity). The RTX cards multiply bfloat16 at half of the rate that is advertised
# for float16, because they sum in float32.
CARDS = {
    "A100": Card(312e12, 80 << 30),
    "H100": Card(989e12, 80 << 30),
    "H200": Card(989e12, 141 << 30),
    "L40S": Card(362e12, 48 << 30),
    "RTX3090": Card(71e12, 24 << 30),
    "RTX4090": Card(165e12, 24 << 30),
}

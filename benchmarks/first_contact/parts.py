"""The parts of the walk, in their order: what comes first is worth most where the walk is cut."""

from __future__ import annotations

from dataclasses import dataclass

GRACE = 10.0  # seconds that a part may run past its share, to end what it has begun


@dataclass(frozen=True)
class Part:
    """One part.

    Args:
        name: of the part, and of its file.
        title: for the page.
        weight: its share of the time, among the weights of the parts that are still to come. Time that a part leaves
            goes to those after it.
        function: "module:function" of this package.
    """

    name: str
    title: str
    weight: float
    function: str


PARTS = (
    Part("probe", "What is here", 3, "preparing:probe"),
    Part("build", "CUDA kernels built for this card", 9, "preparing:build"),
    Part("self-test", "Self-test", 15, "checking:self_test"),
    Part("goldens", "Networks against golden values", 5, "checking:goldens"),
    Part("sanitizer", "compute-sanitizer", 9, "checking:sanitize"),
    Part("peaks", "Peaks of this machine", 4, "speed:peaks"),
    Part("operations", "Operations and blocks, against their rivals", 17, "speed:operations"),
    Part("networks", "Networks, against their rivals", 16, "speed:networks"),
    Part("sampler-step", "A sampler step as a CUDA graph", 4, "steps:sampler_step"),
    Part("training-step", "A training step", 6, "steps:training_step"),
    Part("tune", "Configurations tuned for this card", 8, "tuning:tune"),
)
# What runs in a process of its own: the parts, and pieces that some of them share out.
FUNCTIONS = {part.name: part.function for part in PARTS} | {
    "self-test-of": "checking:self_test_of",
    "every-kernel-once": "checking:every_kernel_once",
}

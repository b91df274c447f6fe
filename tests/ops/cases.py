"""The small cases of every operation, under the names that tests use."""

from pvdm_fast.analysis.cases import BATCH, LATTICE, LAYOUT, Case, as_tuple, leaves, rotation, run_with_gradients
from pvdm_fast.analysis.cases import SMALL as CASES

__all__ = ["BATCH", "CASES", "LATTICE", "LAYOUT", "Case", "as_tuple", "leaves", "rotation", "run_with_gradients"]

"""Golden values of the authors' release: how its weights and inputs are drawn (see golden/README.md), and results."""

from __future__ import annotations

from pvdm_fast.analysis.goldens import GoldenCase as GoldenCase
from pvdm_fast.analysis.goldens import draw as draw
from pvdm_fast.analysis.goldens import draw_parameter as draw_parameter
from pvdm_fast.analysis.goldens import load_case as load_case

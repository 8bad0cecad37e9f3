"""Calibration: thresholds from dense passes over text, for every block geometry at once.

`api.py` is what users call; `observation.py` is what a dense pass tells, `fitting.py` what follows.
"""

from __future__ import annotations

from hf_sparse_attention.calibration.api import calibrate

__all__ = ["calibrate"]

"""Instance segmentation with crisp boundaries.

``create`` builds a method, ``load`` opens a trained model, and ``Predictor`` goes from a picture
to its objects. Names are loaded on first use, so ``import brefine`` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brefine.methods import METHODS, create
    from brefine.predict import Predictor, load
    from brefine.results import Result

__version__ = "0.1.0"
__all__ = ["METHODS", "Predictor", "Result", "__version__", "create", "load"]

_HOMES = {
    "METHODS": "brefine.methods",
    "create": "brefine.methods",
    "Predictor": "brefine.predict",
    "load": "brefine.predict",
    "Result": "brefine.results",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'brefine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""agglom: distil several frozen vision foundation models into one student backbone."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# Lazy, so that `agglom --help` and `import agglom` cost no torch import.
_LAZY = {
    "Distiller": "agglom.distiller",
    "load": "agglom.export",
    "detection_backbone": "agglom.detection",
    "Features": "agglom.features",
    "InputSpec": "agglom.features",
}

__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agglom' has no attribute {name!r}")

"""MiCS for Hugging Face Accelerate and Transformers: sharded data parallelism that spares slow links between nodes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_mics.accelerator import MiCSAccelerator as MiCSAccelerator
    from hf_mics.callback import MiCSCallback as MiCSCallback
    from hf_mics.engine import apply_mics as apply_mics
    from hf_mics.engine import mics_engine as mics_engine
    from hf_mics.engine import remove_mics as remove_mics
    from hf_mics.plugin import MiCSPlugin as MiCSPlugin
    from hf_mics.topology import Topology as Topology

__version__ = "0.1.0"

# Resolved at first use: importing hf_mics must not load torch.
_HOMES = {
    "MiCSAccelerator": "hf_mics.accelerator",
    "MiCSCallback": "hf_mics.callback",
    "MiCSPlugin": "hf_mics.plugin",
    "Topology": "hf_mics.topology",
    "apply_mics": "hf_mics.engine",
    "mics_engine": "hf_mics.engine",
    "remove_mics": "hf_mics.engine",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

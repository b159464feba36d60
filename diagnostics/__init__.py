"""How well conditioned are the gradients of a network while it trains."""

if __name__ != "torchgeom_optim.diagnostics":
    raise ImportError(f"{__name__!r} is not importable by this name; import torchgeom_optim.diagnostics instead.")

from torchgeom_optim.diagnostics.cost import Cost
from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.hook import Diagnostics
from torchgeom_optim.diagnostics.measurement import Options
from torchgeom_optim.diagnostics.metrics import METRICS, PRESETS
from torchgeom_optim.diagnostics.schedule import EverySteps, LogSpaced

__all__ = [
    "METRICS",
    "PRESETS",
    "Cost",
    "Diagnostics",
    "EverySteps",
    "History",
    "LogSpaced",
    "Options",
    "Record",
]

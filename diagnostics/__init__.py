"""How well conditioned are the gradients of a network while it trains."""

if __name__ != "torchgeom_optim.diagnostics":
    raise ImportError(f"{__name__!r} is not importable by this name; import torchgeom_optim.diagnostics instead.")

from torchgeom_optim.diagnostics.checks import Verdict
from torchgeom_optim.diagnostics.controller import BatchAdvice, ConsistencyLR, advise_batch_size
from torchgeom_optim.diagnostics.cost import Cost
from torchgeom_optim.diagnostics.history import History, Record
from torchgeom_optim.diagnostics.hook import Diagnostics
from torchgeom_optim.diagnostics.huggingface import huggingface_callback
from torchgeom_optim.diagnostics.lightning import lightning_callback
from torchgeom_optim.diagnostics.measurement import Options
from torchgeom_optim.diagnostics.metrics import METRICS, PRESETS
from torchgeom_optim.diagnostics.plots import dashboard
from torchgeom_optim.diagnostics.reading import summary, verdicts
from torchgeom_optim.diagnostics.schedule import EverySteps, LogSpaced
from torchgeom_optim.diagnostics.tensorboard import TensorBoardLog

__all__ = [
    "METRICS",
    "PRESETS",
    "BatchAdvice",
    "ConsistencyLR",
    "Cost",
    "Diagnostics",
    "EverySteps",
    "History",
    "LogSpaced",
    "Options",
    "Record",
    "TensorBoardLog",
    "Verdict",
    "advise_batch_size",
    "dashboard",
    "huggingface_callback",
    "lightning_callback",
    "summary",
    "verdicts",
]

"""Pure mathematics on tensors: what every system of the package looks at a network through."""

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.gram import GramResult, per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError
from torchgeom_optim.geometry.layers import register_rule

__all__ = [
    "Capture",
    "GramRecorder",
    "GramResult",
    "Jacobian",
    "JacobianMemoryError",
    "per_sample_gram",
    "register_rule",
]

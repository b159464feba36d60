"""Pure mathematics on tensors: what every system of the package looks at a network through."""

from torchgeom_optim.geometry.capture import Capture
from torchgeom_optim.geometry.data_spectrum import data_spectrum
from torchgeom_optim.geometry.fisher import fisher_jacobian, fisher_spectrum
from torchgeom_optim.geometry.gram import GramResult, per_sample_gram
from torchgeom_optim.geometry.gram_recorder import GramRecorder
from torchgeom_optim.geometry.inpca import InPCA, inpca
from torchgeom_optim.geometry.jacobian import Jacobian, JacobianMemoryError
from torchgeom_optim.geometry.kronecker import KroneckerBasis, KroneckerFactors, diagonal_in, kronecker_factors
from torchgeom_optim.geometry.lanczos import SpectralDensity
from torchgeom_optim.geometry.layers import register_rule
from torchgeom_optim.geometry.numpy_operator import NumpyOperator
from torchgeom_optim.geometry.sloppiness import Sloppiness, sloppiness
from torchgeom_optim.geometry.spectrum import Spectrum, jacobian_density, jacobian_spectrum

__all__ = [
    "Capture",
    "GramRecorder",
    "GramResult",
    "InPCA",
    "Jacobian",
    "JacobianMemoryError",
    "KroneckerBasis",
    "KroneckerFactors",
    "NumpyOperator",
    "Sloppiness",
    "SpectralDensity",
    "Spectrum",
    "data_spectrum",
    "diagonal_in",
    "fisher_jacobian",
    "fisher_spectrum",
    "inpca",
    "jacobian_density",
    "jacobian_spectrum",
    "kronecker_factors",
    "per_sample_gram",
    "register_rule",
    "sloppiness",
]

"""How derivatives are taken: the strategies, the autograd node, the sweeps."""

from .backsolve_adjoint import BacksolveAdjoint
from .continuous import GaussAdjoint, InterpolatingAdjoint, QuadratureAdjoint
from .forward import ForwardSensitivity
from .problem import Gradient, Outputs, Problem
from .strategies import Backprop, DiscreteAdjoint

__all__ = [
    "Backprop",
    "BacksolveAdjoint",
    "DiscreteAdjoint",
    "ForwardSensitivity",
    "GaussAdjoint",
    "Gradient",
    "InterpolatingAdjoint",
    "Outputs",
    "Problem",
    "QuadratureAdjoint",
]

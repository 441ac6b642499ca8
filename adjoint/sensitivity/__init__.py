"""How derivatives are taken: the strategies, the autograd node, the sweeps."""

from .problem import Gradient, Outputs, Problem
from .strategies import Backprop, DiscreteAdjoint

__all__ = ["Backprop", "DiscreteAdjoint", "Gradient", "Outputs", "Problem"]

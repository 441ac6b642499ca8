"""Layers."""

from .deq import DEQ
from .neural_ode import NeuralODE

__all__ = ["DEQ", "NeuralODE"]

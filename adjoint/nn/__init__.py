"""Layers."""

from .neural_ode import NeuralODE

__all__ = ["NeuralODE"]

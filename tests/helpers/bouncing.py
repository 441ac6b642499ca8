"""A ball that bounces, and its closed form."""

from __future__ import annotations

import torch

from adjoint import Event


def fall(t, y, e, g):
    """Height and velocity of a body in free fall; ``e`` and ``g`` are 0-d or ``(B,)``."""
    return torch.stack([y[..., 1], -g.expand_as(y[..., 1])], -1)


def height(t, y, e, g):
    return y[..., 0]


def rebound(t, y, e, g):
    return torch.stack([y[..., 0], -e * y[..., 1]], -1)


BOUNCE = Event(height, direction=-1, reset=rebound, name="bounce")


def contact(n, h, e, g):
    """When a ball that was dropped from ``h`` meets the ground for the n-th time, n = 1, 2, ..."""
    return (2 * h / g).sqrt() * (1 + 2 * sum(e**k for k in range(1, n)))


def between(n, h, e, g, share=0.4):
    """A time after the n-th contact and before the next one, without derivatives."""
    a, b = contact(n, h, e, g), contact(n + 1, h, e, g)
    return (a + share * (b - a)).detach()


def flight(t, n, h, e, g):
    """Height and velocity at ``t``, after ``n`` contacts."""
    if n == 0:
        return torch.stack([h - g * t**2 / 2, -g * t], -1)
    v, s = e**n * (2 * g * h).sqrt(), t - contact(n, h, e, g)
    return torch.stack([v * s - g * s**2 / 2, v - g * s], -1)

"""A custom function as they were written before transforms: with a context in ``forward``."""

from __future__ import annotations

import torch


class OldProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, bar):
        a, b = ctx.saved_tensors
        return bar * b, bar * a

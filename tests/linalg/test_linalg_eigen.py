"""One eigenpair: by its equation and NumPy, derivatives by differences."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from adjoint.linalg.eigen import DegenerateEigenvalue, eigenpair


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_pair(dtype):
    a = torch.randn(2, 3, 3, dtype=dtype) + torch.diag(torch.tensor([0.0, 4.0, 9.0]))
    value, v = eigenpair(a, 4.2)
    every = np.linalg.eigvals(a.numpy())
    truth = [row[np.abs(row - 4.2).argmin()] for row in every]
    np.testing.assert_allclose(value.numpy(), truth, rtol=1e-10)
    torch.testing.assert_close(torch.linalg.vector_norm(v, dim=-1), torch.ones(2))
    torch.testing.assert_close((a.to(v.dtype) @ v[..., None])[..., 0], value[:, None] * v)
    a.requires_grad_()
    assert gradcheck(lambda x: eigenpair(x, 4.2), a, check_forward_ad=True)
    assert gradgradcheck(lambda x: eigenpair(x, 4.2), a)
    torch.testing.assert_close(vmap(lambda x: eigenpair(x, 4.2)[1])(a), v)


def test_nested():
    a = torch.randn(3, 3) + torch.diag(torch.tensor([0.0, 4.0, 9.0]))

    def loss(x):
        value, v = eigenpair(x, 4.2)
        return value.real.sin() + v.real.sin().sum()

    torch.testing.assert_close(jacfwd(jacfwd(loss))(a), jacrev(jacrev(loss))(a))


def test_degenerate():
    with pytest.raises(DegenerateEigenvalue, match="gap"):
        eigenpair(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), 1.0)

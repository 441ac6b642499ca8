"""Least squares and matrix equations: values by SciPy and NumPy, derivatives by differences, transforms by loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from adjoint.errors import InvalidInput
from adjoint.linalg.functions import discrete_lyapunov, lstsq, lyapunov, sylvester

DTYPES = [torch.float64, torch.complex128]


def _pair(name, dtype, batch=()):
    a, b, c = (torch.randn(*batch, *s, dtype=dtype) for s in ((3, 3), (2, 2), (3, 2)))
    if name == "sylvester":
        return sylvester, (a + 3 * torch.eye(3), b + 3 * torch.eye(2), c)
    if name in ("tall", "wide"):
        return lstsq, (
            torch.randn(*batch, *((4, 2) if name == "tall" else (2, 4)), dtype=dtype),
            torch.randn(*batch, 4 if name == "tall" else 2, 2, dtype=dtype),
        )
    q = torch.randn(*batch, 3, 3, dtype=dtype)
    return (lyapunov, (a - 4 * torch.eye(3), q)) if name == "lyapunov" else (discrete_lyapunov, (0.3 * a, q))


NAMES = ["sylvester", "tall", "wide", "lyapunov", "discrete"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_values(name, dtype):
    fun, args = _pair(name, dtype)
    n = [x.numpy() for x in args]
    truth = {
        "sylvester": lambda: scipy.linalg.solve_sylvester(*n),
        "lyapunov": lambda: scipy.linalg.solve_continuous_lyapunov(n[0], -n[1]),
        "discrete": lambda: scipy.linalg.solve_discrete_lyapunov(*n),
    }.get(name, lambda: np.linalg.pinv(n[0]) @ n[1])()
    np.testing.assert_allclose(fun(*args).numpy(), truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name, dtype):
    fun, args = _pair(name, dtype, (2,))
    args = [x.requires_grad_() for x in args]
    assert gradcheck(fun, args, check_forward_ad=True)
    assert gradgradcheck(fun, args, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    fun, args = _pair(name, torch.float64, (3,))
    torch.testing.assert_close(vmap(fun)(*args), torch.stack([fun(*row) for row in zip(*args, strict=True)]))
    one = [x[0] for x in args]

    def loss(a):
        return fun(a, *one[1:]).sin().sum()

    torch.testing.assert_close(jacfwd(jacfwd(loss))(one[0]), jacrev(jacrev(loss))(one[0]))


def test_faults():
    with pytest.raises(InvalidInput, match="rank"):
        lstsq(torch.ones(4, 2), torch.ones(4, 1))
    assert vmap(lstsq)(torch.ones(1, 4, 2), torch.ones(1, 4, 1)).isnan().all()
    with pytest.raises(InvalidInput, match="coincide"):
        sylvester(torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([-2.0, 5.0])), torch.ones(2, 2))
    with pytest.raises(InvalidInput, match="sylvester needs"):
        sylvester(torch.eye(2), torch.eye(2), torch.ones(3, 2))
    assert sylvester(torch.eye(2), torch.eye(2), torch.full((2, 2), float("nan"))).isnan().all()

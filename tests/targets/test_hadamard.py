"""Hadamard matrices: every construction against the definition, every width that vision models use, and the rotation
that stands in where there is none."""

import pytest
import torch

from agglom.targets.covariance import equalizer
from agglom.targets.hadamard import character_matrix, hadamard, plan, prime_power

WIDTHS = range(192, 4097)


def is_hadamard(h: torch.Tensor) -> bool:
    """H (Hᵀ v) = n v for random integers v, in exact arithmetic: wrong with a chance of 2^-40 (Freivalds)."""
    v = torch.randint(-(2**20), 2**20, (len(h), 2), generator=torch.Generator().manual_seed(0)).double()
    wide = h.double()
    return bool((h.abs() == 1).all()) and torch.equal(wide @ (wide.T @ v), len(h) * v)


def leaves(n: int) -> set[int]:
    """Sizes of the matrices that a width's Kronecker product is made of."""
    kind, size = plan(n)
    return leaves(size) | leaves(n // size) if kind == "kronecker" else {n}


def test_factors_of_every_width():
    """A Kronecker product of Hadamard matrices is one, so the factors settle all widths from 192 to 4096.

    All factors up to 600 and every 16th above (all of them pass, but take a minute).
    """
    known = [n for n in WIDTHS if plan(n)]
    assert len(known) == 651
    factors = sorted(set().union(*(leaves(n) for n in known)))
    for n in [n for n in factors if n <= 600] + [n for n in factors if n > 600][::16]:
        assert is_hadamard(hadamard(n)), n


def test_characters_of_every_prime():
    """Q Qᵀ = q I - J for a circulant Q says that its first row's autocorrelation is -1 off 0."""
    for q in (q for q in range(3, 4096) if prime_power(q) == (q, 1)):
        row = torch.zeros(q)
        row[1:] = -1
        row[torch.arange(1, q) ** 2 % q] = 1  # independent of how the module finds its squares
        correlation = torch.fft.irfft(torch.fft.rfft(row.double()).abs().square(), n=q)
        assert (correlation[1:] + 1).abs().max() < 1e-6
        if q < 200:
            # row 0 of the module's matrix is chi(0 - b)
            assert torch.equal(character_matrix(q)[:, 0].float(), row)


@pytest.mark.parametrize("n", [192, 256, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 2048, 4096])
def test_widths_of_vision_models(n):
    assert is_hadamard(hadamard(n))


@pytest.mark.parametrize("n", [28, 244, 344, 1332, 52, 100, 340, 724])
def test_prime_powers(n):
    """27, 243, 343, 1331 (Paley I) and 25, 49, 169, 361 (Paley II)."""
    kind, q = plan(n)
    assert prime_power(q)[1] > 1 and kind == ("paley1" if q % 4 == 3 else "paley2")
    assert is_hadamard(hadamard(n))


def test_full_product_of_a_small_one():
    h = hadamard(36).long()
    assert torch.equal(h @ h.T, 36 * torch.eye(36, dtype=torch.long))


def test_where_there_is_none():
    assert [n for n in range(1, 100) if plan(n) is None and n % 4 == 0] == [92]  # Williamson's, not built here
    assert all(hadamard(n) is None for n in (0, 3, 6, 193, 770, 92))
    assert [q for q in range(2, 30) if prime_power(q)] == [3, 5, 7, 9, 11, 13, 17, 19, 23, 25, 27, 29]


@pytest.mark.parametrize("q", [7, 9, 13, 27])
def test_characters(q):
    """As many squares as non-squares a row; symmetric where -1 is a square, skew elsewhere; Q Qᵀ = q I - J."""
    chi = character_matrix(q).long()
    assert (chi.sum(1) == 0).all() and (chi.diagonal() == 0).all()
    assert torch.equal(chi.T, chi if q % 4 == 1 else -chi)
    assert torch.equal(chi @ chi.T, q * torch.eye(q, dtype=torch.long) - 1)


@pytest.mark.parametrize("n", [2, 3, 37, 193, 232])
@pytest.mark.parametrize("power", [0, 1, 8])
def test_equalizer(n, power):
    """Orthogonal, and the diagonal of G diag(v) Gᵀ is constant, for flat and for steep spectra."""
    values = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** power
    g = equalizer(values)
    torch.testing.assert_close(g @ g.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close((g * g) @ values, values.mean().expand(n), atol=1e-12, rtol=0)


def test_equalizer_of_nothing():
    assert equalizer(torch.zeros(5)).isfinite().all()
    assert equalizer(torch.tensor([1.0, 0, 0, 0, 0])).isfinite().all()

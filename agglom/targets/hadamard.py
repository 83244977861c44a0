"""Hadamard matrices: square, of +1 and -1, with orthogonal rows.

Built from Paley's two constructions over finite fields (Paley 1933) and Kronecker products (Sylvester 1867), which give
one for most multiples of 4, among them every width that vision models use.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def plan(n: int) -> tuple[str, int] | None:
    """How a Hadamard matrix of order n is built, or None where the constructions here give none.

    Returns:
        ("one", 1), ("two", 2), ("paley1", q), ("paley2", q), or ("kronecker", a) with n = a * (n / a).
    """
    if n in (1, 2):
        return ("one", "two")[n - 1], n
    if n < 1 or n % 4:
        return None
    if plan(n // 2):
        return "kronecker", 2
    if (n - 1) % 4 == 3 and prime_power(n - 1):
        return "paley1", n - 1
    if (n // 2 - 1) % 4 == 1 and prime_power(n // 2 - 1):
        return "paley2", n // 2 - 1
    for a in range(4, int(n**0.5) + 1, 4):
        if n % a == 0 and plan(a) and plan(n // a):
            return "kronecker", a
    return None


def hadamard(n: int) -> Tensor | None:
    """(n, n) int8 with H Hᵀ = n I, or None where `plan` knows none."""
    how = plan(n)
    if how is None:
        return None
    kind, size = how
    if kind == "one":
        return torch.ones(1, 1, dtype=torch.int8)
    if kind == "two":
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    if kind == "kronecker":
        left, right = hadamard(size), hadamard(n // size)
        assert left is not None and right is not None  # plan() has found both
        return torch.kron(left, right)
    # the border makes a conference matrix of the field's quadratic characters: zero diagonal, C Cᵀ = q I
    conference = torch.ones(size + 1, size + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = character_matrix(size)
    eye = torch.eye(size + 1, dtype=torch.int8)
    if kind == "paley1":  # skew, so C + Cᵀ = 0 and adding I keeps the rows orthogonal
        conference[1:, 0] = -1
        return conference + eye
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(conference, plus.to(torch.int8)) + torch.kron(eye, minus.to(torch.int8))


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k, p an odd prime, or None."""
    if q < 3 or q % 2 == 0:
        return None
    p = next((d for d in range(3, int(q**0.5) + 1, 2) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def character_matrix(q: int) -> Tensor:
    """(q, q) int8 of chi(a - b) over the elements of the field GF(q): 0 on the diagonal, 1 for squares, -1 else."""
    found = prime_power(q)
    if found is None:
        raise ValueError(f"{q} is no power of an odd prime")
    p, k = found
    powers = _powers_of_a_generator(p, k)
    chi = torch.zeros(q, dtype=torch.int8)
    chi[powers[0::2]] = 1  # the squares are the even powers
    chi[powers[1::2]] = -1
    if k == 1:  # then it is circulant: row a is the doubled sequence, backwards, from its own offset on
        return torch.cat([chi, chi]).flip(0).unfold(0, q, 1)[:q].flip(0)
    # element number = its coefficients as base-p digits; subtract digit by digit
    number, difference = torch.arange(q), torch.zeros(q, q, dtype=torch.int32)
    for d in range(k):
        digit = (number // p**d % p).to(torch.int32)
        difference += (digit[:, None] - digit[None, :]).remainder_(p) * p**d
    return chi[difference]


def _powers_of_a_generator(p: int, k: int) -> list[int]:
    """[g^0, g^1, ...], all p**k - 1 non-zero elements of the field, as numbers whose base-p digits are coefficients.

    Looks for a reduction rule x^k = r(x) under which x itself generates the field (a primitive polynomial).
    """
    top = p ** (k - 1)
    for rule in range(1, p**k):
        element, powers = 1, []
        while True:
            powers.append(element)
            # times x: shift the digits up, then add the carry times r, digit by digit
            carry, shifted = element // top, element % top * p
            element = sum((shifted // p**d % p + carry * (rule // p**d % p)) % p * p**d for d in range(k))
            if element in (0, 1) or len(powers) == p**k:
                break
        if element == 1 and len(powers) == p**k - 1:
            return powers
    raise AssertionError("every finite field has a generator")

"""Hadamard matrices: Sylvester, Paley I and II, four circulants, Kronecker products.

A Hadamard matrix H has entries ±1 and H Hᵀ = n I. Paley's constructions need the quadratic
character of a finite field (Paley 1933); together with doubling and a few arrays of circulants
they cover the widths of the Llama, Qwen, Gemma and SmolLM families. A width that none of them
reaches gets equal blocks of the largest order that divides it.
"""

import logging
from functools import cache
from itertools import product

import numpy as np
import torch

from spinlab.errors import InputError
from spinlab.rotation.circulants import goethals_seidel, has_circulants

log = logging.getLogger(__name__)


@cache
def hadamard_factors(n: int) -> tuple[int, int]:
    """Split n into (core, power of two) such that H_n = H_core ⊗ Sylvester(power).

    The core is the smallest one that exists: 576 = 36·16, 1536 = 12·128, 11008 = 172·64. A power
    of two has core 1. Raises InputError for orders with no known construction here.
    """
    if n < 1:
        raise InputError(f"width {n} has no Hadamard matrix: a width is at least 1")
    power = n & -n
    if n == power:
        return 1, n
    odd = n // power
    twos = 4
    while twos <= power:
        if _construction(odd * twos) is not None:
            return odd * twos, power // twos
        twos *= 2
    raise InputError(
        f"width {n} = {odd}·{power} has no Hadamard matrix by Sylvester, Paley, "
        "Goethals-Seidel or Kronecker products; use kind `random` for that rotation instead"
    )


def has_hadamard(n: int) -> bool:
    """Tell whether a Hadamard matrix of order n can be built here."""
    try:
        hadamard_factors(n)
    except InputError:
        return False
    return True


def hadamard_block(n: int, where: str) -> int:
    """Return the order of the Hadamard blocks that tile width n: n itself wherever it has one.

    A width without one is tiled by the largest order that divides it, and a log line says so.
    """
    size = max(d for d in range(1, n + 1) if n % d == 0 and has_hadamard(d))
    if size < n:
        log.warning(
            "%s: no Hadamard matrix of order %d can be built; taking %d blocks of order %d",
            where,
            n,
            n // size,
            size,
        )
    return size


@cache
def hadamard_matrix(n: int) -> torch.Tensor:
    """Return a Hadamard matrix of order n: (n, n), int8, entries ±1. Do not modify it."""
    core, power = hadamard_factors(n)
    matrix = np.ones((1, 1), dtype=np.int8) if core == 1 else _build(core)
    sylvester = np.ones((1, 1), dtype=np.int8)
    while sylvester.shape[0] < power:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    return torch.from_numpy(np.kron(matrix, sylvester))


def _construction(n: int) -> tuple[str, int, int] | None:
    """Name how order n = 4·k is built: Paley I or II of a field, circulants, or a product."""
    if n % 4 == 0 and (n - 1) % 4 == 3 and _prime_power(n - 1):
        return "paley1", n - 1, 0
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1):
        return "paley2", n // 2 - 1, 0
    if has_circulants(n):
        return "goethals_seidel", n, 0
    for a in range(4, int(n**0.5) + 1, 4):
        if n % a == 0 and (n // a) % 4 == 0 and _construction(a) and _construction(n // a):
            return "kronecker", a, n // a
    return None


def _build(n: int) -> np.ndarray:
    construction = _construction(n)
    assert construction is not None
    kind, a, b = construction
    if kind == "kronecker":
        return np.kron(_build(a), _build(b))
    if kind == "goethals_seidel":
        return goethals_seidel(a)
    q = _jacobsthal(a)
    ones = np.ones((1, a), dtype=np.int8)
    if kind == "paley1":  # q = 3 mod 4: Q is skew, so S + I with S = [[0, 1], [-1, Q]]
        s = np.block([[np.zeros((1, 1), np.int8), ones], [-ones.T, q]])
        return (s + np.eye(n, dtype=np.int8)).astype(np.int8)
    # q = 1 mod 4: Q is symmetric; replace 0 by [[1,-1],[-1,-1]] and ±1 by ±[[1,1],[1,-1]]
    s = np.block([[np.zeros((1, 1), np.int8), ones], [ones.T, q]])
    plus, null = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return (np.kron(s, plus) + np.kron(np.eye(n // 2, dtype=np.int8), null)).astype(np.int8)


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with p prime and q = p^k, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest, k = rest // p, k + 1
    return (p, k) if rest == 1 else None


def _jacobsthal(q: int) -> np.ndarray:
    """Return Q with Q[i, j] = χ(a_i - a_j), χ the quadratic character of GF(q)."""
    field = _prime_power(q)
    assert field is not None
    p, k = field
    elements = np.array(list(product(range(p), repeat=k)), dtype=np.int64)  # low degree first
    weights = p ** np.arange(k - 1, -1, -1)
    squares = _multiply(elements, elements, p, _irreducible(p, k))
    character = np.full(q, -1, dtype=np.int8)
    character[(squares % p) @ weights] = 1
    character[0] = 0
    differences = (elements[:, None, :] - elements[None, :, :]) % p
    return character[differences @ weights]


def _multiply(a: np.ndarray, b: np.ndarray, p: int, modulus: tuple[int, ...]) -> np.ndarray:
    """Multiply polynomials row by row (coefficients low degree first) modulo `modulus` and p."""
    k = a.shape[1]
    full = np.zeros((a.shape[0], 2 * k - 1), dtype=np.int64)
    for i in range(k):
        full[:, i : i + k] += a[:, i : i + 1] * b
    for degree in range(2 * k - 2, k - 1, -1):  # x^k = -(lower terms of the monic modulus)
        lead = full[:, degree : degree + 1] % p
        full[:, degree - k : degree] -= lead * np.array(modulus[:k])
    return full[:, :k] % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Return the lower coefficients of a monic irreducible polynomial of degree k over GF(p).

    By elimination: whatever is not a product of two smaller monic polynomials. Fields here have
    at most a few thousand elements.
    """
    reducible = set()
    for d in range(1, k // 2 + 1):
        for low in product(range(p), repeat=d):
            for high in product(range(p), repeat=k - d):
                both = np.polynomial.polynomial.polymul([*low, 1], [*high, 1]).astype(int) % p
                reducible.add(tuple(both[:k]))
    return next(c for c in product(range(p), repeat=k) if c not in reducible)

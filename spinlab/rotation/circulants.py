"""Hadamard matrices of order 4n from four circulant matrices of signs (Goethals and Seidel 1967).

Where A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4n I, their array is a Hadamard matrix. Each circulant is given
by the residues modulo n that carry a minus sign; these form orbits of multiplication by one
number, as with Williamson's symmetric circulants, whose number is -1. The orbits below come from a
search by computer over all such subsets that fit each other.
"""

import numpy as np

# n: (multiplier, one residue of every orbit, for each of the four circulants)
_ORBITS = {
    23: (-1, ((1, 2, 4, 6), (1, 2, 4, 5, 9, 10, 11), (1, 2, 5, 7, 9), (3, 4, 5, 8, 9))),
    29: (
        -1,
        (
            (1, 7, 11, 13, 14),
            (3, 5, 8, 9, 10, 12),
            (2, 3, 6, 7, 9, 12, 13, 14),
            (3, 4, 7, 9, 12, 13, 14),
        ),
    ),
    39: (29, ((1, 3, 4, 6, 7), (1, 3, 6, 7, 12, 13), (3, 6, 7, 12, 13), (1, 2, 6, 12, 13))),
    43: (4, ((1, 3, 6, 7), (1, 2, 7), (1, 3, 6), (2, 6, 7))),
    65: (
        36,
        (
            (1, 2, 4, 5, 8, 12, 13, 39),
            (2, 3, 4, 5, 6, 10, 13, 26),
            (2, 4, 5, 6, 8, 13),
            (1, 3, 4, 5, 12, 13),
        ),
    ),
    73: (2, ((1, 5, 9, 11, 13), (1, 9, 11, 13), (1, 3, 5, 11), (3, 9, 11, 25))),
}


def has_circulants(order: int) -> bool:
    """Tell whether four circulants that make a Hadamard matrix of this order are known here."""
    return order % 4 == 0 and order // 4 in _ORBITS


def goethals_seidel(order: int) -> np.ndarray:
    """Return the Hadamard matrix (order, order) of four circulants, int8."""
    n = order // 4
    multiplier, found = _ORBITS[n]
    a, b, c, d = (_circulant(n, multiplier, residues) for residues in found)
    # b R, with R the reversed identity, has its columns reversed
    br, cr, dr = (m[:, ::-1] for m in (b, c, d))
    bt, ct, dt = (m.T[:, ::-1] for m in (b, c, d))
    return np.block([[a, br, cr, dr], [-br, a, dt, -ct], [-cr, -dt, a, bt], [-dr, ct, -bt, a]])


def _circulant(n: int, multiplier: int, residues: tuple[int, ...]) -> np.ndarray:
    row = np.ones(n, dtype=np.int8)
    for residue in residues:
        while row[residue % n] == 1:
            row[residue % n] = -1
            residue *= multiplier
    return row[(np.arange(n)[None, :] - np.arange(n)[:, None]) % n]

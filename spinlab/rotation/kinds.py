"""The kinds of rotations that are drawn: a name, and what makes a matrix of that kind.

A kind is a function (n, generator, where) -> an orthogonal (n, n) in float64; where: the rotation
that it is for, to be named in errors. It serves as R1 and R2, and online as R3 and R4.
"""

from collections.abc import Callable, Mapping

import torch

from spinlab.rotation.orthogonal import (
    exact_hadamard,
    gaussian_projection,
    orthogonalize_rows,
    random_orthogonal,
    randomized_hadamard,
    well_posed_bernoulli,
)

Kind = Callable[[int, torch.Generator, str], torch.Tensor]

KINDS: Mapping[str, Kind] = {
    "identity": lambda n, generator, where: torch.eye(n, dtype=torch.float64),
    "random": lambda n, generator, where: random_orthogonal(n, generator),
    "gaussian": lambda n, generator, where: orthogonalize_rows(gaussian_projection(n, generator)),
    "bernoulli": lambda n, generator, where: orthogonalize_rows(well_posed_bernoulli(n, generator)),
    "hadamard": randomized_hadamard,
    "exact_hadamard": lambda n, generator, where: exact_hadamard(n, where),
}

"""Which images are judged: a draw that nobody chose, and that anybody can repeat.

The indices follow from the digests of what is judged and a nonce (`docs/threat-model.md`, 3), so
that a builder cannot pick friendly images; the gate repeats the draw from the certificate alone.
"""

from mlflow_kdguard.files import sha256


def draw(population: int, n: int, *parts: str) -> tuple[int, ...]:
    """`n` distinct indices below `population`, ascending, uniform under a hash of `parts`.

    Every index is ranked by SHA-256(parts, index) and the n smallest are taken: no generator
    whose stream could change between library versions is involved. If n exceeds the population,
    every index is drawn.
    """
    if n < 0 or population < 0:
        raise ValueError(f"cannot draw {n} of {population}")
    seed = sha256("\x1f".join(parts).encode())
    ranked = sorted(range(population), key=lambda i: sha256(f"{seed}:{i}".encode()))
    return tuple(sorted(ranked[:n]))

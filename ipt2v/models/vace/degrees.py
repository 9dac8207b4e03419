"""How many ranks can share one video. Pure arithmetic, no torch: the launcher asks before it submits."""

from __future__ import annotations


def legal_degrees(num_heads: int) -> tuple[int, ...]:
    """Numbers of ranks that Ulysses can use: the divisors of the number of heads."""
    return tuple(degree for degree in range(1, num_heads + 1) if num_heads % degree == 0)


def check_degree(degree: int, num_heads: int, *, model: str) -> None:
    """Raise ValueError if `degree` ranks cannot share `num_heads` heads."""
    if num_heads % degree:
        legal = ", ".join(map(str, legal_degrees(num_heads)))
        raise ValueError(
            f"ulysses: {degree} ranks do not divide the {num_heads} heads of {model}; "
            f"set nodes x gpus_per_node of the video stage to one of {legal}"
        )

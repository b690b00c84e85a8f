"""The choice between XLA and a Triton kernel."""

from .gpu import partitioned


class CannotRunHereError(ValueError):
    """An implementation was asked for that cannot run on this machine, or with these arguments."""


def require_known(implementation: str | None, known: tuple[str, ...]) -> None:
    """Raises ValueError for the name of no implementation."""
    if implementation not in (None, *known):
        raise ValueError(f"implementation = {implementation!r}; expected None or one of {', '.join(known)}.")


def takes_triton(implementation: str | None, why_not: str | None) -> bool:
    """Whether the kernel runs; `why_not`: the reason why it cannot. Raises ValueError if it is asked for and cannot."""
    if implementation == "triton" and why_not is not None:
        raise CannotRunHereError(f'implementation = "triton" cannot run here: {why_not}.')
    return implementation == "triton" or (implementation is None and why_not is None and not partitioned())

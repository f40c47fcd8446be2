"""JAX programs, looked into."""

from collections.abc import Iterator
from typing import Any

import jax.extend


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a program and of all programs in it, in order."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def depends_on(value: Any, goals: set[Any], program: list[Any]) -> bool:
    """Whether a value is computed from one of `goals`, of those in the same program."""
    makers = {out: equation for equation in program for out in equation.outvars}
    found: set[Any] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, jax.extend.core.Literal) or value in found:
            continue
        if value in goals:
            return True
        found.add(value)
        waiting += makers[value].invars if value in makers else []
    return False

"""What is raised when the user, not the program, has to change something."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, wraps
from itertools import takewhile
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Wrong input: one sentence that names the option, the value that came, and the way out.

    The command line prints it without a traceback and exits with code 2.
    """


class ProcessLostError(RuntimeError):
    """Another process of the run has ended; what it had finished is on disk.

    The command line prints it without a traceback and exits with code 1.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message and what it announces; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announcing = len(list(takewhile(lambda line: line.endswith(":"), lines)))
    line = " ".join(lines[: announcing + 1])
    return line if " " in line else f"{type(error).__name__} {line}".strip()


class module_property(cached_property[T]):  # noqa: N801  # a decorator
    """A cached property of a `torch.nn.Module`.

    A module answers an AttributeError within a property with one that the property is missing,
    which hides the cause: it is raised as a RuntimeError.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        @wraps(compute)
        def computed(module: Any) -> T:
            try:
                return compute(module)
            except AttributeError as error:
                raise RuntimeError(f"{compute.__name__} failed: {error}") from error

        super().__init__(computed)

"""What Lightning and torch refuse, as wrong input: one sentence that names the option."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_inversion.cli.parser import input_error_behind
from lightning_inversion.errors import InputError, first_line

_RUN_BY = {"/torch/optim/": "--model.optimizer", "/lightning/": "--trainer"}
"""Where a run's error is raised, and the option that is at fault."""


@contextmanager
def wrong_values(option: str = "", *also: type[Exception]) -> Iterator[None]:
    """Turn a library's refusal of the values of options into an `InputError`.

    Args:
        option: to which the values belong; '' where the error names it.
        also: errors that mean a wrong value here, beside ValueError, Lightning's own, and
            ImportError, by which it asks for a package.
    """
    kinds: tuple[type[Exception], ...] = (
        ValueError, ImportError, MisconfigurationException, *also,
    )  # fmt: skip
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        ours = input_error_behind(error)
        if ours is not None:
            raise ours from error
        if isinstance(error, UnicodeDecodeError):
            raise InputError(
                "--config names a file that is not UTF-8 text; give a file of YAML."
            ) from error
        text = " ".join(str(error).split())
        key = re.search(r"\b(accelerator|devices|num_nodes|precision|strategy)[=`]", text)
        name = f"--trainer.{key[1]}" if key else option
        raise InputError(
            f"{name}: {text.rstrip('.')}; choose another value.".removeprefix(": ")
        ) from error


@contextmanager
def wrong_run(checkpoint: Any) -> Iterator[None]:
    """Turn what a run is refused after its options were read into an `InputError`.

    Args:
        checkpoint: the value of --ckpt_path.
    """
    try:
        yield
    except (InputError, OSError, MemoryError):
        raise
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        reason = first_line(error).rstrip(".")
        if any(file.endswith("checkpoint_connector.py") for file in files):
            raise InputError(
                f"--ckpt_path {str(checkpoint)!r} cannot be restored ({reason}); name another "
                "checkpoint, or leave --ckpt_path out."
            ) from error
        for place, option in _RUN_BY.items():
            if place in files[-1]:
                raise InputError(
                    f"{option}: it cannot run so ({reason}); choose another value."
                ) from error
        raise

"""``quiet_transformers``: transformers without its bars and reports."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and reports of unread weights: blocks are dropped on purpose.

    Weights that are *missing* are looked for by the caller, who raises an error for them.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    bitsandbytes = logging.getLogger("bitsandbytes")
    bitsandbytes_level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)  # it names optional kernels that are not installed
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|bitsandbytes|gguf)(\.|$)")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        bitsandbytes.setLevel(bitsandbytes_level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]

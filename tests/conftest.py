"""Fixtures shared by all tests: a tiny model in a folder, the same loaded, and the real one.

What takes seconds to import is imported where it is used: pytest reads this file in a process that
runs no test as well.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

gc.disable()  # until all is imported: what imports make stays, and looking through it takes seconds

# Several test workers that each take every core are several times slower than one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from lightning_inversion.transformer.truncated import TruncatedTransformer
    from lightning_inversion.verification.measurements import Measurements


def pytest_collection_finish() -> None:
    """Collect garbage rarely, and never among what was imported: that stays and is most of it."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama of 4 blocks, width 32, 300 tokens, with a tokenizer of any text."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_transformer(tiny_folder: Path) -> TruncatedTransformer:
    """The tiny Llama cut after its second block. Frozen, so the session can share it."""
    from lightning_inversion.transformer.loading import TransformerSpec

    return TransformerSpec(model=str(tiny_folder), depth=2).load()


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests without the real model keep what is measured once for a model and depth."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def _own_cache(session_cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_INVERSION_CACHE", str(session_cache))
        yield


@pytest.fixture(scope="session")
def measurements(_own_cache: None) -> Measurements:
    """Of a random Llama of 4 blocks, cut after the third."""
    from tests.measured import measured

    return measured("llama", 3)


@pytest.fixture(scope="session")
def other_measurements(_own_cache: None) -> Measurements:
    """Of a random GPT-2 of 4 blocks, cut after the first."""
    from tests.measured import measured

    return measured("gpt2", 1)


@pytest.fixture(scope="session")
def headless(tiny_transformer: TruncatedTransformer) -> Measurements:
    """Of the tiny Llama cut after its second block, without its head."""
    from lightning_inversion.verification.measurements import Measurements

    return Measurements.measure(tiny_transformer)


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    """``monkeypatch`` for a whole module, its fixtures included."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def _no_user_cache(
    request: pytest.FixtureRequest, session_cache: Path, module_patch: pytest.MonkeyPatch
) -> None:
    """The user's cache keeps the real model, and nothing of tiny ones."""
    if request.node.get_closest_marker("integration") is None:
        module_patch.setenv("LIGHTNING_INVERSION_CACHE", str(session_cache))


@pytest.fixture(scope="module")
def shared_parsers(module_patch: pytest.MonkeyPatch) -> None:
    """The commands of this process build their parsers once, for modules that start many."""
    from tests.shared import share_parsers

    share_parsers(module_patch)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package reports through ``logging`` while the test runs, a line each."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("lightning_inversion"), Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def smollm2() -> TruncatedTransformer:
    """SmolLM2-135M cut after its first block: trained, real. For tests marked integration."""
    from lightning_inversion.transformer.loading import TransformerSpec

    return TransformerSpec(depth=1).load()

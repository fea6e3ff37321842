"""Fixtures shared by all tests: a tiny model in a folder, the same loaded, and the real one.

What takes seconds to import is imported where it is used: pytest reads this file in a process that
runs no test as well.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Several test workers that each take every core are several times slower than one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from lightning_inversion.transformer.truncated import TruncatedTransformer


def pytest_collection_finish() -> None:
    """Let no garbage collection go through what was imported, which stays: it is most there is."""
    gc.freeze()


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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests without the real model keep what is measured once for a model and depth."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _no_user_cache(
    request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's cache keeps the real model, and nothing of tiny ones."""
    if "integration" not in request.keywords:
        monkeypatch.setenv("LIGHTNING_INVERSION_CACHE", str(cache))


@pytest.fixture(autouse=True)
def _made_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs that tests start in this process share what is the same for all.

    Tests marked integration, and fixtures that tests share, make their own, as a user's run does.
    """
    if "lightning_inversion.cli.lightning" in sys.modules and "integration" not in request.keywords:
        from tests.made_once import share_instruments, share_parsers

        share_parsers(monkeypatch)
        share_instruments(monkeypatch)


@pytest.fixture(scope="session")
def smollm2() -> TruncatedTransformer:
    """SmolLM2-135M cut after its first block: trained, real. For tests marked integration."""
    from lightning_inversion.transformer.loading import TransformerSpec

    return TransformerSpec(depth=1).load()

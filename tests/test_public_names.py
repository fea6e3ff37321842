"""The public names of the package, which are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_inversion


@pytest.mark.parametrize("name", lightning_inversion.__all__)
def test_a_public_name_is_there(name: str) -> None:
    assert getattr(lightning_inversion, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'recuperate'"):
        lightning_inversion.recuperate  # noqa: B018


def test_importing_the_package_imports_nothing_large() -> None:
    code = "import sys, lightning_inversion; print({'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

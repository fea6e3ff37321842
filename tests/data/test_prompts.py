"""Where prompts come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.errors import InputError
from lightning_inversion.results import read_rows
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.fits import fit


def test_prompts_come_from_one_source() -> None:
    with pytest.raises(InputError, match="none was given"):
        PromptDataModule()
    with pytest.raises(InputError, match=r"prompts and --data\.file were given"):
        PromptDataModule(prompts=["a"], file="b")
    with pytest.raises(InputError, match="prompt 1 is empty"):
        PromptDataModule(prompts=["", ""])


def test_each_prompt_is_repeated(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    fit(
        tiny_folder, tiny_transformer, tmp_path, ResultWriter(), prompts=["The sky", "bus"],
        iterations=2, data_options={"repeat": 3},
    )  # fmt: skip
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.index for row in rows] == list(range(6))
    assert [row.prompt for row in rows] == ["The sky"] * 3 + ["bus"] * 3

"""The memory model: what is counted without a weight, and the batch that it chooses."""

from dataclasses import replace
from pathlib import Path

import pytest

from lightning_inversion.data.memory import ModelSize, main, memory, tokens_that_fit
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.embedding import scored_at_a_time
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import CONFIGS, shared_tiny_model

SHAPE = ModelSize(1000, 64, 2, 50_000, 800.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "falcon", "mpt"])
def test_a_block_is_counted_as_it_is_loaded(family: str) -> None:
    shape = ModelSize.of(CONFIGS[family](), 3)
    two, one = (
        sum(
            parameter.numel()
            for parameter in TruncatedTransformer.from_model(
                shared_tiny_model(family), depth=blocks
            ).parameters()
        )
        for blocks in (2, 1)
    )
    assert shape.parameters == two - one
    assert shape.saved > shape.width


def test_a_model_that_needs_numbers_is_refused() -> None:
    with pytest.raises(InputError, match=r"name --data\.tokens_per_batch"):
        ModelSize.of(CONFIGS["bloom"](), 1)


def test_more_of_anything_needs_more() -> None:
    assert memory(replace(SHAPE, blocks=4), 512, 16).total > memory(SHAPE, 512, 16).total
    assert memory(SHAPE, 65536, 16).total > memory(SHAPE, 512, 16).total
    assert memory(SHAPE, 512, 16, weights="int8").weights < memory(SHAPE, 512, 16).weights
    wide = replace(SHAPE, width=6400)
    assert memory(wide, 512, 16).calibration > 100 * memory(SHAPE, 512, 16).calibration  # squares


def test_a_larger_vocabulary_is_scored_for_fewer_positions() -> None:
    assert scored_at_a_time(1000) == scored_at_a_time(49_152) > scored_at_a_time(256_000) > 1
    assert scored_at_a_time(10**9) == 1
    small, large = (
        memory(replace(SHAPE, vocabulary=size, blocks=1), 2048, 1024).search
        - 2048 * (6 * 4 + 8) * 64
        - 1024 * size
        for size in (256_000, 1_024_000)
    )
    assert large == pytest.approx(small, rel=0.05)  # the scores themselves are bounded


def test_the_batch_that_fits(tiny_folder: Path) -> None:
    spec = TransformerSpec(model=str(tiny_folder), depth=2)
    large, small = tokens_that_fit(spec, 8 * 2**30), tokens_that_fit(spec, 2**30)
    assert large > small > 1
    shape = ModelSize.of(spec.config(), 2)
    assert memory(shape, small, small // 32).total < 2**30 < memory(shape, 4 * small, 256).total


def test_the_table(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        "7B, 8", "7B, 32", "13B, 8", "13B, 40", "30B, 8", "30B, 60",
    ]  # fmt: skip
    assert 12.5 < float(rows[1].split("|")[2]) < 13.0  # 6.7e9 weights of two bytes
    assert main(["--model", str(tiny_folder), "--depth", "2"]) == 0
    assert f"| {tiny_folder}, 2 |" in capsys.readouterr().out

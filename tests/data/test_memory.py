"""What is counted without a weight is what a model with weights has."""

from dataclasses import replace

import pytest
import torch

from lightning_inversion.data.memory import Machine, Shape, main, memory, seconds, tokens_that_fit
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.embedding import scored_at_a_time
from lightning_inversion.transformer.loading import TransformerSpec
from tests.tiny import CONFIGS, FAMILIES, shared_tiny_model

UNCOUNTED = {"mixtral", "bloom"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in UNCOUNTED])
def test_parameters_and_operations(family: str) -> None:
    shape = Shape.of(CONFIGS[family](), 3)
    with_two, with_one = (
        sum(p.numel() for p in block_parameters(family, blocks)) for blocks in (2, 1)
    )
    assert shape.parameters == with_two - with_one
    assert shape.saved > shape.width
    assert shape.flops > shape.parameters  # two operations a weight of a matrix, at least


def block_parameters(family: str, blocks: int) -> list[torch.Tensor]:
    from lightning_inversion.transformer.truncated import TruncatedTransformer

    return list(
        TruncatedTransformer.from_model(shared_tiny_model(family), depth=blocks).parameters()
    )


def test_a_model_that_needs_numbers_is_said_so() -> None:
    with pytest.raises(InputError, match=r"name --data\.tokens_per_batch"):
        Shape.of(CONFIGS["bloom"](), 1)


def test_more_of_anything_needs_more() -> None:
    small = Shape(1000, 64, 2, 50_000, 800.0, 100_000.0)
    deep = Shape(1000, 64, 4, 50_000, 800.0, 100_000.0)
    assert memory(deep, 512, 16).total > memory(small, 512, 16).total
    assert memory(small, 65536, 16).total > memory(small, 512, 16).total
    assert memory(small, 512, 16, weight_bytes=1).weights < memory(small, 512, 16).weights
    wide = replace(small, width=6400)
    assert memory(wide, 512, 16).measuring > 100 * memory(small, 512, 16).measuring  # squares
    machine = Machine(flops=1e9, block=0.001)
    assert seconds(deep, machine, 512, 10) > 1.5 * seconds(small, machine, 512, 10)


def test_a_larger_vocabulary_is_scored_for_fewer_places() -> None:
    assert scored_at_a_time(1000) == scored_at_a_time(49_152) > scored_at_a_time(256_000) > 1
    assert scored_at_a_time(10**9) == 1
    small, large = (
        memory(Shape(size, 64, 1, 50_000, 800.0, 100_000.0), 2048, 1024).search
        - 2048 * (6 * 4 + 8) * 64
        - 1024 * size
        for size in (256_000, 1_024_000)
    )
    assert large == pytest.approx(small, rel=0.05)  # the scores themselves are bounded


def test_the_batch_that_fits(tiny_folder, capsys) -> None:
    spec = TransformerSpec(model=str(tiny_folder), depth=2)
    large, small = tokens_that_fit(spec, 8 * 2**30), tokens_that_fit(spec, 2**30)
    assert large > small > 1
    shape = Shape.of(spec.config(), 2)
    assert memory(shape, small, small // 32).total < 2**30
    assert main(["--model", str(tiny_folder), "--flops", "1e10"]) == 0
    assert "float32" in capsys.readouterr().out

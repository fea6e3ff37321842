import pytest
import torch

from lightning_inversion.transformer.best_tokens import best_tokens


@pytest.mark.parametrize("vocabulary", [5, 64, 640, 1000, 1023, 49152 // 16 + 1])
@pytest.mark.parametrize("k", [1, 5])
def test_the_best_of_blocks_are_the_best_of_all(vocabulary: int, k: int) -> None:
    scores = torch.randn(3, 7, vocabulary, generator=torch.Generator().manual_seed(k))
    scores[0, 0, -1] = 9.0  # behind the last whole block, if there is anything
    scores[0, 1, :k] = 8.0 + torch.arange(k)  # all in one block
    found, expected = best_tokens(scores, k), scores.topk(k)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)


def test_tokens_that_are_ruled_out_come_last_and_none_comes_twice() -> None:
    scores = torch.full((1, 1000), -torch.inf)
    scores[0, [3, 999, 500]] = torch.tensor([1.0, 2.0, 3.0])
    found = best_tokens(scores, 6)
    assert found.indices[0, :3].tolist() == [500, 999, 3]
    assert len(set(found.indices[0].tolist())) == 6
    assert found.values[0, 3:].isinf().all()

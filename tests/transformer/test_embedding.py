"""The token embedding, its pseudo-inverse, and the best of a vocabulary's scores."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.transformer import TokenEmbedding, TruncatedTransformer
from lightning_inversion.transformer.embedding import best_tokens
from tests.tiny import FAMILIES, VOCABULARY, WIDTH, each, tiny_model


def random_embedding(V: int = 40, D: int = 8) -> TokenEmbedding:
    return TokenEmbedding(torch.randn(V, D, generator=torch.Generator().manual_seed(0)))


@each(FAMILIES)
def test_one_hot_mixing_is_the_models_embedding(family: str) -> None:
    model = tiny_model(family, "eager")
    embedding = TruncatedTransformer.from_model(model, depth=1).embedding
    ids = torch.arange(VOCABULARY)[None]
    expected = model.get_input_embeddings()(ids)
    assert (embedding.vocabulary_size, embedding.width) == (VOCABULARY, WIDTH)
    assert torch.equal(embedding(ids), expected)
    one_hot = torch.nn.functional.one_hot(ids, VOCABULARY).float()
    torch.testing.assert_close(embedding.mix(one_hot), expected)


def test_unmix_is_the_pseudo_inverse() -> None:
    embedding = random_embedding()
    embeds = torch.randn(3, 5, 8)
    expected = embeds @ torch.linalg.pinv(embedding.matrix)
    torch.testing.assert_close(embedding.unmix(embeds), expected)
    torch.testing.assert_close(embedding.mix(embedding.unmix(embeds)), embeds)


@pytest.mark.parametrize("shape", [(5, 8), (8, 8)])
def test_unmix_of_a_small_vocabulary(shape: tuple[int, int]) -> None:
    embedding = random_embedding(*shape)
    embeds = embedding(torch.arange(shape[0]))
    torch.testing.assert_close(embedding.unmix(embeds), torch.eye(shape[0]), rtol=0, atol=1e-3)


def test_unmix_with_an_unused_dimension() -> None:
    matrix = random_embedding().matrix.clone()
    matrix[:, 3] = matrix[:, 2]
    embedding = TokenEmbedding(matrix)
    embeds = torch.randn(4, 8)
    expected = embeds @ torch.linalg.pinv(matrix)
    torch.testing.assert_close(embedding.unmix(embeds), expected, rtol=1e-3, atol=1e-4)


def test_unmix_and_mix_are_differentiable() -> None:
    embedding = random_embedding()
    vectors = torch.randn(2, 40, requires_grad=True)
    embedding.unmix(embedding.mix(vectors)).sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.any()


def test_mean_and_spread() -> None:
    embedding = random_embedding()
    torch.testing.assert_close(embedding.mean, embedding.matrix.mean(0))
    centred = embedding.matrix - embedding.matrix.mean(0)
    assert embedding.std == pytest.approx(centred.square().mean().sqrt().item(), rel=1e-5)


def test_what_is_cached_follows_the_matrix() -> None:
    embedding = random_embedding()
    spread, inverse = embedding.std, embedding.unmix(embedding.matrix)
    embedding._apply(lambda tensor: tensor * 2)
    assert embedding.std == pytest.approx(2 * spread, rel=1e-5)
    torch.testing.assert_close(embedding.unmix(embedding.matrix), inverse)


def test_duplicates_are_found() -> None:
    matrix = random_embedding().matrix.clone()
    matrix[7] = matrix[30] = matrix[2].clone()
    matrix[9] = 0.0
    matrix[11] = -0.0
    assert TokenEmbedding(matrix).duplicates() == ((2, 7, 30), (9, 11))
    assert random_embedding().duplicates() == ()


@pytest.mark.parametrize("vocabulary", [5, 64, 640, 1000, 1023, 49152 // 16 + 1])
@pytest.mark.parametrize("k", [1, 5])
def test_the_best_of_blocks_are_the_best_of_all(vocabulary: int, k: int) -> None:
    scores = torch.randn(3, 7, vocabulary, generator=torch.Generator().manual_seed(k))
    scores[0, 0, -1] = 9.0  # after the last whole block, if there is anything
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

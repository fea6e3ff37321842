"""Initial values, encodings and perturbed targets of the learnable input."""

import pytest
import torch

from lightning_inversion.errors import InputError
from lightning_inversion.inputs import (
    EmbeddingInput,
    GaussianPerturbation,
    InitializerInputs,
    MeanInitializer,
    NeighbourPerturbation,
    NormalInitializer,
    PromptInitializer,
    VocabularyInput,
    nearest_other,
    row_noise,
)
from lightning_inversion.transformer.embedding import TokenEmbedding

IDS = torch.tensor([[1, 5, 7], [2, 2, 0]])


@pytest.fixture
def embedding() -> TokenEmbedding:
    generator = torch.Generator().manual_seed(0)
    return TokenEmbedding(torch.randn(40, 8, generator=generator) * 0.1 + 0.02)


def given(embedding: TokenEmbedding, values: torch.Tensor | None = None) -> InitializerInputs:
    def unused() -> None:
        pytest.fail("no probe is needed")

    return InitializerInputs(embedding, torch.zeros(2, 3, 8), unused, values)


def test_noise_of_a_prompt_does_not_depend_on_its_batch() -> None:
    together = row_noise(3, [7, 2], [4, 2], 5, "start")
    alone = row_noise(3, [2], [2], 5, "start")
    assert torch.equal(together[1, :2], alone[0])
    assert not together[1, 2:].any()
    assert not torch.equal(row_noise(3, [2], [2], 5, "shift"), alone)
    assert not torch.equal(row_noise(4, [2], [2], 5, "start"), alone)


def test_initial_values_have_the_mean_and_std_they_promise(embedding: TokenEmbedding) -> None:
    noise = row_noise(0, [0], [4000], 8, "start")
    normal = NormalInitializer(mean=0.5, std=0.05)(noise, given(embedding))
    assert normal.mean().item() == pytest.approx(0.5, abs=2e-3)
    assert normal.std().item() == pytest.approx(0.05, rel=0.03)
    own = MeanInitializer(std=1.0)(noise, given(embedding))
    torch.testing.assert_close(own.mean((0, 1)), embedding.mean, atol=6e-3, rtol=0)
    assert own.std().item() == pytest.approx(embedding.std, rel=0.1)
    target = torch.ones_like(noise)
    warm = PromptInitializer(noise=0.5, target=2.0)(noise, given(embedding, target))
    torch.testing.assert_close(warm, 0.5 * noise + 2)
    with pytest.raises(InputError, match="known prompts"):
        PromptInitializer()(noise, given(embedding))


@pytest.mark.parametrize(
    "learnable",
    [EmbeddingInput(), VocabularyInput(target="one_hot"), VocabularyInput(target="pinv")],
    ids=["embedding", "one_hot", "pinv"],
)
def test_encoding_a_token_gives_its_embedding(learnable, embedding: TokenEmbedding) -> None:
    vectors = learnable.embed(learnable.encode(IDS, embedding), embedding)
    scale = 10 if getattr(learnable, "target", "") == "one_hot" else 1
    torch.testing.assert_close(vectors, scale * embedding(IDS), atol=1e-5, rtol=1e-4)


def test_perturbations(embedding: TokenEmbedding) -> None:
    learnable = EmbeddingInput()
    noise = row_noise(0, [0, 1], [3, 3], 8, "shift")
    gaussian = GaussianPerturbation(std=0.1)(IDS, noise, learnable, embedding)
    torch.testing.assert_close(gaussian - embedding(IDS), 0.1 * noise)
    neighbour = NeighbourPerturbation()(IDS, noise, learnable, embedding)
    changed = (neighbour != embedding(IDS)).any(-1)
    assert changed.sum(1).tolist() == [1, 1]
    row, position = changed.nonzero()[0].tolist()
    others = torch.cdist(embedding(IDS)[row, position, None], embedding.matrix)[0]
    others[IDS[row, position]] = torch.inf
    torch.testing.assert_close(neighbour[row, position], embedding.matrix[others.argmin()])


def nearly_alike() -> TokenEmbedding:
    """300 tokens, of which 30 are 1e-5 std apart and two have one embedding."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 32, generator=generator)
    matrix[100:130] = matrix[100] + 1e-5 * torch.randn(30, 32, generator=generator)
    matrix[7] = matrix[8]
    return TokenEmbedding(matrix)


def test_the_nearest_other_token_is_the_nearest_by_direct_difference() -> None:
    embedding = nearly_alike()
    matrix = embedding.matrix.double()
    for token in [*range(95, 135), 7, 8, 0]:
        distances = (matrix - matrix[token]).norm(dim=1)
        distances[embedding.first_duplicate == embedding.first_duplicate[token]] = torch.inf
        nearest = int(nearest_other(token, embedding))
        assert nearest != token
        assert float(distances[nearest]) == pytest.approx(float(distances.min()), rel=1e-4)


def test_a_neighbour_differs_even_where_tokens_are_nearly_alike() -> None:
    embedding, learnable = nearly_alike(), EmbeddingInput()
    for index in range(40):
        ids = torch.tensor([[100 + index % 30, 100 + (7 * index) % 30, 8]])
        noise = row_noise(0, [index], [3], 32, "shift")
        neighbour = NeighbourPerturbation()(ids, noise, learnable, embedding)
        changed = (neighbour != embedding(ids)).any(-1)
        assert changed.sum() == 1
        assert changed[0].nonzero().item() == noise[0, :, 0].abs().argmax()


def test_an_initializer_of_embeddings_is_refused_for_vocabulary_vectors(
    embedding: TokenEmbedding,
) -> None:
    learnable = VocabularyInput(initializer=MeanInitializer())
    with pytest.raises(InputError, match="MeanInitializer"):
        learnable.initializer(row_noise(0, [0], [3], 40, "start"), given(embedding))


def test_a_one_hot_vector_has_the_value_that_is_asked_for(embedding: TokenEmbedding) -> None:
    vectors = VocabularyInput(one_hot_value=3.0).encode(IDS, embedding)
    assert vectors.argmax(-1).tolist() == IDS.tolist()
    assert vectors.sum(-1).unique().tolist() == [3.0]

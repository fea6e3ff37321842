"""Values back to tokens: scores, masks, top-k."""

import pytest
import torch

from lightning_inversion.decoding import (
    CosineDecoder,
    L2Decoder,
    PinvDecoder,
    decode,
    disallowed_tokens,
    natural_decoder,
)
from lightning_inversion.inputs import EmbeddingInput, VocabularyInput
from lightning_inversion.metrics import top_k_accuracy
from lightning_inversion.transformer.embedding import TokenEmbedding


@pytest.fixture
def embedding() -> TokenEmbedding:
    return TokenEmbedding(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("decoder", [L2Decoder(), CosineDecoder()], ids=["l2", "cosine"])
def test_a_token_decodes_to_itself(decoder, embedding: TokenEmbedding) -> None:
    ids = torch.arange(50)[None]
    top = decode(embedding(ids), EmbeddingInput(), embedding, decoder)
    assert torch.equal(top.best, ids)


def test_scores_against_their_definitions(embedding: TokenEmbedding) -> None:
    vectors = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    distances = torch.cdist(vectors, embedding.matrix)
    l2 = L2Decoder()(vectors, embedding)
    torch.testing.assert_close(
        l2 - vectors.square().sum(-1, keepdim=True) / 2, -distances.square() / 2, atol=1e-4, rtol=0
    )
    reference = torch.linalg.pinv(embedding.matrix)
    torch.testing.assert_close(
        PinvDecoder()(vectors, embedding), vectors @ reference, atol=1e-5, rtol=1e-4
    )
    cosine = torch.cosine_similarity(vectors[:, None], embedding.matrix[None], dim=-1)
    torch.testing.assert_close(CosineDecoder()(vectors, embedding), cosine)


def test_top_k_is_best_first_and_chunks_do_not_show(embedding: TokenEmbedding) -> None:
    values = torch.randn(3, 70, 6, generator=torch.Generator().manual_seed(2))
    top = decode(values, EmbeddingInput(), embedding, L2Decoder(), k=4)
    scores = L2Decoder()(values, embedding)
    torch.testing.assert_close(top.scores, scores.topk(4).values)
    assert top.ids.shape == (3, 70, 4)


def test_a_vocabulary_vector_is_its_own_scores(embedding: TokenEmbedding) -> None:
    learnable = VocabularyInput()
    assert natural_decoder(learnable) is None
    assert decode(torch.eye(50)[None, :5], learnable, embedding, None).best.tolist() == [
        [0, 1, 2, 3, 4]
    ]


def test_only_allowed_tokens_are_decoded(embedding: TokenEmbedding) -> None:
    values = -torch.ones(1, 1, 50)
    values[0, 0, 3], values[0, 0, 7] = -0.5, 5.0
    learnable = VocabularyInput()
    disallowed = disallowed_tokens([3, 4], 50)
    assert decode(values, learnable, embedding, None, disallowed=disallowed).best.item() == 3
    # The source's mask multiplies by 0: a disallowed token then beats a negative score.
    by_zero = decode(values, learnable, embedding, None, disallowed=disallowed, masked_score=0.0)
    assert by_zero.best.item() not in (3, 4)


def test_fewer_allowed_tokens_than_k_leave_no_other_in_the_top_k(embedding: TokenEmbedding) -> None:
    values = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    disallowed = disallowed_tokens([3, 4], 50)
    top = decode(values, VocabularyInput(), embedding, None, k=5, disallowed=disallowed)
    assert set(top.ids.flatten().tolist()) == {3, 4}
    ids, mask = torch.full((2, 3), 7), torch.ones(2, 3, dtype=torch.bool)
    assert top_k_accuracy(top.ids, ids, mask).tolist() == [0.0, 0.0]


def test_equal_vectors_are_scored_once(embedding: TokenEmbedding) -> None:
    scored = []

    class Watched(L2Decoder):
        def __call__(self, vectors, embedding):
            scored.append(len(vectors))
            return super().__call__(vectors, embedding)

    learnable = EmbeddingInput()
    ids = torch.tensor([[3, 5, 3, 3], [5, 3, 7, 0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    top = decode(embedding(ids), learnable, embedding, Watched(), 2, mask=mask)
    assert scored == [3]
    assert torch.equal(top.best[mask], ids[mask])
    each = decode(embedding(ids), learnable, embedding, L2Decoder(), 2)
    assert torch.equal(top.ids[mask], each.ids[mask])


def test_a_mask_of_its_own_for_each_row() -> None:
    values = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    hidden = torch.tensor([[False, True, True], [False, False, True]])
    embedding = TokenEmbedding(torch.eye(3))
    best = decode(values, VocabularyInput(), embedding, None, disallowed=hidden).best
    assert best.tolist() == [[0], [1]]

"""What follows known vectors has the features that whole texts have, and their gradient."""

from __future__ import annotations

import pytest
import torch

from lightning_inversion.transformer.known_vectors import KnownVectors
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import FAMILIES, tiny_model

LENGTHS = torch.tensor([3, 0, 5])
ROWS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_as_in_the_whole_text(family: str) -> None:
    transformer = TruncatedTransformer.from_model(tiny_model(family), depth=2)
    ids = torch.randint(300, (4, 8), generator=torch.Generator().manual_seed(1))
    vectors = transformer.embedding(ids).requires_grad_()
    whole = transformer(vectors)
    known = KnownVectors(transformer, ROWS, vectors, LENGTHS)

    some = torch.tensor([3, 0])
    others = transformer.embedding(torch.tensor([[7, 8], [9, 10]]))
    ours = known.candidates(some, others)
    plain = transformer.candidates(vectors.detach()[some], known.lengths_of(some), others)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)

    if transformer.caches:
        places = LENGTHS[:, None] + torch.arange(2)
        behind = known.followed_by(vectors[ROWS[:, None], places])
        torch.testing.assert_close(behind, whole[ROWS[:, None], places], atol=1e-4, rtol=1e-4)
        pick = (ROWS[:, None], places)
        (expected,) = torch.autograd.grad(whole[pick].square().sum(), vectors)
        (gradient,) = torch.autograd.grad(behind.square().sum(), vectors)
        size = float(expected[pick].abs().max())
        torch.testing.assert_close(gradient[pick], expected[pick], atol=1e-4 * size, rtol=1e-3)

    known.append(some, vectors.detach()[some, LENGTHS[[2, 0]]])
    assert known.lengths.tolist() == [4, 0, 6]
    again = known.candidates(some, vectors.detach()[some, [6, 4]][:, None])
    torch.testing.assert_close(again[:, 0], whole[some, [6, 4]], atol=1e-4, rtol=1e-4)

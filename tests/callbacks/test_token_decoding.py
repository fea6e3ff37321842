import pytest
import torch

from lightning_inversion.callbacks.nearest_tokens import nearest_distances, picture
from lightning_inversion.transformer.truncated import TruncatedTransformer


def test_distances_are_those_of_a_search(tiny_transformer: TruncatedTransformer) -> None:
    embedding = tiny_transformer.embedding
    vectors = embedding(torch.tensor([[7, 8]]))[0] + torch.tensor([[0.0], [0.01]])
    found = nearest_distances(vectors, embedding, 3)
    every = torch.cdist(vectors, embedding.matrix) / embedding.matrix.std() / embedding.width**0.5
    expected = every.sort(dim=-1).values[:, :3]
    assert found == pytest.approx(expected.numpy(), abs=2e-3)
    assert found[0, 0] < 1e-3


def test_a_picture_is_bright_where_a_token_is_near() -> None:
    image = picture(torch.tensor([[0.0, 0.5], [1.0, 4.0]]))
    assert image.shape == (3, 24, 24)
    assert image[:, 0, 0].tolist() == [253, 231, 37]
    assert image[:, -1, 0].tolist() == [33, 145, 140]
    assert image[:, 0, -1].tolist() == image[:, -1, -1].tolist() == [68, 1, 84]

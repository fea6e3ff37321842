"""What might explain the effect of training: numbers of one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_inversion.files import Record
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.truncated import TruncatedTransformer


def random_ids(transformer: TruncatedTransformer, rows: int = 32, length: int = 16) -> Tensor:
    """``[rows, length]`` random tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    size = (rows, length)
    return torch.randint(transformer.embedding.vocabulary_size, size, generator=generator)


def jacobians(transformer: TruncatedTransformer, ids: Tensor, position: int) -> Tensor:
    """``[N, F, D]`` derivatives of a position's features by its own vector, of ids ``[N, T]``."""
    vectors = transformer.embedding(ids)

    def features(own: Tensor) -> Tensor:
        moved = torch.cat([vectors[:, :position], own[:, None], vectors[:, position + 1 :]], dim=1)
        return transformer(moved)[:, position]  # type: ignore[no-any-return]

    own = vectors[:, position].clone().requires_grad_()
    put_out = features(own)
    rows = [
        torch.autograd.grad(put_out[:, feature].sum(), own, retain_graph=True)[0]
        for feature in range(put_out.shape[1])
    ]
    return torch.stack(rows, dim=1)


@torch.no_grad()
def block_gain(transformer: TruncatedTransformer) -> float:
    """How large the blocks' own part of the features is, in sizes of the embedding.

    The root mean square of features - embeddings over that of embeddings, at later positions of
    random tokens; the mean of each position is taken off, and with it its position's vector. Blocks
    that put out nothing have 0.
    """
    ids = random_ids(transformer, rows=256)
    vectors = transformer.embedding(ids)
    added = transformer.features_of(ids) - vectors
    sizes = [(one - one.mean(0))[:, 1:].square().mean().sqrt() for one in (added, vectors)]
    return float(sizes[0] / sizes[1])


@torch.no_grad()
def embedding_numbers(matrix: Tensor, ids: Tensor) -> Record:
    """Numbers of an embedding ``[V, D]``: its size, conditioning, anisotropy, nearest tokens.

    Args:
        matrix: W.
        ids: tokens whose nearest other token is looked for.
    """
    values = torch.linalg.svdvals(matrix.double())
    centred = torch.linalg.svdvals((matrix - matrix.mean(0)).double())
    directions = nn.functional.normalize(matrix, dim=1)
    distances = torch.cdist(matrix[ids], matrix)
    distances[torch.arange(len(ids)), ids] = torch.inf
    return {
        "embedding_std": float(matrix.std()),
        "embedding_condition": float(values[0] / values[-1]),
        "embedding_condition_centred": float(centred[0] / centred[-1]),
        "anisotropy": float(directions.mean(0).square().sum()),
        "row_norm_variation": float(matrix.norm(dim=1).std() / matrix.norm(dim=1).mean()),
        "nearest_wrong": float(distances.amin(1).median()),
    }


def mechanism(transformer: TruncatedTransformer, ids: Tensor, probe: LinearProbe) -> Record:
    """Everything about one model that might explain what the recipe reads.

    Args:
        transformer: the truncated model.
        ids: ``[N, T]`` prompts.
        probe: its linear probe.
    """
    numbers = embedding_numbers(transformer.embedding.matrix, torch.unique(ids))
    features = transformer.features_of(ids).abs()
    numbers["block_gain"] = block_gain(transformer)
    numbers["massive_first"] = float(features[:, 0].max() / features.median())
    numbers["massive_later"] = float(features[:, 1:].max() / features.median())
    for name, position in (("first", 0), ("later", ids.shape[1] // 2)):
        spectrum = torch.linalg.svdvals(jacobians(transformer, ids[:4], position).double())
        numbers[f"jacobian_largest_{name}"] = float(spectrum[:, 0].median())
        numbers[f"jacobian_median_{name}"] = float(spectrum.median())
        numbers[f"jacobian_smallest_{name}"] = float(spectrum[:, -1].median())
        numbers[f"jacobian_condition_{name}"] = float((spectrum[:, 0] / spectrum[:, -1]).median())
    numbers["probe_bits"] = float(probe.signal[1].clamp_min(1.0).log2().sum() / 2)
    numbers["probe_median_signal"] = float(probe.signal[1].median())
    return numbers

"""Selections of features, candidates with their prefixes, and the description of the model."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lightning_inversion.errors import InputError
from lightning_inversion.transformer import TruncatedTransformer
from tests.tiny import BLOCKS, VOCABULARY, WIDTH, shared_tiny_model, tiny_model

IDS = torch.tensor([[5, 9, 77, 120, 33]])


def test_layers_are_concatenated() -> None:
    model = tiny_model("llama")
    together = TruncatedTransformer.from_model(model, layers=[1, 2, 4])
    alone = [TruncatedTransformer.from_model(model, depth=d).features_of(IDS) for d in (1, 2, 4)]
    assert together.depth == 4
    assert together.feature_size == 3 * WIDTH
    assert torch.equal(together.features_of(IDS), torch.cat(alone, dim=-1))


@pytest.mark.parametrize(("features", "size"), [("0:8", 8), (":-4", WIDTH - 4), ("30:", 2)])
def test_a_slice_of_the_features(features: str, size: int) -> None:
    model = tiny_model("llama")
    part = TruncatedTransformer.from_model(model, depth=1, features=features)
    whole = TruncatedTransformer.from_model(model, depth=1).features_of(IDS)
    start, stop = (int(end) if end else None for end in features.split(":"))
    assert part.feature_size == size
    assert torch.equal(part.features_of(IDS), whole[..., start:stop])


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"depth": 0}, "depth"),
        ({"depth": BLOCKS + 1}, "depth"),
        ({"layers": [2, 1]}, "layers"),
        ({"layers": []}, "layers"),
        ({"layers": [BLOCKS + 1]}, "layers"),
        ({"layers": [1, 2], "depth": 3}, "depth"),
        ({"depth": 1, "features": "a:b"}, "features"),
        ({"depth": 1, "features": "40:50"}, "features"),
    ],
)
def test_options_that_do_not_fit_name_themselves(options: dict[str, object], option: str) -> None:
    with pytest.raises(InputError, match=rf"--model\.transformer\.{option}:"):
        TruncatedTransformer.from_model(shared_tiny_model("llama"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_candidates_are_the_next_tokens_of_their_rows(family: str) -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model(family, "eager"), depth=2)
    ids = torch.randint(1, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([4, 0, 2])
    tried = torch.randint(1, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(2))
    found = transformer.candidates(
        transformer.embedding(ids), lengths, transformer.embedding(tried)
    )
    for row, length in enumerate(lengths):
        sequences = torch.cat([ids[row, :length].expand(6, -1), tried[row, :, None]], dim=1)
        expected = transformer.features_of(sequences)[:, -1]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_more_candidates_than_one_forward_takes(tiny_transformer: TruncatedTransformer) -> None:
    embedding = tiny_transformer.embedding
    everything = embedding(torch.arange(VOCABULARY)).expand(2, -1, -1)
    prefix = embedding(torch.tensor([[3, 4, 5], [6, 7, 8]]))
    found = tiny_transformer.candidates(prefix, torch.tensor([3, 1]), everything)
    part = tiny_transformer.candidates(prefix, torch.tensor([3, 1]), everything[:, 290:])
    torch.testing.assert_close(found[:, 290:], part, rtol=1e-4, atol=1e-4)


def test_half_precision_gives_float32() -> None:
    model = tiny_model("llama")
    whole = TruncatedTransformer.from_model(model, depth=2).features_of(IDS)
    half = TruncatedTransformer.from_model(copy.deepcopy(model).bfloat16(), depth=2)
    features = half.features_of(IDS)
    assert features.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(features, whole, dim=-1).min() > 0.99
    assert half.caches


def test_the_description_is_plain_and_distinguishes_models(
    tiny_transformer: TruncatedTransformer,
) -> None:
    description = tiny_transformer.description
    assert json.loads(json.dumps(description)) == description
    assert description["depth"] == 2
    model = tiny_model("llama")
    one = TruncatedTransformer.from_model(model, depth=2)
    assert one.fingerprint == TruncatedTransformer.from_model(model, depth=2).fingerprint
    assert one.fingerprint == tiny_transformer.fingerprint
    assert one.fingerprint != TruncatedTransformer.from_model(model, depth=1).fingerprint


def test_a_stack_that_is_not_one_list_is_refused() -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="no single list"):
        TruncatedTransformer.from_model(model, depth=1)

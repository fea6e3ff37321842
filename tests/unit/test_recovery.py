import pytest
import torch

from lightning_inversion.recovery.token_search import TokenSearch
from lightning_inversion.recovery.verification import TOLERANCE, relative_residual, verify_text
from lightning_inversion.transformer.known_vectors import KnownVectors
from lightning_inversion.transformer.readout import Readout
from lightning_inversion.transformer.truncated import TruncatedTransformer


@pytest.fixture(scope="module")
def readout(tiny_transformer: TruncatedTransformer) -> Readout:
    return Readout.fit(tiny_transformer)


def test_readout_standardizes_and_guesses(
    tiny_transformer: TruncatedTransformer, readout: Readout
) -> None:
    ids = torch.randint(300, (64, 8), generator=torch.Generator().manual_seed(5))
    features = tiny_transformer.features_of(ids)
    positions = torch.arange(8).expand(64, 8)
    standard = readout.standardize(features, positions)
    for kind in (standard[:, :1], standard[:, 1:]):
        assert kind.mean().item() == pytest.approx(0, abs=0.1)
        assert kind.std().item() == pytest.approx(1, abs=0.15)
    truth = tiny_transformer.embedding(ids)
    error = (readout(features, positions) - truth).square().mean()
    plain = (tiny_transformer.embedding.mean - truth).square().mean()
    assert error < 0.8 * plain


def test_readout_leaves_the_global_random_numbers_alone(
    tiny_transformer: TruncatedTransformer, readout: Readout
) -> None:
    state = torch.get_rng_state()
    again = Readout.fit(tiny_transformer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.matrix, readout.matrix)


def test_a_token_is_verified_only_behind_a_verified_prefix(
    tiny_transformer: TruncatedTransformer,
) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.tensor([[True, True, True, True]])
    target = tiny_transformer.features_of(ids)
    wrong = torch.tensor([[3, 9, 5, 6]])
    verdict = verify_text(tiny_transformer.features_of(wrong), target, mask, tiny_transformer)
    assert verdict.verified.tolist() == [[True, False, False, False]]
    right = verify_text(tiny_transformer.features_of(ids), target, mask, tiny_transformer)
    assert right.verified.all()
    assert right.residuals.max() < 1e-5


def test_no_wrong_token_is_ever_proven(
    tiny_transformer: TruncatedTransformer, readout: Readout
) -> None:
    ids = torch.tensor([[3, 4, 5], [9, 8, 7]])
    target = tiny_transformer.features_of(ids)
    search = TokenSearch(tiny_transformer, readout, target, start=299, most=299)
    search.tested[0, 4] = True  # the right token of row 0 is withheld
    rows = torch.arange(2)
    prefix = tiny_transformer.embedding(ids)
    known = KnownVectors(tiny_transformer, rows, prefix, torch.tensor([1, 1]))
    found = search.propose(rows, known, prefix[:, 0])
    assert found.proven.tolist() == [False, True]
    assert found.ids[1] == 8
    assert found.residuals[0] > TOLERANCE


def test_candidates_are_never_repeated_and_end_with_the_vocabulary(
    tiny_transformer: TruncatedTransformer, readout: Readout
) -> None:
    target = tiny_transformer.features_of(torch.tensor([[3, 4]])) + 1.0  # no token fits
    search = TokenSearch(tiny_transformer, readout, target, start=16, most=256)
    prefix = tiny_transformer.embedding(torch.tensor([[3, 4]]))
    known = KnownVectors(tiny_transformer, torch.tensor([0]), prefix, torch.tensor([1]))
    for _ in range(12):
        before = search.tested.sum()
        search.propose(torch.tensor([0]), known, prefix[:, 0])
        assert search.tested.sum() > before or bool(search.tested.all())
    assert search.tested.all()


def test_a_search_goes_on_where_it_was_left(
    tiny_transformer: TruncatedTransformer, readout: Readout
) -> None:
    target = tiny_transformer.features_of(torch.tensor([[3, 4]])) + 1.0
    prefix = tiny_transformer.embedding(torch.tensor([[3, 4]]))
    row = torch.tensor([0])
    known = KnownVectors(tiny_transformer, row, prefix, torch.tensor([1]))
    one = TokenSearch(tiny_transformer, readout, target)
    one.propose(row, known, prefix[:, 0])
    other = TokenSearch(tiny_transformer, readout, target)
    other.restore({name: value.clone() for name, value in one.state().items()})
    for search in (one, other):
        search.propose(row, known, prefix[:, 0])
    assert torch.equal(one.corrected, other.corrected)
    assert torch.equal(one.tested, other.tested)


def test_relative_residual_by_hand() -> None:
    residual = relative_residual(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    assert residual.item() == pytest.approx(4 / 3)

import pytest
import torch

from lightning_inversion.recovery.linear_map import ProbeProposer
from lightning_inversion.recovery.measurements import Measurements
from lightning_inversion.recovery.optimized_input import NearestToInput
from lightning_inversion.recovery.proposals import Mixture
from lightning_inversion.recovery.rounds import round_of
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.recovery.verification import verify_text
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def probe(tiny_transformer: TruncatedTransformer) -> LinearProbe:
    return LinearProbe.fit(tiny_transformer)


def test_readout_standardizes_and_guesses(
    tiny_transformer: TruncatedTransformer, probe: LinearProbe
) -> None:
    ids = torch.randint(300, (64, 8), generator=torch.Generator().manual_seed(5))
    features = tiny_transformer.features_of(ids)
    positions = torch.arange(8).expand(64, 8)
    standard = probe.standardize(features, positions)
    for kind in (standard[:, :1], standard[:, 1:]):
        assert kind.mean().item() == pytest.approx(0, abs=0.1)
        assert kind.std().item() == pytest.approx(1, abs=0.25)  # it was fitted on frequent ones too
    truth = tiny_transformer.embedding(ids)
    error = (probe(features, positions) - truth).square().mean()
    plain = (tiny_transformer.embedding.mean - truth).square().mean()
    assert error < 0.8 * plain


def test_readout_leaves_the_global_random_numbers_alone(
    tiny_transformer: TruncatedTransformer, probe: LinearProbe
) -> None:
    state = torch.get_rng_state()
    again = LinearProbe.fit(tiny_transformer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.matrix, probe.matrix)


@pytest.fixture(scope="module")
def measurements(tiny_transformer: TruncatedTransformer) -> Measurements:
    return Measurements.measure(tiny_transformer)


def test_a_token_is_verified_only_behind_a_verified_prefix(measurements: Measurements) -> None:
    transformer = measurements.transformer
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.tensor([[True, True, True, True]])
    target = transformer.features_of(ids)
    wrong = transformer.features_of(torch.tensor([[3, 9, 5, 6]]))
    verdict = verify_text(wrong, target, mask, measurements)
    assert verdict.verified.tolist() == [[True, False, False, False]]
    right = verify_text(transformer.features_of(ids), target, mask, measurements)
    assert right.verified.all()
    assert right.residuals.max() < 1e-5


def test_where_tokens_see_what_follows_all_are_verified_or_none() -> None:
    model = tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=2, surgery=Surgery(causal=False))
    measurements = Measurements.measure(transformer)
    assert (measurements.calibration.threshold > 0).all()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    target = transformer.features_of(ids)
    ids[1, 2] = 9
    mask = torch.ones_like(ids, dtype=torch.bool)
    verdict = verify_text(transformer.features_of(ids), target, mask, measurements)
    assert verdict.verified.tolist() == [[True] * 4, [False] * 4]


def test_no_wrong_token_is_ever_proven(measurements: Measurements) -> None:
    ids = torch.tensor([[3, 4, 5], [9, 8, 7]])
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    rows, vectors = torch.arange(2), measurements.transformer.embedding(ids)
    search.prefix.begin(rows, vectors, torch.tensor([1, 1]))
    search.tried[0, 4] = True  # the right token of row 0 is withheld
    search.count[0] = 1
    order = NearestToInput(vectors)
    ((trial, _),) = round_of(search, order, rows, torch.tensor([299, 299]), torch.ones(2))
    assert trial.verified.tolist() == [False, True]
    assert trial.best[1] == 8
    assert (trial.residuals[0].min() > trial.threshold[0]).item()
    assert search.positions(rows).tolist() == [1, 2]
    assert trial.tried.tolist() == [300, 299]


def test_candidates_are_never_repeated_and_end_with_the_vocabulary(
    measurements: Measurements,
) -> None:
    ids, row = torch.tensor([[3, 4]]), torch.tensor([0])
    vectors = measurements.transformer.embedding(ids)
    search = PrefixSearch(
        measurements, measurements.transformer.features_of(ids) + 1.0
    )  # none fits
    search.prefix.begin(row, vectors, torch.tensor([1]))
    linear_map = ProbeProposer()
    linear_map.begin(search)
    order = Mixture([linear_map, NearestToInput(vectors)], alone=1.0)
    named: set[int] = set()
    for _ in range(5):
        ((trial, _),) = round_of(search, order, row, torch.tensor([60]), torch.ones(1))
        assert named.isdisjoint(trial.ids[0].tolist())
        named |= set(trial.ids[0].tolist())
    assert search.tried.all()


def test_places_are_proven_together_up_to_the_first_wrong_guess(measurements: Measurements) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6], [1, 2, 3, 4]])
    rows = torch.arange(3)
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    guesses = torch.stack([ids, ids + 20], dim=2)  # of two candidates the first is right
    guesses[1, 2] = torch.tensor([40, 41])  # neither is
    guesses[2, 1] = guesses[2, 1].flip(0)  # the second is: those behind stand behind a wrong one
    trials = list(search.run_ahead(rows, guesses, torch.full((3,), 4)))
    assert [trial.rows.tolist() for trial in trials] == [[0, 1, 2], [0, 1, 2], [0, 1], [0]]
    assert search.positions(rows).tolist() == [4, 2, 2]
    assert [trial.again for trial in trials] == [False, True, True, True]
    known = measurements.transformer.embedding(ids)
    for row, length in enumerate([4, 2, 2]):
        assert torch.equal(search.prefix.vectors[row, :length], known[row, :length])
    assert search.tried[1].nonzero()[:, 0].tolist() == [40, 41]
    assert not search.tried[[0, 2]].any()
    assert search.reach.tolist() == [8, 2, 2]
    # The keys and values that were kept are those of the right tokens.
    trial = search.try_out(rows[1:], ids[1:, 2:3])
    assert trial.verified.all()


def test_texts_that_end_are_run_with_longer_ones(measurements: Measurements) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 0, 0]])
    rows, vectors = torch.arange(2), measurements.transformer.embedding(ids)
    vectors[1, 2:] = torch.nan  # a fit holds nothing behind a text's end
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    left = torch.tensor([4, 2])
    search.reach[:] = torch.tensor([3, 64])
    trials = list(round_of(search, NearestToInput(vectors), rows, torch.ones(2).long(), left))
    assert [trial.rows.tolist() for trial, _ in trials] == [[1], [1], [0], [0], [0], [0]]
    assert search.positions(rows).tolist() == [4, 2]
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])  # the last token is behind the second's end
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    order = NearestToInput(measurements.transformer.embedding(ids))
    left = torch.tensor([4, 3])
    trials = list(round_of(search, order, rows, torch.ones(2).long(), left))
    assert [trial.rows.tolist() for trial, _ in trials] == [[0, 1], [0, 1], [0, 1], [0]]
    assert search.positions(rows).tolist() == [4, 3]


def test_more_places_than_the_model_has_room_for_are_halved(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, row = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]]), torch.tensor([0])
    vectors = measurements.transformer.embedding(ids)
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    monkeypatch.setattr(search.prefix, "reaches", lambda rows, width, count: width <= 2)
    trials = list(round_of(search, NearestToInput(vectors), row, torch.ones(1).long(), row + 8))
    assert [trial.again for trial, _ in trials] == [False, True]
    assert search.positions(row).tolist() == [2]


def test_several_places_in_one_forward_are_those_places_one_by_one(
    measurements: Measurements,
) -> None:
    ids = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(4))
    others = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(5))
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    search.try_out(torch.tensor([0]), ids[:1, :1])  # the rows stand at different places
    vectors = measurements.transformer.embedding(torch.stack([ids[:, 1:4], others[:, 1:4]], dim=2))
    together = search.prefix.ahead(torch.arange(2), vectors)
    for row, start in enumerate([ids[:1, :1], ids[1:, :0]]):
        for place in range(3):
            before = torch.cat([start, ids[row : row + 1, 1 : 1 + place]], dim=1)
            for column, own in enumerate((ids, others)):
                text = torch.cat([before, own[row : row + 1, 1 + place : 2 + place]], dim=1)
                alone = measurements.transformer.features_of(text)[0, -1]
                torch.testing.assert_close(
                    together[row, place, column], alone, atol=1e-5, rtol=1e-4
                )


def test_a_frontier_goes_on_where_it_was_left(measurements: Measurements) -> None:
    ids, row = torch.tensor([[3, 4]]), torch.tensor([0])
    target = measurements.transformer.features_of(ids) + 1.0
    vectors, one_token = measurements.transformer.embedding(ids), torch.tensor([1])
    one = PrefixSearch(measurements, target)
    one.prefix.begin(row, vectors, one_token)
    one.try_out(row, torch.tensor([[20, 21, 22]]))
    other = PrefixSearch(measurements, target)
    other.prefix.begin(row, vectors, one_token)
    other.restore({name: value.clone() for name, value in one.state().items()})
    for search in (one, other):
        search.try_out(row, torch.tensor([[30, 31]]))
    assert torch.equal(one.guess(row), other.guess(row))
    assert torch.equal(one.tried, other.tried)
    assert one.tried.sum() == 5


def test_a_fit_that_knows_nothing_of_a_token_says_nothing(measurements: Measurements) -> None:
    ids = torch.tensor([[3, 4]])
    vectors = measurements.transformer.embedding(ids)
    vectors[0, 1] = torch.nan
    search = PrefixSearch(measurements, measurements.transformer.features_of(ids))
    row = torch.tensor([0])
    search.prefix.begin(row, vectors, torch.tensor([0]))
    assert NearestToInput(vectors).scores(search, row).argmax() == 3
    search.accept(row, torch.tensor([3]))
    assert not NearestToInput(vectors).scores(search, row).any()

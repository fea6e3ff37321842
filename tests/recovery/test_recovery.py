import pytest
import torch

from lightning_inversion.recovery.instruments import Instruments
from lightning_inversion.recovery.linear_map import LinearMap
from lightning_inversion.recovery.optimized_input import OptimizedInput
from lightning_inversion.recovery.proposals import Mixture
from lightning_inversion.recovery.rounds import round_of
from lightning_inversion.recovery.search import Frontier
from lightning_inversion.recovery.verification import verify_text
from lightning_inversion.transformer.linear_probe import Readout
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import tiny_model


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
        assert kind.std().item() == pytest.approx(1, abs=0.25)  # it was fitted on frequent ones too
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


@pytest.fixture(scope="module")
def instruments(tiny_transformer: TruncatedTransformer) -> Instruments:
    return Instruments.measure(tiny_transformer)


def test_a_token_is_verified_only_behind_a_verified_prefix(instruments: Instruments) -> None:
    transformer = instruments.transformer
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.tensor([[True, True, True, True]])
    target = transformer.features_of(ids)
    wrong = transformer.features_of(torch.tensor([[3, 9, 5, 6]]))
    verdict = verify_text(wrong, target, mask, instruments)
    assert verdict.verified.tolist() == [[True, False, False, False]]
    right = verify_text(transformer.features_of(ids), target, mask, instruments)
    assert right.verified.all()
    assert right.residuals.max() < 1e-5


def test_where_tokens_see_what_follows_all_are_verified_or_none() -> None:
    model = tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=2, surgery=Surgery(causal=False))
    instruments = Instruments.measure(transformer)
    assert (instruments.calibration.tolerance > 0).all()
    ids = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    target = transformer.features_of(ids)
    ids[1, 2] = 9
    mask = torch.ones_like(ids, dtype=torch.bool)
    verdict = verify_text(transformer.features_of(ids), target, mask, instruments)
    assert verdict.verified.tolist() == [[True] * 4, [False] * 4]


def test_no_wrong_token_is_ever_proven(instruments: Instruments) -> None:
    ids = torch.tensor([[3, 4, 5], [9, 8, 7]])
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    rows, vectors = torch.arange(2), instruments.transformer.embedding(ids)
    frontier.prefix.begin(rows, vectors, torch.tensor([1, 1]))
    frontier.tried[0, 4] = True  # the right token of row 0 is withheld
    frontier.count[0] = 1
    order = OptimizedInput(vectors)
    ((trial, _),) = round_of(frontier, order, rows, torch.tensor([299, 299]), torch.ones(2))
    assert trial.certified.tolist() == [False, True]
    assert trial.best[1] == 8
    assert (trial.residuals[0].min() > trial.tolerance[0]).item()
    assert frontier.positions(rows).tolist() == [1, 2]
    assert trial.tried.tolist() == [300, 299]


def test_candidates_are_never_repeated_and_end_with_the_vocabulary(
    instruments: Instruments,
) -> None:
    ids, row = torch.tensor([[3, 4]]), torch.tensor([0])
    vectors = instruments.transformer.embedding(ids)
    frontier = Frontier(instruments, instruments.transformer.features_of(ids) + 1.0)  # none fits
    frontier.prefix.begin(row, vectors, torch.tensor([1]))
    linear_map = LinearMap()
    linear_map.begin(frontier)
    order = Mixture([linear_map, OptimizedInput(vectors)], alone=1.0)
    named: set[int] = set()
    for _ in range(5):
        ((trial, _),) = round_of(frontier, order, row, torch.tensor([60]), torch.ones(1))
        assert named.isdisjoint(trial.ids[0].tolist())
        named |= set(trial.ids[0].tolist())
    assert frontier.tried.all()


def test_places_are_proven_together_up_to_the_first_wrong_guess(instruments: Instruments) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6], [1, 2, 3, 4]])
    rows = torch.arange(3)
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    guesses = torch.stack([ids, ids + 20], dim=2)  # of two candidates the first is right
    guesses[1, 2] = torch.tensor([40, 41])  # neither is
    guesses[2, 1] = guesses[2, 1].flip(0)  # the second is: those behind stand behind a wrong one
    trials = list(frontier.run_ahead(rows, guesses, torch.full((3,), 4)))
    assert [trial.rows.tolist() for trial in trials] == [[0, 1, 2], [0, 1, 2], [0, 1], [0]]
    assert frontier.positions(rows).tolist() == [4, 2, 2]
    assert [trial.again for trial in trials] == [False, True, True, True]
    known = instruments.transformer.embedding(ids)
    for row, length in enumerate([4, 2, 2]):
        assert torch.equal(frontier.prefix.vectors[row, :length], known[row, :length])
    assert frontier.tried[1].nonzero()[:, 0].tolist() == [40, 41]
    assert not frontier.tried[[0, 2]].any()
    assert frontier.reach.tolist() == [8, 2, 2]
    # The keys and values that were kept are those of the right tokens.
    trial = frontier.try_out(rows[1:], ids[1:, 2:3])
    assert trial.certified.all()


def test_texts_that_end_are_run_with_longer_ones(instruments: Instruments) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 0, 0]])
    rows, vectors = torch.arange(2), instruments.transformer.embedding(ids)
    vectors[1, 2:] = torch.nan  # a fit holds nothing behind a text's end
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    left = torch.tensor([4, 2])
    frontier.reach[:] = torch.tensor([3, 64])
    trials = list(round_of(frontier, OptimizedInput(vectors), rows, torch.ones(2).long(), left))
    assert [trial.rows.tolist() for trial, _ in trials] == [[1], [1], [0], [0], [0], [0]]
    assert frontier.positions(rows).tolist() == [4, 2]
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])  # the last token is behind the second's end
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    order = OptimizedInput(instruments.transformer.embedding(ids))
    left = torch.tensor([4, 3])
    trials = list(round_of(frontier, order, rows, torch.ones(2).long(), left))
    assert [trial.rows.tolist() for trial, _ in trials] == [[0, 1], [0, 1], [0, 1], [0]]
    assert frontier.positions(rows).tolist() == [4, 3]


def test_more_places_than_the_model_has_room_for_are_halved(
    instruments: Instruments, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, row = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]]), torch.tensor([0])
    vectors = instruments.transformer.embedding(ids)
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    monkeypatch.setattr(frontier.prefix, "reaches", lambda rows, width, count: width <= 2)
    trials = list(round_of(frontier, OptimizedInput(vectors), row, torch.ones(1).long(), row + 8))
    assert [trial.again for trial, _ in trials] == [False, True]
    assert frontier.positions(row).tolist() == [2]


def test_several_places_in_one_forward_are_those_places_one_by_one(
    instruments: Instruments,
) -> None:
    ids = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(4))
    others = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(5))
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    frontier.try_out(torch.tensor([0]), ids[:1, :1])  # the rows stand at different places
    vectors = instruments.transformer.embedding(torch.stack([ids[:, 1:4], others[:, 1:4]], dim=2))
    together = frontier.prefix.ahead(torch.arange(2), vectors)
    for row, start in enumerate([ids[:1, :1], ids[1:, :0]]):
        for place in range(3):
            before = torch.cat([start, ids[row : row + 1, 1 : 1 + place]], dim=1)
            for column, own in enumerate((ids, others)):
                text = torch.cat([before, own[row : row + 1, 1 + place : 2 + place]], dim=1)
                alone = instruments.transformer.features_of(text)[0, -1]
                torch.testing.assert_close(
                    together[row, place, column], alone, atol=1e-5, rtol=1e-4
                )


def test_a_frontier_goes_on_where_it_was_left(instruments: Instruments) -> None:
    ids, row = torch.tensor([[3, 4]]), torch.tensor([0])
    target = instruments.transformer.features_of(ids) + 1.0
    vectors, one_token = instruments.transformer.embedding(ids), torch.tensor([1])
    one = Frontier(instruments, target)
    one.prefix.begin(row, vectors, one_token)
    one.try_out(row, torch.tensor([[20, 21, 22]]))
    other = Frontier(instruments, target)
    other.prefix.begin(row, vectors, one_token)
    other.restore({name: value.clone() for name, value in one.state().items()})
    for frontier in (one, other):
        frontier.try_out(row, torch.tensor([[30, 31]]))
    assert torch.equal(one.guess(row), other.guess(row))
    assert torch.equal(one.tried, other.tried)
    assert one.tried.sum() == 5


def test_a_fit_that_knows_nothing_of_a_token_says_nothing(instruments: Instruments) -> None:
    ids = torch.tensor([[3, 4]])
    vectors = instruments.transformer.embedding(ids)
    vectors[0, 1] = torch.nan
    frontier = Frontier(instruments, instruments.transformer.features_of(ids))
    row = torch.tensor([0])
    frontier.prefix.begin(row, vectors, torch.tensor([0]))
    assert OptimizedInput(vectors).scores(frontier, row).argmax() == 3
    frontier.accept(row, torch.tensor([3]))
    assert not OptimizedInput(vectors).scores(frontier, row).any()

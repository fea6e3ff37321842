"""Which positions move, which are fixed, and when a row stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback

from lightning_inversion.__main__ import main as run
from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer, VocabularyInput
from lightning_inversion.inversion import Inversion
from lightning_inversion.objectives import L2
from lightning_inversion.results import read_rows
from lightning_inversion.schedules import AllPositions, LeftToRight, Schedule, VerifiedPrefix
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.fits import PROMPTS, fit


class Moves(Callback):
    """Which positions each optimiser step moves, and its learning rate."""

    def __init__(self) -> None:
        self.moved: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
        self.before = pl_module.state.values.detach().clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.moved.append((pl_module.state.values != self.before).any(-1))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


def test_all_positions_move_and_none_is_fixed(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    moves = Moves()
    module, trainer = fit(tiny_folder, tiny_transformer, tmp_path, moves, iterations=3)
    assert trainer.global_step == 3
    assert all(torch.equal(moved, module.state.batch.mask) for moved in moves.moved)
    assert not module.state.fixed.any()
    assert AllPositions().period(7) == 7


def test_left_to_right_moves_one_position_and_no_other(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    """From the first iteration of each position on: the focus is set before the gradient."""
    moves = Moves()
    module, trainer = fit(
        tiny_folder, tiny_transformer, tmp_path, LinearLearningRate(), moves,
        prompts=PROMPTS[:2], schedule=LeftToRight(iterations=3), iterations=60,
        learnable=EmbeddingInput(NormalInitializer(0, 0.1)), objective=L2(), optimizer=adam,
    )  # fmt: skip
    mask, lengths = module.state.batch.mask, module.state.batch.lengths
    longest = max(lengths)
    assert min(lengths) < longest
    assert trainer.global_step == len(moves.moved) == 3 * longest
    for iteration, moved in enumerate(moves.moved):
        position = iteration // 3
        expected = torch.zeros_like(mask)
        expected[:, position] = mask[:, position]
        assert torch.equal(moved, expected), iteration
    # The learning rate starts again with each position.
    assert moves.rates[:3] == pytest.approx([0.02, 0.02 * 0.505, 0.0002])
    assert moves.rates == pytest.approx(moves.rates[:3] * longest)
    assert module.state.stopped_at.tolist() == [3 * length for length in lengths]


@pytest.mark.integration  # a whole fit
def test_left_to_right_fixes_each_token_that_it_leaves(tiny_folder: Path, tmp_path: Path) -> None:
    schedule = ["--model.schedule=LeftToRight", "--model.schedule.iterations=15"]
    assert fit_by_command(tiny_folder, tmp_path, *schedule, "--model.iterations=400") == 0
    folder = tmp_path / "lightning_logs/version_0"
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    (row,) = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    assert row["iterations"] == 15 * len(row["ids"])
    assert row["schedule"] == "LeftToRight"
    assert checkpoint["state"]["fixed"][0].all()
    assert not checkpoint["state"]["verified"].any()
    transformer = TransformerSpec(model=str(tiny_folder)).load()
    tokens = transformer.embedding(torch.tensor(row["recovered_ids"]))
    assert torch.equal(checkpoint["state"]["values"][0], tokens)


def fit_by_command(folder: Path, root: Path, *more: str) -> int:
    return run(
        [
            "fit",
            f"--model.transformer.model={folder}",
            '--data.prompts=["The sky is blue."]',
            "--data.tokens_per_batch=100",
            f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            "--stopping.stop=false",
            *more,
        ]
    )


def test_positions_without_iterations_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ["--model.schedule=LeftToRight", "--model.schedule.iterations=5"]
    assert fit_by_command(tiny_folder, tmp_path, *schedule, "--model.iterations=6") == 2
    assert "end before the last position" in capsys.readouterr().err
    LeftToRight(5).check_length(longest=4, iterations=20)
    with pytest.raises(InputError, match=r"--model\.iterations 19 end before .* be 20 or more"):
        LeftToRight(5).check_length(longest=4, iterations=19)


@pytest.mark.parametrize(
    ("schedule", "settings", "sentence"),
    [
        (LeftToRight(), {"isolated": True}, "LeftToRight gives a token its prefix"),
        (VerifiedPrefix(), {"isolated": True}, "VerifiedPrefix gives a token its prefix"),
        (VerifiedPrefix(), {"learnable": VocabularyInput()}, "AllPositions for .* VocabularyInput"),
        (
            VerifiedPrefix(),
            {"transformer": TransformerSpec(causal=False)},
            "AllPositions for --model.transformer.causal false",
        ),
    ],
)
def test_what_contradicts_is_refused_with_a_way_out(
    schedule: Schedule, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as refusal:
        schedule.check(Inversion(schedule=schedule, **settings))  # type: ignore[arg-type]
    assert "--model.schedule AllPositions" in str(refusal.value)
    AllPositions().check(Inversion(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "build",
    [
        lambda: LeftToRight(iterations=0),
        lambda: VerifiedPrefix(every=0),
        lambda: VerifiedPrefix(candidates=0),
        lambda: VerifiedPrefix(window=0),
        lambda: VerifiedPrefix(candidates=64, max_candidates=8),
    ],
)
def test_numbers_that_make_no_sense_are_refused(build: Callable[[], Schedule]) -> None:
    with pytest.raises(InputError, match=r"--model\.schedule"):
        build()


def test_noise_that_hides_tokens_is_reported_once(messages: list[str]) -> None:
    state: Any = SimpleNamespace(focus=None)
    calibration = SimpleNamespace(verifies=False)
    experiment: Any = SimpleNamespace(measurements=SimpleNamespace(calibration=calibration))
    schedule = VerifiedPrefix()
    for _ in range(2):
        assert schedule.before_iteration(state, experiment) is None
    assert state.focus is None  # the input is optimised as a whole
    (message,) = messages
    assert "noise in the targets hides which token is right" in message


def test_prompts_that_the_probe_reads_need_no_iteration(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    module, trainer = fit(
        tiny_folder, tiny_transformer, tmp_path, StoppingCriterion(stop=False), ResultWriter(),
        schedule=VerifiedPrefix(),
    )  # fmt: skip
    assert trainer.global_step == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.recovered for row in rows] == PROMPTS
    assert all(row.verified and row.criterion_met for row in rows)
    assert [row.iterations for row in rows] == [0, 0, 0]
    assert module.state.values.grad is None


def test_tokens_are_verified_and_fixed_one_by_one(
    tiny_folder: Path, tiny_transformer: TruncatedTransformer, tmp_path: Path
) -> None:
    # No linear guess and few candidates: the tokens must come from rounds, restarts and growth.
    moves = Moves()
    module, trainer = fit(
        tiny_folder, tiny_transformer, tmp_path, ResultWriter(), moves,
        schedule=VerifiedPrefix(every=1, candidates=4, max_candidates=64),
        iterations=400, learnable=EmbeddingInput(NormalInitializer(0, 0.01)), optimizer=adam,
    )  # fmt: skip
    batch = module.state.batch
    assert torch.equal(module.state.verified, batch.mask)
    assert torch.equal(module.top_tokens(1).best[batch.mask], batch.ids[batch.mask])
    assert 0 < trainer.global_step < 400
    assert all(moved.sum(1).max() <= 2 for moved in moves.moved)  # the window
    rows = read_rows(tmp_path / "results.jsonl")
    assert all(row.verified and row.exact for row in rows)


def test_a_search_starts_again_where_the_checkpoint_left_it(
    tiny_transformer: TruncatedTransformer,
) -> None:
    """What was tried is not tried again."""
    schedule = VerifiedPrefix(every=1, candidates=4, max_candidates=4)
    inversion = Inversion(
        TransformerSpec(depth=2), schedule=schedule,
        learnable=EmbeddingInput(NormalInitializer(0, 0.01)),
    ).use(tiny_transformer)  # fmt: skip
    batch = PromptBatch.collate([(0, "a", [5, 6, 7])])
    inversion.begin(batch)
    assert inversion.state.target is not None
    inversion.state.target += 1.0  # no token fits
    schedule.before_iteration(inversion.state, inversion)
    stored = inversion.state.to_checkpoint()
    before = stored["search"]["tried"].clone()
    assert before.any()
    inversion.state = type(inversion.state).from_checkpoint(stored, torch.device("cpu"))
    inversion.resume(batch)
    inversion.state.target += 1.0
    inversion.state.iteration = 1
    schedule.before_iteration(inversion.state, inversion)
    tried = inversion.state.to_checkpoint()["search"]["tried"]
    assert tried[before].all()
    assert tried.sum() == before.sum() + 4
    schedule.after_batch(inversion.state)
    assert inversion.state.search is None

"""The ladder's plan, its training, the recipe at several rates, and changes to a model."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from lightning_inversion.api import invert
from lightning_inversion.decoding import PinvDecoder
from lightning_inversion.errors import InputError
from lightning_inversion.files import append_records
from lightning_inversion.inputs import EmbeddingInput, NormalInitializer
from lightning_inversion.ladder import channel, pretrained
from lightning_inversion.ladder import train as training
from lightning_inversion.ladder.channel import fano, slice_of_share
from lightning_inversion.ladder.interventions import (
    BLOCK_CHANGES,
    EMBEDDING,
    INTERVENTIONS,
    even_rows,
    exchanged,
    scaled,
    whitened,
    without_largest,
)
from lightning_inversion.ladder.measure import Rows, Subject, cells_of, intervene, measure
from lightning_inversion.ladder.mechanism import block_gain, jacobians, mechanism
from lightning_inversion.ladder.plan import Plan
from lightning_inversion.ladder.recipe import RATES, Recipe, RecipeResult, run_recipe, tuned_rate
from lightning_inversion.ladder.train import Texts, is_trained, model_folder, train, train_rung
from lightning_inversion.objectives import L1
from lightning_inversion.schedules import AllPositions
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from tests.tiny import shared_tiny_model, tiny_model

TEXT = "the sky is blue or red and a quick brown fox jumps over lazy dogs near their river"
IDS = torch.tensor([[11, 42, 7, 8], [9, 120, 5, 77]])


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two tiny rungs and a text of 200 sentences."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(TEXT.split(), k=14)) + "." for _ in range(200)]
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    stored = {
        "steps": 10, "batch": 4, "length": 16, "learning_rate": 0.003, "checkpoints": [0, 0.3, 1],
        "text": str(tmp_path / "text.txt"),
        "rungs": [{"shape": ["gpt2", "llama"], "width": 16, "blocks": 1, "vocabulary": 280,
                   "seed": 0}],
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    return Plan.read(tmp_path / "plan.yaml")


def test_the_plan_that_is_kept_can_be_read() -> None:
    plan = Plan.read(Path(__file__).parents[2] / "configs" / "ladder" / "ladder.yaml")
    assert {rung.width for rung in plan.rungs} == {64, 128, 256, 512}
    assert {rung.vocabulary for rung in plan.rungs} == {1024, 8192}
    assert plan.kept_steps[plan.steps] == 1.0


def test_a_plan_may_try_other_rates(plan: Plan, tmp_path: Path) -> None:
    stored = yaml.safe_load((tmp_path / "plan.yaml").read_text("utf-8"))
    stored["rungs"].append({**stored["rungs"][0], "shape": "gpt2", "rate": [0.25, 2]})
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    more = Plan.read(tmp_path / "plan.yaml")
    assert [rung.name for rung in more.rungs[2:]] == [
        "gpt2-w16-b1-v280-s0-r0.25", "gpt2-w16-b1-v280-s0-r2",
    ]  # fmt: skip
    rates = [more.learning_rate_of(rung) for rung in more.rungs]
    assert rates == [0.024, 0.024, 0.006, 0.048]
    for rung in more.rungs:
        for share in more.checkpoints:
            model_folder(tmp_path, rung, share).mkdir(parents=True)
    cells = [(rung.name, share) for rung, share in cells_of(more, tmp_path)]
    assert [share for name, share in cells if name.endswith("-r2")] == [1.0]
    assert [share for name, share in cells if name.endswith("-s0")] == [1.0, 0.0] * 2 + [0.3] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [({"width": 20}, "multiples of 16"), ({"shape": "gpt3"}, "shapes are"),
     ({"seed": [0, 0]}, "twice"), ({"depth": 1}, "unknown key 'depth'"),
     ({"rate": 0}, "has rate 0; give one above 0"), ({"rate": ".inf"}, "rate '.inf' is of another"),
     ({"rate": float("inf")}, "has rate inf"), ({"width": "16"}, "width '16' is of another kind")],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(plan: Plan, tmp_path: Path, change: dict[str, object],
                                          words: str) -> None:  # fmt: skip
    stored = yaml.safe_load((tmp_path / "plan.yaml").read_text("utf-8"))
    stored["rungs"] = [{**stored["rungs"][0], **change}]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(stored), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        Plan.read(tmp_path / "plan.yaml")


def test_prompts_are_of_text_that_no_model_is_trained_on(plan: Plan) -> None:
    assert len(plan.held_out) == 20
    assert not set(plan.held_out) & set(plan.trained_on)


def test_a_text_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    monkeypatch.setattr("lightning_inversion.ladder.plan.find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed"):
        _ = replace(plan, text=None).verses
    with pytest.raises(InputError, match="cannot be read"):
        _ = replace(plan, text="nowhere.txt").verses


def weights(folder: Path) -> list[Tensor]:
    return [*TransformerSpec(model=str(folder)).load_causal_lm()[0].state_dict().values()]


@pytest.mark.integration  # two trainings
def test_a_training_that_is_cut_off_resumes_to_the_same_model_and_is_measured(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_EVERY", 2)
    texts, rung = Texts(plan), plan.rungs[0]
    step = training.LadderTraining.training_step

    def cut_off(self: training.LadderTraining, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == 7:
            raise RuntimeError("cut off")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(training.LadderTraining, "training_step", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        train_rung(rung, plan, tmp_path / "resumed", texts)
    monkeypatch.setattr(training.LadderTraining, "training_step", step)
    assert not is_trained(rung, plan, tmp_path / "resumed")
    first = model_folder(tmp_path / "resumed", rung, 0.0)
    made = first.stat().st_mtime_ns
    train(plan, tmp_path / "resumed")
    assert all(is_trained(one, plan, tmp_path / "resumed") for one in plan.rungs)
    assert first.stat().st_mtime_ns == made
    train_rung(rung, plan, tmp_path / "whole", texts)
    for share in plan.checkpoints:
        both = [
            weights(model_folder(tmp_path / name, rung, share)) for name in ("resumed", "whole")
        ]
        assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))

    rows = Rows(tmp_path / "cells.jsonl")
    measure(plan, tmp_path / "resumed", rows, iterations=20)
    found = rows.read()
    assert len(found) == 6  # two rungs, three checkpoints
    untrained = next(row for row in found if row["share"] == 0)
    assert untrained["recovery_right"] == 1
    assert all(row["recovery_false"] == 0 for row in found)
    assert all(0 <= row[name] <= 1 for row in found for name in ("printed", "tuned", "probe_top1"))
    measure(plan, tmp_path / "resumed", Rows(tmp_path / "cells.jsonl"), iterations=20)
    assert rows.read() == found

    monkeypatch.setattr("lightning_inversion.ladder.measure.INTERVENTIONS", INTERVENTIONS[:2])
    changed = Rows(tmp_path / "interventions.jsonl")
    intervene(plan, tmp_path / "resumed", changed, iterations=10)
    assert len(changed.read()) == 8  # two rungs, two ends of the training, two interventions


def test_a_new_row_does_not_take_the_place_of_one_that_is_there(tmp_path: Path) -> None:
    append_records(tmp_path / "rows.jsonl", [{"index": 1, "model": "one"}])
    rows = Rows(tmp_path / "rows.jsonl")
    for model in ("two", "three"):
        rows.add({"model": model})
    assert [row["model"] for row in rows.read()] == ["one", "two", "three"]
    assert rows.has(model="two")
    assert not rows.has(model="four")


def test_a_rate_of_a_row_is_the_learning_rate() -> None:
    """A row of many rates is what ``invert`` gives at that rate alone."""
    model = shared_tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=1)
    outcome = run_recipe(transformer, IDS, (1.0, 0.1), Recipe(iterations=8))
    for number, rate in enumerate((1.0, 0.1)):
        found = invert(
            model, None, [transformer.features_of(own[None])[0] for own in IDS], depth=1,
            objective=L1(), schedule=AllPositions(), decoder=PinvDecoder(), iterations=8,
            learnable=EmbeddingInput(NormalInitializer()),
            optimizer=lambda values, rate=rate: torch.optim.SGD(values, lr=rate),
        )  # fmt: skip
        for row, own in enumerate(IDS):
            error = (found[row].values - transformer.embedding(own)).norm(dim=-1)
            torch.testing.assert_close(outcome.error[number, row], error, rtol=1e-2, atol=1e-2)


def test_the_tuned_rate_is_the_nearest_of_the_best() -> None:
    right = torch.zeros(len(RATES), 2)
    right[2] = right[4] = 1.0
    outcome = RecipeResult({"pinv": right}, right, right, right, right)
    assert tuned_rate(outcome, RATES) == RATES[2]


def test_parameters_are_exchanged_by_name() -> None:
    model, other = shared_tiny_model("llama"), tiny_model("llama", seed=1)
    mixed = exchanged(model, other, EMBEDDING)
    given = dict(other.named_parameters())
    own = dict(model.named_parameters())
    differing = {
        name for name, value in mixed.named_parameters() if not torch.equal(value, own[name])
    }
    assert differing == {"model.embed_tokens.weight"}
    assert torch.equal(dict(mixed.named_parameters())[differing.pop()],
                       given["model.embed_tokens.weight"])  # fmt: skip


def test_blocks_take_the_other_models_size_or_write_less() -> None:
    model, other = shared_tiny_model("gpt2"), scaled(tiny_model("gpt2", seed=1), lambda *_: 3.0)
    resized = {one.name: one.model for one in INTERVENTIONS}["blocks of the other size"]
    assert resized is not None
    given, own = other.state_dict(), model.state_dict()
    changed = 0
    for name, value in resized(model, other).state_dict().items():
        if torch.equal(value, own[name]):
            continue
        changed += 1
        assert value.ndim == 2
        assert float(value.norm()) == pytest.approx(float(given[name].norm()), rel=1e-4)
        cosine = torch.nn.functional.cosine_similarity(value.flatten(), own[name].flatten(), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-4)
    assert changed == 4 * model.config.num_hidden_layers
    gains = [
        block_gain(TruncatedTransformer.from_model(scaled(model, lambda *_, f=f: f), depth=1))
        for f in (1.0, 0.35, 0.0)
    ]
    assert gains[0] > gains[1] > gains[2] == pytest.approx(0, abs=1e-4)


def test_embeddings_are_evened() -> None:
    matrix = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9)
    values = torch.linalg.svdvals(whitened(matrix))
    assert float(values[0] / values[-1]) == pytest.approx(1, abs=1e-4)
    norms = even_rows(matrix).norm(dim=1)
    assert float(norms.max() / norms.min()) == pytest.approx(1, abs=1e-4)
    assert float(whitened(matrix).norm()) == pytest.approx(float(matrix.norm()), rel=1e-4)
    assert float(even_rows(matrix).norm()) == pytest.approx(float(matrix.norm()), rel=1e-4)


def test_the_jacobian_is_the_derivative() -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model("gpt2"), depth=1)
    vectors = transformer.embedding(IDS)
    moved = vectors.clone()
    direction = torch.randn(vectors.shape[-1], generator=torch.Generator().manual_seed(1))
    moved[:, 2] += 1e-2 * direction
    before = vectors.clone()
    before[:, 2] -= 1e-2 * direction
    slope = (transformer(moved) - transformer(before))[:, 2] / 2e-2
    expected = jacobians(transformer, IDS, 2) @ direction
    torch.testing.assert_close(slope, expected, rtol=2e-2, atol=2e-2)


def test_the_largest_feature_is_left_out_and_numbers_are_finite() -> None:
    transformer = TruncatedTransformer.from_model(shared_tiny_model("gpt2"), depth=1)
    left = without_largest(transformer).diagonal(dim1=1, dim2=2)
    assert left.sum().item() == 2 * (transformer.feature_size - 1)
    ids = torch.arange(32).view(4, 8)
    numbers = mechanism(transformer, ids, LinearProbe.fit(transformer))
    assert all(value == value and value >= 0 for value in numbers.values())
    assert numbers["jacobian_condition_later"] >= 1


def test_fano_bounds_what_can_be_right() -> None:
    assert fano(10, 1024) == 1
    assert fano(0, 1024) == pytest.approx(1 / 1024, abs=1e-3)
    assert 0.4 < fano(5, 1024) < 0.6
    assert slice_of_share(64, 1) is None
    assert slice_of_share(64, 0.5) == "0:32"


def test_the_pretrained_models_blocks_are_changed_at_both_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = shared_tiny_model("llama"), tiny_model("llama", seed=1)
    names = {"model": "tiny", "width": 32, "seed": 0, "share": 1.0}
    subject = Subject(model, SimpleNamespace(), IDS, IDS, None, IDS, names)  # type: ignore[arg-type]
    monkeypatch.setattr(pretrained, "pretrained", lambda _: subject)
    monkeypatch.setattr(TransformerSpec, "load_causal_lm", lambda _: (other, None))
    plan: Any = None
    rows = Rows(tmp_path / "rows.jsonl")
    for _ in range(2):  # the second time nothing is missing
        pretrained.intervene_pretrained(plan, rows, iterations=2)
    found = rows.read()
    assert [(row["intervention"], row["share"]) for row in found] == [
        (name, share) for name in ("none", *BLOCK_CHANGES) for share in (1.0, 0.0)
    ]
    gains = {(row["intervention"], row["share"]): row["block_gain"] for row in found}
    assert gains["none", 1.0] != gains["none", 0.0]
    assert all(gains["blocks times 0.35", share] < gains["none", share] for share in (0.0, 1.0))


def test_a_stopped_survey_measures_no_setting_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, measured = shared_tiny_model("llama"), []
    names = {"model": "tiny", "share": 1.0, "width": 32}

    def row_of(_: Any, depth: int, setting: channel.Setting) -> dict[str, Any]:
        measured.append((depth, setting.name))
        read = dict.fromkeys(("probe_top1", "probe_read_bits", "recovery_right"), 1.0)
        features = slice_of_share(32, setting.kept)
        return {"kind": "survival", **names, "depth": depth, "features": features,
                "channel": setting.name, **read, "recovery_verified": 1.0,
                "recovery_false": 0}  # fmt: skip

    monkeypatch.setattr(channel, "survival_row", row_of)
    subject = SimpleNamespace(model=model, names=names)
    monkeypatch.setattr(channel, "subjects", lambda *_: [subject])
    plan: Any = None
    channel.survive(plan, tmp_path, Rows(tmp_path / "rows.jsonl"))
    assert len(measured) == len(set(measured)) >= len(channel.SETTINGS)
    before = len(measured)
    channel.survive(plan, tmp_path, Rows(tmp_path / "rows.jsonl"))
    assert len(measured) == before

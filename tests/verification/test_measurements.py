"""Measurements: kept or measured now, they are the same; another model's are never used."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_inversion.cache import ENVIRONMENT, measured_files
from lightning_inversion.data.storage import Storage
from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.linear_probe import LinearProbe, Moments
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification import measurements
from lightning_inversion.verification.calibration import Calibration
from lightning_inversion.verification.first_tokens import FirstTokenFeatures
from lightning_inversion.verification.held_out import HeldOutRuns
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.recognition import recognised
from tests.tiny import tiny_model

IDS = torch.tensor([[17, 230, 5, 5, 101, 9], [3, 44, 280, 7, 3, 60]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))


def measure(channel: Any = None, depth: int = 2, features: str | None = None) -> Measurements:
    torch.manual_seed(0)
    model = tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=depth, features=features)
    return Measurements.measure(transformer, LanguageModel(model, transformer.caches), channel)


def same(one: Any, other: Any) -> bool:
    """Equal in type and in every bit, whatever fields there are."""
    if is_dataclass(one):
        pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
        return type(one) is type(other) and all(same(*pair) for pair in pairs)
    if isinstance(one, Tensor):
        bits = one.dtype == other.dtype and one.stride() == other.stride()
        return bits and torch.equal(one.nan_to_num(-7.0), other.nan_to_num(-7.0))
    return type(one) is type(other) and bool(one == other)


def nothing_is_measured(patch: pytest.MonkeyPatch) -> None:
    for kind, name in (
        (LinearProbe, "fit"),
        (Calibration, "measure"),
        (FirstTokenFeatures, "_scan"),
        (LanguageModel, "sample_text"),
        (TruncatedTransformer, "_caching"),
        (ProbeRanking, "_best_temperature"),
    ):
        patch.setattr(kind, name, lambda *_, **__: pytest.fail("measured again"))


@pytest.mark.parametrize("channel", [None, Storage("bfloat16"), Storage(noise=0.5)])
def test_position_0_alone_is_measured_as_it_is_beside_the_others(channel: Storage | None) -> None:
    transformer = measure().transformer
    whole = Measurements.measure(transformer, channel=channel)
    alone = Measurements.measure(transformer, channel=channel, first_alone=True)
    for name in ("mean", "std", "matrix", "signal"):
        of_both = getattr(alone.probe, name)
        assert torch.equal(of_both[0], getattr(whole.probe, name)[0])
        assert torch.equal(of_both[0], of_both[1])
    assert torch.equal(alone.calibration.std[0], whole.calibration.std[0])
    ratio = float(alone.calibration.plausible[0] / whole.calibration.plausible[0])
    assert 0.5 < ratio < 2
    first = transformer.features_of(IDS[:, :1])
    stored = first if channel is None else channel(first, torch.Generator().manual_seed(0))
    residuals = alone.calibration.residual(first, stored, torch.zeros(2, 1, dtype=torch.long))
    assert bool((residuals <= alone.calibration.plausible[0]).all())


@pytest.mark.parametrize("channel", [None, Storage("bfloat16"), Storage(noise=0.5)])
def test_what_is_kept_is_what_was_measured(
    channel: Storage | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measure(channel)
    text = first.text
    direct = LinearProbe.fit(first.transformer, text=text, noise=channel.noise if channel else 0.0)
    target = first.transformer.features_of(IDS)
    found = recover_prompts(TokenRecovery(), first, Targets(target, [6, 6]))
    nothing_is_measured(monkeypatch)
    again = measure(channel)
    assert same(again.probe, first.probe)
    assert same(again.calibration, first.calibration)
    assert same(direct, again.probe)
    for one, two in zip(
        found, recover_prompts(TokenRecovery(), again, Targets(target, [6, 6])), strict=True
    ):
        one.seconds = two.seconds = 0.0
        assert [{**vars(token), "seconds": 0} for token in one.tokens] == [
            {**vars(token), "seconds": 0} for token in two.tokens
        ]


def test_a_model_is_known_by_its_content_wherever_it_came_from(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TransformerSpec(model=str(tiny_folder), depth=2)
    loaded, whole = spec.load_with_head()
    first = Measurements.measure(loaded, LanguageModel(whole, loaded.caches))
    nothing_is_measured(monkeypatch)
    model, tokenizer = spec.load_causal_lm()
    in_memory = TruncatedTransformer.from_model(model, tokenizer, depth=2)
    assert in_memory.description != loaded.description
    again = Measurements.measure(in_memory, LanguageModel(model, in_memory.caches))
    assert same(again.calibration, first.calibration)


def test_every_field_of_a_calibration_is_kept_in_its_type() -> None:
    first = measure()
    measured = Calibration.measure(first.transformer, first.probe, None, first.text)
    for one in fields(Calibration):
        kept, new = getattr(first.calibration, one.name), getattr(measured, one.name)
        assert type(kept) is type(new), one.name
        assert torch.equal(kept, new) if isinstance(new, Tensor) else kept == new, one.name


def test_channels_and_depths_have_calibrations_of_their_own() -> None:
    thresholds = [
        float(measured.calibration.threshold[1])
        for measured in (measure(), measure(Storage("bfloat16")), measure(depth=1))
    ]
    assert len(set(thresholds)) == 3
    names = [entry.path.name.partition("-")[0] for entry in measured_files()]
    assert names.count("Calibration") == 3
    assert names.count("LinearProbe") == 2  # a storage without noise needs no other


def test_equal_weights_that_compute_something_else_are_measured_for_themselves() -> None:
    def steer(module: nn.Module, given: Any, output: Any) -> Any:
        return (output[0] + 1.0, *output[1:]) if isinstance(output, tuple) else output + 1.0

    plain = measure()
    model = tiny_model("llama")
    handle = model.base_model.layers[0].register_forward_hook(steer)
    steered = TruncatedTransformer.from_model(model, depth=2)
    handle.remove()
    assert steered.fingerprint == plain.transformer.fingerprint
    measured = Measurements.measure(steered)
    assert not torch.equal(measured.probe.mean, Measurements.measure(plain.transformer).probe.mean)
    again = recognised(steered)
    assert again == measured.identity
    assert again is not None
    assert again["behaviour"] == 1
    assert plain.identity is not None
    assert plain.identity["behaviour"] == 0


def test_too_many_ways_to_behave_are_not_kept() -> None:
    for number in range(6):
        model = tiny_model("llama")
        model.base_model.layers[0].register_forward_pre_hook(
            lambda _, given, number=number: (given[0] * (1 + number), *given[1:])
        )
        identity = recognised(TruncatedTransformer.from_model(model, depth=1))
        assert (identity is None) == (number > 3)


def test_a_channel_that_cannot_be_told_from_others_is_measured_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Halved:
        noise, largest = 0.0, 1.0

        def without_noise(self, features: Tensor) -> Tensor:
            return features / 2 * 2

    first = measure(Halved())
    measured: list[Any] = []
    whole = Calibration.measure
    monkeypatch.setattr(Calibration, "measure", lambda *given: measured.append(1) or whole(*given))
    assert same(measure(Halved()).calibration, first.calibration)
    assert measured


@pytest.mark.parametrize(
    ("channel", "features"),
    [(Storage(noise=0.5), None), (Storage("bfloat16"), None), (Storage("float16"), "4:20")],
)
def test_other_channels_and_slices_of_a_depth_run_nothing_again(
    channel: Storage, features: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = measure(channel, features=features)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "other"))
    measure()
    for kind, name in ((Moments, "of"), (HeldOutRuns, "measure")):
        monkeypatch.setattr(kind, name, lambda *_: pytest.fail("run again"))
    after = measure(channel, features=features)
    assert same(after.probe, alone.probe)
    assert same(after.calibration, alone.calibration)
    assert after.probe.mean.shape == (2, after.transformer.feature_size)


def test_a_slice_is_measured_as_if_its_features_were_all() -> None:
    cut = measure(features="4:20")
    probe = LinearProbe.fit(cut.transformer, text=cut.text)
    calibration = Calibration.measure(cut.transformer, probe, text=cut.text)
    for ours, theirs in ((cut.probe, probe), (cut.calibration, calibration)):
        for one in ("mean", "std"):
            assert torch.allclose(getattr(ours, one), getattr(theirs, one), rtol=1e-4, atol=1e-6)
    assert torch.allclose(cut.probe.matrix, probe.matrix, rtol=1e-2, atol=1e-4)
    assert torch.allclose(cut.calibration.threshold, calibration.threshold, rtol=1e-2)


def test_of_wide_models_no_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "_NARROW", 8)
    measure()
    kinds = {entry.path.name.partition("-")[0] for entry in measured_files()}
    assert {"LinearProbe", "Calibration"} <= kinds
    assert not kinds & {"Moments", "HeldOutRuns"}

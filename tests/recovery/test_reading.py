"""Rows after a prefix that is not known are read, with a probability, and never verified."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_inversion import recover
from lightning_inversion.__main__ import main as run
from lightning_inversion.data.storage import Storage
from lightning_inversion.data.targets import Captured
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.reading import Reading, ReadingScale, _logistic, beam_search
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from tests.tiny import shared_tiny_model

PREFIX = 4


def behind_prefix(measurements: Measurements) -> tuple[Tensor, Tensor]:
    """Ids of the model's own text, and their rows after a prefix that nobody is told."""
    assert measurements.text is not None
    ids = measurements.text[:6, : PREFIX + 10]
    return ids[:, PREFIX:], measurements.transformer.features_of(ids)[:, PREFIX:]


@pytest.mark.parametrize("beams", [0, 3])
def test_rows_are_read_and_never_verified(measurements: Measurements, beams: int) -> None:
    ids, rows = behind_prefix(measurements)
    found = recover_prompts(Reading(beams), measurements, Targets(rows, [10, 10, 10, 10, 10, 7]))
    pairs = [
        (token, right)
        for prompt, own in zip(found, ids.tolist(), strict=True)
        for token, right in zip(prompt.tokens, own, strict=False)
    ]
    assert [len(prompt.tokens) for prompt in found] == [10] * 5 + [7]
    assert sum(token.id == right for token, right in pairs) > 0.2 * len(pairs)
    chances = [token.probability for token, _ in pairs]
    assert all(chance is not None and 0 < chance <= 1 for chance in chances)
    for token, _ in pairs:
        assert token.state == "read"
        assert not token.verified
        assert token.residual == float("inf")
        assert token.alternatives[0] == token.id
        assert len(set(token.alternatives)) == len(token.alternatives) == 6
    assert not any(prompt.verified for prompt in found)


def test_probabilities_are_calibrated_once(measurements: Measurements) -> None:
    scale = ReadingScale.kept(measurements, 3)
    assert 0 < scale.temperature <= 2
    assert 0 < scale.share < 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadingScale, "of", lambda *_: pytest.fail("it was measured again"))
        assert ReadingScale.kept(measurements, 3) == scale


@pytest.mark.parametrize("first", [0, 1])
def test_probabilities_with_and_without_a_language_model_are_kept_apart(first: int) -> None:
    """Without one the scale is measured on random tokens, and there is no prior to add."""
    model = shared_tiny_model("gpt2")
    transformer = TruncatedTransformer.from_model(model, depth=1 + first)
    both = [
        Measurements.measure(transformer),
        Measurements.measure(transformer, LanguageModel(model, transformer.caches)),
    ]
    for one in (both[first], both[1 - first]):
        assert ReadingScale.kept(one, 0) == ReadingScale.of(one, 0)


def test_each_number_of_beams_has_its_own_scale(measurements: Measurements) -> None:
    scales = [ReadingScale.kept(measurements, beams) for beams in (0, 1, 4)]
    assert scales == [ReadingScale.of(measurements, beams) for beams in (0, 1, 4)]
    assert len(set(scales)) == 3


def test_probabilities_follow_how_often_tokens_are_right() -> None:
    """Chances that are twice as sure as they may be are drawn down."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, generator=generator)
    right = torch.rand(4000, generator=generator) < (logits / 2 - 1).sigmoid()
    none = torch.zeros(4000)
    evidence = torch.stack([logits, none, none, torch.ones(4000)], dim=1)
    weights = _logistic(evidence, right, [1.0, 0.0, 0.0, 0.0])
    assert weights == pytest.approx([0.5, 0, 0, -1], abs=0.1)


def test_probabilities_know_the_noise() -> None:
    """Of rows under strong noise few tokens are right, and few are thought to be."""
    model = shared_tiny_model("llama")
    transformer = TruncatedTransformer.from_model(model, depth=1)
    ids = torch.randint(300, (8, 24), generator=torch.Generator().manual_seed(3))
    rows = transformer.features_of(ids)
    storage = Storage(noise=float(rows.std()))
    noisy = storage(rows, torch.Generator().manual_seed(4))[:, 4:]
    measurements = Measurements.measure(transformer, None, storage)
    found = recover_prompts(Reading(0), measurements, Targets(noisy, [20] * 8))
    pairs = [
        (token.id == right, token.probability or 0.0)
        for prompt, own in zip(found, ids[:, 4:].tolist(), strict=True)
        for token, right in zip(prompt.tokens, own, strict=True)
    ]
    share, thought = (sum(one) / len(pairs) for one in zip(*pairs, strict=True))
    assert 0.1 < share < 0.5
    assert thought == pytest.approx(share, abs=0.05)  # 0.1 less where the noise is not told


def test_without_a_language_model_rows_are_read_alone(headless: Measurements) -> None:
    ids = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(0))
    rows = headless.transformer.features_of(ids)[:, 3:]
    found = recover_prompts(Reading(), headless, Targets(rows, [5, 5]))
    assert {token.state for prompt in found for token in prompt.tokens} == {"read"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_many_beams_find_the_likeliest_sequence(family: str) -> None:
    model = shared_tiny_model(family)
    language_model = LanguageModel(model, caches=True)
    generator = torch.Generator().manual_seed(1)
    chances = (3 * torch.randn(3, 300, generator=generator)).log_softmax(-1)
    ids, conditional = beam_search(language_model, chances, beams=200)
    few = chances.topk(12).indices.tolist()
    best = max(
        itertools.product(*few),
        key=lambda one: joint(language_model, chances, torch.tensor([one])),
    )
    assert ids.tolist() == list(best)
    assert conditional.shape == (3, 300)
    torch.testing.assert_close(conditional.logsumexp(-1), torch.zeros(3))


def joint(language_model: LanguageModel, chances: Tensor, ids: Tensor) -> float:
    prior = (0.95 * language_model.log_probabilities(ids).exp() + 0.05 / 300).log()[0, :-1]
    each = torch.arange(ids.shape[1])
    return float(chances[each, ids[0]].sum() + prior[each[:-1], ids[0, 1:]].sum())


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="beams must be 0 or more, and is -1"):
        Reading(beams=-1)


def test_in_python_rows_need_no_first_position(measurements: Measurements) -> None:
    _, rows = behind_prefix(measurements)
    found = recover(shared_tiny_model("llama"), None, list(rows), depth=3, policy=Reading(0))
    assert len(found) == 6
    assert {token.state for prompt in found for token in prompt.tokens} == {"read"}
    assert "read" in found.to_html()
    assert found[0].certificate.from_json(found[0].certificate.to_json()).tokens[0].state == "read"


@pytest.mark.usefixtures("shared_parsers")
def test_the_command_writes_what_was_read(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    transformer = TransformerSpec(model=str(tiny_folder), depth=2).load()
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = transformer.features_of(ids)[:, 3:]
    Captured(list(rows), transformer.description, Storage()).write(tmp_path / "x.safetensors")
    arguments = [
        "predict", "--targets", str(tmp_path / "x.safetensors"), "--model", str(tiny_folder),
        "--depth", "2", "--model.recovery", "Reading", f"--trainer.default_root_dir={tmp_path}",
    ]  # fmt: skip
    assert run(arguments) == 0
    (file,) = tmp_path.glob("lightning_logs/*/results.jsonl")
    for row in map(json.loads, file.read_text().splitlines()):
        assert row["token_states"] == ["read"] * 6
        assert row["verified_tokens"] == 0
        assert not row["verified"]
        assert row["unresolved"] == list(range(6))
        assert row["token_residuals"] == [None] * 6
        assert all(0 < chance <= 1 for chance in row["probabilities"])
        assert row["policy"] == "Reading"

"""Models as notebooks have them: hooked, wrapped, shared by threads, in training, in float64."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_inversion.api import invert, recover, verify
from lightning_inversion.attribution.attribute import attribute
from lightning_inversion.attribution.config import Choices
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.language_model import own_text
from tests.tiny import shared_tiny_model, tiny_tokenizer

TEXT = "The sky is blue."


def ids() -> Tensor:
    found = tiny_tokenizer()(TEXT, return_tensors="pt").input_ids
    assert isinstance(found, Tensor)
    return found


def copied(**changed: Any) -> hf.PreTrainedModel:
    """A tiny model of the same weights that a test may change, with other settings."""
    model = shared_tiny_model("llama")
    config = model.config.__class__(**{**model.config.to_dict(), **changed})
    own = type(model)(config)
    own.load_state_dict(model.state_dict())
    return own.eval()


def states(model: Any, depth: int = 2) -> Tensor:
    with torch.no_grad():
        found = model(ids(), output_hidden_states=True).hidden_states[depth]
    assert isinstance(found, Tensor)
    return found


def check(model: Any, target: Tensor) -> None:
    (found,) = recover(model, None, target, depth=2)
    assert found.ids == ids()[0].tolist()
    assert found.verified


class Recorder:
    """A hook that cannot be copied."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def __call__(self, *_: Any) -> None:
        self.count()

    def count(self, *_: Any) -> None:
        with self.lock:
            self.calls += 1


def test_hooks_that_cannot_be_copied_stay_the_users_own() -> None:
    model, recorder = copied(), Recorder()
    model.base_model.layers[0].register_forward_hook(recorder)
    model.base_model.layers[1].register_forward_pre_hook(recorder.count)
    target = states(model)
    before = recorder.calls
    check(model, target)
    assert recorder.calls > before
    assert recorder in model.base_model.layers[0]._forward_hooks.values()


def test_what_is_run_is_a_copy_that_no_other_thread_uses() -> None:
    """While candidates are scored, the head of the copy scores one position of each row."""
    model = copied()
    own: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda head, _: own.append(head is model.lm_head))
    drawn = torch.randn(1, 4, states(model).shape[-1], generator=torch.manual_seed(0))
    own.clear()
    recover(model, None, drawn, depth=2)
    assert own
    assert not any(own)


def test_a_model_in_training_is_measured_without_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = copied(attention_dropout=0.5)
    target = states(model)
    model.train()
    seen: list[bool] = []

    def noting(language_model: Any, *sizes: int) -> Tensor:
        seen.extend(module.training for module in language_model.model.modules())
        return own_text(language_model, *sizes)

    monkeypatch.setattr("lightning_inversion.verification.measurements.own_text", noting)
    check(model, target)
    invert(model, None, target, depth=2, iterations=1)
    assert seen
    assert not any(seen)
    assert all(module.training for module in model.modules())


def test_threads_that_attribute_leave_a_model_in_training() -> None:
    model, tokenizer = copied(attention_dropout=0.5).train(), tiny_tokenizer()
    choices = Choices(method="gradient")
    alone = attribute(model, tokenizer, TEXT, choices).scores
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: attribute(model, tokenizer, TEXT, choices), range(12)))
    assert all(torch.equal(one.scores, alone) for one in found)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_float64() -> None:
    model = copied().double()
    target = states(model)
    check(model, target)
    check(model, target.float())
    (found,) = recover(model, None, target, depth=2)
    assert verify(found.certificate, model, target)
    wrong = target.clone()
    wrong[0, 2] = states(model, 1)[0, 2]
    assert not recover(model, None, wrong, depth=2)[0].verified


class Adapted(nn.Module):
    """As a model of peft: a wrapper whose own base model is no model of transformers."""

    def __init__(self, model: hf.PreTrainedModel, prompts: bool = False) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        kind = type("Kind", (), {"value": "PROMPT_TUNING"})
        self.active_peft_config = type(
            "Config", (), {"is_prompt_learning": prompts, "peft_type": kind}
        )

    def get_base_model(self) -> nn.Module:
        """The model, with its adapters."""
        return self.base_model.model


def test_a_model_with_adapters_of_peft() -> None:
    model = copied()
    target = states(model)
    check(Adapted(model), target)
    with pytest.raises(InputError, match="model has prompt_tuning vectors before its tokens"):
        recover(Adapted(model, prompts=True), None, target, depth=2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"depth": "2"}, "depth is a str; give a whole number"),
        ({"depth": 2.0}, "depth is a float; give a whole number"),
        ({"known_prefix": "Hi"}, "known_prefix must hold token ids; it is 'Hi'"),
        ({"known_prefix": [0.5]}, "known_prefix must hold token ids"),
        ({"known_prefix": None}, "known_prefix must hold token ids; it is None"),
        ({"policy": "SIPIT"}, "policy is a str; give a RecoveryPolicy"),
        ({"layout": "left"}, "layout is a str; give a Layout"),
        ({"objective": "L1"}, "objective is a str; give a Objective"),
        ({"schedule": "AllPositions"}, "schedule is a str; give a Schedule"),
        ({"iterations": 2.5}, "iterations is a float; give a whole number"),
        ({"rates": (1.0,)}, "give two numbers, the first rate and the last"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1, and is 0"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_one_sentence(
    changed: dict[str, Any], sentence: str
) -> None:
    model = shared_tiny_model("llama")
    of_recover = {"depth", "known_prefix", "policy", "layout"}
    call: Any = recover if of_recover & set(changed) else invert
    with pytest.raises(InputError, match=sentence):
        call(model, None, torch.ones(3, 64), **{"depth": 2, **changed})


def test_a_warning_names_arguments(caplog: pytest.LogCaptureFixture) -> None:
    target = torch.randn(1, 4, states(copied()).shape[-1], generator=torch.manual_seed(0))
    recover(copied(), None, target, depth=2)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "or set policy Reading" in told
    assert "--" not in told

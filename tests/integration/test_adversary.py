"""A standing adversary: no token is verified that is not the prompt's."""

from __future__ import annotations

import pytest

from tests.benchmarks.adversary import CHANNELS, EMBEDDINGS, FEATURES, PAIRS, Case, attacked

pytestmark = pytest.mark.integration

CASES = [
    *(Case(seed, embedding, "all", "float32") for seed, embedding in enumerate(EMBEDDINGS)),
    *(Case(seed, "near", kind, "float32") for seed, kind in enumerate(FEATURES[1:], start=10)),
    *(Case(seed, "very near", "all", kind) for seed, kind in enumerate(CHANNELS[1:], start=20)),
    Case(5, "untrained cluster", "attention alone", "noise"),
    Case(5, "near", "all", "strong noise", large=True),
    Case(4, "untrained cluster", "all", "strong Laplace noise", large=True),
    Case(3, "near", "all", "sparse"),
    Case(4, "very near", "all", "sparse noise"),
    Case(6, "parallel", "attention alone", "float32"),
    Case(7, "equal", "slice", "noise"),
    Case(3, "near", "keys and values", "float32"),
    Case(4, "parallel", "keys and values", "bfloat16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_certificate_is_false(case: Case) -> None:
    counts = attacked(
        case, ("honest", "changed weights", "permuted", "untold noise", "other noise")
    )
    print(dict(counts))
    assert counts["tokens"] > 500
    assert counts["false"] == 0


@pytest.mark.parametrize("channel", ["bfloat16", "computed in bfloat16"])
def test_no_certificate_is_false_that_the_next_row_decides(channel: str) -> None:
    kinds = ("honest", "other rounding", "changed weights", "untold noise")
    counts = attacked(Case(3, PAIRS, "all", channel, width=96, large=True), kinds)
    print(dict(counts))
    assert counts["refuted"] > 0
    assert counts["false"] == 0


def test_no_certificate_of_a_last_row_is_false() -> None:
    counts = attacked(Case(3, "near", "all", "float32"), ("honest", "changed weights"), last=True)
    assert counts["honest: verified"] > 0
    assert counts["false"] == 0


def test_the_adversary_leaves_something_to_verify() -> None:
    """Else it would test nothing."""
    counts = attacked(Case(2, "near", "all", "float32"), ("honest",))
    assert counts["right"] == counts["tokens"]
    assert counts["verified"] > counts["tokens"] / 2

"""The text of three tokens that is run at load: each way of reading more than vectors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.load_checks import check_reads_vectors

EMBEDDING = nn.Embedding(40, 8)


def check(outputs: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    """Check a model that makes `outputs` of vectors and, where it has them, ids."""

    def run(input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        vectors = EMBEDDING(input_ids) if inputs_embeds is None else inputs_embeds
        return outputs(vectors, input_ids)

    check_reads_vectors("FakeModel", run, EMBEDDING)


def looked_up(vectors: Tensor, ids: Tensor | None) -> Tensor:
    if not (vectors[0, :, None] == EMBEDDING.weight).all(-1).any(-1).all():
        raise ValueError("not a token's\nvector")
    return vectors.cumsum(1)


def broken(vectors: Tensor, ids: Tensor | None) -> Tensor:
    raise ValueError("of two\nlines")


def in_place(vectors: Tensor, ids: Tensor | None) -> Tensor:
    return vectors.mul_(2).cumsum(1)


def test_a_causal_model_of_vectors_passes() -> None:
    check(lambda vectors, ids: vectors.cumsum(1))
    check(in_place)


def test_a_model_without_finite_numbers_passes() -> None:
    check(lambda vectors, ids: vectors * float("nan"))


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (lambda vectors, ids: vectors - vectors.mean(1, keepdim=True), "is not causal"),
        (
            lambda vectors, ids: vectors if ids is None else vectors + ids[..., None],
            "reads more of a token than its vector",
        ),
        (looked_up, "needs token ids beside their vectors"),
        (lambda vectors, ids: vectors + ids[..., None], "needs token ids beside their vectors"),
        (broken, r"cannot be run on tokens \(ValueError: of two\)"),
        (lambda vectors, ids: vectors.detach(), "passes no gradient to its token vectors"),
        (lambda vectors, ids: vectors.transpose(0, 1), r"of shape \[3, 1, 8\] for 3 tokens"),
        (lambda vectors, ids: vectors[:, None].expand(-1, 4, -1, -1), r"of shape \[1, 4, 3, 8\]"),
    ],
)
def test_others_are_refused_in_a_sentence(
    outputs: Callable[[Tensor, Tensor | None], Tensor], reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        check(outputs)
    message = str(raised.value)
    assert message.startswith("--model.transformer.model: FakeModel ")
    assert message.endswith("choose another causal language model.")
    assert "\n" not in message

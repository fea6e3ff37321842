"""Rows in unknown order: attention determines it, and the tokens are then verified as ever."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_inversion import recover
from lightning_inversion.__main__ import main as run
from lightning_inversion.errors import InputError
from lightning_inversion.recovery.order import _Ordering, in_order
from lightning_inversion.recovery.policy import Targets
from lightning_inversion.recovery.reading import Reading
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from tests.tiny import shared_tiny_model


def shuffled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``[T, F]`` in another order, and the place of each in it."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    return rows[order], order.argsort()


def texts(measurements: Measurements) -> Tensor:
    assert measurements.text is not None
    ids = measurements.text[:4, :9].clone()
    ids[1, 3:6] = ids[1, 2]  # one token at several positions
    return ids


@pytest.mark.parametrize("model", ["measurements", "other_measurements"])
def test_the_order_is_found(model: str, request: pytest.FixtureRequest) -> None:
    measurements: Measurements = request.getfixturevalue(model)
    rows = measurements.transformer.features_of(texts(measurements))
    given = rows.clone()
    places = []
    for number, own in enumerate(rows):
        given[number], place = shuffled(own)
        places.append(tuple(place.tolist()))
    lengths = [9, 9, 9, 9]
    found, orders = in_order(measurements, Targets(given, lengths))
    assert [order.rows for order in orders] == places
    assert [order.found for order in orders] == lengths
    assert torch.equal(found.features, rows)


def test_where_no_reading_fits_the_next_token_is_searched_for(
    measurements: Measurements, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = measurements.transformer.features_of(texts(measurements)[:1])
    given, place = shuffled(rows[0])
    readings = _Ordering._readings

    def unlikely(self: _Ordering, kind: int) -> Tensor:
        found = readings(self, kind)
        return found if kind == 0 else found[:, -1:].expand_as(found)

    monkeypatch.setattr(_Ordering, "_readings", unlikely)
    _, (order,) = in_order(measurements, Targets(given[None], [9]))
    assert order.rows == tuple(place.tolist())
    without = replace(measurements, language_model=None)
    _, (order,) = in_order(without, Targets(given[None], [9]))
    assert order.found == 1


@pytest.mark.parametrize("stored", [True, False])
def test_behind_a_known_prefix(measurements: Measurements, stored: bool) -> None:
    ids = texts(measurements)
    rows = measurements.transformer.features_of(ids)[:1]
    given = rows.clone()
    if stored:
        given[0], _ = shuffled(rows[0])
    else:
        given[0, 2:], _ = shuffled(rows[0, 2:])
        given[:, :2] = torch.nan
    found, (order,) = in_order(measurements, Targets(given, [9], (int(ids[0, 0]), int(ids[0, 1]))))
    assert order.found == 9
    assert torch.equal(found.features[:, 2:], rows[:, 2:])


def test_rows_that_fit_nowhere_stand_at_the_end(measurements: Measurements) -> None:
    rows = measurements.transformer.features_of(texts(measurements)[:1])
    given = rows[:, [3, 5, 0, 4, 1, 2]]
    given[0, 1] += 1  # position 5
    _, (order,) = in_order(measurements, Targets(given, [6]))
    assert order.rows == (2, 4, 5, 0, 3, 1)
    assert order.found == 5
    _, (order,) = in_order(measurements, Targets(given[:, :2], [2]))
    assert order.found == 0


def test_a_model_that_is_not_causal_is_refused(measurements: Measurements) -> None:
    model = shared_tiny_model("llama")
    whole = TruncatedTransformer.from_model(model, depth=1, surgery=Surgery(causal=False))
    with pytest.raises(InputError, match="order unknown needs a causal model"):
        in_order(replace(measurements, transformer=whole), Targets(torch.zeros(1, 2, 32), [2]))


def test_python_finds_the_order_and_verifies(messages: list[str]) -> None:
    model = shared_tiny_model("llama")
    ids = torch.randint(3, 300, (7,), generator=torch.Generator().manual_seed(5))
    states = model(ids[None], output_hidden_states=True).hidden_states[2][0].detach()
    given, places = shuffled(states)
    (found,) = recover(model, None, given, depth=2, order="unknown")
    assert found.ids == ids.tolist()
    assert found.verified
    assert found.order == tuple(places.tolist())
    assert found.to_dict()["order"] == places.tolist()
    (bag,) = recover(model, None, given, depth=2, order="unknown", policy=Reading(0))
    assert len(bag.ids) == 7
    recover(model, None, given + 1, depth=2, order="unknown", diagnose_first=False)
    assert any("the order of 0 of 7 rows was found" in line for line in messages)


@pytest.mark.usefixtures("shared_parsers")
def test_a_file_whose_rows_are_in_any_order(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.tensor([[11, 42, 7, 42, 5]])
    states = AutoModelForCausalLM.from_pretrained(tiny_folder)(ids, output_hidden_states=True)
    given, places = shuffled(states.hidden_states[2][0].detach())
    save_file({"hidden": given}, tmp_path / "x.safetensors")
    words = [
        f"--model.transformer.model={tiny_folder}", "--model.transformer.depth=2",
        f"--data.targets={tmp_path / 'x.safetensors'}", "--data.order=unknown",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert run(["predict", *words]) == 0
    (file,) = tmp_path.rglob("results.jsonl")
    row = json.loads(file.read_text())
    assert row["recovered_ids"] == ids[0].tolist()
    assert row["verified"]
    assert row["order"] == places.tolist()
    capsys.readouterr()
    assert run(["fit", *words]) == 2
    assert "--data.order unknown is for predict; leave it out" in capsys.readouterr().err

"""The tokens as they emerge: distances, pictures, early iterations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_inversion.__main__ import main as run
from lightning_inversion.callbacks.token_decoding import nearest_distances, nearest_picture
from lightning_inversion.transformer.truncated import TruncatedTransformer

TEXT = "The café 🙂 emoji"


def test_distances_are_those_of_a_search(tiny_transformer: TruncatedTransformer) -> None:
    embedding = tiny_transformer.embedding
    vectors = embedding(torch.tensor([[7, 8]]))[0] + torch.tensor([[0.0], [0.01]])
    found = nearest_distances(vectors, embedding, 3)
    every = torch.cdist(vectors, embedding.matrix) / embedding.matrix.std() / embedding.width**0.5
    expected = every.sort(dim=-1).values[:, :3]
    assert found == pytest.approx(expected.numpy(), abs=2e-3)
    assert found[0, 0] < 1e-3


def test_a_picture_is_bright_where_a_token_is_near() -> None:
    image = nearest_picture(torch.tensor([[0.0, 0.5], [1.0, 4.0]]))
    assert image.shape == (3, 24, 24)
    assert image[:, 0, 0].tolist() == [253, 231, 37]
    assert image[:, -1, 0].tolist() == [33, 145, 140]
    assert image[:, 0, -1].tolist() == image[:, -1, -1].tolist() == [68, 1, 84]


@pytest.mark.integration  # a whole fit
@pytest.mark.usefixtures("shared_parsers")
def test_a_short_fit_is_shown_at_several_iterations(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        f"--model.transformer.model={tiny_folder}",
        "--model.transformer.depth=1",
        f'--data.prompts=["{TEXT}"]',
        "--data.tokens_per_batch=100",
        "--model.iterations=200",
        "--model.schedule.candidates=1",
        "--model.schedule.max_candidates=1",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]
    assert run(["fit", *options]) == 0
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    for kind, key in (
        (events.Scalars, "tokens/verified"),
        (events.Images, "tokens/distance_to_nearest"),
        (events.Tensors, "tokens/top_k/text_summary"),
    ):
        assert len(kind(key)) > 1
    *_, last = (event.tensor_proto for event in events.Tensors("tokens/top_k/text_summary"))
    shown = [line for line in capsys.readouterr().err.splitlines() if "iteration" in line]
    assert shown[0].startswith("iteration 1: distance ")
    assert " at its start, then token accuracy " in shown[0]
    assert "verified 1.000" in shown[-1]
    assert TEXT in shown[-1]
    assert TEXT in last.string_val[0].decode()

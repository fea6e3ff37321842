"""Parts that single experiments of the document need: ranges of features, own tokens, sequence."""

import json
from pathlib import Path

import pytest
import torch

from lightning_inversion.__main__ import main as run
from lightning_inversion.data.batch import PromptBatch
from lightning_inversion.decoding import decode
from lightning_inversion.errors import InputError
from lightning_inversion.inputs import VocabularyInput
from lightning_inversion.module import InputInversion
from lightning_inversion.objectives import L1, L2, CosineDistance, Narrowed, Standardized
from lightning_inversion.transformer.embedding import TokenEmbedding
from lightning_inversion.transformer.truncated import TruncatedTransformer

MASK = torch.ones(4, 3, dtype=torch.bool)


@pytest.mark.parametrize("objective", [L1(), L2(), CosineDistance(), L2(relative=True)])
def test_narrowed_is_the_objective_of_the_sliced_features(objective) -> None:
    generated, target = torch.randn(2, 4, 3, 10).unbind()
    found = Narrowed(["0:4", "2:9"], objective)(generated, target, MASK)
    for row, inside in enumerate([slice(0, 4), slice(2, 9)] * 2):
        alone = objective(
            generated[row : row + 1, :, inside], target[row : row + 1, :, inside], MASK[:1]
        )
        torch.testing.assert_close(found[row], alone[0])


def test_narrowed_gives_no_gradient_outside_its_range() -> None:
    generated = torch.randn(2, 3, 10, requires_grad=True)
    Narrowed(["0:4", "2:9"])(generated, torch.randn(2, 3, 10), MASK[:2]).sum().backward()
    assert generated.grad is not None
    assert not generated.grad[0, :, 4:].any()
    assert not generated.grad[1, :, :2].any()


def test_narrowed_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="at least one slice"):
        Narrowed([])
    with pytest.raises(InputError, match=r"objective\.ranges: '7' is not a slice"):
        Narrowed(["7"])
    with pytest.raises(InputError, match=r"Standardized\.objective"):
        Narrowed(["0:4"], Standardized())
    with pytest.raises(InputError, match=r"--data\.repeat 3"):
        Narrowed(["0:4"] * 3)(torch.ones(4, 3, 10), torch.ones(4, 3, 10), MASK)


def test_a_mask_of_its_own_for_each_row() -> None:
    learnable = VocabularyInput()
    learnable.allocate((2, 1, 3))
    learnable.values.data = torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 2.0, 3.0]]])
    hidden = torch.tensor([[False, True, True], [False, False, True]])
    best = decode(learnable, TokenEmbedding(torch.eye(3)), None, disallowed=hidden).best
    assert best.tolist() == [[0], [1]]


def test_own_tokens_are_those_of_the_row(tiny_transformer: TruncatedTransformer) -> None:
    module = InputInversion(own_tokens=True).use(tiny_transformer)
    module.configure_model()
    module.begin(PromptBatch.collate([(0, "a", [5, 6, 7]), (1, "b", [8, 9])]))
    best = module.top_tokens().best
    assert set(best[0].tolist()) <= {5, 6, 7}
    assert set(best[1, :2].tolist()) <= {8, 9}


def test_alone_is_a_text_of_one_token(tiny_transformer: TruncatedTransformer) -> None:
    module = InputInversion(alone=True).use(tiny_transformer)
    module.configure_model()
    module.begin(PromptBatch.collate([(0, "a", [5, 6, 7]), (1, "b", [8, 9])]))
    features = module.generated()
    one = tiny_transformer(module.learnable.values[:1, 2:3])
    torch.testing.assert_close(features[0, 2], one[0, 0])
    whole = tiny_transformer.features_of(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(module.target[0], whole[0])
    assert not features[1, 2].any()


def fit(folder: Path, root: Path, *more: str) -> int:
    return run(
        [
            "fit",
            f"--model.transformer.model={folder}",
            '--data.prompts=["The sky is blue."]',
            "--data.tokens_per_batch=100",
            f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            "--token_by_token.every=0",
            "--stopping.stop=false",
            *more,
        ]
    )


def test_position_by_position_fixes_each_token_it_leaves(tiny_folder: Path, tmp_path: Path) -> None:
    positions = "--position_by_position.iterations=15"
    assert fit(tiny_folder, tmp_path, positions, "--model.iterations=400") == 0
    checkpoint = torch.load(
        tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True
    )
    held = checkpoint["state_dict"]["learnable.held"][0]
    rows = (tmp_path / "lightning_logs/version_0/results.jsonl").read_text().splitlines()
    row = json.loads(rows[0])
    assert row["iterations"] == 15 * len(row["ids"])
    assert held.all()


def test_position_by_position_refuses_what_contradicts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    positions = "--position_by_position.iterations=5"
    assert fit(tiny_folder, tmp_path, positions, "--model.iterations=6") == 2
    assert "end before the last position" in capsys.readouterr().err
    assert fit(tiny_folder, tmp_path, positions, "--model.alone=true") == 2
    assert "choose one of them" in capsys.readouterr().err
    assert fit(tiny_folder, tmp_path, positions, "--token_by_token.every=5") == 2
    assert "set --token_by_token.every 0" in capsys.readouterr().err


def test_each_prompt_is_repeated(tiny_folder: Path, tmp_path: Path) -> None:
    assert fit(tiny_folder, tmp_path, "--data.repeat=3", "--model.iterations=2") == 0
    rows = (tmp_path / "lightning_logs/version_0/results.jsonl").read_text().splitlines()
    assert [json.loads(row)["index"] for row in rows] == [0, 1, 2]

"""A cut of shared blocks is the transformer that its spec loads by itself."""

from pathlib import Path

import pytest
import torch

from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.shared import SharedModels
from tests.tiny import save_tiny

SPECS = [
    {"depth": 4},
    {"depth": 1},
    {"depth": 2, "mlp": False, "norms": False},
    {"depth": 3, "repeat_first": True},
    {"depth": 2, "positions": "first"},
    {"depth": 2, "causal": False},
    {"layers": [1, 3]},
    {"depth": 2, "features": "0:8"},
    {"depth": 4, "final_norm": True},
    {"depth": 2, "embedding": "untrained"},
    {"depth": None},
    {"depth": 1},
]


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", "trained"),
        pytest.param("gpt2", "untrained", marks=pytest.mark.integration),
    ],
)
def test_a_cut_is_what_the_spec_loads(family: str, weights: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    specs = [TransformerSpec(model=str(folder), weights=weights, **more) for more in SPECS]
    models = SharedModels(specs)
    ids = torch.tensor([[5, 9, 200, 31]])
    for spec in specs:
        cut, alone = models.load(spec), spec.load()
        assert torch.equal(cut.features_of(ids), alone.features_of(ids)), spec
        assert cut.description == alone.description


def test_a_whole_model_serves_every_depth(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llama")
    models = SharedModels([TransformerSpec(model=str(folder), depth=1)])
    ids = torch.tensor([[5, 9, 200, 31]])
    wholes = set()
    for depth in (1, 3):
        spec = TransformerSpec(model=str(folder), depth=depth)
        cut, whole = models.load_with_head(spec)
        wholes.add(id(whole))
        states = whole(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(cut.features_of(ids), states[depth])
        assert torch.equal(models.load(spec).features_of(ids), spec.load().features_of(ids))
    assert len(wholes) == 1


def test_another_model_replaces_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, int]] = []
    load_blocks = TransformerSpec.load_blocks

    def counted(spec: TransformerSpec, depth: int):
        loaded.append((Path(spec.model).name, depth))
        return load_blocks(spec, depth)

    monkeypatch.setattr(TransformerSpec, "load_blocks", counted)
    a, b = (str(save_tiny(tmp_path / name)) for name in "ab")
    models = SharedModels([TransformerSpec(model=a, depth=2)])
    for spec in (
        TransformerSpec(model=a, depth=1),
        TransformerSpec(model=a, depth=2, attention="sdpa"),
        TransformerSpec(model=a, depth=3),  # deeper than expected
        TransformerSpec(model=b, depth=1),
        TransformerSpec(model=b, depth=1, dtype="bfloat16"),
    ):
        models.load(spec)
    assert loaded == [("a", 2), ("a", 3), ("b", 1), ("b", 1)]

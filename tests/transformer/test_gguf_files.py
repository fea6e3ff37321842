"""A tiny .gguf file, written here, is converted once and loads like any folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_inversion.errors import InputError
from lightning_inversion.transformer import TransformerSpec, resolve_source
from lightning_inversion.transformer.gguf import is_converted
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_gguf import save_tiny_gguf


@pytest.fixture
def tiny_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny Llama as a .gguf file, and a cache of its own."""
    monkeypatch.setenv("LIGHTNING_INVERSION_CACHE", str(tmp_path / "cache"))
    save_tiny_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_gives_the_same_features(
    tiny_gguf: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformer = TransformerSpec(model=str(tiny_gguf), depth=2).load()
    assert "Writing" not in (noise := capfd.readouterr().err)
    assert "%" not in noise
    ids = torch.tensor([[5, 9, 77, 120, 33]])
    with torch.no_grad():
        expected = tiny_model("llama")(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(transformer.features_of(ids), expected)
    assert transformer.tokenizer is not None
    text = "The sky is blue, encore."
    assert transformer.tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert transformer.tokenizer.decode(transformer.tokenizer(text).input_ids) == text


def test_a_conversion_is_kept_and_a_damaged_one_is_made_again(tiny_gguf: Path) -> None:
    folder = Path(resolve_source(str(tiny_gguf)).location)
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    resolve_source(str(tiny_gguf))
    assert weights.stat().st_mtime_ns == written
    tokenizer = (folder / "tokenizer.json").read_bytes()
    for damaged, content in (
        (weights, weights.read_bytes()[:1000]),
        (folder / "tokenizer.json", b" " * len(tokenizer)),
    ):
        damaged.write_bytes(content)
        assert not is_converted(folder)
        resolve_source(str(tiny_gguf))
        assert is_converted(folder)
    assert (folder / "tokenizer.json").read_bytes() == tokenizer


def test_a_gguf_file_of_too_many_blocks_is_one_sentence(tiny_gguf: Path) -> None:
    content = tiny_gguf.read_bytes()
    at = content.index(b"llama.block_count") + len("llama.block_count") + 4
    tiny_gguf.write_bytes(content[:at] + b"\0\0\0\x7f" + content[at + 4 :])
    with pytest.raises(InputError, match=r"llama.block_count 2130706432, and at most 4096"):
        resolve_source(str(tiny_gguf))

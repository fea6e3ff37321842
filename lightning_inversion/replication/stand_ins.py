"""Stand-ins: the document's untrained models, of their own shape, where no hub can be reached.

An untrained model is its configuration and a seed. ``configs/stand_ins`` holds the configuration;
the tokenizer is SmolLM2's, whose 49,152 tokens fit. Only ``weights: untrained`` makes sense here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_inversion.errors import InputError
from lightning_inversion.transformer.loading import TransformerSpec


def make_stand_in(name: str, configs: Path, folder: Path) -> Path:
    """Put the configuration ``configs/stand_ins/<name>.json`` and a tokenizer into a folder.

    Args:
        name: the model whose shape is wanted.
        configs: the folder of configs.
        folder: where stand-ins go.

    Returns:
        The folder, which ``model.transformer.model`` takes.
    """
    shape = configs / "stand_ins" / f"{name}.json"
    if not shape.exists():
        known = ", ".join(sorted(path.stem for path in shape.parent.glob("*.json")))
        raise InputError(f"There is no stand-in {name!r}; choose one of {known}.")
    made = folder / name
    if not (made / "config.json").exists():
        made.mkdir(parents=True, exist_ok=True)
        TransformerSpec().load_tokenizer().save_pretrained(made)
        (made / "config.json").write_text(shape.read_text())
    return made


def main() -> None:
    """``python -m lightning_inversion.replication.stand_ins gpt2``."""
    parser = argparse.ArgumentParser(prog="python -m lightning_inversion.replication.stand_ins")
    parser.add_argument("names", nargs="+")
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs/stand_ins"))
    options = parser.parse_args()
    for name in options.names:
        print(make_stand_in(name, options.configs, options.folder))


if __name__ == "__main__":
    main()

"""What is refused of a model's configuration before anything is built of it."""

from __future__ import annotations

from typing import Any

from lightning_inversion.errors import InputError

OPTION = "--model.transformer.model"
MOST_BLOCKS = 4096
"""Blocks, or experts of one, that a model may have: transformers builds them one by one."""


def check_counts(name: str, config: Any) -> None:
    """Raise InputError if a configuration counts more blocks or experts than can be built.

    Args:
        name: of the model, for messages.
        config: its values, before anything is made of them.
    """
    entries = config.items() if isinstance(config, dict) else ()
    for key, value in entries:
        check_counts(name, value)
        counts = str(key).endswith(("layer", "layers", "experts", "block_count", "expert_count"))
        # -2 is the last layer but one that an image's features are taken from.
        least = -MOST_BLOCKS if str(key).endswith("feature_layer") else -1
        if counts and isinstance(value, int | float) and not least <= value <= MOST_BLOCKS:
            raise InputError(
                f"{OPTION}: {name!r} has {key} {value!r}, and at most {MOST_BLOCKS} can be "
                "built; correct its configuration, or give another model."
            )

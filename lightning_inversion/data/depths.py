"""Which of the depths that a file holds are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_inversion.data.layout import Layout, Wanted, named
from lightning_inversion.data.names import FINAL, counted_number


class Depths:
    """Chooses the depths that are asked for among those that are there.

    Args:
        wanted: what is asked for.

    Attributes:
        sources: how depths were found, in words.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.sources: list[str] = []

    def are_layers(self, tensors: list[Tensor]) -> bool:
        """Whether tensors of one shape are the layers of one run, and no prompts of one length."""
        if self.wanted.layout.depths is not None:
            return len(tensors) == len(self.wanted.layout.depths)
        if self.wanted.shape is None:
            return False
        if len(tensors) == self.wanted.sizes.blocks and self.wanted.layout.axes is None:
            raise self.wanted.error(
                f" holds {len(tensors)} tensors of one shape, prompts or the outputs of "
                f"{len(tensors)} blocks; set --data.layout.axes prompts,positions,features, or "
                f"--data.layout.depths [1,2,...,{len(tensors)}]."
            )
        return len(tensors) == self.wanted.sizes.blocks + 1

    def are_numbered(self, names: Sequence[str]) -> bool:
        """Whether numbers alone name the tensors: depths, blocks or prompts; a manifest decides.

        Raises:
            InputError: numbers that may be depths leave a choice.
        """
        if len(names) < 2 or not all(map(str.isdecimal, names)) or not self.wanted.checks_width:
            return False
        first, layout = int(names[0]), self.wanted.layout
        in_a_row = list(map(int, names)) == list(range(first, first + len(names)))
        if (first > 1 or not in_a_row) and layout == Layout(dtype=layout.dtype):
            raise self.wanted.error(
                f" holds tensors named {', '.join(names[:5])}, which may be depths or prompts; set "
                f"--data.layout.depths [{','.join(names[:5])}], or --data.layout.axes "
                "prompts,positions,features."
            )
        return True

    def of_numbered_layer(self, names: Sequence[str]) -> int | None:
        """The depth of one numbered layer, where it is the one asked for by one way of counting.

        Raises:
            InputError: it is another by any.
        """
        number = counted_number(names[0]) if len(names) == 1 else None
        asked = self.wanted.depths
        if number is None or asked is None or self.wanted.layout.depths is not None:
            return None
        if asked[0] not in (number, number + 1):
            raise self.wanted.error(
                f" holds {names[0]!r}, and depth {asked[0]} is asked for; set "
                f"--model.transformer.depth {number + 1} if blocks count from 0, or {number}."
            )
        return asked[0]

    def of_layers(self, layers: int, name: str) -> list[int]:
        """The depth of each layer that a tensor holds.

        Raises:
            InputError: nothing tells it.
        """
        told = self.wanted.layout.depths
        if told is not None:
            if len(told) != layers:
                raise self.wanted.error(
                    f"{named(name)} holds {layers} layers, and --data.layout.depths names "
                    f"{len(told)}; name the depth of each."
                )
            self.sources.append("from --data.layout.depths")
            return told
        if self.wanted.shape is not None:
            blocks = self.wanted.sizes.blocks
            if layers == blocks + 1:
                self.sources.append(f"entry of {layers} hidden states")
                return [*range(blocks), FINAL]
            if name.rsplit(".", 1)[-1] == "residual_stream" and layers == blocks:
                self.sources.append("from the outputs of all blocks")
                return list(range(1, blocks + 1))
        raise self.wanted.error(
            f"{named(name)} holds {layers} layers and does not tell which; name the depth of each "
            "with --data.layout.depths, as [4,8]."
        )

    def pick(self, available: Sequence[int], names: Sequence[str] = ()) -> list[int]:
        """Which of the available depths are asked for.

        Raises:
            InputError: one is not among them.
        """
        blocks = self.wanted.sizes.blocks if FINAL in available or self.wanted.depths is None else 0
        picked = []
        for depth in self.wanted.depths or (blocks,):
            fitting = [
                index
                for index, own in enumerate(available)
                if own == depth or (own == FINAL and depth == blocks)
            ]
            if not fitting:
                held = sorted({blocks if own == FINAL else own for own in available})
                several = f"depths {', '.join(map(str, held[:40]))}"
                what = f"depth {held[0]}" if len(held) == 1 else several
                by_name = f" in {names[0]!r}" if len(held) == 1 and names and names[0] else ""
                way_out = (
                    f"set --model.transformer.depth {held[0] if len(held) == 1 else 'to one'}"
                    if held[-1] > 0
                    else "save the output of a block"
                )
                raise self.wanted.error(
                    f" holds {what}{by_name}, and depth {depth} is asked for; {way_out}."
                )
            normed = [index for index in fitting if available[index] == FINAL]
            plain = [index for index in fitting if available[index] != FINAL]
            first, second = (normed, plain) if self.wanted.final_norm else (plain, normed)
            picked.append((first or second)[0])
        return picked

    def side_by_side(self, parts: list[list[Tensor]]) -> list[Tensor]:
        """Features of several depths of the same prompts, concatenated."""
        if len(parts) == 1:
            return parts[0]
        if len({tuple(len(prompt) for prompt in part) for part in parts}) > 1:
            raise self.wanted.error(
                " holds depths of prompts that differ in length; save them together."
            )
        return [torch.cat(same, dim=-1) for same in zip(*parts, strict=True)]

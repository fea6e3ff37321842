"""Which of the depths that a file holds are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_inversion.data.layout import Layout, Wanted, named
from lightning_inversion.data.names import (
    FINAL,
    NamedDepth,
    counted_number,
    numbers_alone,
)


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

        A word before all of them (``hs_0``, ``arr_0``) changes nothing where they are as many as a
        model's hidden states or blocks, or as the depths that are told.

        Raises:
            InputError: numbers that may be depths leave a choice.
        """
        numbers, layout = numbers_alone(names), self.wanted.layout
        if numbers is None or not self.wanted.checks_width:
            return False
        blocks = self.wanted.sizes.blocks if self.wanted.shape is not None else 0
        in_a_row = numbers == list(range(numbers[0], numbers[0] + len(names)))
        may_be_depths = not blocks or max(numbers) <= blocks
        if (
            may_be_depths
            and (numbers[0] > 1 or not in_a_row)
            and layout == Layout(dtype=layout.dtype)
        ):
            raise self.wanted.error(
                f" holds tensors named {', '.join(names[:5])}, which may be depths or prompts; set "
                f"--data.layout.depths [{','.join(map(str, numbers[:5]))}], or --data.layout.axes "
                "prompts,positions,features."
            )
        several = (blocks, blocks + 1, len(layout.depths or ()))
        return len(names) in several or all(map(str.isdecimal, names))

    def of_numbered_layer(self, names: Sequence[str]) -> int | None:
        """The depth of one numbered layer, where it is the one asked for by one way of counting.

        It may be in the names of several prompts.

        Raises:
            InputError: it is another by any.
        """
        numbers = {counted_number(name) for name in names}
        number = numbers.pop() if len(numbers) == 1 else None
        asked = self.wanted.depths
        if number is None or asked is None or self.wanted.layout.depths is not None:
            return None
        self.check_number(number, repr(names[0]))
        return asked[0]

    def check_number(self, number: int, name: str) -> None:
        """Refuse the number of a layer that is not asked for by either way of counting.

        Raises:
            InputError: names both depths.
        """
        asked = self.wanted.depths
        if asked is None or self.wanted.layout.depths is not None:
            return
        if number < 0:
            number += self.wanted.sizes.blocks + 1
        if asked[0] not in (number, number + 1):
            raise self.wanted.error(
                f" holds {name}, and depth {asked[0]} is asked for; set "
                f"--model.transformer.depth {number + 1} if blocks count from 0, or {number}."
            )

    def of_modules(self, told: dict[str, NamedDepth]) -> dict[str, NamedDepth]:
        """The depths of names such as layers.0 and layers.1, of one prompt.

        One more than there are blocks are the hidden states, and no outputs of blocks.

        Raises:
            InputError: a name is of a block that the model does not have.
        """
        depths = {name: found.depth for name, found in told.items() if found.depth != FINAL}
        numbers = sorted(depths.values())
        if len(numbers) < 2 or numbers != list(range(1, len(numbers) + 1)):
            return told
        blocks = self.wanted.sizes.blocks if self.wanted.shape is not None else len(numbers)
        if len(numbers) <= blocks:
            return told
        if len(numbers) > blocks + 1:
            raise self.wanted.error(
                f" holds {max(depths, key=depths.__getitem__)!r}, and the model has {blocks} "
                "blocks; give the model that made it."
            )
        source = f"entry of {len(numbers)} hidden states"
        return {
            name: found if found.depth == FINAL
            else replace(found, depth=found.depth - 1 if found.depth <= blocks else FINAL,
                         source=source)
            for name, found in told.items()
        }  # fmt: skip

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

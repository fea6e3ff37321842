"""Which hidden states are asked for, and what the user tells of the file that holds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_inversion.data.layout import Layout, ModelShape, Wanted
from lightning_inversion.data.storage import Storage
from lightning_inversion.errors import InputError
from lightning_inversion.transformer.selection import Output
from lightning_inversion.verification.noise import NoiseName

Order = Literal["given", "unknown"]


@dataclass(frozen=True)
class Request:
    """Which hidden states a file is read for, and what the user tells of them.

    Args:
        depths: whose features are asked for; None for those of all blocks.
        final_norm: whether they are taken after the final norm.
        output: hidden states, or keys, values or both of the block after the depth.
        shape: reads the model's configuration, when it is needed.
        layout: what shapes and names leave open.
        first_position: the position of the first row; None for the manifest's, or 0.
        known_prefix: the tokens with which every prompt begins; None for the manifest's.
        centred: whether the mean over the features was subtracted.
        scale: the factor that the features were multiplied by.
        noise: std of the noise in them, in the model's units.
        noise_kind: how it is distributed.
        largest: the share of each position's features that was kept, the largest; others are 0.
        order: whether the rows are in the order of the text.
        logits: whether logits stand in place of the states after the final norm.
    """

    depths: tuple[int, ...] | None = None
    final_norm: bool = False
    shape: Callable[[], ModelShape] | None = None
    layout: Layout = field(default_factory=Layout)
    first_position: int | None = None
    known_prefix: Sequence[int] | None = None
    centred: bool = False
    scale: float = 1.0
    noise: float = 0.0
    noise_kind: NoiseName = "gaussian"
    largest: float = 1.0
    output: Output = "hidden_states"
    order: Order = "given"
    logits: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--data.order", self.order, get_args(Order)),
            ("--model.transformer.output", self.output, get_args(Output)),
        ):
            if value not in known:
                raise InputError(f"{name}: {value!r} is unknown; choose from {', '.join(known)}.")
        told = Storage(
            noise=self.noise, noise_kind=self.noise_kind, scale=self.scale, largest=self.largest
        )
        told.check("--data.")
        if self.first_position is not None and self.first_position < 0:
            raise InputError(
                f"--data.first_position must be 0 or more, and is {self.first_position}."
            )

    def wanted(self, where: str, checks_width: bool = True) -> Wanted:
        """What is asked for of a file or of objects that ``where`` names.

        Raises:
            InputError: logits are asked for at a depth that has none.
        """
        if self.logits and self.shape is not None:
            blocks = self.shape().blocks
            if not self.final_norm or self.depths not in (None, (blocks,)):
                raise InputError(
                    "--data.logits: logits follow from the states after the final norm; set "
                    f"--model.transformer.depth {blocks} --model.transformer.final_norm true."
                )
        return Wanted(
            where, self.depths, self.final_norm, self.layout, self.shape, checks_width, self.output,
            self.logits,
        )  # fmt: skip

"""What a command asks of each of its texts; it can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_inversion.attribution.attribute import attribute, to_stderr
from lightning_inversion.attribution.config import Choices, Look
from lightning_inversion.attribution.result import AttributionResult
from lightning_inversion.transformer.loading import WHAT_IS_LOADED, TransformerSpec


@dataclass(frozen=True)
class Request:
    """What is attributed, how, and by which model.

    Attributes:
        choices: with what the preset sets.
        look: with what the preset sets.
        preset: its name, for the command in the output.
        spec: of the model.
    """

    choices: Choices
    look: Look
    preset: str | None
    spec: TransformerSpec

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores beside the text."""
        choices = asdict(self.choices)
        deciding = {name: value for name, value in choices.items() if name != "batch_size"}
        return {**deciding, "model": self.spec.model, **self._model_options}

    def result(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        say: Callable[[str], None] = to_stderr,
    ) -> AttributionResult:
        """The attribution of one text.

        Args:
            model: that `spec` loads.
            tokenizer: of the model.
            text: of at least one token.
            say: is given what happens on the way.

        Raises:
            InputError: the text is too long for the model.
        """
        return attribute(
            model,
            tokenizer,
            text,
            self.choices,
            preset=self.preset,
            look=self.look,
            name=self.spec.model,
            model_options=self._model_options,
            say=say,
        )

    @property
    def _model_options(self) -> dict[str, Any]:
        """The options of the model that are not at their default, but for its name."""
        return {
            field.name: value
            for field in fields(self.spec)
            if field.name in WHAT_IS_LOADED[1:]
            and (value := getattr(self.spec, field.name)) != field.default
        }

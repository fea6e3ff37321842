"""What ``recover`` and ``invert`` return: prompts to read, to show, and to keep."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from torch import Tensor

from lightning_inversion import __version__
from lightning_inversion.transformer.tokens import decoded, token_text, token_texts
from lightning_inversion.verification.certificate import Certificate, TokenCertificate

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

SCHEMA = 1
"""Version of the keys of ``to_dict``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class RecoveredToken(TokenCertificate):
    """A token's certificate, its position and its text.

    Attributes:
        position: in the prompt, from 0.
        text: what the token decodes to there; the first of several tokens that make up one
            character has all of it. Without a tokenizer this and the other texts are None.
        rival_text: what ``rival`` decodes to.
        alternative_texts: what the ``alternatives`` decode to.
    """

    position: int
    text: str | None
    rival_text: str | None
    alternative_texts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        shown = f"id {self.id}" if self.text is None else repr(self.text)
        return f"{type(self).__name__}({self.position}: {shown}, {self.state})"

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; None for a number that is not finite."""
        return {name: _plain(value) for name, value in asdict(self).items()}


class _Shown:
    """What one prompt and several of them have in common."""

    @property
    def _prompts(self) -> Sequence[Recovered]:
        raise NotImplementedError

    @property
    def verified(self) -> bool:
        """Whether there is a token, and every token that was not given is verified."""
        tokens = [token for prompt in self._prompts for token in prompt.tokens]
        return all(prompt.tokens for prompt in self._prompts) and all(t.verified for t in tokens)

    @property
    def verified_count(self) -> str:
        """How many of the tokens that were not given are verified, as '5 of 6'."""
        tokens = [token.verified for prompt in self._prompts for token in prompt.tokens]
        return f"{sum(tokens)} of {len(tokens)}"

    def to_pandas(self) -> pd.DataFrame:
        """A row for each token, those that were given left out; ``prompt`` counts from 1."""
        import pandas as pd

        return pd.DataFrame(
            {"prompt": number, **token.to_dict()}
            for number, prompt in enumerate(self._prompts, start=1)
            for token in prompt.tokens
        )

    def to_html(self) -> str:
        """A page in one file: no script, nothing fetched, everything escaped."""
        from lightning_inversion.report.recovery_page import recovery_page

        return recovery_page([prompt.to_dict() for prompt in self._prompts])

    def _repr_html_(self) -> str:
        from lightning_inversion.report.recovery_page import recovery_fragment

        return recovery_fragment([prompt.to_dict() for prompt in self._prompts])


@dataclass(frozen=True, kw_only=True, repr=False)
class Recovered(_Shown):
    """One recovered prompt.

    Attributes:
        text: all tokens decoded; None without a tokenizer.
        tokens: those that were not given.
        certificate: what the states of the tokens rest on; ``verify`` checks it again.
        given_text: the text of the tokens that were given.
        seconds: wall time; prompts of one batch share it.
        order: the number of each token's row, where rows were in unknown order.
    """

    text: str | None
    tokens: tuple[RecoveredToken, ...]
    certificate: Certificate
    given_text: str | None = None
    seconds: float = 0.0
    order: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        tokens: Sequence[TokenCertificate],
        certificate: Certificate,
        tokenizer: PreTrainedTokenizerBase | None,
        seconds: float,
        **more: Any,
    ) -> Self:
        """The prompt of certificates, with the texts of its tokens."""
        ids, begin = certificate.ids, len(certificate.known)
        texts: Sequence[str | None] = [None] * len(ids)
        if tokenizer is not None:
            texts = token_texts(tokenizer, ids)

        def named(token: int) -> str | None:
            return None if tokenizer is None else token_text(tokenizer, token)

        return cls(
            text=None if tokenizer is None else decoded(tokenizer, ids),
            tokens=tuple(
                RecoveredToken(
                    **asdict(token),
                    position=position,
                    text=texts[position],
                    rival_text=None if token.rival is None else named(token.rival),
                    alternative_texts=tuple(
                        text for other in token.alternatives if (text := named(other)) is not None
                    ),
                )
                for position, token in enumerate(tokens, start=begin)
            ),
            certificate=certificate,
            given_text=None if tokenizer is None else "".join(map(str, texts[:begin])),
            seconds=seconds,
            **more,
        )

    @property
    def _prompts(self) -> Sequence[Recovered]:
        return (self,)

    @property
    def ids(self) -> list[int]:
        """All tokens of the prompt, those that were given among them."""
        return self.certificate.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        shown = "no text" if self.text is None else repr(self.text)
        return f"{type(self).__name__}({shown}, {self.verified_count} tokens verified)"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; the thresholds are in ``certificate.to_json()``."""
        return {
            "schema": SCHEMA,
            "text": self.text,
            "verified": self.verified,
            "ids": self.ids,
            "given": list(self.certificate.known),
            "given_text": self.given_text,
            "order": list(self.order),
            "tokens": [token.to_dict() for token in self.tokens],
            "transformer": self.certificate.transformer,
            "storage": self.certificate.storage,
            "seconds": round(self.seconds, 4),
            "version": __version__,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON; with indent None, one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=indent)


Kind = TypeVar("Kind", bound=Recovered)


class Recoveries(_Shown, tuple[Kind, ...], Generic[Kind]):
    """Recovered prompts, in the order of their hidden states."""

    @property
    def _prompts(self) -> Sequence[Recovered]:
        return self

    @property
    def texts(self) -> list[str | None]:
        """The text of each prompt."""
        return [prompt.text for prompt in self]

    def __repr__(self) -> str:
        prompts = "1 prompt" if len(self) == 1 else f"{len(self)} prompts"
        return f"{type(self).__name__}({prompts}, {self.verified_count} tokens verified)"

    def to_json(self, indent: int | None = 2) -> str:
        """A list with the ``to_dict`` of each prompt, as JSON."""
        found = [prompt.to_dict() for prompt in self]
        return json.dumps(found, ensure_ascii=False, allow_nan=False, indent=indent)


@dataclass(frozen=True, kw_only=True, repr=False)
class Inverted(Recovered):
    """One prompt that ``invert`` has read from an input that it optimised.

    Attributes:
        iterations: of the gradient; 0 where the initial values were right.
        distances: of the features to the target, one an iteration.
        values: ``[T, C]`` the learnable input in the end.
    """

    iterations: int
    distances: tuple[float, ...]
    values: Tensor

    def to_dict(self) -> dict[str, Any]:
        """As of any recovered prompt, with the iterations and distances."""
        more = {"iterations": self.iterations, "distances": list(map(_plain, self.distances))}
        return {**super().to_dict(), **more}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value

"""The evidence of a recovered token, and of a recovered text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class TokenCertificate:
    """What is known of one recovered token.

    Attributes:
        id: the token.
        verified: True where it reproduces the target behind the tokens before it, and no other
            candidate near it does.
        residual: its distance to the target, see ``Calibration``.
        threshold: the residual up to which a token is verified here.
        runner_up: the residual of the nearest other candidate that was tried, None where there was
            none.
        candidates: how many tokens were run for this place.
        order: which candidate order named it.
        seconds: wall time spent on this place; texts of one batch share their rounds.
        duplicates: other tokens with the same embedding: no hidden state can tell them
            apart.
        alternatives: the best candidates of an uncertified token, itself first.
    """

    id: int
    verified: bool
    residual: float
    threshold: float
    runner_up: float | None
    candidates: int
    order: str
    seconds: float
    duplicates: tuple[int, ...] = ()
    alternatives: tuple[int, ...] = ()

    @property
    def margin(self) -> float | None:
        """How many times the threshold the runner-up is away; None without either."""
        if self.runner_up is None or not self.threshold:
            return None
        return self.runner_up / self.threshold

    def instead(self, other: int, residual: float) -> TokenCertificate:
        """With another of its alternatives, which the rest of the text speaks for."""
        others = tuple(token for token in self.alternatives if token != other)
        return replace(self, id=other, residual=residual, alternatives=(other, *others))


@dataclass
class RecoveredPrompt:
    """One text, left to right.

    Attributes:
        tokens: one certificate a token, but for those known beforehand.
        known: tokens that were known beforehand.
        forwards: forwards of the truncated model that this text took part in.
        seconds: wall time until its last token.
    """

    tokens: list[TokenCertificate] = field(default_factory=list)
    known: tuple[int, ...] = ()
    forwards: int = 0
    seconds: float = 0.0

    @property
    def ids(self) -> list[int]:
        """The whole text's tokens."""
        return [*self.known, *(token.id for token in self.tokens)]

    @property
    def verified(self) -> bool:
        """Whether every token is."""
        return all(token.verified for token in self.tokens)

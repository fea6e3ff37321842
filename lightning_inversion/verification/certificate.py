"""``Certificate``: what was shown of one prompt, on which hypothesis, to be checked elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.files import check_of, write_whole
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.untrusted import read_file, read_json
from lightning_inversion.verification.calibration import CLEARANCE, Calibration
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.rivals import NearTokens
from lightning_inversion.verification.verifier import Verifier

FORMAT = 4
"""Version of the certificate's file."""

_SAME = (
    "layers", "features", "final_norm", "mlp", "norms", "residuals", "positions", "causal",
    "repeat_first",
)  # fmt: skip
"""What a model computes beside its weights, in its description."""

Rows = Literal["all", "last"]
"""Which hidden states of a prompt a policy reads."""
State = Literal["verified", "conditional", "group", "unresolved", "read"]
"""What is shown of a token: see ``TokenCertificate``."""


@dataclass(frozen=True)
class TokenCertificate:
    """One recovered token, and what running it has shown.

    Attributes:
        id: the token.
        state: ``verified``: it reproduces the target after the tokens before it, and no token that
            was compared comes near, or after each that does no token reproduces the next row.
            ``conditional``: the same, but a token before it is not verified. ``group``: others
            reproduce the target too. ``unresolved``: nothing is shown. ``read``: it was read off
            its row, and never run; see ``Reading``.
        residual: its distance to the target in std of each feature, see ``Calibration``.
        threshold: the residual up to which a token passes here.
        rival: the nearest other token that was compared, and not refuted; None without one.
        rival_residual: its residual.
        risk: a bound for the chance that another token is right, where the channel adds noise and
            the token is verified or conditional; None of others.
        compared: how many tokens were run at this position.
        proposer: which proposer named it.
        seconds: wall time spent at this position; prompts of one batch share their rounds.
        probability: of a token that was read, calibrated on other text; None of all others.
        alternatives: the best candidates of a token that is not verified, itself first; of a group
            its members.
        refuted: of a verified or conditional token those that reproduce its row too, and after
            which no token reproduces the next row.
    """

    id: int
    state: State
    residual: float
    threshold: float
    rival: int | None
    rival_residual: float | None
    compared: int
    proposer: str
    seconds: float
    risk: float | None = None
    probability: float | None = None
    alternatives: tuple[int, ...] = ()
    refuted: tuple[int, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether the token and all before it are verified."""
        return self.state == "verified"

    @property
    def margin(self) -> float | None:
        """How many times as far as the token its nearest rival is; None without a rival."""
        if self.rival_residual is None:
            return None
        return self.rival_residual / max(self.residual, 1e-9)

    def after(self, verified: bool) -> TokenCertificate:
        """The certificate after tokens that are all verified, or not."""
        if self.state not in ("verified", "conditional"):
            return self
        return replace(self, state="verified" if verified else "conditional")

    def decided(
        self, refuted: tuple[int, ...], rival: int | None, rival_residual: float | None
    ) -> TokenCertificate:
        """The certificate of a group's token whose other members the next row refutes."""
        return replace(
            self, state="conditional", refuted=refuted, rival=rival, rival_residual=rival_residual,
            alternatives=(),
        )  # fmt: skip

    def replaced_by(self, other: int, residual: float) -> TokenCertificate:
        """The certificate of another alternative, which the rest of the prompt supports."""
        others = tuple(token for token in self.alternatives if token != other)
        return replace(self, id=other, residual=residual, alternatives=(other, *others))


@dataclass(frozen=True)
class Certificate:
    """What was shown of the tokens of one prompt, and what that rests on.

    The hypothesis: these weights, this depth, this channel, and the tokens that were given. Each
    token's own hypothesis is the tokens before it.

    Attributes:
        transformer: ``TruncatedTransformer.description``, with the hash of the weights.
        storage: what has happened to the hidden states since.
        known: tokens that were given.
        tokens: a certificate for each other token.
        calibration: the thresholds, measured for this hypothesis; see ``Calibration``.
        rows: which hidden states the tokens were compared with: each token's own, or the last
            position's alone (see ``LastPosition``), which then is that of the whole text.
    """

    transformer: dict[str, Any]
    storage: dict[str, Any]
    known: tuple[int, ...]
    tokens: tuple[TokenCertificate, ...]
    calibration: Calibration
    rows: Rows = "all"

    @classmethod
    def of(
        cls,
        known: tuple[int, ...],
        tokens: Sequence[TokenCertificate],
        measurements: Measurements,
        storage: Mapping[str, Any],
        rows: Rows = "all",
    ) -> Certificate:
        """The certificate of a prompt of known and recovered tokens."""
        return cls(
            dict(measurements.transformer.description), dict(storage), known, tuple(tokens),
            measurements.calibration, rows,
        )  # fmt: skip

    @property
    def ids(self) -> list[int]:
        """All tokens of the prompt."""
        return [*self.known, *(token.id for token in self.tokens)]

    def check(self, transformer: TruncatedTransformer, hidden_states: Tensor) -> CertificateCheck:
        """Run the tokens again in one forward, and the tokens that are near to them in another.

        Where the next row refutes tokens, two forwards more show it again. Nothing is searched, and
        nothing is measured again. The thresholds are the certificate's. Of a token that was
        compared with the whole vocabulary, the tokens near to it, the nearest rival and those that
        were refuted are run again; that no other one is nearer rests on the certificate.

        Args:
            transformer: the same model, at the same depth, on any machine.
            hidden_states: ``[T, F]`` of the prompt, in float32.

        Raises:
            InputError: it is another model, or another number of rows or features.
        """
        for key, value in self.transformer.items():
            own = transformer.description.get(key)
            if key == "weights_sha256" and own != value:
                raise InputError("The certificate was written for a model of other weights.")
            if key in _SAME and own != value:
                raise InputError(
                    f"The certificate was written for {key} {value}, and the model has {own}."
                )
        shape = [len(self.ids), transformer.feature_size]
        if self.rows == "last" and hidden_states.dim() == 2:
            return self._check_last(transformer, hidden_states[-1:])
        if list(hidden_states.shape) != shape:
            raise InputError(
                f"The certificate is for hidden states of shape {shape}, and these have "
                f"{list(hidden_states.shape)}."
            )
        vocabulary = transformer.embedding.vocabulary_size
        rivals = {
            (0, position): [*([] if token.rival is None else [token.rival]), *token.refuted]
            for position, token in enumerate(self.tokens, start=len(self.known))
            if token.compared >= vocabulary and (token.rival is not None or token.refuted)
        }
        near = NearTokens.at(self.calibration, transformer.embedding)
        verifier = Verifier(self.calibration, near, vocabulary, transformer.causal)
        ids = torch.tensor([self.ids], device=transformer.device)
        verdict = verifier.verify(
            ids,
            hidden_states[None].to(transformer.device),
            torch.ones_like(ids, dtype=torch.bool),
            transformer.features_of,
            rivals=rivals,
        )
        begin = len(self.known)
        reproduced = verdict.alone[0, begin:].tolist()
        return CertificateCheck(
            tuple(token.state for token in self.tokens),
            tuple(reproduced),
            tuple(verdict.residuals[0, begin:].tolist()),
        )

    @torch.no_grad()
    def _check_last(self, transformer: TruncatedTransformer, row: Tensor) -> CertificateCheck:
        """Run the text, and for each token its rival in its place, against the last row [1, F]."""
        begin, position = len(self.known), torch.tensor([len(self.ids) - 1])
        texts = torch.tensor(self.ids, device=transformer.device).repeat(1 + len(self.tokens), 1)
        for number, token in enumerate(self.tokens):
            texts[1 + number, begin + number] = token.id if token.rival is None else token.rival
        features = transformer.features_of(texts)[:, -1]
        at = position.to(features.device)
        residuals = self.calibration.residual(features, row.to(features), at.expand(len(features)))
        passes = bool(self.calibration.passes(residuals[:1], at))
        apart = (residuals[1:] >= CLEARANCE * residuals[0]).tolist()
        return CertificateCheck(
            tuple(token.state for token in self.tokens),
            tuple(passes and far for far in apart),
            (float(residuals[0]),) * len(self.tokens),
        )

    # -- files -------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The certificate as JSON, with every number of its thresholds."""
        calibration = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in vars(self.calibration).items()
        }
        return json.dumps(
            {
                "format": FORMAT,
                "transformer": self.transformer,
                "storage": self.storage,
                "known": self.known,
                "tokens": [asdict(token) for token in self.tokens],
                "calibration": calibration,
                "rows": self.rows,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what ``to_json`` wrote.

        Raises:
            InputError: it is no certificate.
        """
        try:
            found = read_json(text)
            if found["format"] != FORMAT:
                raise ValueError(f"it has format {found['format']!r}, and {FORMAT} is read")
            stored = found["calibration"]
            if stored["power"] not in (1, 2) or type(stored["features"]) is not int:
                raise ValueError("its calibration has another power than 1 or 2, or no features")
            parts: dict[str, Any] = {
                f.name: stored[f.name] if f.type == "int" else torch.tensor(stored[f.name])
                for f in fields(Calibration)
            }
            tokens = tuple(_token(one) for one in found["tokens"])
            known = tuple(int(id) for id in found["known"])
            rows = found.get("rows", "all")
            if rows not in get_args(Rows):
                raise ValueError(f"it is of the rows {rows!r}")
            return cls(
                dict(found["transformer"]), dict(found["storage"]), known, tokens,
                Calibration(**parts), rows,
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is no certificate: {error}.") from error

    def write(self, path: Path) -> None:
        """Write the certificate's JSON, whole or not at all."""
        write_whole(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: Path) -> Certificate:
        """Read a certificate's file.

        Raises:
            InputError: the file cannot be read, or is no certificate.
        """
        try:
            return cls.from_json(read_file(path).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}.") from error


@dataclass(frozen=True)
class CertificateCheck:
    """What running the tokens of a certificate again has shown; true where it holds.

    Attributes:
        states: what the certificate claims of each token.
        reproduced: whether each token reproduces its row now, and no token that was run with it
            does; see ``Certificate.check``.
        residuals: of each token now.
    """

    states: tuple[State, ...]
    reproduced: tuple[bool, ...]
    residuals: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether each token that the certificate calls verified or conditional is reproduced."""
        return all(
            again or state not in ("verified", "conditional")
            for state, again in zip(self.states, self.reproduced, strict=True)
        )

    def __bool__(self) -> bool:
        return self.holds


def _token(stored: Any) -> TokenCertificate:
    types = get_type_hints(TokenCertificate)
    for key, value in stored.items():
        if key in ("alternatives", "refuted"):
            if not all(type(id) is int for id in value):
                raise ValueError(f"a token's {key} are no ids")
        elif key == "state":
            if value not in get_args(State):
                raise ValueError(f"a token has the unknown state {value!r}")
        elif not check_of(types[key])(value):
            raise ValueError(f"a token has a {key} of the wrong type")
    ids = {key: tuple(stored[key]) for key in ("alternatives", "refuted")}
    return TokenCertificate(**{**stored, **ids})

"""``read_certificates``: the certificates of a ``predict``, to be checked on another machine."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from lightning_inversion.errors import InputError
from lightning_inversion.results import CERTIFICATE, FILE, ResultRow, read_rows
from lightning_inversion.verification.certificate import Certificate, TokenCertificate


def read_certificates(folder: str | Path) -> dict[int, Certificate]:
    """The certificates of a run of ``predict``, by the number of the prompt, from 0.

    ``verify`` checks each with the prompt's hidden states. Prompts of which nothing was recovered
    have none. Residuals have the digits of the rows.

    Args:
        folder: of the run, with ``results.jsonl`` and ``certificate.json``.

    Raises:
        InputError: the folder is not of such a run.
    """
    folder = Path(folder)
    if not (folder / CERTIFICATE).exists():
        raise InputError(
            f"folder {str(folder)!r} has no {CERTIFICATE}; give the folder of a run of predict."
        )
    shared = Certificate.read(folder / CERTIFICATE)
    return {
        row.index: replace(
            shared, known=tuple(row.recovered_ids[: row.known_tokens]), tokens=_tokens(row)
        )
        for row in read_rows(folder / FILE)
        if row.recovered_ids
    }


def _tokens(row: ResultRow) -> tuple[TokenCertificate, ...]:
    def token(at: int) -> TokenCertificate:
        residual, threshold, margin = row.token_residuals[at], row.thresholds[at], row.margins[at]
        residual = math.inf if residual is None else residual
        return TokenCertificate(
            id=row.recovered_ids[at],
            state=row.token_states[at],  # type: ignore[arg-type]  # a row was checked when written
            residual=residual,
            threshold=math.inf if threshold is None else threshold,
            rival=row.rivals[at],
            rival_residual=None if margin is None else margin * max(residual, 1e-9),
            compared=row.candidates[at],
            proposer=row.proposers[at],
            seconds=row.token_seconds[at],
            risk=row.risks[at],
            probability=row.probabilities[at],
            alternatives=tuple(row.alternatives[at]),
            refuted=tuple(row.refuted[at]),
        )

    return tuple(token(at) for at in range(row.known_tokens, len(row.recovered_ids)))

"""Rows after a prefix that is not known: each is read by itself, and nothing can be verified.

A server with a prefix cache stores such rows, and so does one that adds a system prompt. The search
cannot begin, as every row depends on the tokens before it. The linear probe needs none of them: it
was fitted on many contexts. Read tokens have the state ``read`` and a probability.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_inversion.errors import InputError
from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.proposers.proposals import mix_with_uniform
from lightning_inversion.recovery.policy import (
    ALTERNATIVES,
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
)
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import Beams, LanguageModel
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.verification.certificate import TokenCertificate
from lightning_inversion.verification.measurements import Measurements

_TEMPERATURES = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
_SHARES = (1e-4, 1e-3, 1e-2, 0.03, 0.1)
_HELD_OUT = 0.25
"""Share of the model's own text that a second probe is not fitted on."""
_POSITIONS = 512
"""Positions of that text on which probabilities are calibrated."""
_PRIOR_SHARE = 0.05
"""Share of the language model's probability that is given evenly to all tokens."""


@dataclass(frozen=True)
class ReadingScale:
    """What makes the probe's log-likelihoods probabilities, for rows that it was not fitted on.

    Attributes:
        temperature: by which they are multiplied.
        share: of the probability that all tokens get evenly.
        temperature_beside_prior: the same, where the language model's probabilities are added.
        share_beside_prior: the same.
    """

    temperature: float
    share: float
    temperature_beside_prior: float
    share_beside_prior: float

    @classmethod
    def kept(cls, measurements: Measurements) -> ReadingScale:
        """Read them from the cache folder, or measure them once.

        They depend on the text, without which there is no prior, and on noise, as the probe does.
        """
        of = measurements.probe.matrix, measurements.text
        return measurements.kept(cls, lambda: cls.of(measurements), *of)

    @classmethod
    @torch.no_grad()
    def of(cls, measurements: Measurements) -> ReadingScale:
        """Measure them on the model's own text, or on random tokens, by a probe fitted on others.

        The temperature and the share are those under which the right tokens are likeliest.
        """
        transformer, text = measurements.transformer, measurements.text
        channel = measurements.channel
        noise = 0.0 if channel is None else channel.noise
        drawn = torch.Generator().manual_seed(11)
        if text is None:
            generator = torch.Generator().manual_seed(6)
            size = (64, 16)
            text = torch.randint(transformer.embedding.vocabulary_size, size, generator=generator)
        held = max(1, round(_HELD_OUT * len(text)))
        fitted = None if measurements.text is None else text[:-held]
        probe = measurements.probe_of(fitted)
        ranking = ProbeRanking(replace(measurements, probe=probe))
        grid = [(t, share) for t in _TEMPERATURES for share in _SHARES]
        alone, beside = torch.zeros(2, len(grid), dtype=torch.float64)
        rows = max(1, min(held, -(-_POSITIONS // (text.shape[1] - 1))))
        for ids in text[-rows:, None].to(transformer.device):
            features = transformer.features_of(ids)[0, 1:]
            if channel is not None:
                added = noise * torch.randn(features.shape, generator=drawn).to(features)
                features = channel.without_noise(features + added)
            prior = None
            if measurements.language_model is not None:
                prior = _prior(measurements.language_model.log_probabilities(ids)[0, :-1])
            right = ids[0, 1:, None]
            likelihood = _likelihood(ranking, probe, features)
            for number, (temperature, share) in enumerate(grid):
                chances = _scaled(likelihood, temperature, share)
                alone[number] += chances.gather(1, right).sum().cpu()
                if prior is not None:
                    together = (chances + prior).log_softmax(-1)
                    beside[number] += together.gather(1, right).sum().cpu()
        return cls(*grid[int(alone.argmax())], *grid[int(beside.argmax())])


class Reading(RecoveryPolicy):
    """Names the token of each row without those before it, by the linear probe; verifies nothing.

    For rows after a prefix that is not known. The probability of a token is calibrated on text of
    the model's own.

    Args:
        beams: sequences that are kept while the language model's probabilities, given the rows'
            own tokens alone, are added; 0 reads every row by itself.
    """

    needs_first_position = False

    def __init__(self, beams: int = 8) -> None:
        if beams < 0:
            raise InputError(f"--model.recovery: beams must be 0 or more, and is {beams}.")
        self.beams = beams
        self.needs_language_model = beams > 0

    def recover(
        self, measurements: Measurements, targets: Targets
    ) -> Iterator[list[RecoveredPrompt]]:
        """Read B prompts; see ``RecoveryPolicy``. Rows of known tokens are left out."""
        scale = ReadingScale.kept(measurements)
        ranking = measurements.derived(ProbeRanking)
        prompts = [RecoveredPrompt(known=targets.known) for _ in targets.lengths]
        given = len(targets.known)
        for prompt, rows, length in zip(prompts, targets.features, targets.lengths, strict=True):
            began = time.monotonic()
            likelihood = _likelihood(ranking, measurements.probe, rows[given:length])
            if self.beams and measurements.language_model is not None:
                temperature, share = scale.temperature_beside_prior, scale.share_beside_prior
                chances = _scaled(likelihood, temperature, share)
                ids, chances = beam_search(measurements.language_model, chances, self.beams)
            else:
                chances = _scaled(likelihood, scale.temperature, scale.share)
                ids = best_tokens(chances, 1).indices[:, 0]
            seconds = (time.monotonic() - began) / max(1, len(ids))
            prompt.tokens = [self._read(*one, seconds) for one in zip(ids, chances, strict=True)]
            prompt.seconds = time.monotonic() - began
            yield prompts
        yield prompts

    def _read(self, token: Tensor, chances: Tensor, seconds: float) -> TokenCertificate:
        best = best_tokens(chances[None], min(1 + ALTERNATIVES, len(chances))).indices[0]
        own = int(token)
        others = [other for other in best.tolist() if other != own][:ALTERNATIVES]
        return TokenCertificate(
            id=own,
            state="read",
            residual=float("inf"),
            threshold=0.0,
            rival=None,
            rival_residual=None,
            compared=0,
            proposer=self.name,
            seconds=seconds,
            probability=float(chances[own].exp()),
            alternatives=(own, *others),
        )


@torch.no_grad()
def beam_search(
    language_model: LanguageModel, chances: Tensor, beams: int
) -> tuple[Tensor, Tensor]:
    """The likeliest sequence under the probe and a language model together.

    Args:
        language_model: gives the probability of each token after those of the same sequence.
        chances: ``[T, V]`` log-probabilities of each position by itself.
        beams: sequences kept.

    Returns:
        ids ``[T]``, and log-probabilities ``[T, V]`` of each position after the tokens before it.
    """
    V, branches = chances.shape[1], Beams(language_model)
    total, after = chances.new_zeros(1), chances.new_zeros(1, V)
    found: list[Tensor] = []  # [beams, V] of each position so far, in the order of the beams
    for own in chances:
        together = own + after
        best = (total[:, None] + together).flatten().topk(min(beams, together.numel()))
        parents, tokens = best.indices // V, best.indices % V
        total = best.values
        found = [one[parents] for one in [*found, together.log_softmax(-1)]]
        after = _prior(branches.extend(parents, tokens))
    ids = branches.ids[0]
    return ids, torch.stack([one[0] for one in found])


def _likelihood(ranking: ProbeRanking, probe: LinearProbe, rows: Tensor) -> Tensor:
    """Log-likelihood ``[T, V]`` of each token for rows ``[T, F]`` of later positions."""
    later = torch.ones(len(rows), dtype=torch.long, device=rows.device)
    return ranking.likelihood(probe(rows, later), later)


def _scaled(likelihood: Tensor, temperature: float, share: float) -> Tensor:
    return mix_with_uniform((temperature * likelihood).log_softmax(-1), share)


def _prior(log_probabilities: Tensor) -> Tensor:
    return mix_with_uniform(log_probabilities, _PRIOR_SHARE)

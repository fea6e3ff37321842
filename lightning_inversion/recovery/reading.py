"""Rows after a prefix that is not known: each is read by itself, and nothing can be verified.

A server with a prefix cache stores such rows, and so does one that adds a system prompt. The search
cannot begin, as every row depends on the tokens before it. The linear probe needs none of them: it
was fitted on many contexts. Read tokens have the state ``read`` and a probability.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_inversion.errors import InputError
from lightning_inversion.progress import counted
from lightning_inversion.proposers.probe_proposer import ProbeRanking
from lightning_inversion.proposers.proposals import mix_with_uniform
from lightning_inversion.recovery.policy import (
    ALTERNATIVES,
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
)
from lightning_inversion.transformer.blocks import most_positions
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import Beams, LanguageModel
from lightning_inversion.transformer.linear_probe import LinearProbe
from lightning_inversion.verification.certificate import TokenCertificate
from lightning_inversion.verification.measurements import Measurements

_log = logging.getLogger(__name__)
_TEMPERATURES = (2.0, 1.4, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01)
_SHARES = (1e-4, 1e-3, 1e-2, 0.03, 0.1)
_HELD_OUT = 0.25
"""Share of the model's own text that a second probe is not fitted on."""
_PIECE = 20
"""Tokens of a piece of it that are read together, at most."""
_RANDOM = 12, 48
"""Rows and tokens of random text, where there is none of the model's own."""
_PRIOR_SHARE = 0.05
"""Share of the language model's probability that is given evenly to all tokens."""
_LEAST = 1e-3
"""Chances nearer to 0 or 1 count as this far from it."""


@dataclass(frozen=True)
class ReadingScale:
    """What makes the probe's log-likelihoods probabilities, for rows that it was not fitted on.

    The chance of a token after the tokens that were read before it is too high where those are
    wrong, and too low where the rows after it speak for it. So a logistic regression on how often
    tokens are right gives their probability.

    Attributes:
        temperature: by which log-likelihoods are multiplied.
        share: of the probability that all tokens get evenly.
        slope: the weight of the logit of a token's chance in the regression.
        slope_alone: the weight of the logit of its chance by the probe alone.
        slope_of_mean: the weight of the mean log-chance of the tokens that were read together.
        offset: what is added.
    """

    temperature: float
    share: float
    slope: float = 1.0
    slope_alone: float = 0.0
    slope_of_mean: float = 0.0
    offset: float = 0.0

    @classmethod
    def kept(cls, measurements: Measurements, beams: int) -> ReadingScale:
        """Read it from the cache folder, or measure it once.

        It depends on the text, without which there is no prior, on what has happened to the
        features, and on the sequences that are kept.
        """
        channel = torch.tensor([*repr(measurements.channel).encode()])
        of = measurements.probe.matrix, measurements.text, channel, torch.tensor(beams)

        def measure() -> ReadingScale:
            _log.info("calibrating the probabilities of tokens that are read ...")
            return cls.of(measurements, beams)

        return measurements.kept(cls, measure, *of)

    @classmethod
    @torch.no_grad()
    def of(cls, measurements: Measurements, beams: int) -> ReadingScale:
        """Measure it on text that a second probe was not fitted on, after other text.

        The temperature and the share are those under which the right tokens are likeliest.
        """
        language_model = measurements.language_model if beams else None
        held_out = list(_held_out(measurements, mixed=language_model is not None))
        grid = [(t, share) for t in _TEMPERATURES for share in _SHARES]
        scores = torch.stack([_scores(*one, language_model) for one in held_out]).sum(0)
        plain = cls(*grid[int(scores.argmax())])
        evidence, right = [], []
        for likelihood, ids in counted(held_out, "calibrating"):
            read = plain.read(likelihood, language_model, beams)
            evidence.append(read.evidence)
            right.append(read.ids == ids)
        weights = _logistic(torch.cat(evidence), torch.cat(right), plain.weights)
        return cls(plain.temperature, plain.share, *weights)

    @property
    def weights(self) -> list[float]:
        """Of the columns of ``ReadTokens.evidence``."""
        return [self.slope, self.slope_alone, self.slope_of_mean, self.offset]

    def read(
        self, likelihood: Tensor, language_model: LanguageModel | None, beams: int
    ) -> ReadTokens:
        """The likeliest tokens for a likelihood ``[T, V]`` of the probe.

        Args:
            likelihood: of each token in each row.
            language_model: whose probabilities are added; None reads each row by itself.
            beams: sequences kept.
        """
        alone = chances = _scaled(likelihood, self.temperature, self.share)
        if language_model is None:
            ids = best_tokens(chances, 1).indices[:, 0]
        else:
            ids, chances = beam_search(language_model, chances, beams)
        own, by_probe = (some.gather(1, ids[:, None])[:, 0] for some in (chances, alone))
        columns = [own.exp().logit(_LEAST), by_probe.exp().logit(_LEAST)]
        columns += [own.mean().expand(len(own)), torch.ones_like(own)]
        evidence = torch.stack(columns, dim=1)
        right = (evidence @ evidence.new_tensor(self.weights)).sigmoid()
        return ReadTokens(ids, chances, evidence, right)


@dataclass(frozen=True)
class ReadTokens:
    """The tokens that are read in T rows.

    Attributes:
        ids: ``[T]``.
        chances: ``[T, V]`` log-chances in each row, after the tokens that were read before it.
        evidence: ``[T, 4]`` for each token that was read, see ``ReadingScale``.
        right: ``[T]`` the probability that it is right.
    """

    ids: Tensor
    chances: Tensor
    evidence: Tensor
    right: Tensor


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
        language_model = measurements.language_model if self.beams else None
        beams = 0 if language_model is None else self.beams
        scale = ReadingScale.kept(measurements, beams)
        ranking = measurements.derived(ProbeRanking)
        prompts = [RecoveredPrompt(known=targets.known) for _ in targets.lengths]
        given = len(targets.known)
        for prompt, rows, length in zip(prompts, targets.features, targets.lengths, strict=True):
            began = time.monotonic()
            likelihood = _likelihood(ranking, measurements.probe, rows[given:length])
            read = scale.read(likelihood, language_model, beams)
            seconds = (time.monotonic() - began) / max(1, len(read.ids))
            each = zip(read.ids, read.chances, read.right.tolist(), strict=True)
            prompt.tokens = [self._read(*one, seconds) for one in each]
            prompt.seconds = time.monotonic() - began
            yield prompts
        yield prompts

    def _read(
        self, token: Tensor, chances: Tensor, right: float, seconds: float
    ) -> TokenCertificate:
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
            probability=right,
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
    steps: list[tuple[Tensor, Tensor]] = []  # log-scores [beams, V], and the parents of the best
    for own in chances:
        together = own + after
        best = (total[:, None] + together).flatten().topk(min(beams, together.numel()))
        parents, tokens = best.indices // V, best.indices % V
        total = best.values
        steps.append((together, parents))
        after = _prior(branches.extend(parents, tokens))
    beam, found = 0, []
    for together, parents in reversed(steps):
        beam = int(parents[beam])
        found.append(together[beam].log_softmax(-1))
    return branches.ids[0], torch.stack(found[::-1])


def _held_out(measurements: Measurements, mixed: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Likelihood ``[T, V]`` and ids ``[T]`` of text that comes after the beginning of another.

    The probe that reads it was not fitted on it. It is random where there is no text of the model's
    own.

    Args:
        measurements: of the model.
        mixed: a quarter is random tokens, which show what a language model is worth on text that is
            unlike its own.
    """
    transformer, channel = measurements.transformer, measurements.channel
    generator = torch.Generator().manual_seed(6)
    fitted, own = measurements.text, None
    rows, length = _RANDOM
    if fitted is None:
        length = min(length, most_positions(transformer.model.config) or length)
    else:
        rows, length = max(1, round(_HELD_OUT * len(fitted))), fitted.shape[1]
        fitted, own = fitted[:-rows], fitted[-rows:].cpu()
    held = torch.randint(transformer.embedding.vocabulary_size, (rows, length), generator=generator)
    if own is not None:
        held = torch.where((torch.arange(rows) % 4 < 3)[:, None], own, held) if mixed else own
    probe = measurements.probe_of(fitted)
    ranking = ProbeRanking(replace(measurements, probe=probe))
    half = held.shape[1] // 2
    pieces = held[:, : 2 * half].reshape(-1, half)
    for before, piece in zip(held.repeat_interleave(2, 0).roll(2, 0), pieces, strict=True):
        length = int(torch.randint(1, half + 1, (), generator=generator))
        ids = torch.cat([before[:length], piece[:_PIECE]]).to(transformer.device)
        features = transformer.features_of(ids[None])[0, length:]
        if channel is not None:
            features = channel(features, generator)
        yield _likelihood(ranking, probe, features), ids[length:]


def _scores(likelihood: Tensor, ids: Tensor, language_model: LanguageModel | None) -> Tensor:
    """``[temperatures * shares]`` the log-chance of right tokens ``[T]`` under each of them."""
    V = likelihood.shape[1]
    prior = torch.full_like(likelihood, 1 / V)
    if language_model is not None:
        prior[1:] = _prior(language_model.log_probabilities(ids[None])[0, :-1]).exp()
    shares = torch.tensor(_SHARES, device=likelihood.device)
    found = []
    for temperature in _TEMPERATURES:
        chances = (temperature * likelihood).softmax(-1)
        right, all_tokens = chances.gather(1, ids[:, None]), (chances * prior).sum(-1, keepdim=True)
        right, all_tokens = ((1 - shares) * one + shares / V for one in (right, all_tokens))
        found.append((right.log() - all_tokens.log()).sum(0))
    return torch.cat(found)


def _logistic(evidence: Tensor, right: Tensor, plain: list[float]) -> list[float]:
    """Weights of evidence ``[N, 4]`` under which tokens are as often right as they are likely.

    They are drawn towards ``plain`` ones, with which chances stay as they are.
    """
    x, y = evidence.double(), right.double()
    drawn_to = x.new_tensor(plain)
    weights = drawn_to.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        errors = binary_cross_entropy_with_logits(x @ weights, y, reduction="sum")
        total = errors + (weights - drawn_to).square().sum() / 2
        (weights.grad,) = torch.autograd.grad(total, weights)
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    found: list[float] = weights.tolist()
    return found


def _likelihood(ranking: ProbeRanking, probe: LinearProbe, rows: Tensor) -> Tensor:
    """Log-likelihood ``[T, V]`` of each token for rows ``[T, F]`` of later positions."""
    later = torch.ones(len(rows), dtype=torch.long, device=rows.device)
    return ranking.likelihood(probe(rows, later), later)


def _scaled(likelihood: Tensor, temperature: float, share: float) -> Tensor:
    return mix_with_uniform((temperature * likelihood).log_softmax(-1), share)


def _prior(log_probabilities: Tensor) -> Tensor:
    return mix_with_uniform(log_probabilities, _PRIOR_SHARE)

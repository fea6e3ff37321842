"""SIPIT as published (Nikolaou et al. 2025, arXiv 2510.15511), to measure others against."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_inversion.errors import InputError
from lightning_inversion.recovery.policy import (
    ALTERNATIVES,
    RecoveredPrompt,
    RecoveryPolicy,
    Targets,
)
from lightning_inversion.verification.certificate import State, TokenCertificate
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.verifier import Verifier

_RESET_EVERY = 50
_FIRST_RATE, _LAST_RATE = 1.0, 0.01


class SIPIT(RecoveryPolicy):
    """One prompt at a time, one token at a time: the untested row nearest to a descending proxy.

    A proxy starts at the embedding of a random token. Each iteration runs the whole prefix twice,
    with the proxy after it, forward and backward, and with one token; if that token does not
    reproduce the target, the proxy takes a step of SGD on the mean squared error (the gradient
    clipped to norm 1, the rate falling from 1 to 0.01 over 50 iterations), and the nearest untested
    token is next. Every 50 iterations the proxy is set onto it. Nothing is kept between forwards.

    The clipping, and the rate that stays low after 50 iterations, are those of a public copy of the
    code, not of the paper. That copy compares with targets made prefix by prefix. A target from one
    forward over the prompt is rounded differently: at blocks 15 and 30 of SmolLM2-135M the
    published tolerance refuses right tokens.

    Args:
        tolerance: the largest absolute difference of a feature, beside 1e-5 of its size, at which a
            token is accepted; null for the calibrated threshold.
        budget: tokens tried for a position before it is left unresolved with its best candidate;
            null tries the whole vocabulary.
        deadline: seconds after which each position that is left gets a single try; null for none.
        seed: of the random starts.
    """

    def __init__(
        self,
        tolerance: float | None = 1e-5,
        budget: int | None = None,
        deadline: float | None = None,
        seed: int = 0,
    ) -> None:
        if budget is not None and budget < 1:
            raise InputError(f"--model.recovery: budget must be at least 1, and is {budget}.")
        if min(tolerance or 0.0, deadline or 0.0) < 0:
            raise InputError(
                "--model.recovery: tolerance and deadline must not be negative; they are "
                f"{tolerance} and {deadline}."
            )
        self.tolerance, self.budget, self.deadline, self.seed = tolerance, budget, deadline, seed

    def recover(
        self, measurements: Measurements, targets: Targets
    ) -> Iterator[list[RecoveredPrompt]]:
        """Recover B prompts, one after the other; a round is one candidate."""
        began = time.monotonic()
        generator = torch.Generator().manual_seed(self.seed)
        prompts = [RecoveredPrompt(known=targets.known) for _ in targets.lengths]
        limit = measurements.transformer.embedding.vocabulary_size
        limit = min(self.budget or limit, limit)
        for prompt, features, length in zip(
            prompts, targets.features, targets.lengths, strict=True
        ):
            for position in range(len(targets.known), length):
                search = _Position(
                    self.tolerance, measurements, features[position], prompt, generator
                )
                while True:
                    search.iterate()
                    late = self.deadline is not None and time.monotonic() - began > self.deadline
                    if search.accepted or len(search.tried) >= limit or late or search.diverged:
                        break
                    yield prompts
                prompt.tokens.append(search.certificate().after(prompt.verified))
                prompt.seconds = time.monotonic() - began
                yield prompts
        yield prompts


class _Position:
    """The search for one token after a prefix."""

    def __init__(
        self,
        tolerance: float | None,
        measurements: Measurements,
        target: Tensor,
        prompt: RecoveredPrompt,
        generator: torch.Generator,
    ) -> None:
        self.verifier = measurements.derived(Verifier)
        self.transformer, self.calibration = measurements.transformer, measurements.calibration
        self.tolerance, self.target, self.prompt = tolerance, target, prompt
        embedding = self.transformer.embedding
        self.prefix = torch.tensor([prompt.ids], dtype=torch.long, device=target.device)
        self.position = torch.tensor(self.prefix.shape[1], device=target.device)
        self.candidate = int(torch.randint(embedding.vocabulary_size, (), generator=generator))
        self.proxy = self._vector(self.candidate)
        self.tried: list[int] = []
        self.best: list[tuple[float, int]] = []
        self.accepted = self.diverged = False
        self.began = time.monotonic()

    @torch.no_grad()
    def iterate(self) -> None:
        """Try the candidate; if it fails, move the proxy and choose the next."""
        gradient = self._gradient()
        features = self._features(self._vector(self.candidate))
        self.prompt.forwards += 2
        self.residual = self._residual(features)
        self.tried.append(self.candidate)
        self.best = sorted([*self.best, (self.residual, self.candidate)])[: 1 + ALTERNATIVES]
        if self._accepts(features):
            self.accepted = True
            return
        self.diverged = not bool(gradient.isfinite().all())
        done = len(self.tried)
        share = min(1.0, (done - 1) / _RESET_EVERY)
        rate = _FIRST_RATE + share * (_LAST_RATE - _FIRST_RATE)
        self.proxy = self.proxy - rate * gradient / gradient.norm().clamp_min(1.0)
        self.candidate = self._nearest_untried()
        if done % _RESET_EVERY == 0:
            self.proxy = self._vector(self.candidate)

    def certificate(self) -> TokenCertificate:
        """What was found. Verified is what passes SIPIT's own test and ours."""
        residual, token = (self.residual, self.candidate) if self.accepted else self.best[0]
        compared = {run: far for far, run in self.best}
        if self.accepted:
            compared.update(self._near(token))
        ids, residuals = list(compared), list(compared.values())
        judged = self.verifier.judge(
            self.prefix.new_tensor([ids]),
            self.target.new_tensor([residuals]),
            self.position[None],
            self.target[None],
        )
        state: State = "unresolved"
        if self.accepted and bool(judged.group[0]):
            state = "group"
        elif self.accepted and bool(judged.verified[0]) and ids[int(judged.best[0])] == token:
            state = "verified"
        others = sorted((far, run) for run, far in compared.items() if run != token)[:ALTERNATIVES]
        return TokenCertificate(
            id=token,
            state=state,
            residual=residual,
            threshold=float(self.calibration.limit(self.position)),
            rival=others[0][1] if others else None,
            rival_residual=others[0][0] if others else None,
            compared=len(set(self.tried) | set(ids)),
            proposer=SIPIT.__name__,
            seconds=time.monotonic() - self.began,
            alternatives=() if state == "verified" else (token, *(run for _, run in others)),
        )

    @torch.no_grad()
    def _near(self, token: int) -> dict[int, float]:
        """Residuals of the tokens near a token."""
        residual = self.target.new_tensor(self.residual)
        within = self.calibration.within(residual, self.position, self.verifier.vocabulary)
        near, _ = self.verifier.near.of_token(token, float(within))
        return {
            other: self._residual(self._features(self._vector(other))) for other in near.tolist()
        }

    def _residual(self, features: Tensor) -> float:
        return float(self.calibration.residual(features, self.target, self.position))

    def _gradient(self) -> Tensor:
        with torch.enable_grad():
            leaf = self.proxy.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(mse_loss(self._features(leaf), self.target), leaf)
        return gradient

    def _features(self, vector: Tensor) -> Tensor:
        embeds = torch.cat([self.transformer.embedding(self.prefix), vector[None, None]], dim=1)
        features: Tensor = self.transformer(embeds)
        return features[0, -1]

    def _vector(self, token: int) -> Tensor:
        vectors: Tensor = self.transformer.embedding(
            torch.tensor([token], device=self.target.device)
        )
        return vectors[0]

    def _nearest_untried(self) -> int:
        nearness = self.transformer.embedding.nearness(self.proxy)
        nearness[self.tried] = -torch.inf
        return int(nearness.argmax())

    def _accepts(self, features: Tensor) -> bool:
        if self.tolerance is None:
            return bool(self.calibration.passes(torch.tensor(self.residual), self.position))
        return torch.allclose(features, self.target, atol=self.tolerance)

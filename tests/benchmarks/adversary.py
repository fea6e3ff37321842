"""``python -m tests.benchmarks.adversary``: inputs made to get a false certificate.

Each case is a small random model with an embedding that holds nearly equal, equal or parallel
tokens, a choice of features (all, a slice of 1 to 8, attention alone), a type that features are
stored in or that the model computes in, or told noise, and targets that are honest or hostile: of
another depth, of changed weights, scaled, permuted, shifted at the first position, with noise that
was not told. A token is falsely certified if it is ``verified`` and is not the prompt's.
Told noise is Gaussian or Laplace; a weak one, or so strong that tokens that no candidate was near
to could pass for the target. More, less, or the other kind of noise may be told than there is.
``--channel noise`` has told noise in every case, and ``--channel strong`` strong one;
``--features "keys and values"`` attacks those of each case instead; ``--embedding pairs
--features all --channel bfloat16 --width 96 --large`` has tokens of which only the next row shows
which is right; ``--last`` gives the last state alone of texts of two and three tokens.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from dataclasses import dataclass, replace
from unittest import mock

import torch
import transformers as hf
from torch import Tensor

from lightning_inversion.data.storage import Storage
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.last_position import LastPosition
from lightning_inversion.recovery.policy import RecoveryPolicy, Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.surgery import Surgery
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification import verifier
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.noise import NoiseName

EMBEDDINGS = ("trained-like", "near", "very near", "equal", "parallel", "untrained cluster")
PAIRS = "pairs"
"""Tokens so near that at a low precision only the next row may tell two apart; not drawn."""
FEATURES = ("all", "slice", "attention alone", "final norm")
CHANNELS = (
    "float32", "bfloat16", "float16", "noise", "computed in bfloat16", "computed in float16",
    "Laplace noise", "strong noise", "strong Laplace noise", "noise in float16",
    "Laplace noise in float16", "sparse", "sparse in bfloat16", "sparse noise",
    "sparse strong Laplace noise",
)  # fmt: skip
TARGETS = (
    "honest", "other rounding", "other depth", "changed weights", "scaled", "permuted", "shifted",
    "untold noise", "more noise", "less noise", "other noise",
)  # fmt: skip
"""The last three add noise of 1.05 to 3 times, or of 0.3 times the std that is told, and noise of
the other kind."""
_STRONG_WIDTH, _SPARSE_WIDTH = 96, 192
"""Under strong noise few features verify nothing, and few that are kept never do."""
_WIDTH, _LENGTH, _PROMPTS, _TEXTS = 32, 8, 24, 6
_SMALL = verifier._SMALL_VOCABULARY


@dataclass(frozen=True)
class Case:
    """One model and channel, against which every kind of target is tried."""

    seed: int
    embedding: str
    features: str
    channel: str
    width: int = _WIDTH
    large: bool = False
    """Never compare all tokens, as in a large vocabulary."""

    @classmethod
    def drawn(cls, seed: int) -> Case:
        """A case for each seed."""
        generator = torch.Generator().manual_seed(seed)
        kinds = (EMBEDDINGS, FEATURES, CHANNELS)
        drawn = [kind[int(torch.randint(len(kind), (), generator=generator))] for kind in kinds]
        return cls(seed, *drawn)


def attacked(case: Case, kinds: tuple[str, ...] = TARGETS, last: bool = False) -> Counter[str]:
    """Counts of tokens, verified ones, right ones and false ones, also by channel and target."""
    if "strong" in case.channel:
        case = replace(case, width=max(case.width, _STRONG_WIDTH))
    if "sparse" in case.channel:
        case = replace(case, width=max(case.width, _SPARSE_WIDTH))
    with mock.patch.object(verifier, "_SMALL_VOCABULARY", 0 if case.large else _SMALL):
        return _attacked(case, kinds, last)


def _attacked(case: Case, kinds: tuple[str, ...], last: bool) -> Counter[str]:
    generator = torch.Generator().manual_seed(case.seed + 1)
    model, odd = _model(case, generator)
    transformer = _cut(model, case)
    storage = _storage(case, transformer)
    measurements = Measurements.measure(transformer, None, storage)
    counts: Counter[str] = Counter()
    for kind in kinds:
        if kind in ("more noise", "less noise", "other noise") and not storage.noise:
            continue
        ids = _prompts(odd, transformer.embedding.vocabulary_size, generator)
        target = _target(kind, case, model, transformer, ids, storage, generator)
        policy: RecoveryPolicy = TokenRecovery(
            ProbeProposer(), candidates=32, max_candidates=128, budget=256
        )
        lengths = [_LENGTH] * len(ids)
        if last:
            policy, ids = LastPosition(budget=2000), ids[:_TEXTS]
            lengths = [2 + number % 2 for number in range(_TEXTS)]
            ids = [own[:length] for own, length in zip(ids.tolist(), lengths, strict=True)]
        found = recover_prompts(policy, measurements, Targets(target[: len(ids)], lengths))
        truths = ids if isinstance(ids, list) else ids.tolist()
        for prompt, truth in zip(found, truths, strict=True):
            for token, right in zip(prompt.tokens, truth, strict=True):
                counts["right"] += token.id == right
                counts["refuted"] += len(token.refuted)
                for of in ("", f"{kind}: ", f"in {case.channel}: "):
                    counts[f"{of}tokens"] += 1
                    counts[f"{of}verified"] += token.verified
                    counts[f"{of}false"] += token.verified and token.id != right
                counts[f"honest and {token.state}"] += kind == "honest"
    return counts


def _model(case: Case, generator: torch.Generator) -> tuple[hf.PreTrainedModel, Tensor]:
    """A random model with attention that matters, and the tokens that were made alike."""
    torch.manual_seed(case.seed)
    V = 300 if case.seed % 2 else 1200
    shape = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if case.seed % 3 and case.features != "attention alone":
        model: hf.PreTrainedModel = hf.GPT2LMHeadModel(
            hf.GPT2Config(**shape, n_embd=case.width, n_layer=3, n_head=4, n_positions=64)
        )
    else:
        model = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **shape, hidden_size=case.width, num_hidden_layers=3, num_attention_heads=4,
                intermediate_size=64, max_position_embeddings=64,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
        matrix = _embedding(model)
        odd = torch.randperm(V, generator=generator)[:30]
        std = matrix.std()
        away = torch.randn(30, case.width, generator=generator) * std
        far = 10 ** -(2 + 5 * torch.rand(1, generator=generator))
        if case.embedding == "near":
            matrix[odd] = matrix[odd[0]] + 10 * far * away
        elif case.embedding == "very near":
            matrix[odd] = matrix[odd[0]] + far * away
        elif case.embedding == "equal":
            matrix[odd] = matrix[odd[0]].clone()
        elif case.embedding == PAIRS:
            apart = 10 ** -(1.3 + torch.rand(15, 1, generator=generator))
            matrix[odd[1::2]] = matrix[odd[::2]] + apart * away[::2]
        elif case.embedding == "parallel":
            matrix[odd] = matrix[odd[0]] * torch.linspace(0.5, 2.0, 30)[:, None]
        elif case.embedding == "untrained cluster":
            matrix[odd] = 0.01 * (matrix.mean(0) + 0.01 * away)
    if case.channel.startswith("computed"):
        model.to(getattr(torch, case.channel.split()[-1]))
    return model.eval(), odd


def _embedding(model: hf.PreTrainedModel) -> Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.data


def _cut(model: hf.PreTrainedModel, case: Case, depth: int = 2) -> TruncatedTransformer:
    if case.features == "keys and values":  # of the blocks 0, 1 and 2
        block = (case.seed + depth) % 3
        return TruncatedTransformer.from_model(model, depth=block, output="keys_values")
    alone = Surgery(mlp=False, residuals=False)
    width = 1 + case.seed % 8
    start = case.seed % (_WIDTH - 8)
    return TruncatedTransformer.from_model(
        model,
        depth=1 if case.features == "attention alone" else depth,
        features=f"{start}:{start + width}" if case.features == "slice" else None,
        final_norm=case.features == "final norm",
        surgery=alone if case.features == "attention alone" else None,
    )


def _storage(case: Case, transformer: TruncatedTransformer) -> Storage:
    words = case.channel.split()
    dtype = words[-1] if "float" in words[-1] else "float32"
    largest = (0.3, 0.35, 0.5, 0.7, 0.9)[case.seed % 5] if "sparse" in words else 1.0
    if "noise" not in words:
        return Storage(dtype, largest=largest)
    ids = torch.arange(64).view(8, 8)
    std = float(transformer.features_of(ids).std())
    weak, strong = 10 ** -(1 + (case.seed % 5) / 2), (0.1, 0.2, 0.4, 0.7, 1.0)[case.seed % 5]
    kind: NoiseName = "laplace" if "Laplace" in words else "gaussian"
    noise = std * (strong if "strong" in words else weak)
    return Storage(dtype, noise, kind, largest=largest)


def _prompts(odd: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """Half of the tokens are among those that are alike."""
    ids = torch.randint(vocabulary, (_PROMPTS, _LENGTH), generator=generator)
    drawn = odd[torch.randint(len(odd), ids.shape, generator=generator)]
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.5, drawn, ids)


def _target(
    kind: str,
    case: Case,
    model: hf.PreTrainedModel,
    transformer: TruncatedTransformer,
    ids: Tensor,
    storage: Storage,
    generator: torch.Generator,
) -> Tensor:
    features = transformer.features_of(ids)
    std = features.std()
    if kind == "other depth":
        features = _cut(model, case, depth=3).features_of(ids)
    elif kind == "other rounding":
        wider = copy.deepcopy(model)
        wider = wider.double() if model.dtype == torch.float32 else wider.float()
        features = _cut(wider, case).features_of(ids)
    elif kind == "changed weights":
        other = copy.deepcopy(model)
        with torch.no_grad():
            for value in other.parameters():
                if value.dim() > 1:
                    moved = 1e-3 * value.std() * torch.randn(value.shape, generator=generator)
                    value.add_(moved)
        features = _cut(other, case).features_of(ids)
    elif kind == "scaled":
        features = 0.97 * features
    elif kind == "permuted":
        features = features[..., torch.randperm(features.shape[-1], generator=generator)]
    elif kind == "shifted":
        features[:, 0] += 0.5 * std
    elif kind in ("more noise", "less noise"):
        times = (1.05, 1.2, 1.5, 2.0, 3.0)[case.seed % 5] if kind == "more noise" else 0.3
        storage = replace(storage, noise=times * storage.noise)
    elif kind == "other noise":
        other = "laplace" if storage.noise_kind == "gaussian" else "gaussian"
        storage = replace(storage, noise_kind=other)
    elif kind == "untold noise":
        features = features + 1e-3 * std * torch.randn(features.shape, generator=generator)
    return storage(features, generator)


def main() -> None:
    """Run cases until there are enough tokens, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--embedding", choices=(*EMBEDDINGS, PAIRS))
    parser.add_argument("--features", choices=(*FEATURES, "keys and values"))
    parser.add_argument("--channel", help="a word in the names of those that are run")
    parser.add_argument("--width", type=int, default=_WIDTH, help="of the models")
    parser.add_argument(
        "--large", action="store_true", help="never compare all tokens, as in a large vocabulary"
    )
    parser.add_argument("--last", action="store_true")
    options = parser.parse_args()
    channels = [name for name in CHANNELS if options.channel in (None, *name.split())]
    total: Counter[str] = Counter()
    seed = options.first
    while total["tokens"] < options.tokens:
        case = replace(Case.drawn(seed), width=options.width, large=options.large)
        if options.embedding is not None:
            case = replace(case, embedding=options.embedding)
        if options.features is not None:
            case = replace(case, features=options.features)
        if options.channel is not None:
            case = replace(case, channel=channels[seed % len(channels)])
        counts = attacked(case, last=options.last)
        total += counts
        if counts["false"]:
            print(case, dict(counts), flush=True)
        seed += 1
        print(f"{seed - options.first} cases, {total['tokens']} tokens", file=sys.stderr)
    for name, count in sorted(total.items()):
        print(f"{name:32} {count:8}")
    print(f"{seed - options.first} cases, {total['tokens']} tokens, {total['false']} false")


if __name__ == "__main__":
    main()

"""How far down the linear probe ranks the right token, and what its parts are worth.

    python -m tests.benchmarks.probe_proposer --depths 1 8 15 30

The protocol's texts, positions after the first, each token ranked once among the whole vocabulary
with nothing tried. `nearest` is the comparison of tokens with the guess itself, in units of its
errors; `all` the probe with every direction, `probe` the probe as it is used, `with prior` beside
the language model's.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from lightning_inversion.proposers.prior import LanguageModelPrior
from lightning_inversion.proposers.probe_proposer import ProbeProposer
from lightning_inversion.recovery.search import PrefixSearch
from lightning_inversion.replication.policies import protocol_prompts
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

TEXTS = Path("configs/recovery/prompts.jsonl")


def ranks(scores: Tensor, right: Tensor) -> Tensor:
    """``[N]`` tokens that stand before the right one ``[N]``."""
    return (scores > scores.gather(1, right[:, None])).sum(1)


def directions(measurements: Measurements, guess: Tensor, shrunk: bool) -> Tensor:
    """Scores ``[N, V]`` by all directions, of tokens or of what the guess has of them."""
    probe, embedding = measurements.probe, measurements.transformer.embedding
    tokens = (embedding.matrix.float() - probe.bias[1]) @ probe.directions[1]
    told = (guess - probe.bias[1]) @ probe.directions[1]
    heard = probe.kept_share[1] if shrunk else torch.ones(tokens.shape[1])
    return told @ tokens.T - (tokens.square() @ heard) / 2


def main() -> None:
    """Print a row for each depth and way of ranking."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 8, 15, 30])
    depths = parser.parse_args().depths
    model, tokenizer = TransformerSpec().load_causal_lm()
    texts = protocol_prompts(tokenizer, model.config.vocab_size, TEXTS, 20)
    ids = torch.tensor(texts)
    print("| depth | ranked by | first | in the first 8 | mean of ranks, geometric | largest |")
    print("|---|---|---|---|---|---|", flush=True)
    for depth in depths:
        transformer = TruncatedTransformer.from_model(model, tokenizer, depth=depth)
        measurements = Measurements.measure(transformer, LanguageModel(model, transformer.caches))
        found: dict[str, list[Tensor]] = {"nearest": [], "all": [], "probe": [], "with prior": []}
        for text in ids[:, None]:
            search = PrefixSearch(measurements, transformer.features_of(text))
            by_probe, prior = ProbeProposer().begin(search), LanguageModelPrior().begin(search)
            row = torch.zeros(1, dtype=torch.long)
            for position in range(text.shape[1]):
                if position:
                    right, guess = text[0, position, None], search.guess(row)
                    likely = by_probe.scores(row)
                    found["nearest"].append(ranks(directions(measurements, guess, False), right))
                    found["all"].append(ranks(directions(measurements, guess, True), right))
                    found["probe"].append(ranks(likely, right))
                    both = likely + prior.scores(row)
                    found["with prior"].append(ranks(both, right))
                search.accept(row, text[:, position])
                prior.accept(row, text[:, position])
        for name, parts in found.items():
            rank = torch.cat(parts).double()
            mean = math.exp(float((rank + 1).log().mean()))
            print(f"| {depth} | {name} | {(rank < 1).double().mean():.3f} | "
                  f"{(rank < 8).double().mean():.3f} | {mean:.2f} | {int(rank.max()) + 1} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

"""What it costs to read tokens: beside a forward and backward, and while a fit runs.

    python -m tests.benchmarks.decoding
    python -m tests.benchmarks.decoding --places 64 --vocabularies 49152 --widths 576

Random weights of Llama's shape. Every number but the milliseconds is a ratio to a forward and
backward of one block of the same width with as many tokens; quote the ratios, machines are noisy.
The last line is a fit of prompts: the share of its seconds in which tokens were decoded and shown.
"""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaModel

from lightning_inversion.__main__ import main as run
from lightning_inversion.callbacks.token_decoding import TokenDecoding
from lightning_inversion.decoding import L2Decoder, decode
from lightning_inversion.inputs import EmbeddingInput, MeanInitializer
from lightning_inversion.proposers.proposals import best_untried
from lightning_inversion.transformer.embedding import TokenEmbedding

_LENGTH = 32
PROMPTS = [
    f"{who} will meet {whom} {when}, unless it rains all day."
    for who in ("The committee", "My new neighbour")
    for whom in ("the mayor", "three old friends")
    for when in ("on Tuesday at nine", "in the town hall")
]


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least that it took, after once to warm up."""
    work()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


def compare(vocabulary: int, width: int, places: int) -> None:
    """Print the ratios of one vocabulary and width."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=8 * width // 3,
        num_hidden_layers=1, num_attention_heads=width // 64,
    )  # fmt: skip
    block = LlamaModel(config).requires_grad_(False)
    vectors = torch.randn(places // _LENGTH, _LENGTH, width)

    def iteration() -> None:
        leaf = vectors.clone().requires_grad_()
        block(inputs_embeds=leaf, use_cache=False).last_hidden_state.square().sum().backward()

    embedding = TokenEmbedding(torch.randn(vocabulary, width))
    learnable = EmbeddingInput(MeanInitializer())
    flat = vectors.flatten(0, 1)[: embedding.at_a_time]
    tried = torch.zeros(len(flat), vocabulary, dtype=torch.bool)
    scores = embedding.dot(flat)
    with torch.no_grad():
        whole = places / len(flat)  # what is timed for some places, for all of them
        products = whole * seconds(lambda: embedding.dot(flat))
        choice = whole * seconds(lambda: best_untried(scores, tried, 16))
        softmax = whole * seconds(lambda: scores.log_softmax(-1))
    top = seconds(lambda: decode(vectors, learnable, embedding, L2Decoder(), 5))
    one = seconds(iteration)
    print(
        f"V {vocabulary}, D {width}, {places} places: a block forward and backward "
        f"{one * 1e3:.0f} ms; top-5 of all places {top / one:.2f} of it, of which products with "
        f"the vocabulary {products / one:.2f}; choosing 16 untried of given scores "
        f"{choice / one:.2f}, a softmax {softmax / one:.2f}",
        flush=True,
    )


def share_of_a_fit(depth: int, iterations: int) -> tuple[float, float]:
    """Seconds of a fit's iterations, and of them those in which tokens were decoded and shown."""
    spent, report = [], TokenDecoding._report
    first: list[float] = []
    began_batch = TokenDecoding.on_train_epoch_start

    def timed(self: TokenDecoding, *arguments: object) -> None:
        began = time.perf_counter()
        report(self, *arguments)  # type: ignore[arg-type]
        spent.append(time.perf_counter() - began)
        first.append(time.perf_counter())

    def started(self: TokenDecoding, *arguments: object) -> None:
        first.append(time.perf_counter())
        began_batch(self, *arguments)  # type: ignore[arg-type]

    TokenDecoding._report, TokenDecoding.on_train_epoch_start = timed, started  # type: ignore
    try:
        with tempfile.TemporaryDirectory() as folder:
            texts = ", ".join(f'"{prompt}"' for prompt in PROMPTS)
            run([
                "fit", f"--data.prompts=[{texts}]", f"--trainer.default_root_dir={folder}",
                "--trainer.accelerator=cpu", f"--model.transformer.depth={depth}",
                f"--model.iterations={iterations}", "--model.schedule=AllPositions",
                "--stopping.stop=false",
            ])  # fmt: skip
    finally:
        TokenDecoding._report, TokenDecoding.on_train_epoch_start = report, began_batch  # type: ignore
    return first[-1] - first[0], sum(spent)


def main() -> None:
    """Print one line a vocabulary and width, and one of a fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49_152, 256_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2304])
    parser.add_argument("--places", type=int, default=128)
    parser.add_argument("--depths", type=int, nargs="*", default=[1])
    parser.add_argument("--iterations", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for vocabulary in options.vocabularies:
        for width in options.widths:
            compare(vocabulary, width, options.places)
    for depth in options.depths:
        whole, decoding = share_of_a_fit(depth, options.iterations)
        print(
            f"a fit of {len(PROMPTS)} prompts at depth {depth}, {options.iterations} iterations: "
            f"{whole:.1f} s, of them {decoding:.2f} s ({decoding / whole:.1%}) decode and show"
        )


if __name__ == "__main__":
    main()

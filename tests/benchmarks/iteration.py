"""What the Trainer adds to an iteration, and what batching saves.

    python -m tests.benchmarks.iteration            both, side by side in one process
    python -m tests.benchmarks.iteration --prompts FILE --depth 1 --iterations 200

Prints milliseconds an iteration and ratios; quote the ratios, machines are noisy.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from lightning import Trainer

from lightning_inversion.callbacks.checkpoint import RunCheckpoint
from lightning_inversion.callbacks.learning_rate import LinearLearningRate
from lightning_inversion.callbacks.result_writer import ResultWriter
from lightning_inversion.callbacks.stopping import StoppingCriterion
from lightning_inversion.callbacks.token_decoding import TokenDecoding
from lightning_inversion.cli.trainer import quiet_lightning
from lightning_inversion.data.prompts import PromptDataModule
from lightning_inversion.inputs import EmbeddingInput, MeanInitializer
from lightning_inversion.module import InputInversion
from lightning_inversion.objectives import L1
from lightning_inversion.schedules import AllPositions
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

PROMPTS = [
    f"{who} {what}."
    for who in ("The committee", "My new neighbour", "A light blue boat", "Nobody in the room")
    for what in (
        "will meet on Tuesday at nine",
        "called after six and said nothing",
        "went down the river before dawn",
        "paid two hundred euros for it",
    )
]


def bare(transformer: TruncatedTransformer, data: PromptDataModule, iterations: int) -> float:
    """Seconds an iteration of the loop a script would have: forward, backward, step."""
    batch = data.batches[0]
    target = transformer.features_of(batch.ids, batch.mask)
    objective = L1()
    values = transformer.embedding.mean.expand(*batch.ids.shape, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=1e-3)
    began = time.perf_counter()
    for _ in range(iterations):
        optimizer.zero_grad()
        objective(transformer(values, batch.mask), target, batch.mask).sum().backward()
        optimizer.step()
    return (time.perf_counter() - began) / iterations


class _Clock(LinearLearningRate):
    """Times the iterations alone, without what a batch costs once: its target, its results."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.ended = time.perf_counter()
        if batch_idx == 0:
            self.began = self.ended


def through_trainer(
    transformer: TruncatedTransformer, data: PromptDataModule, iterations: int
) -> float:
    """Seconds an iteration through the Trainer, with every default callback and logger."""
    module = InputInversion(
        learnable=EmbeddingInput(MeanInitializer()),
        objective=L1(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        iterations=iterations,
        schedule=AllPositions(),
    ).use(transformer)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder,
            max_epochs=-1,
            accelerator="cpu",
            log_every_n_steps=10,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                RunCheckpoint(), TokenDecoding(), StoppingCriterion(stop=False), ResultWriter(),
                clock,
            ],
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    return (clock.ended - clock.began) / (iterations - 1)


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    quiet_lightning()
    prompts = options.prompts.read_text().splitlines() if options.prompts else PROMPTS
    spec = TransformerSpec(depth=options.depth)
    transformer = spec.load()

    def data_of(texts: list[str]) -> PromptDataModule:
        data = PromptDataModule(prompts=texts, iterations=options.iterations)
        data.setup()
        return data

    every = data_of(prompts)
    bare(transformer, every, 10)
    pairs = [
        (
            bare(transformer, every, options.iterations),
            through_trainer(transformer, every, options.iterations),
        )
        for _ in range(options.repeats)
    ]
    plain = statistics.median(a for a, _ in pairs) * 1e3
    ours = statistics.median(b for _, b in pairs) * 1e3
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{len(prompts)} prompts, depth {options.depth}: bare loop {plain:.1f} ms an iteration, "
          f"through the Trainer {ours:.1f} ms, ratio {ratio:.3f}")  # fmt: skip

    sixteen = (prompts * 16)[:16]
    together, apart = [], []
    for _ in range(options.repeats):
        together.append(bare(transformer, data_of(sixteen), options.iterations // 4))
        apart.append(
            sum(bare(transformer, data_of([text]), options.iterations // 4) for text in sixteen)
        )
    share = statistics.median(a / b for a, b in zip(together, apart, strict=True))
    print(f"16 prompts together cost {share:.3f} of 16 prompts one by one")


if __name__ == "__main__":
    main()

"""Which architectures of transformers pass every step, as a Markdown table.

    python -m tests.benchmarks.architectures                    all of them, about an hour
    python -m tests.benchmarks.architectures llama mamba
    python -m tests.benchmarks.architectures --steps load parity attribute --rows rows.jsonl

Each is a tiny random model in a folder, run in a process of its own with a time limit. A step
passes, is refused in one sentence, is slow, or fails: `wrong` where it gave a wrong result,
`unresolved` where a token was not found, `crash` where anything but a sentence came out.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from lightning_inversion import __main__ as command_line
from lightning_inversion.api import recover
from lightning_inversion.cache import ENVIRONMENT
from lightning_inversion.errors import InputError
from lightning_inversion.transformer import TransformerSpec
from lightning_inversion.transformer.language_model import own_text
from tests.architectures import ARCHITECTURES, NOT_MADE, save_architecture
from tests.tiny import tiny_tokenizer

PROMPTS = ["A quick brown fox"]
DEPTHS = (1, 3)
TOLERANCE = 1e-4
LENGTH = 20
FIRST_BLOCK_FIRST = {"falcon_mamba", "mamba", "mamba2", "rwkv"}
"""Whose `hidden_states` lack the embeddings: the output of block k is at k - 1."""
OWN_TEXT = (24, 32)
"""Texts, and tokens of each, that a model writes: less than elsewhere, for those without a cache.
"""


class FailedError(Exception):
    """A result that is not right; the message begins with what it is."""


@dataclass
class Steps:
    """The steps of one architecture, whose model lies in `folder`."""

    name: str
    folder: Path

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The model as transformers loads it."""
        (kind,) = AutoConfig.from_pretrained(self.folder, trust_remote_code=False).architectures
        model = getattr(transformers, kind).from_pretrained(self.folder, dtype=torch.float32)
        return model.eval()

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor, depth: int) -> torch.Tensor:
        """Hugging Face's own `[B, T, D]` after so many blocks."""
        states = self.reference(ids, output_hidden_states=True, use_cache=False).hidden_states
        return states[depth - (self.name in FIRST_BLOCK_FIRST)]

    def load(self) -> None:
        """The model loads at two depths."""
        for depth in DEPTHS:
            assert TransformerSpec(model=str(self.folder), depth=depth).load().depth == depth

    def parity(self) -> None:
        """Features are Hugging Face's hidden states: long, of one token, alone and padded."""
        ids = torch.randint(1, 290, (3, LENGTH), generator=torch.Generator().manual_seed(0))
        lengths = [LENGTH, 1, 11]
        mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        for depth in DEPTHS:
            transformer = TransformerSpec(model=str(self.folder), depth=depth).load()
            padded = transformer.features_of(ids, mask)
            for row, length in enumerate(lengths):
                one = ids[row : row + 1, :length]
                expected = self.hidden_states(one, depth)[0]
                for kind, found in (
                    ("", transformer.features_of(one)[0]),
                    (" padded", padded[row, :length]),
                ):
                    off = float((found - expected).abs().max() / expected.abs().max())
                    if not off <= TOLERANCE:
                        raise FailedError(
                            f"wrong: off by {off:.1g} at depth {depth}, T={length}{kind}"
                        )

    def predict(self) -> None:
        """Prompts are recovered from the package's own features."""
        self._check(self._rows("predict", "--model.transformer.depth=2"))

    def recover(self) -> None:
        """Prompts are recovered from Hugging Face's hidden states."""
        tokenizer = tiny_tokenizer()
        rows = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
        found = recover(
            self.reference, tokenizer, [self.hidden_states(ids, 2) for ids in rows], depth=2
        )
        self._check(
            {
                "ids": ids[0].tolist(),
                "recovered_ids": one.ids,
                "token_verified": [token.verified for token in one.tokens],
            }
            for one, ids in zip(found, rows, strict=True)
        )

    def fit(self) -> None:
        """A fit ends with the prompts verified."""
        rows = self._rows("fit", "--model.transformer.depth=1", "--model.iterations=100")
        self._check(rows)

    @torch.no_grad()
    def attribute(self) -> None:
        """Each token has a finite attribution of Hugging Face's own prediction."""
        out = self.folder / "attribution.json"
        command_line.run(["attribute", PROMPTS[0], f"--model={self.folder}", f"--json={out}"])
        result = json.loads(out.read_text())
        ids = tiny_tokenizer()(PROMPTS[0], return_tensors="pt").input_ids
        expected = float(self.reference(ids).logits[0, -1].softmax(-1).max())
        found = result["queries"][0]["probability"]
        if abs(found - expected) > TOLERANCE:
            raise FailedError(
                f"wrong: the prediction has probability {expected:.3g}, not {found:.3g}"
            )
        (scores,) = result["scores"]
        if len(scores) != ids.shape[1] or None in scores:
            raise FailedError("wrong: a token has no finite score")

    def _rows(self, command: str, *more: str) -> list[dict[str, Any]]:
        root = self.folder / command
        options = [
            f"--model.transformer.model={self.folder}", f"--data.prompts={json.dumps(PROMPTS)}",
            "--data.tokens_per_batch=100", f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu", *more,
        ]  # fmt: skip
        command_line.run([command, *options])
        lines = (root / "lightning_logs" / "version_0" / "results.jsonl").read_text()
        return [json.loads(line) for line in lines.splitlines()]

    @staticmethod
    def _check(rows: Iterable[dict[str, Any]]) -> None:
        tokens = [
            (right == found, verified)
            for row in rows
            for right, found, verified in zip(
                row["ids"], row["recovered_ids"], row["token_verified"], strict=True
            )
        ]
        wrong = sum(verified and not right for right, verified in tokens)
        if wrong:
            raise FailedError(f"wrong: {wrong} of {len(tokens)} tokens verified wrongly")
        missing = sum(not (right and verified) for right, verified in tokens)
        if missing:
            raise FailedError(f"unresolved: {missing} of {len(tokens)} tokens")


STEPS = ("load", "parity", "predict", "recover", "fit", "attribute")


def run_steps(name: str, chosen: Sequence[str], results: Connection) -> None:
    """Run steps of an architecture in this process; sends each one's name and what it came to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    own_text.__defaults__ = OWN_TEXT
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ENVIRONMENT] = f"{folder}/cache"
        steps = Steps(name, Path(folder) / name)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            save_architecture(steps.folder, name)
            for step in chosen:
                began = time.perf_counter()
                outcome = _outcome(getattr(steps, step)).replace(str(steps.folder), name)
                results.send((step, outcome, round(time.perf_counter() - began, 1)))


def _outcome(step: Callable[[], None]) -> str:
    try:
        step()
    except InputError as error:
        return f"refused: {error}"
    except FailedError as error:
        return str(error)
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = next(
            (
                frame
                for frame in reversed(traceback.extract_tb(error.__traceback__))
                if "lightning_inversion/" in frame.filename
            ),
            place,
        )
        lines = str(error).splitlines() or [""]
        return (
            f"crash: {type(error).__name__}: {lines[0][:200]} ({Path(place.filename).name}:"
            f"{place.lineno}, from {Path(own.filename).name}:{own.lineno})"
        )
    return "passes"


@dataclass
class Outcome:
    """What each step of an architecture came to, and in how many seconds."""

    name: str
    steps: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def passes(self, steps: Iterable[str]) -> bool:
        """Whether it passes each of some steps."""
        return all(self.steps.get(step) == "passes" for step in steps)

    @property
    def reason(self) -> str:
        """Why it does not pass: one sentence where it is refused at load, or else each step's."""
        load = self.steps.get("load", "")
        others = (result for result in self.steps.values() if result != "passes")
        if load.startswith("refused: ") and all(one.startswith("refused: ") for one in others):
            return f"refused: {load.split(': ', 2)[2]}"  # without the option's name
        wrong = {step: result for step, result in self.steps.items() if result != "passes"}
        return "; ".join(f"{step} {result}" for step, result in wrong.items())

    def measure(self, steps: Sequence[str] = STEPS, limit: float = 300) -> None:
        """Run steps in a process of their own for at most `limit` seconds."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning_inversion.cli.lightning", "tests.architectures"])
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=run_steps, args=(self.name, steps, sending))
        process.start()
        sending.close()
        end = time.monotonic() + limit
        for step in steps:
            if not receiving.poll(max(0, end - time.monotonic())):
                self.steps[step] = f"slow: more than {limit:.0f} s"
                process.kill()
                break
            try:
                _, self.steps[step], self.seconds[step] = receiving.recv()
            except EOFError:
                self.steps[step] = "crash: the process ended"
                break
        process.join()


def markdown(outcomes: Sequence[Outcome]) -> str:
    """How many architectures pass each step, and by name those that do not pass all."""
    steps = [step for step in STEPS if any(step in one.steps for one in outcomes)]
    whole = [one for one in outcomes if len(one.steps) == len(steps) or not one.passes(one.steps)]
    counts = [
        f"{sum(one.passes([step]) for one in outcomes)} of "
        f"{sum(step in one.steps for one in outcomes)}"
        for step in steps
    ]
    counts.append(f"{sum(one.passes(steps) for one in whole)} of {len(whole)}")
    lines = [
        f"| architectures | {' | '.join(steps)} | every step |",
        f"|---|{'---|' * (len(steps) + 1)}",
        f"| pass | {' | '.join(counts)} |",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for one in outcomes:
        if not one.passes(one.steps):
            reasons[one.reason].append(one.name)
    if reasons:
        lines += ["", "| not passing | what happens |", "|---|---|"]
        lines += [f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure the architectures named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all if left out")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--limit", type=float, default=300, help="seconds for each")
    parser.add_argument("--rows", type=Path, help="outcomes are kept here, and not measured again")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ARCHITECTURES):
        parser.error(f"not made: {', '.join(sorted(unknown))} (of those known: {NOT_MADE})")
    outcomes: dict[str, Outcome] = {}
    if options.rows and options.rows.exists():
        kept = map(json.loads, options.rows.read_text().splitlines())
        outcomes = {row["name"]: Outcome(**row) for row in kept}
    for name in options.names or ARCHITECTURES:
        outcome = outcomes.setdefault(name, Outcome(name))
        if left := [step for step in options.steps if step not in outcome.steps]:
            outcome.measure(left, options.limit)
        if options.rows:
            rows = [json.dumps(vars(one)) + "\n" for one in outcomes.values()]
            options.rows.write_text("".join(rows))
    print(markdown(list(outcomes.values())))


if __name__ == "__main__":
    main()

"""``python -m lightning_inversion.replication.policies``: recovery policies side by side on the same targets.

20 texts of 20 tokens, 18 of them natural and 2 random, at several depths of a model. Each policy is
a config of ``configs/recovery``, or one of your own. What has a row in the results already is not
run again, so that a stopped run goes on where it stopped; the recommended policy alone is, once for
each run and depth, because times are compared within one process.
``python -m lightning_inversion.replication.policy_table`` then writes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lightning_inversion
from lightning_inversion.data.texts import read_prompts
from lightning_inversion.errors import InputError
from lightning_inversion.files import Record, append_records, read_records
from lightning_inversion.recovery.policy import RecoveredPrompt, RecoveryPolicy
from lightning_inversion.recovery.proposals import FirstTokenFeatures
from lightning_inversion.recovery.verification import Measurements
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer

T = TypeVar("T")

BASELINE = "recommended"
"""The policy to which all others are compared."""

RANDOM_TEXTS = 2
_EVERY = 9
"""A random text follows every ninth natural one, so that a subset has its share of them."""


@dataclasses.dataclass(frozen=True)
class NamedPolicy:
    """A policy as a config describes it.

    Attributes:
        name: of its file.
        settings: what the file says under ``model.recovery``.
    """

    name: str
    settings: dict[str, Any]

    @classmethod
    def read(cls, named: str, configs: Path) -> NamedPolicy:
        """Of a path, or of a file of ``configs``.

        Raises:
            InputError: there is no such file, or it describes no policy.
        """
        path = Path(named) if named.endswith((".yaml", ".yml")) else configs / f"{named}.yaml"
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["recovery"]
        except OSError as error:
            raise InputError(
                f"--policies: {str(path)!r} cannot be read: {error.strerror}; give the name of a "
                f"file in {str(configs)!r}, or a path that ends in .yaml."
            ) from error
        except (KeyError, TypeError, yaml.YAMLError) as error:
            raise InputError(
                f"--policies: {str(path)!r} has no model.recovery; write the policy's class_path "
                "there."
            ) from error
        policy = cls(path.stem, settings)
        policy.build()
        return policy

    def build(self) -> RecoveryPolicy:
        """A new policy, which has seen nothing.

        Raises:
            InputError: the settings do not describe one.
        """
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--recovery", type=RecoveryPolicy)
        try:
            parsed = parser.parse_object({"recovery": self.settings})
            policy = parser.instantiate(parsed).recovery
        except InputError:
            raise
        except Exception as error:  # of many kinds, depending on what is wrong
            reason = " ".join(str(error).split())
            raise InputError(f"--policies: {self.name} describes no policy: {reason}") from error
        assert isinstance(policy, RecoveryPolicy)
        return policy

    @property
    def fingerprint(self) -> str:
        """Of its settings: another policy of the same name is not the same."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def protocol_texts(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, prompts: Path, length: int
) -> list[list[int]]:
    """The texts as ids, each of ``length`` tokens.

    Raises:
        InputError: a prompt is shorter than that.
    """
    texts: list[list[int]] = []
    for number, prompt in enumerate(read_prompts(prompts, "--file"), start=1):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][:length]
        if len(ids) < length:
            raise InputError(
                f"--file {str(prompts)!r}, line {number} has {len(ids)} tokens of this model, "
                f"fewer than {length}; write more, or lower --length."
            )
        texts.append(ids)
    generator = torch.Generator().manual_seed(0)
    for number in range(RANDOM_TEXTS):
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        texts.insert((number + 1) * (_EVERY + 1) - 1, ids)
    return texts


def run_policy(
    policy: RecoveryPolicy, measurements: Measurements, ids: Tensor, cap: float | None
) -> Record:
    """Let a policy recover texts, for ``cap`` seconds at most; what it did, as plain values.

    Args:
        policy: new, without state.
        measurements: of the model.
        ids: ``[N, T]`` the right tokens.
        cap: seconds after which it is stopped between two rounds; None for none.
    """
    target = measurements.transformer.features_of(ids)
    texts: list[RecoveredPrompt] = []
    capped = False
    began = time.monotonic()
    with torch.no_grad():
        for texts in policy.recover(measurements, target, [ids.shape[1]] * len(ids)):
            if cap is not None and time.monotonic() - began > cap:
                capped = any(len(text.tokens) < ids.shape[1] for text in texts)
                break
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 3), "capped": capped, **scores(texts, ids.tolist())}


def scores(texts: list[RecoveredPrompt], right: list[list[int]]) -> Record:
    """How many tokens are right and verified, and what they took."""
    pairs = [
        (token, truth)
        for text, ids in zip(texts, right, strict=True)
        for token, truth in zip(text.tokens, ids, strict=False)
    ]
    # Position 0 has an order of its own, a scan: the orders are judged by the later ones.
    later = [token.candidates for text in texts for token in text.tokens[1:]]
    return {
        "tokens": sum(map(len, right)),
        "done": len(pairs),
        "right": sum(token.id == truth for token, truth in pairs),
        "verified": sum(token.verified for token, _ in pairs),
        "false_certificates": sum(
            token.verified and truth not in (token.id, *token.duplicates) for token, truth in pairs
        ),
        "exact": sum(text.ids == ids for text, ids in zip(texts, right, strict=True)),
        "candidates_median": _quantile(later, 0.5),
        "candidates_p95": _quantile(later, 0.95),
        "candidates_max": _quantile(later, 1.0),
        "forwards": sum(text.forwards for text in texts),
    }


def _quantile(values: list[int], share: float) -> int | None:
    """The smallest value that at least this share of them does not exceed."""
    if not values:
        return None
    place = max(1, -int(-share * len(values) // 1))
    return sorted(values)[place - 1]


@dataclasses.dataclass
class Protocol:
    """One run of the command.

    Attributes:
        model: as ``TransformerSpec.model`` names it.
        policies: what is compared.
        depths: blocks kept.
        prompts: how many texts, the first of the protocol's.
        length: tokens of a text.
        cap: seconds for a policy at a depth; what others are compared to is not stopped.
        file: the natural texts.
        results: the file of rows.
    """

    model: str
    policies: list[NamedPolicy]
    depths: list[int]
    prompts: int
    length: int
    cap: float | None
    file: Path
    results: Path

    def run(self, say: Callable[[str], None]) -> None:
        """Run what has no row yet."""
        missing = {depth: self.missing(depth) for depth in self.depths}
        if not any(missing.values()):
            say(f"{self.results}: everything is there")
            return
        for depth in self.depths:  # before anything slow starts
            TransformerSpec(model=self.model, depth=depth).check()
        model, tokenizer = TransformerSpec(model=self.model).load_causal_lm()
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        texts = protocol_texts(tokenizer, len(weight), self.file, self.length)[: self.prompts]
        run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        for depth, policies in missing.items():
            if policies:
                self._run_depth(model, tokenizer, depth, policies, texts, run, say)

    def missing(self, depth: int) -> list[NamedPolicy]:
        """The policies without a row; the baseline too, where one of the others has none."""
        there = [row for row in read_records(self.results) if self._is_cell(row, depth)]
        done = {(row["policy"], row["settings"]) for row in there}
        missing = [
            policy for policy in self.policies if (policy.name, policy.fingerprint) not in done
        ]
        baseline = [policy for policy in self.policies if policy.name == BASELINE]
        others = [policy for policy in missing if policy.name != BASELINE]
        return [*baseline, *others] if others else missing

    def _is_cell(self, row: Record, depth: int) -> bool:
        mine = (self.model, depth, self.prompts, self.length)
        return (row["model"], row["depth"], row["texts"], row["length"]) == mine

    def _run_depth(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        depth: int,
        policies: list[NamedPolicy],
        texts: list[list[int]],
        run: str,
        say: Callable[[str], None],
    ) -> None:
        transformer = TruncatedTransformer.from_model(model, tokenizer, depth=depth)
        language_model = LanguageModel(model, transformer.caches)
        measurements, measuring = _timed(lambda: Measurements.measure(transformer, language_model))
        _, scanning = _timed(lambda: FirstTokenFeatures.of(measurements))
        ids = torch.tensor(texts, device=transformer.device)
        # Of three, because the first also warms up and the others may be disturbed.
        forward = min(_timed(lambda: transformer.features_of(ids))[1] for _ in range(3))
        shared: Record = {
            "run": run,
            "model": self.model,
            "depth": depth,
            "texts": len(texts),
            "length": self.length,
            "cap": self.cap,
            "measuring_seconds": round(measuring, 3),
            "scan_seconds": round(scanning, 3),
            "forward_seconds": round(forward, 4),
            "threads": torch.get_num_threads(),
            "device": transformer.device.type,
            "version": lightning_inversion.__version__,
            "version_torch": torch.__version__,
            "version_transformers": transformers.__version__,
        }
        say(
            f"depth {depth}: measurements {measuring:.1f} s, first tokens {scanning:.1f} s, "
            f"one forward {forward:.2f} s"
        )
        for policy in policies:
            # What the others are compared to ends, unless it is alone.
            compared_to = policy.name == BASELINE and len(policies) > 1
            cap = None if compared_to else self.cap
            row = run_policy(policy.build(), measurements, ids, cap)
            index = len(read_records(self.results))
            named = {"index": index, "policy": policy.name, "settings": policy.fingerprint}
            append_records(self.results, [{**named, **shared, **row}])
            say(
                f"depth {depth}, {policy.name}: {row['right']}/{row['tokens']} right, "
                f"{row['verified']} verified, {row['false_certificates']} falsely, "
                f"{row['seconds']:.1f} s{' (stopped)' if row['capped'] else ''}"
            )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    result = work()
    return result, time.monotonic() - began


def main(arguments: list[str] | None = None) -> int:
    """Run the protocol; returns the exit code, 2 where the user has to change something."""
    configs = Path("configs/recovery")
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.policies",
        description="Compare recovery policies on the same texts and depths, in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=TransformerSpec.model, help="as --model.transformer.model")
    add("--depths", type=int, nargs="+", default=[1, 8, 15, 30], help="blocks kept")
    add("--policies", nargs="+", default=[BASELINE], help="files of --configs, or paths")
    add("--prompts", type=int, default=20, help="the first N of the texts")
    add("--length", type=int, default=20, help="tokens of a text")
    add(
        "--cap",
        type=float,
        help="seconds for a policy beside the recommended one",
    )
    add("--configs", type=Path, default=configs, help="folder of the policies' files")
    add("--file", type=Path, help="the natural texts; prompts.jsonl of --configs if left out")
    add("--out", type=Path, default=configs / "results", help="folder of the results")
    options = parser.parse_args(arguments)
    file = options.file or options.configs / "prompts.jsonl"
    try:
        count = len(read_prompts(file, "--file")) + RANDOM_TEXTS
        if not 1 <= options.prompts <= count:
            raise InputError(f"--prompts must be from 1 to {count}, and is {options.prompts}.")
        if options.length < 2:
            raise InputError(f"--length must be at least 2, and is {options.length}.")
        protocol = Protocol(
            model=options.model,
            policies=[NamedPolicy.read(name, options.configs) for name in options.policies],
            depths=options.depths,
            prompts=options.prompts,
            length=options.length,
            cap=options.cap,
            file=file,
            results=options.out / "protocol.jsonl",
        )
        protocol.run(lambda line: print(line, flush=True))
    except InputError as error:
        print(f"protocol: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``python -m lightning_inversion.replication.policies``: recovery policies side by side.

The protocol: 20 prompts of 20 tokens, 18 of them natural and 2 random, at several depths of a
model. Each policy is a file of ``configs/recovery``, or one of your own. A policy that has a row in
the results is not run again, so that a stopped run resumes; the recommended policy alone is run
again beside others, because times are compared within one process.
``python -m lightning_inversion.replication.tables`` then writes the tables.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

import lightning_inversion
from lightning_inversion.cli.ending import exit_code
from lightning_inversion.data.texts import read_prompts
from lightning_inversion.errors import InputError
from lightning_inversion.files import Record, append_records, read_records
from lightning_inversion.recovery.policy import RecoveredPrompt, RecoveryPolicy, Targets
from lightning_inversion.replication.claims import fingerprint_of
from lightning_inversion.replication.tables import BASELINE, PROTOCOL
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

RANDOM_PROMPTS = 2
_EVERY = 9
"""A random prompt follows every ninth natural one, so that a subset has its share of them."""
# Not __name__, which is __main__ where the module is run.
_log = logging.getLogger("lightning_inversion.replication.policies")


@dataclass(frozen=True)
class NamedPolicy:
    """A policy as a YAML file describes it.

    Attributes:
        name: of the file.
        settings: what the file has under ``model.recovery``.
    """

    name: str
    settings: dict[str, Any]

    @classmethod
    def read(cls, given: str, configs: Path) -> NamedPolicy:
        """The policy of a path, or of a file of ``configs``.

        Raises:
            InputError: there is no such file, or it describes no policy.
        """
        path = Path(given) if given.endswith((".yaml", ".yml")) else configs / f"{given}.yaml"
        try:
            policy = cls(path.stem, yaml.safe_load(path.read_text("utf-8"))["model"]["recovery"])
            policy.build()
        except InputError:
            raise
        except OSError as error:
            raise InputError(
                f"--policies: {str(path)!r} cannot be read: {error.strerror}; give the name of a "
                f"file in {str(configs)!r}, or a path that ends in .yaml."
            ) from error
        except Exception as error:  # of many kinds, depending on what is wrong
            reason = " ".join(str(error).split())
            raise InputError(
                f"--policies: {str(path)!r} describes no policy under model.recovery: {reason}"
            ) from error
        return policy

    def build(self) -> RecoveryPolicy:
        """A new policy, without state."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--recovery", type=RecoveryPolicy)
        built = parser.instantiate(parser.parse_object({"recovery": self.settings}))
        policy: RecoveryPolicy = built.recovery
        return policy

    @property
    def fingerprint(self) -> str:
        """Of the settings; another policy of the same name has another."""
        return fingerprint_of(self.settings)


def protocol_prompts(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, file: Path, length: int
) -> list[list[int]]:
    """The prompts as ids, each of ``length`` tokens.

    Raises:
        InputError: a natural prompt is shorter than that.
    """
    prompts: list[list[int]] = []
    for number, prompt in enumerate(read_prompts(file, "--file"), start=1):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"][:length]
        if len(ids) < length:
            raise InputError(
                f"--file {str(file)!r}, line {number} has {len(ids)} tokens of this model, "
                f"fewer than {length}; write more, or lower --length."
            )
        prompts.append(ids)
    generator = torch.Generator().manual_seed(0)
    for number in range(RANDOM_PROMPTS):
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        prompts.insert((number + 1) * (_EVERY + 1) - 1, ids)
    return prompts


def run_policy(
    policy: RecoveryPolicy, measurements: Measurements, ids: Tensor, cap: float | None
) -> Record:
    """Let a policy recover prompts; its scores and seconds, as plain values.

    Args:
        policy: new, without state.
        measurements: of the model.
        ids: ``[N, T]`` the right tokens.
        cap: seconds after which it is stopped between two rounds; None for no limit.
    """
    target = measurements.transformer.features_of(ids)
    prompts: list[RecoveredPrompt] = []
    capped = False
    began = time.monotonic()
    with torch.no_grad():
        for prompts in policy.recover(measurements, Targets(target, [ids.shape[1]] * len(ids))):
            if cap is not None and time.monotonic() - began > cap:
                capped = any(len(prompt.tokens) < ids.shape[1] for prompt in prompts)
                break
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 3), "capped": capped, **scores(prompts, ids.tolist())}


def scores(prompts: Sequence[RecoveredPrompt], right: list[list[int]]) -> Record:
    """How many tokens are right and verified, and how many candidates and forwards they took."""
    pairs = [
        (token, truth)
        for prompt, ids in zip(prompts, right, strict=True)
        for token, truth in zip(prompt.tokens, ids, strict=False)
    ]
    # Position 0 has a scan of its own: the proposers are judged by the later positions.
    later = [token.compared for prompt in prompts for token in prompt.tokens[1:]]
    quantiles = np.quantile(later, [0.5, 0.95, 1], method="inverted_cdf").tolist() if later else []
    names = ("candidates_median", "candidates_p95", "candidates_max")
    return {
        "tokens": sum(map(len, right)),
        "done": len(pairs),
        "right": sum(token.id == truth for token, truth in pairs),
        "verified": sum(token.verified for token, _ in pairs),
        "falsely_verified": sum(token.verified and truth != token.id for token, truth in pairs),
        "exact": sum(prompt.ids == ids for prompt, ids in zip(prompts, right, strict=True)),
        **dict(zip_longest(names, quantiles)),
        "forwards": sum(prompt.forwards for prompt in prompts),
    }


def missing_policies(rows: Sequence[Record], policies: Sequence[NamedPolicy]) -> list[NamedPolicy]:
    """The policies without a row; the baseline too, where one of the others has none."""
    done = {(row["policy"], row["settings"]) for row in rows}
    missing = [one for one in policies if (one.name, one.fingerprint) not in done]
    if any(one.name != BASELINE for one in missing):
        return [one for one in policies if one.name == BASELINE or one in missing]
    return missing


def run_depth(
    transformer: TruncatedTransformer,
    model: PreTrainedModel,
    policies: Sequence[NamedPolicy],
    ids: Tensor,
    cap: float | None,
) -> Iterator[Record]:
    """Run policies on the same targets; yields a row for each as it ends.

    Args:
        transformer: the truncated model.
        model: the whole model, of the same weights.
        policies: what is compared; the baseline beside others is not stopped.
        ids: ``[N, T]`` the right tokens.
        cap: seconds for each policy; None for no limit.
    """
    language_model = LanguageModel(model, transformer.caches)
    measurements, calibrating = _timed(lambda: Measurements.measure(transformer, language_model))
    # The least of three: the first also warms up, and the others may be disturbed.
    forward = min(_timed(lambda: transformer.features_of(ids))[1] for _ in range(3))
    _log.info(
        "depth %d: calibration and linear probe %.1f s, one forward %.2f s",
        transformer.depth, calibrating, forward,
    )  # fmt: skip
    for policy in policies:
        is_baseline = policy.name == BASELINE and len(policies) > 1
        row = run_policy(policy.build(), measurements, ids, None if is_baseline else cap)
        _log.info(
            "depth %d, %s: %d/%d right, %d verified, %d falsely, %.1f s%s",
            transformer.depth, policy.name, row["right"], row["tokens"], row["verified"],
            row["falsely_verified"], row["seconds"], " (stopped)" if row["capped"] else "",
        )  # fmt: skip
        yield {
            "policy": policy.name,
            "settings": policy.fingerprint,
            "calibration_seconds": round(calibrating, 3),
            "forward_seconds": round(forward, 4),
            "device": transformer.device.type,
            **row,
        }


def run_protocol(options: argparse.Namespace) -> None:
    """Run what has no row yet, and append its rows.

    Raises:
        InputError: an option is wrong, or does not fit the model.
    """
    file = options.file or options.configs / "prompts.jsonl"
    count = len(read_prompts(file, "--file")) + RANDOM_PROMPTS
    if not 1 <= options.prompts <= count:
        raise InputError(f"--prompts must be from 1 to {count}, and is {options.prompts}.")
    if options.length < 2:
        raise InputError(f"--length must be at least 2, and is {options.length}.")
    policies = [NamedPolicy.read(name, options.configs) for name in options.policies]
    for depth in options.depths:  # before anything slow begins
        TransformerSpec(model=options.model, depth=depth).check()

    results = options.out / PROTOCOL
    rows = read_records(results)
    shared = {"model": options.model, "prompts": options.prompts, "length": options.length}
    missing = {
        depth: missing_policies(
            [row for row in rows if {**shared, "depth": depth}.items() <= row.items()], policies
        )
        for depth in options.depths
    }
    if not any(missing.values()):
        _log.info("every policy has its rows in %s", results)
        return
    model, tokenizer = TransformerSpec(model=options.model).load_causal_lm()
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    prompts = protocol_prompts(tokenizer, len(weight), file, options.length)[: options.prompts]
    shared |= {
        "run": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "cap": options.cap,
        "threads": torch.get_num_threads(),
        "version": lightning_inversion.__version__,
        "version_torch": torch.__version__,
        "version_transformers": version("transformers"),
    }
    index = len(rows)
    for depth in (depth for depth in options.depths if missing[depth]):
        transformer = TruncatedTransformer.from_model(model, tokenizer, depth=depth)
        ids = torch.tensor(prompts, device=transformer.device)
        for row in run_depth(transformer, model, missing[depth], ids, options.cap):
            append_records(results, [{"index": index, **shared, "depth": depth, **row}])
            index += 1


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    result = work()
    return result, time.monotonic() - began


def main(arguments: list[str] | None = None) -> int:
    """Run the protocol; returns the exit code, 2 for a wrong option."""
    configs = Path("configs/recovery")
    parser = argparse.ArgumentParser(
        prog="python -m lightning_inversion.replication.policies",
        description="Compare recovery policies on the same prompts and depths, in one process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=TransformerSpec.model, help="as --model.transformer.model")
    add("--depths", type=int, nargs="+", default=[1, 8, 15, 30], help="blocks kept")
    add("--policies", nargs="+", default=[BASELINE], help="files of --configs, or paths")
    add("--prompts", type=int, default=20, help="the first N of the prompts")
    add("--length", type=int, default=20, help="tokens of a prompt")
    add("--cap", type=float, help="seconds for a policy beside the recommended one")
    add("--configs", type=Path, default=configs, help="folder of the policies' files")
    add("--file", type=Path, help="the natural prompts; prompts.jsonl of --configs if left out")
    add("--out", type=Path, default=configs, help=f"folder of the results, {PROTOCOL}")
    options = parser.parse_args(arguments)
    return exit_code("protocol", lambda: run_protocol(options))


if __name__ == "__main__":
    raise SystemExit(main())

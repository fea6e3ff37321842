"""``python -m tests.benchmarks.ordinary``: right tokens of ordinary text that are not verified.

For each depth and type three kinds of target, none of them from the machine that checks: hidden
states of the float32 model that were ``stored`` in the type, of the model ``computed`` in it
(eager attention, one prompt at a time), and of the same weights in a ``wider`` type, rounded. The
right tokens are verified, and near wrong ones are offered in their place: none may be verified.
The first prompts are recovered too, as ``predict`` does. A row is kept for each setting, and one
that has a row is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import pydoc_data.topics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_inversion.data.storage import Storage
from lightning_inversion.data.texts import read_prompts
from lightning_inversion.files import append_records, read_records
from lightning_inversion.recovery.policy import Targets, recover_prompts
from lightning_inversion.recovery.token_recovery import TokenRecovery
from lightning_inversion.transformer.embedding import best_tokens
from lightning_inversion.transformer.language_model import LanguageModel
from lightning_inversion.transformer.loading import TransformerSpec
from lightning_inversion.transformer.truncated import TruncatedTransformer
from lightning_inversion.verification.measurements import Measurements
from lightning_inversion.verification.verifier import Verifier

DEPTHS = (1, 4, 8, 15, 24, 30)
TYPES = ("float32", "bfloat16", "float16")
KINDS = ("stored", "computed", "wider")
_LENGTH, _ROWS, _OFFERED = 32, 16, 4
SHOWN = ("tokens", "verified", "conditional", "group", "unresolved", "offered", "false")


def prompts(tokenizer: Any, tokens: int) -> list[list[int]]:
    """Prompts of up to 32 tokens: those of ``configs/prompts.txt``, then pages of Python's manual.

    None of it was written by the model.
    """
    found = [tokenizer(text)["input_ids"] for text in read_prompts(Path("configs/prompts.txt"), "")]
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    ids = tokenizer("\n".join(pages))["input_ids"]
    starts = range(0, len(ids) - _LENGTH, _LENGTH)
    wanted = max(1, (tokens - sum(map(len, found))) // _LENGTH)
    step = max(1, len(starts) // wanted)  # from all over the manual
    return [*found, *(ids[start : start + _LENGTH] for start in starts[::step][:wanted])]


def targets(kind: str, spec: TransformerSpec, ids: list[Tensor]) -> Iterator[Tensor]:
    """Features ``[T, F]`` of each prompt, alone, on the machine that is not the checking one."""
    dtype = "float32" if kind == "stored" else spec.dtype
    other = dataclasses.replace(spec, dtype=dtype, attention="eager").load()
    if kind == "wider":
        other.double() if dtype == "float32" else other.float()
    for one in ids:
        yield other.features_of(one[None])[0]


@torch.no_grad()
def checked(
    measurements: Measurements, target: list[Tensor], ids: list[Tensor], recovered: int
) -> dict[str, Any]:
    """Counts of the states of right tokens, of wrong ones verified, and of recovered ones."""
    transformer, verifier = measurements.transformer, measurements.derived(Verifier)
    counts = dict.fromkeys((*SHOWN, "largest residual"), 0.0)
    for rows in torch.split(torch.arange(len(ids)), _ROWS):
        some = [ids[row] for row in rows]
        padded = pad_sequence(some, batch_first=True)
        mask = pad_sequence([torch.ones_like(one, dtype=torch.bool) for one in some], True)
        aims = pad_sequence([target[row] for row in rows], batch_first=True)
        verdict = verifier.verify(padded, aims, mask, transformer.features_of)
        for name in ("verified", "conditional", "group"):
            counts[name] += int((getattr(verdict, name) & mask).sum())
        counts["tokens"] += int(mask.sum())
        counts["largest residual"] = max(
            counts["largest residual"], float(verdict.residuals[mask].max())
        )
        offered, wrong = _with_near_tokens(transformer, some)
        picked = torch.arange(len(some)).repeat_interleave(_OFFERED)
        verdict = verifier.verify(offered, aims[picked], mask[picked], transformer.features_of)
        counts["offered"] += int(wrong.sum())
        counts["false"] += int(((verdict.verified | verdict.conditional) & wrong).sum())
    counts["unresolved"] = counts["tokens"] - sum(counts[name] for name in SHOWN[1:4])
    calibration = measurements.calibration
    shown = {key: getattr(calibration, key).tolist() for key in ("rounding", "threshold", "radius")}
    return {**counts, **shown, **_recovered(measurements, target[:recovered], ids[:recovered])}


def _with_near_tokens(
    transformer: TruncatedTransformer, ids: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Copies of prompts, each with one token replaced by a near one; where the wrong tokens are."""
    embedding = transformer.embedding
    padded = pad_sequence(ids, batch_first=True).repeat_interleave(_OFFERED, dim=0)
    wrong = torch.zeros_like(padded, dtype=torch.bool)
    lengths = torch.tensor([len(one) for one in ids]).repeat_interleave(_OFFERED)
    each = torch.arange(len(padded))
    at = (each * 7919) % lengths
    own = padded[each, at]
    near = embedding.nearness(embedding(own))
    near.scatter_(1, own[:, None], -torch.inf)
    padded[each, at] = best_tokens(near, 3).indices[each, each % 3]
    wrong[each, at] = True
    return padded, wrong


def _recovered(
    measurements: Measurements, target: list[Tensor], ids: list[Tensor]
) -> dict[str, Any]:
    if not ids:
        return {}
    policy = TokenRecovery(budget=1024)
    aims, lengths = pad_sequence(target, batch_first=True), [len(one) for one in ids]
    found = recover_prompts(policy, measurements, Targets(aims, lengths))
    pairs = [
        (token, right)
        for prompt, truth in zip(found, ids, strict=True)
        for token, right in zip(prompt.tokens, truth.tolist(), strict=True)
    ]
    return {
        "recovered": len(pairs),
        "recovered right": sum(token.id == right for token, right in pairs),
        "recovered verified": sum(token.verified for token, _ in pairs),
        "recovered false": sum(token.verified and token.id != right for token, right in pairs),
    }


def main() -> None:
    """Run the settings that have no row, and print a table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each setting")
    parser.add_argument("--recovered", type=int, default=2, help="prompts that are recovered too")
    parser.add_argument("--out", type=Path, default=Path("ordinary.jsonl"))
    options = parser.parse_args()
    print(f"| depth | type | target | {' | '.join(SHOWN)} | recovered: right, verified, false |")
    print("|---" * (len(SHOWN) + 4) + "|")
    whole, tokenizer = TransformerSpec().load_causal_lm()
    language_model = LanguageModel(whole, caches=True)
    ids = [torch.tensor(one) for one in prompts(tokenizer, options.tokens)]
    for depth in options.depths:
        for dtype in dict.fromkeys(["float32", *options.types]):
            for stored in options.types if dtype == "float32" else [dtype]:
                for kind in options.kinds:
                    if (kind == "stored") != (dtype == "float32" and stored != "float32"):
                        continue
                    key = {"depth": depth, "type": stored, "target": kind, "prompts": len(ids)}
                    rows = read_records(options.out)
                    row = next((row for row in rows if key.items() <= row.items()), None)
                    if row is None:
                        began = time.process_time()
                        spec = TransformerSpec(depth=depth, dtype=dtype)
                        transformer = spec.load()
                        measurements = Measurements.measure(
                            transformer, language_model, Storage(stored)
                        )
                        target = [Storage(stored)(one) for one in targets(kind, spec, ids)]
                        counts = checked(measurements, target, ids, options.recovered)
                        seconds = round(time.process_time() - began, 1)
                        row = {"index": len(rows), **key, **counts, "seconds": seconds}
                        append_records(options.out, [row])
                    _show(row)


def _show(row: dict[str, Any]) -> None:
    shown = [f"{row[name]:.0f}" for name in SHOWN]
    names = ("recovered", "recovered right", "recovered verified", "recovered false")
    found = "{}: {}, {}, {}".format(*(row[name] for name in names)) if names[0] in row else ""
    print(f"| {row['depth']} | {row['type']} | {row['target']} | {' | '.join(shown)} | {found} |",
          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

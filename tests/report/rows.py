"""Made-up rows as runs leave them: what a report has to cope with, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from lightning_inversion.results import ResultRow

WORDS = (
    *("the", "sky", "is", "blue", "and", "red", "a", "light"),
    *("rain", "falls", "on", "every", "roof", "of", "our", "town"),
)


def row(
    index: int, *, depth: int = 1, seed: int = 0, right: float = 1.0, length: int = 6, **more: Any
) -> dict[str, Any]:
    """A row of ``fit``: each token is right, and verified, with the given probability."""
    draw = random.Random(f"{index} {depth} {seed} {right}")
    words = [WORDS[draw.randrange(len(WORDS))] for _ in range(length)]
    ids = [WORDS.index(word) for word in words]
    hits = [draw.random() < right for _ in ids]
    recovered = [
        token if hit else (token + 1) % len(WORDS) for token, hit in zip(ids, hits, strict=True)
    ]
    accuracy = sum(hits) / length
    fields: dict[str, Any] = {
        "index": index,
        "prompt": " ".join(words),
        "recovered": " ".join(WORDS[token] for token in recovered),
        "recovered_tokens": [(" " if i else "") + WORDS[t] for i, t in enumerate(recovered)],
        "recovered_ids": recovered,
        "top_k_ids": [[token, (token + 2) % len(WORDS)] for token in recovered],
        "ids": ids,
        "exact": all(hits),
        "token_accuracy": accuracy,
        "top_k_accuracy": accuracy,
        "hamming": 1 - accuracy,
        "verified": all(hits),
        "verified_tokens": sum(hits),
        "token_verified": hits,
        "unresolved": [position for position, hit in enumerate(hits) if not hit],
        "token_residuals": [0.001 if hit else 0.9 for hit in hits],
        "thresholds": [0.003] * length,
        "distance_ratio": 0.5,
        "criterion_met": True,
        "criterion_met_at": 3,
        "iterations": 20 + index % 7,
        "seconds": 1.25,
        "model": "a/model",
        "weights": "trained",
        "depth": depth,
        "layers": [depth],
        "dtype": "float32",
        "objective": "Standardized",
        "top_k": 2,
        "seed": seed,
        "version": "0.1.0",
    }
    return ResultRow(**{**fields, **more}).to_record()


def predicted(index: int, **more: Any) -> dict[str, Any]:
    """A row of ``predict``: as that of ``fit``, with the candidates of each token."""
    draw = random.Random(index)
    made = row(index, **more)
    fields: dict[str, Any] = {
        "command": "predict",
        "policy": "probe",
        "candidates": [1 + int(draw.paretovariate(0.7)) for _ in made["recovered_ids"]],
        "proposers": ["probe"] * len(made["recovered_ids"]),
        "top_k_ids": [],
        **dict.fromkeys(("objective", "top_k", "distance_ratio", "iterations")),
    }
    return {**made, **fields, **{key: value for key, value in more.items() if key in made}}


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A run's folder that holds the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

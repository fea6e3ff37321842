"""Rows as runs leave them, made up: what a report has to cope with, without a model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

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
    read = [
        token if hit else (token + 1) % len(WORDS) for token, hit in zip(ids, hits, strict=True)
    ]
    best = [[token, (token + 2) % len(WORDS)] for token in read]
    accuracy = sum(hits) / length
    made: dict[str, Any] = {
        "schema": 2,
        "index": index,
        "prompt": " ".join(words),
        "recovered": " ".join(WORDS[token] for token in read),
        "recovered_tokens": [(" " if i else "") + WORDS[token] for i, token in enumerate(read)],
        "exact": all(hits),
        "token_accuracy": accuracy,
        "top_k": 2,
        "top_k_accuracy": accuracy,
        "hamming": 1 - accuracy,
        "verified": all(hits),
        "verified_tokens": sum(hits),
        "unresolved": [place for place, hit in enumerate(hits) if not hit],
        "relative_residuals": [0.001 if hit else 0.9 for hit in hits],
        "threshold": 0.003,
        "duplicates": [],
        "distance_ratio": 0.5,
        "criterion_met": True,
        "criterion_met_at": 3,
        "iterations": 20 + index % 7,
        "seconds": 1.25,
        "ids": ids,
        "recovered_ids": read,
        "recovered_scores": [0.1] * length,
        "top_k_ids": best,
        "model": "a/model",
        "revision": None,
        "weights": "trained",
        "depth": depth,
        "layers": [depth],
        "features": None,
        "dtype": "float32",
        "objective": "Standardized",
        "seed": seed,
        "version": "0.1.0",
        "weights_sha256": f"{depth}" * 64,
    }
    return {**made, **more}


def predicted(index: int, **more: Any) -> dict[str, Any]:
    """A row of ``predict``: as that of ``fit``, with certificates token by token."""
    made = row(index, **more)
    verified = [token not in made["unresolved"] for token in range(len(made["recovered_ids"]))]
    for key in ("relative_residuals", "top_k_ids", "objective", "distance_ratio"):
        del made[key]
    draw = random.Random(index)
    made["command"] = "predict"
    made["verified"] = verified
    made["residuals"] = [0.001 if hit else 0.9 for hit in verified]
    made["candidates"] = [1 + int(draw.paretovariate(0.7)) for _ in verified]
    made["orders"] = ["probe"] * len(verified)
    return {**made, **{key: value for key, value in more.items() if key in made}}


def write_run(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A run's folder that holds the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

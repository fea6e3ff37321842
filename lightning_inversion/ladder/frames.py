"""Kept rows as data frames, and the parts of them that tables and figures show."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lightning_inversion.files import read_records

SHAPES = {"gpt2": "GPT-2", "llama": "Llama"}


def frame_of(path: Path) -> pd.DataFrame:
    """Kept rows as a table; with ``family``, the model but for its seed."""
    frame = pd.DataFrame(read_records(path))
    if len(frame):
        frame["family"] = [
            f"{SHAPES[row.shape]} {row.width}, {row.blocks} blocks, V {row.vocabulary}"
            if row.model.startswith(row.shape)
            else row.model
            for row in frame.itertuples()
        ]
    if "printed_step" in frame and "nearest_wrong" in frame:
        frame["steps_to_nearest"] = frame["nearest_wrong"] / frame["tuned_step"]
    return frame


def of_every_width(frame: pd.DataFrame) -> pd.DataFrame:
    """The models of which there is every width: those of two blocks and 1,024 tokens."""
    return frame[(frame["blocks"] == 2) & (frame["vocabulary"] == 1024)]


def made_here(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Interventions on the ladder's models; without one a model has its row among the cells."""
    return rows[rows["model"].isin(cells["model"]) & (rows["intervention"] != "none")]

"""What a run logged while it ran: the distance and its ratio by iteration, from event files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

TAGS = {"distance": "match/distance", "distance ratio": "match/distance_ratio"}
"""A curve's name, and its tag in the event files."""

Points = list[tuple[int, float]]


def scalars_of(folder: Path) -> dict[str, Points]:
    """The points (step, value) of each curve of a run; {} where nothing was logged.

    Args:
        folder: of the run; its event files are read in the order they were begun. What a killed
            process was writing is left out.
    """
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for tag, step, value in _events(path):
            found.setdefault(tag, {})[step] = value
    named = {tag: name for name, tag in TAGS.items()}
    return {named[tag]: sorted(points.items()) for tag, points in found.items() if tag in named}


def _events(path: Path) -> Iterable[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    wanted = set(TAGS.values())
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.tag in wanted:
                yield value.tag, int(event.step), float(value.simple_value)

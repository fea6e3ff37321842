"""A finished sweep -> its report, and the report's figures in TensorBoard."""

from __future__ import annotations

from pathlib import Path

from lightning_inversion.report.command import write_files
from lightning_inversion.report.load import load_results
from lightning_inversion.sweep.folder import SweepFolder


def write_report(sweep: SweepFolder) -> Path:
    """Write the report of all cells into the sweep's folder; returns the page's path."""
    out = sweep.path / "report"
    paths = write_files(load_results([sweep.path]), out)
    for old in out.glob("events.out.tfevents.*"):
        old.unlink()
    _log([path for path in paths if path.suffix == ".png"], out)
    return paths[0]


def _log(pictures: list[Path], folder: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    if not pictures:
        return
    writer = EventFileWriter(str(folder))
    for path in pictures:
        image = Summary.Image(encoded_image_string=path.read_bytes())
        value = Summary.Value(tag=f"sweep/{path.stem}", image=image)
        writer.add_event(Event(summary=Summary(value=[value])))
    writer.close()

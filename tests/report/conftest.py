"""Runs that several tests report on."""

from pathlib import Path

import pytest

from tests.report.rows import predicted, row, write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two depths by two seeds of fit, worse below, and one depth of predict."""
    for depth, right in ((1, 1.0), (4, 0.5)):
        for seed in (0, 1):
            rows = [row(i, depth=depth, seed=seed, right=right) for i in range(8)]
            for number, made in enumerate(rows):
                made["prompt"] = f"{number} of {depth}"
            write_run(tmp_path / "runs" / f"{depth}-{seed}", rows)
    write_run(tmp_path / "runs" / "p", [predicted(i, depth=4) for i in range(8)])
    return tmp_path / "runs"

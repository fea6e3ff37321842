"""The page of an audit, from rows that are made up: it must not contradict itself."""

from pathlib import Path

from lightning_inversion.report.audit import Part, write_audit
from tests.report.rows import predicted, write_run


def test_a_share_of_tokens_is_the_same_wherever_the_page_says_it(tmp_path: Path) -> None:
    """Texts of unlike length: by tokens it would be 8 of 10, as a mean over texts it is 50%."""
    rows = [predicted(0, length=8, right=1.0), predicted(1, length=2, right=0.0)]
    run = write_run(tmp_path, rows) / "results.jsonl"
    part = Part("predict", 1, "untouched", run, "done")
    page = write_audit([part], tmp_path / "audit.html").read_text()
    assert "exact recovery reads 50% of the tokens, 50% verified, and 1 of 2 texts whole" in page
    assert '--share:0.500">50%, 50% verified</td>' in page
    assert ">0.500 [0.00, 1.00]</td>" in page
    assert "50% of the tokens right" in page
    assert "80%" not in page
    assert "Shares of tokens are means over the texts." in page

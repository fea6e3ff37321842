"""The page of an audit, from made-up rows: it must not contradict itself."""

from pathlib import Path

import pytest

from lightning_inversion.errors import InputError
from lightning_inversion.report.audit_page import AuditRun, write_audit
from tests.report.rows import predicted, row, write_run


def test_a_share_of_tokens_is_the_same_wherever_the_page_has_it(tmp_path: Path) -> None:
    """Prompts of unlike length: by tokens it would be 8 of 10, as a mean over prompts it is 50%."""
    rows = [predicted(0, length=8, right=1.0), predicted(1, length=2, right=0.0)]
    run = write_run(tmp_path, rows) / "results.jsonl"
    audit = AuditRun("predict", 1, "untouched", run, "done")
    page = write_audit([audit], tmp_path / "audit.html").read_text()
    assert "finds 50% of the tokens, 50% verified, and 1 of 2 prompts exactly" in page
    assert '--share:0.500">50%, 50% verified</td>' in page
    assert ">0.500 [0.00, 1.00]</td>" in page
    assert "50% of the tokens right" in page
    assert "80%" not in page
    assert "Shares of tokens are means over the prompts." in page


def test_each_run_has_its_cell_and_its_sentence(tmp_path: Path) -> None:
    whole = [predicted(i, right=1.0) for i in range(2)]
    runs = [
        AuditRun("fit", 1, "untouched", write_run(tmp_path / "0", [row(0, right=0.0)]), "done"),
        AuditRun("predict", 1, "untouched", write_run(tmp_path / "1", whole), "done"),
        AuditRun("predict", 1, "rounded", write_run(tmp_path / "2", whole), "done"),
        AuditRun("predict", 8, "untouched", None, "failed", "lost <i>power</i>"),
        AuditRun("predict", 8, "rounded", None, "waiting"),
        AuditRun("fit", 8, "rounded", write_run(tmp_path / "3", [row(0, error="bad")]), "done"),
    ]
    page = write_audit(runs, tmp_path / "audit.html", 0).read_text()
    assert "This is a part of the audit: 4 of 6 runs are done." in page
    assert "Failed: exact recovery at depth 8, untouched (lost &lt;i&gt;power&lt;/i&gt;)." in page
    assert "(untouched). The same with: rounded." in page
    assert "gradient inversion finds 0% of the tokens, none verified, and 0 of 1" in page
    assert "No verified token is wrong." in page
    cells = [line for line in page.splitlines() if '<th scope="row">' in line]
    assert [cell.count("</td>") for cell in cells] == [4, 4]
    for word in ("failed", "not run yet", "no results"):
        assert f'class="note">{word}</td>' in page


def test_an_audit_without_results_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no result yet"):
        write_audit([AuditRun("fit", 1, "untouched", None, "waiting")], tmp_path / "audit.html")

"""The deliberate faults of ``tests.benchmarks.mutations`` still fit the package."""

import pytest

from tests.benchmarks.mutations import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_put_in(fault: Fault) -> None:
    text = (ROOT / "lightning_inversion" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.right) == 1
    assert fault.wrong != fault.right
    assert all((ROOT / name).is_file() for name in fault.tests.split())

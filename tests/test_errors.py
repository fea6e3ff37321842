"""The cause of a failed property of a module is shown."""

import pytest
from torch import nn

from lightning_inversion.errors import module_property


class Model(nn.Module):
    calls = 0

    @module_property
    def size(self) -> int:
        self.calls += 1
        return 3

    @module_property
    def wrong(self) -> int:
        return self.absent.length  # type: ignore[union-attr,return-value]


def test_a_module_property_is_computed_once() -> None:
    model = Model()
    assert (model.size, model.size, model.calls) == (3, 3, 1)


def test_an_attribute_error_within_a_property_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="wrong failed: 'Model' object has no attribute 'abse"):
        _ = Model().wrong

"""What tests of selection share."""

import jax
import pytest

from jaxhybrid.model.partition import make_mesh


@pytest.fixture(scope="module")
def one_device(compiled_once):
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        yield

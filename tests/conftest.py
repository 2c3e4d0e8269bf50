# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in the scripts; before torch is loaded


@pytest.fixture(autouse=True)
def environment():
    """Variables as they were. transformers 4 leaves a run's bf16 in the environment of the runs after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)

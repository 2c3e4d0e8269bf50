# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import os

import pytest
from hypothesis import settings

# Its limit of 200 ms an example says how busy a machine is, and nothing about the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# Before torch is loaded. The policy is that of the scripts; the models are tiny, and there is a test process for each core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def environment():
    """Variables as they were. transformers 4 leaves a run's bf16 in the environment of the runs after it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def saved(tmp_path):
    """Folder of a tiny model with its processor."""
    from tests.tiny import save_tiny  # loads torch

    return save_tiny(tmp_path / "model")

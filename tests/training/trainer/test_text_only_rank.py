# SPDX-License-Identifier: Apache-2.0
"""A rank whose batches have no image keeps step with the others: two real processes, gloo."""

import pytest
import torch

from tests.tiny import REPOSITORY, run_script
from tests.training.trainer import text_only_rank

CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


@pytest.mark.parametrize(
    ("stage", "projector_type", "checkpointing"), [("align", "c-abs", False), ("instruct", "d-abs", True)]
)
def test_one_rank_with_images_and_one_without(stage, projector_type, checkpointing, tmp_path):
    settings = [stage, projector_type, checkpointing]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    script = REPOSITORY / "tests" / "training" / "trainer" / "text_only_rank.py"
    run_script(*torchrun, script, *settings, 1, 2, tmp_path / "two.pt", env=CPU)
    # The same samples in one process, two a batch.
    text_only_rank.main(*map(str, settings), "2", "1", str(tmp_path / "one.pt"))
    two, one = (torch.load(tmp_path / name) for name in ("two.pt", "one.pt"))
    assert len(two["losses"]) == 4 and two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)

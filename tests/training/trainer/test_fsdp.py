# SPDX-License-Identifier: Apache-2.0
"""`fully_shard` on two real processes (gloo): the model shards, trains as one process does, saves whole and reloads."""

import json

import numpy as np
import pytest
import torch

from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.tiny import REPOSITORY, run_script, tiny_model
from tests.training.trainer.run_fsdp import STEPS, batch, loss_of
from training.stages import set_trained

RUN_FSDP = REPOSITORY / "tests" / "training" / "trainer" / "run_fsdp.py"


def test_sharded_training_is_that_of_one_process(tmp_path):
    tiny_model(dropout=0.0).save_pretrained(tmp_path / "start")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    run_script(*two, RUN_FSDP, tmp_path, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert all(0.4 < rank["share"] < 0.6 for rank in ranks), "each process holds about half of the parameters"

    model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "start").train()
    set_trained(model, "instruct")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(len(STEPS)):
        losses = [model(**batch(model, step, rank)).loss for rank in range(2)]
        for rank, loss in enumerate(losses):
            assert ranks[rank]["losses"][step] == pytest.approx(loss.item(), abs=1e-4), (step, rank)
        (sum(losses) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()

    saved = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "end")
    for rank in range(2):
        assert ranks[rank]["reloaded"] == pytest.approx(ranks[rank]["trained"], abs=1e-6)
        assert loss_of(saved, rank) == pytest.approx(ranks[rank]["trained"], abs=1e-6)
    one, other = saved.state_dict(), model.state_dict()
    assert one.keys() == other.keys()
    assert max(float(np.abs((one[name] - other[name]).numpy()).max()) for name in one) < 1e-3

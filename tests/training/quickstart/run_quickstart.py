# SPDX-License-Identifier: Apache-2.0
"""The quickstart in a few steps: `run_quickstart.py FOLDER STEPS`. The second process imports this file, too."""

import sys
from functools import partial

from training.quickstart import run, stand_ins

run.ALIGN_STEPS, run.INSTRUCT_STEPS, run.BATCH_SIZE, run.TEST_QUESTIONS = int(sys.argv[2]), 2, 4, 40
stand_ins.make_vision_tower = partial(stand_ins.make_vision_tower, steps=2)
stand_ins.make_language_model = partial(stand_ins.make_language_model, steps=2)

if __name__ == "__main__":
    run.run_quickstart(sys.argv[1])

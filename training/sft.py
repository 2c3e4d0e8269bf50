# SPDX-License-Identifier: Apache-2.0
"""Trains a Honeybee with TRL's SFTTrainer.

    python training/sft.py                                            # the quickstart: both stages on handwritten digits

    python training/sft.py --config training/configs/align.yaml \
        --vision_model openai/clip-vit-large-patch14 --text_model lmsys/vicuna-7b-v1.5 \
        --dataset captions.jsonl --output_dir outputs/align           # stage 1: a new projector

    python training/sft.py --config training/configs/instruct.yaml \
        --model_name_or_path outputs/align --dataset data.jsonl --output_dir outputs/instruct    # stage 2

`--mixture training/configs/recipes/recipe.yaml` in place of `--dataset` trains on a recipe of several datasets. Every
field of `SFTConfig` is a flag and a YAML key, and so are TRL's model and LoRA settings (`--use_peft`); what would change
nothing is left out with a warning, and what cannot be is refused. `--dry_run` checks and describes a run without starting
it. SIGTERM and Ctrl-C save after the step and exit with code 0; `--resume` goes on.
"""

import logging
import os
import sys
import warnings

import yaml

from training.run.settings import parse_arguments


def quickstart() -> None:
    try:
        from training.quickstart.run import run_quickstart

        run_quickstart()
    except KeyboardInterrupt:
        sys.exit("Interrupted; the same command goes on behind what is finished")


def main():
    # Waiting threads of torch would spin and take the core from the one that they wait for, wherever other work runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # transformers 5 has another name for it, which 4 does not know.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    if len(sys.argv) == 1:
        quickstart()
        return
    try:
        settings = parse_arguments()
        from training.run.launch import launch  # loads for seconds; --help and a wrong setting are answered before
    except (ValueError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted before the first step")
    launch(settings)


if __name__ == "__main__":
    main()

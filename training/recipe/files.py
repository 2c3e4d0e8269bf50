# SPDX-License-Identifier: Apache-2.0
"""Where the original files of each dataset are, below the data root."""

import os
from glob import escape, glob, has_magic

FILES = {
    "blip": ("BLIP/blip_cc_sbu/*.tar", "BLIP/blip_laion/*.tar"),
    "coyo": ("coyo/coyo100m/*.tar",),
    "vqav2": ("VQAv2/v2_OpenEnded_mscoco_train2014_questions.json", "VQAv2/v2_mscoco_train2014_annotations.json"),
    "gqa": ("GQA/annotations/train_balanced_questions_minimal.json",),
    "ocrvqa": ("OCRVQA/dataset.json",),
    "vsr": ("VSR/random/train.jsonl",),
    "sqa": ("ScienceQA/llava_train_QCM-LEPA.json",),
    "aokvqa": ("A-OKVQA/aokvqa_v1p0_train.json",),
    "refcoco": ("refcoco/annotations/finetune_refcoco_train.json",),
    "refcoco_plus": ("refcoco/annotations/finetune_refcoco+_train.json",),
    "refcocog": ("refcoco/annotations/finetune_refcocog_train.json",),
    "vg": ("VisualGenome/metadata/image_data.json", "VisualGenome/metadata/region_descriptions.json"),
    "llava150k": (
        "llava_instruct_150k/complex_reasoning_77k.json",
        "llava_instruct_150k/conversation_58k.json",
        "llava_instruct_150k/detail_23k.json",
    ),
    "sharegpt": ("Vicuna/llava_v1_5_sharegpt40k.json",),
}


def annotation_files(name: str, root: str) -> list[str]:
    """Paths of the files that a dataset is read from, shards expanded, in reading order.

    Raises:
        ValueError: no such dataset.
        FileNotFoundError: every path that is missing, at once.
    """
    if name not in FILES:
        raise ValueError(f"dataset {name!r} has no reader; there are {', '.join(FILES)}")
    paths, missing = [], []
    for pattern in FILES[name]:
        path = os.path.join(root, pattern)
        if has_magic(pattern):
            found = sorted(glob(os.path.join(escape(root), pattern)))
        else:
            found = [path] if os.path.isfile(path) else []
        paths += found
        if not found:
            missing.append(path)
    if missing:
        raise FileNotFoundError(
            f"dataset {name!r} lacks {', '.join(missing)}; put the files there, correct the data root {root!r}, or leave "
            "the dataset out"
        )
    return paths

# SPDX-License-Identifier: Apache-2.0
"""Samples as long as those of the fine-tuning mixture, without its files.

The mixture, its weights, templates, merged and de-duplicated questions and the collator are the shipped ones. The
records are made up: English words, as many as published statistics say for each dataset (`WORDS`), and a tokenizer
trained on the same words with about as many tokens a word as Llama's. With the real files, `--recipe FILE` takes their
place.
"""

import re
from functools import partial

import numpy as np
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.decoders import Metaspace
from transformers import PreTrainedTokenizerFast

from processing import HoneybeeProcessor, prepare_tokenizer
from processing.prepare_tokenizer import square_image_processor
from training.recipe.balancing import sampling_weights
from training.recipe.catalogue import DATASETS
from training.recipe.config import Recipe, load_recipe
from training.recipe.instructize import TEMPLATES, Instructions
from training.recipe.mixture import Mixture, Source
from training.recipe.sources import open_mixture, render_record

# Means: turns of an image, words of a question and of an answer. Rounded, from the datasets' papers and files: VQAv2 5.4
# questions an image, GQA 13 (balanced train), OCR-VQA 5; LLaVA150K by its three files; ShareGPT before it is cut.
WORDS = {
    "coyo": (1, 0, 14),
    "vqav2": (5.4, 6, 1),
    "gqa": (13, 9, 1),
    "ocrvqa": (5, 6, 3),
    "vsr": (1, 7, 1),
    "sqa": (1, 12, 1),
    "aokvqa": (1, 9, 1),
    "refcoco": (1, 3.5, 1),
    "refcoco_plus": (1, 3.5, 1),
    "refcocog": (1, 8.4, 1),
    "vg": (1, 5, 1),
    "sharegpt": (5, 40, 200),
}
LLAVA150K = [(77, (1, 17, 130)), (58, (4.4, 11, 20)), (23, (1, 10, 100))]  # thousand samples, and the means as above
RECORDS = 300  # of each dataset


def words() -> list[str]:
    """English words in running text, as often as they occur there."""
    text = " ".join(load().DESCR for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine))
    return re.findall(r"\b[a-z]{2,12}\b", text.lower())


def processor(num_image_tokens: int = 144, image_size: int = 224) -> HoneybeeProcessor:
    """A sentencepiece-like tokenizer of these words and of the templates, digits one by one as in Llama's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Punctuation()]
    )
    backend.decoder = Metaspace()
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=1400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    corpus = [" ".join(words()), *[TEMPLATES.read_text(encoding="utf-8")] * 5]
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    images = square_image_processor(image_size)
    return HoneybeeProcessor(images, prepare_tokenizer(tokenizer), num_image_tokens=num_image_tokens)


class _Writer:
    def __init__(self, name: str):
        self.name, self.words = name, np.array(words())
        self.random = np.random.default_rng(sum(name.encode()))

    def text(self, mean: float) -> str:
        # Long texts vary more than short ones.
        number = self.random.poisson(mean) if mean < 20 else self.random.lognormal(np.log(mean) - 0.18, 0.6)
        return " ".join(self.random.choice(self.words, max(1, int(number))))

    def record(self) -> dict:
        if self.name == "llava150k":
            shares = np.array([share for share, _ in LLAVA150K], dtype=float)
            turns, question, answer = LLAVA150K[self.random.choice(len(shares), p=shares / shares.sum())][1]
        else:
            turns, question, answer = WORDS[self.name]
        number = 1 if turns == 1 else max(1, int(self.random.poisson(turns)))
        if self.name in ("vqav2", "gqa", "ocrvqa"):
            number = min(number, 10)
        has_image = self.name != "sharegpt" and not (self.name == "sqa" and self.random.random() < 0.52)
        turn = dict.fromkeys(("question", "answer", "options", "context", "phrase", "bbox"))
        made = []
        for _ in range(number):
            made.append({**turn, "question": self.text(question), "answer": self.text(answer)})
            if DATASETS[self.name].task == "vqa-multiple-choice":
                of_sqa = self.name == "sqa"
                made[-1]["options"] = [self.text(4 if of_sqa else 1.3) for _ in range(3 if of_sqa else 4)]
                made[-1]["context"] = self.text(41) if of_sqa and self.random.random() < 0.4 else ""
                made[-1]["answer"] = "A"
            if DATASETS[self.name].task == "referring-expression":
                corners = ",".join(f"{corner:.3f}" for corner in self.random.random(4))
                made[-1].update(phrase=self.text(question), bbox=f"[{corners}]", question=None, answer=None)
            if self.name == "gqa" and self.random.random() < 0.55:  # what de-duplication by answer thins out
                made[-1]["answer"] = str(self.random.choice(["yes", "no", "left", "right"], p=[0.35, 0.35, 0.15, 0.15]))
            if self.name == "vsr":
                made[-1].update(question=f"Is the {self.text(question)}?", answer="yes")
        image = "image.jpg" if has_image else None
        return {"dataset": self.name, "task": DATASETS[self.name].task, "image": image, "turns": made}


def mixture(num_samples: int, recipe: str | None = None) -> Mixture:
    """The fine-tuning mixture: on made-up records, or with the files of `recipe`."""
    if recipe is not None:
        return open_mixture(load_recipe(recipe), num_samples, recipe)
    settings = Recipe(data_root="")
    instructions = Instructions(settings)
    sources = []
    for name in settings.chosen():
        writer = _Writer(name)

        deduplicate = settings.turns.deduplicate.get(name)
        render = partial(render_record, instructions=instructions, deduplicate=deduplicate, keep="draw")
        sources.append(Source(name, DATASETS[name].task, [writer.record() for _ in range(RECORDS)], render))
    return Mixture(sources, sampling_weights(sources, settings.balancing, settings.weights), num_samples)

# SPDX-License-Identifier: Apache-2.0
"""The quickstart from stand-ins to a table of accuracies. All training here goes through `training/run/launch.py`."""

import json
import multiprocessing
import os
import shutil
import sys
from collections import defaultdict

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers import set_seed
from trl import ModelConfig, SFTConfig

from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from training.quickstart.digit_scenes import QUESTION_WEIGHTS, SceneMaker
from training.quickstart.stand_ins import make_stand_ins
from training.run.arguments import HoneybeeArguments
from training.run.checkpoints import last_whole_checkpoint
from training.run.launch import prepare, run
from training.run.settings import Settings

PROJECTOR = {"projector_type": "c-abs", "num_query_tokens": 16, "hidden_size": 64, "depth": 2}
BATCH_SIZE = 32
ALIGN_STEPS, INSTRUCT_STEPS = 250, 350
CAPTION_SHARE = 0.3  # of the instruction data
TEST_QUESTIONS = 800

ASK_SCRIPT = """\
from transformers import pipeline
ask = pipeline("image-text-to-text", model={model!r}, trust_remote_code=True)
print(ask(text=[{{"role": "user", "content": [{{"type": "image", "path": {scene!r}}}, \
{{"type": "text", "text": {question!r}}}]}}], return_full_text=False)[0]["generated_text"])
"""

FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        "chat_template": Value("string"),
    }
)


def make_dataset(folder: str, stage: str, seed: int, blind: bool) -> None:
    """Writes the samples of a stage; `blind` replaces every image by a black one."""
    maker = SceneMaker("train", seed)
    steps, caption_share = (ALIGN_STEPS, 1.0) if stage == "align" else (INSTRUCT_STEPS, CAPTION_SHARE)

    def samples():
        for _ in range(steps * BATCH_SIZE):
            scene = maker.scene()
            messages, chat_template = maker.conversation(scene.contents, caption_share)
            image = PILImage.new("RGB", scene.image.size) if blind else scene.image
            yield {"messages": messages, "images": [image], "chat_template": chat_template}

    Dataset.from_list(list(samples()), features=FEATURES).save_to_disk(folder)


def is_model(folder: str) -> bool:
    """Whether a stage was finished here."""
    return os.path.isfile(os.path.join(folder, "model.safetensors"))


def train_stage(folder: str, stage: str, dataset: str, seed: int, **model) -> str:
    """Trains a stage, or what is left of it, unless `folder` holds it already; returns `folder`."""
    if is_model(folder):
        return folder
    stopped = last_whole_checkpoint(folder) is not None
    if not stopped:
        shutil.rmtree(folder, ignore_errors=True)
    model_name_or_path = model.pop("model_name_or_path", None)
    settings = Settings(
        HoneybeeArguments(stage=stage, dataset=dataset, **model),
        SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            learning_rate=3e-3,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": 1e-4},
            warmup_steps=20,
            weight_decay=0.01,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=seed,
            resume_from_checkpoint="true" if stopped else None,
        ),
        ModelConfig(model_name_or_path=model_name_or_path, dtype="float32"),
    )
    trainer, checkpoint = prepare(settings)
    run(trainer, checkpoint, how_to_go_on="the same command again")
    return folder


def set_up(seed: int) -> None:
    """A process of the quickstart. Models as small as these gain next to nothing from a second thread."""
    set_seed(seed)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def build(name: str, blind: bool, stand_ins: tuple[str, str], output_dir: str, seed: int) -> tuple[str, str]:
    """Trains both stages; returns the folders of the two models."""
    vision, text = stand_ins
    folders = {}
    for stage in ("align", "instruct"):
        data = os.path.join(output_dir, "data", f"{name}_{stage}")
        if not os.path.isfile(os.path.join(data, "dataset_info.json")):  # written last
            make_dataset(data, stage, seed + (stage == "instruct"), blind)
        parts = (
            {"vision_model": vision, "text_model": text, "projector": PROJECTOR}
            if stage == "align"
            else {"model_name_or_path": folders["align"]}
        )
        target = name if stage == "instruct" else f"{name}_{stage}"
        folders[stage] = train_stage(os.path.join(output_dir, target), stage, data, seed, **parts)
    return folders["align"], folders["instruct"]


def build_control(log: str, *arguments) -> None:
    """[`build`] of the blind control, in a process of its own that writes to a file."""
    with open(log, "w", encoding="utf-8") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    set_up(arguments[-1])
    build("blind", True, *arguments)


def build_both(stand_ins: tuple[str, str], output_dir: str, seed: int) -> tuple[str, str, str]:
    """The model after alignment, the model, and the blind control, which a second process trains at the same time.

    Raises:
        SystemExit: the training was stopped, or that of the control failed.
    """
    arguments = (stand_ins, output_dir, seed)
    blind, log = os.path.join(output_dir, "blind"), os.path.join(output_dir, "blind.log")
    # Not forked: torch may have threads by now.
    control = multiprocessing.get_context("spawn").Process(target=build_control, args=(log, *arguments))
    if is_model(blind):
        return *build("model", False, *arguments), blind
    print(f"A second process trains the blind control and writes to {log}", flush=True)
    control.start()
    try:
        aligned, model = build("model", False, *arguments)
        control.join()
    finally:
        if control.is_alive():  # the model's training was stopped or failed; the control saves what it has
            control.terminate()
            control.join()
    if not is_model(blind):
        sys.exit(f"The blind control is not finished; {log} says why. The same command goes on")
    return aligned, model, blind


class Questions:
    """The held-out scenes with their questions, the same for every model that is compared."""

    def __init__(self, maker: SceneMaker, number: int):
        self.scenes = [maker.scene() for _ in range(number)]
        asked = [maker.question(scene.contents) for scene in self.scenes]
        self.kinds, self.questions, self.answers = (list(column) for column in zip(*asked))

    @torch.inference_mode()
    def ask(self, folder: str, blind: bool = False, batch_size: int = 80, **asked) -> list[str]:
        """The model's answers, generated greedily; `asked` are settings of the processor's call."""
        model = HoneybeeForConditionalGeneration.from_pretrained(folder).eval()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
        processor = HoneybeeProcessor.from_pretrained(folder)
        given = []
        for start in tqdm(range(0, len(self.scenes), batch_size), desc=f"Answering ({os.path.basename(folder)})"):
            rows = slice(start, start + batch_size)
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                    add_generation_prompt=True,
                )
                for question in self.questions[rows]
            ]
            images = [PILImage.new("RGB", s.image.size) if blind else s.image for s in self.scenes[rows]]
            inputs = processor(
                images=images, text=texts, add_special_tokens=False, padding=True, return_tensors="pt", **asked
            ).to(device)
            output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            given += processor.tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
        return [answer.strip() for answer in given]

    def accuracy(self, given: list[str]) -> dict[str, float]:
        """Share of exact answers, overall and by kind."""
        right = defaultdict(list)
        for kind, answer, truth in zip(self.kinds, given, self.answers):
            right[kind].append(answer == truth)
            right["overall"].append(answer == truth)
        return {kind: sum(right[kind]) / len(right[kind]) for kind in ("overall", *QUESTION_WEIGHTS) if right[kind]}

    def draw_sheet(self, given: list[str], path: str, number: int = 12) -> None:
        """A picture of some scenes with question, answer and truth."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(3, number // 3, figsize=(3 * number // 3, 10))
        for index, axis in enumerate(axes.flat):
            axis.imshow(self.scenes[index].image)
            axis.set_xticks([8, 24, 40, 56], "abcd")
            axis.set_yticks([8, 24, 40, 56], "1234")
            right = given[index] == self.answers[index]
            title = self.questions[index].replace(" ,", ",\n").replace(" ?", "?")
            axis.set_title(
                f"{title}\n{given[index]}  (truth: {self.answers[index]})", color="black" if right else "red"
            )
        figure.tight_layout()
        figure.savefig(path, dpi=70)
        pyplot.close(figure)


def run_quickstart(output_dir: str = os.path.join("outputs", "quickstart"), seed: int = 0) -> dict[str, dict]:
    """Makes stand-ins, trains both stages and a blind control, evaluates by generation on held-out scenes, and prints
    the result. What an earlier run finished in `output_dir` is kept. Returns accuracies by model and kind of question.
    """
    set_up(seed)
    stand_ins = make_stand_ins(os.path.join(output_dir, "stand_ins"), seed)
    aligned, model, blind = build_both(stand_ins, output_dir, seed)

    questions = Questions(SceneMaker("test", seed), TEST_QUESTIONS)
    given = questions.ask(model)
    table = {
        "model": questions.accuracy(given),
        "after alignment only": questions.accuracy(questions.ask(aligned)),
        "blind control": questions.accuracy(questions.ask(blind, blind=True)),
    }
    sheet, scene = os.path.join(output_dir, "samples.png"), os.path.join(output_dir, "scene.png")
    questions.draw_sheet(given, sheet)
    shown = questions.kinds.index("what")
    questions.scenes[shown].image.save(scene)

    with open(os.path.join(output_dir, "results.json"), "w", encoding="utf-8") as file:
        json.dump(table, file, indent=2)
    script = ASK_SCRIPT.format(model=model, scene=scene, question=questions.questions[shown])
    with open(os.path.join(output_dir, "ask.py"), "w", encoding="utf-8") as file:
        file.write(script)

    kinds = list(table["model"])
    print(f"\nAccuracy on {TEST_QUESTIONS} questions about held-out scenes\n")
    print(f"{'':22}" + "".join(f"{kind:>9}" for kind in kinds))
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{row[kind]:9.2f}" for kind in kinds))
    print(f"\nModel: {model}\nScenes, questions, answers: {sheet}")
    print(f"\nTo ask it about {scene}:\n\n{script}")
    return table

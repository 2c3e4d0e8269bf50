# SPDX-License-Identifier: Apache-2.0
import json
import os
import pickle
import shutil
import struct
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hub_upload.convert_official import ConversionError, convert
from modeling_honeybee import HoneybeeForConditionalGeneration
from processing import HoneybeeProcessor
from tests.golden import TOKENIZER, checkpoints
from tests.tiny import REPOSITORY, run_script

SCRIPT = REPOSITORY / "hub_upload" / "convert_official.py"
CASES = checkpoints()
SMALL = next(path for path, _ in CASES if path.name == "c-abs-nondiv-m9")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy that may be spoiled."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SMALL / name, folder / name)
        os.chmod(folder / name, 0o644)
    return folder


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_checkpoint_agrees_with_the_official_code(tmp_path):
    """Projector output, logits, loss, gradients and greedy tokens, in a process that loads the folders' own code."""
    arguments = []
    for checkpoint, reference in CASES:
        names = convert(checkpoint, tmp_path / checkpoint.name, str(TOKENIZER))
        (tmp_path / f"{checkpoint.name}.json").write_text(json.dumps(names))
        arguments += [tmp_path / checkpoint.name, reference, tmp_path / f"{checkpoint.name}.json"]
    assert len(CASES) >= 2
    script = tmp_path / "verify_conversion.py"  # away from this project
    shutil.copy(REPOSITORY / "hub_upload" / "verify_conversion.py", script)
    result = run_script(script, *arguments, cwd=tmp_path, env={"HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert result.stdout.count("  ok") == 6 * len(CASES), result.stdout


def test_command_line_with_verification(tmp_path):
    result = run_script(
        SCRIPT, "--checkpoint", SMALL, "--output", tmp_path / "out", "--tokenizer", TOKENIZER, "--verify", SMALL
    )
    assert "greedy tokens that differ" in result.stdout and "TOO FAR" not in result.stdout


def test_output_is_complete(tmp_path):
    convert(SMALL, tmp_path / "out", str(TOKENIZER))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "processor_config.json", "chat_template.jinja", "modeling_honeybee.py", "projectors_honeybee.py",
        "deformable_attention_honeybee.py", "configuration_honeybee.py", "processing_honeybee.py",
    }  # fmt: skip
    assert os.listdir(tmp_path) == ["out"], "nothing temporary is left"
    model, info = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = HoneybeeProcessor.from_pretrained(tmp_path / "out")
    assert processor.num_image_tokens == model.config.num_image_tokens == 9
    assert processor.image_token_id == model.config.image_token_id == 416
    official = json.loads((SMALL / "config.json").read_text())
    assert model.config.vision_feature_layer == official["projector_config"]["feature_layer_index"]
    assert list(processor.image_processor.image_mean) == official["vision_config"]["image_mean"]
    # The saved tokenizer is a plain one.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert tokenizer.is_fast and tokenizer.convert_tokens_to_ids("<image>") == 416
    embeddings = load_file(tmp_path / "out" / "model.safetensors")["model.language_model.embed_tokens.weight"]
    torch.testing.assert_close(embeddings[-1], embeddings[:-1].mean(0))


@pytest.mark.parametrize("layout", ["pickle", "sharded pickle", "sharded safetensors"])
def test_every_layout_of_weights(layout, checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "expected", str(TOKENIZER))
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = [names] if layout == "pickle" else [names[::2], names[1::2]]
    kind = "safetensors" if "safetensors" in layout else "bin"
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for index, half in enumerate(halves, 1):
        file = f"{stem}.{kind}" if len(halves) == 1 else f"{stem}-{index:05}-of-00002.{kind}"
        part = {name: tensors[name] for name in half}
        weight_map |= dict.fromkeys(half, file)
        if kind == "safetensors":
            save_file(part, checkpoint / file)
        else:
            torch.save(part, checkpoint / file)
    if len(halves) > 1:
        (checkpoint / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(checkpoint, tmp_path / "out", str(TOKENIZER))
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_and_shards(dtype, tmp_path):
    convert(SMALL, tmp_path / "out", str(TOKENIZER), dtype=dtype, max_shard_size="60KB")
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    model, info = HoneybeeForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"] and {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("checkpoint", [path for path, _ in CASES], ids=lambda path: path.name)
def test_half_precision_follows_float32(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out", str(TOKENIZER))
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=dtype)
        tower = model.model.vision_tower.to(torch.float32)  # the projector alone is compared
        features = model.model.get_patch_features(pixels)
        assert next(tower.parameters()).dtype == features.dtype == torch.float32
        outputs[dtype] = model.model.projector(features.to(dtype))
        outputs[dtype].float().pow(2).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.model.projector.parameters())
    full = outputs.pop(torch.float32)
    for dtype, half in outputs.items():
        assert half.dtype == dtype
        assert (half.float() - full).norm() / full.norm() < 2e-2, dtype


def test_memory_stays_under_two_shards(tmp_path):
    """A checkpoint of 300 MB in holes: 16-bit weights, converted to another dtype, in shards of 40 MB."""
    folder = tmp_path / "big"
    folder.mkdir()
    config = json.loads((SMALL / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12}
    config["projector_config"] |= {"output_hidden_size": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, tensor in load_file(SMALL / "model.safetensors").items():
        copies = [name]
        if ".layers.0." in name and name.startswith("language_model"):
            copies = [name.replace(".layers.0.", f".layers.{i}.") for i in range(12)]
        elif ".layers.1." in name and name.startswith("language_model"):
            continue
        # Only the language model grows: 48 -> 1024, 96 -> 2816, with the projector's output.
        grows = name.startswith("language_model") or "readout" in name
        widths = {48: 1024, 96: 2816} if grows else {}
        shape = [widths.get(size, size) for size in tensor.shape]
        for copy in copies:
            size = 2 * torch.Size(shape).numel()
            header[copy] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    assert offset > 300e6
    result = run_script(
        REPOSITORY / "tests" / "hub_upload" / "convert_with_memory.py",
        folder, tmp_path / "out", TOKENIZER, "bfloat16", "40MB",
        env={"MALLOC_MMAP_THRESHOLD_": "65536"},  # else glibc keeps some of what is freed, now more, now less
    )  # fmt: skip
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    peak = int(result.stdout.split("peak")[-1].split()[0])
    assert peak < 2 * largest, f"{peak / 1e6:.0f} MB for shards of {largest / 1e6:.0f} MB"


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def remove(name):
    return lambda folder: edit_weights(folder, lambda t: t.pop(name))


def rename(folder):
    edit_weights(
        folder, lambda t: t.update({"abstractor.net.0.b1.conv9.weight": t.pop("abstractor.net.0.b1.conv3.bn.bias")})
    )


def transpose(folder):
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    edit_weights(folder, lambda t: t.update({name: t[name].T}))


def unknown_projector(folder):
    edit_config(folder, lambda config: config["projector_config"].update(projector_type="q-former"))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def hostile_pickle(folder):
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"abstractor.pos_emb": RunsCode()}, file)


def hostile_zip(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"abstractor.pos_emb": RunsCode()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove("abstractor.readout.0.weight"), ["1 missing", "model.projector.readout.0.weight"]),
        (rename, ["1 missing", "norm3.bias", "1 unexpected", "abstractor.net.0.b1.conv9.weight"]),
        (transpose, ["wrong shape", "up_proj.weight is [48, 96] and should be [96, 48]"]),
        (unknown_projector, ["q-former", "linear, mlp, resampler, c-abs, d-abs"]),
        (truncate, ["model.safetensors cannot be read", "download it again"]),
        (hostile_pickle, ["pytorch_model.bin", "refused"]),
        (hostile_zip, ["pytorch_model.bin", "refused"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["neither model.safetensors nor pytorch_model.bin"]),
        (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["not valid JSON"]),
        (lambda folder: edit_config(folder, lambda c: c.pop("projector_config")), ["visual_projector_config"]),
        (
            lambda folder: edit_config(folder, lambda c: c["projector_config"].update(num_query_tokens=10)),
            ["10", "9 or 16"],
        ),
        (
            lambda folder: edit_config(folder, lambda c: c["projector_config"].pop("feature_layer_index")),
            ["feature_layer_index"],
        ),
    ],
)
def test_a_spoiled_checkpoint_stops_with_one_sentence(spoil, words, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil(checkpoint)
    with pytest.raises(ConversionError) as error:
        convert(checkpoint, tmp_path / "out", str(TOKENIZER))
    assert all(word in str(error.value) for word in words), error.value
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"], "no output, nothing half-written, no code run"


def test_the_older_layout_names_its_tokens_at_the_top(checkpoint, tmp_path):
    def older(config):
        config["visual_projector_config"] = config.pop("projector_config")
        config["num_query_tokens"] = config["visual_projector_config"]["num_query_tokens"]
        config["visual_projector_config"]["num_query_tokens"] = None

    edit_config(checkpoint, older)
    convert(checkpoint, tmp_path / "out", str(TOKENIZER))
    assert HoneybeeProcessor.from_pretrained(tmp_path / "out").num_image_tokens == 9


def test_tied_embeddings(checkpoint, tmp_path):
    edit_config(checkpoint, lambda config: config["text_config"].update(tie_word_embeddings=True))
    edit_weights(checkpoint, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    convert(checkpoint, tmp_path / "out", str(TOKENIZER))
    model = HoneybeeForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_wrong_tokenizers_are_named(tmp_path):
    with pytest.raises(ConversionError, match="give --tokenizer.*'tiny-tokenizer'"):
        convert(SMALL, tmp_path / "out")
    from tests.tiny import word_tokenizer

    word_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ConversionError, match="has 175 tokens and the language model 416"):
        convert(SMALL, tmp_path / "out", str(tmp_path / "other"))


def test_an_existing_output_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="already exists"):
        convert(SMALL, tmp_path / "out", str(TOKENIZER))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_errors_end_the_script(checkpoint, tmp_path):
    truncate(checkpoint)
    arguments = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--tokenizer", TOKENIZER]
    result = run_script(SCRIPT, *arguments, check=False, python=sys.executable)
    assert result.returncode == 1
    assert result.stdout.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_failure_while_writing_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hub_upload.convert_official.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert(checkpoint, tmp_path / "out", str(TOKENIZER))
    assert os.listdir(tmp_path) == ["checkpoint"]

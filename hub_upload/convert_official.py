# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint of the official Honeybee release to a folder that transformers loads.

    python hub_upload/convert_official.py --checkpoint 7B-C-Abs-M144/last --tokenizer vicuna-7b-v1.5 --output honeybee-7b

The output is complete: config, sharded safetensors, tokenizer, processor, chat templates, generation config, model
code. Weights stream from the checkpoint's files, which are memory-mapped, to the output's shard by shard: the memory
that is needed beside them stays under twice --max-shard-size, whatever the size of the model.

With `--verify REFERENCE` the result is loaded by a process of its own and compared with reference data of the official
code (`io.safetensors`, `io.json`, `projector_grads.safetensors`).
"""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from modeling_honeybee import HoneybeeConfig, HoneybeeForConditionalGeneration, HoneybeeProjectorConfig
from modeling_honeybee.model_folder import CONVERSION_FILE, read_json
from processing import HoneybeeProcessor, prepare_tokenizer
from processing.prepare_tokenizer import square_image_processor

# Tensors of old transformers versions that are computed, not learned.
COMPUTED = re.compile(r"position_ids$|rotary_emb\.inv_freq$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Official name -> ours, by projector; the first pattern that matches the whole name counts.
_MLP = [(r"net\.(\d+\..*)", r"mlp.\1")]
PROJECTOR_NAMES = {
    "linear": _MLP,
    "mlp": _MLP,
    "c-abs": [
        (r"net\.0\.b(\d+)\.(.*)", r"stage1.\1.\2"),
        (r"net\.2\.b(\d+)\.(.*)", r"stage2.\1.\2"),
    ],
    "resampler": [
        (r"visual_input_fc\.(.*)", r"input_proj.\1"),
        (r"visual_output_fc\.(.*)", r"output_proj.\1"),
        (r"vit_eos", "eos_tokens"),
        (r"encoder\.layers\.(\d+)\.crossattention\.(.*)", r"layers.\1.\2"),
    ],
    "d-abs": [
        (r"v_pos_emb", "pos_emb"),
        (r"query_position_embeddings\.(.*)", r"query_embeddings.\1"),
        (r"layers\.(\d+)\.encoder_attn(.*)", r"layers.\1.cross_attn\2"),
    ],
}
# Within a layer, after the step above.
LAYER_NAMES = {
    "c-abs": [
        (r"conv(\d)\.conv\.weight", r"conv\1.weight"),
        (r"conv(\d)\.bn\.(.*)", r"norm\1.\2"),
        (r"se\.(.*)", r"squeeze_excite.\1"),
        (r"downsample\.conv\.weight", "shortcut.0.weight"),
        (r"downsample\.bn\.(.*)", r"shortcut.1.\1"),
    ],
    "resampler": [
        (r"norm1\.(.*)", r"norm_query.\1"),
        (r"normk\.(.*)", r"norm_features.\1"),
        (r"attention\.query\.(.*)", r"q_proj.\1"),
        (r"attention\.key\.(.*)", r"k_proj.\1"),
        (r"attention\.value\.(.*)", r"v_proj.\1"),
        (r"output\.out_proj\.(.*)", r"out_proj.\1"),
        (r"output\.norm2\.(.*)", r"norm_mlp.\1"),
        (r"output\.mlp\.w1\.(.*)", r"gate_proj.\1"),
        (r"output\.mlp\.w3\.(.*)", r"up_proj.\1"),
        (r"output\.mlp\.w2\.(.*)", r"down_proj.\1"),
        (r"output\.mlp\.ffn_ln\.(.*)", r"norm_inner.\1"),
    ],
}


# Official field of a projector's config -> ours.
COMMON_FIELDS = ("num_query_tokens", "num_eos_tokens", "pos_emb", "hidden_size")
PROJECTOR_FIELDS = {
    "linear": {"depth": "depth", "prenorm": "prenorm"},
    "mlp": {"depth": "depth", "prenorm": "prenorm"},
    "c-abs": {"depth": "depth", "mlp_depth": "mlp_depth", "prenorm": "prenorm"},
    "resampler": {
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "attention_probs_dropout_prob": "dropout",
        "layer_norm_eps": "layer_norm_eps",
    },
    "d-abs": {
        "num_queries": "num_query_tokens",  # the one that the official projector follows
        "d_model": "hidden_size",
        "decoder_layers": "num_hidden_layers",
        "decoder_attention_heads": "num_attention_heads",
        "decoder_n_points": "num_sampling_points",
        "decoder_ffn_dim": "intermediate_size",
        "dropout": "dropout",
        "pooled_v_target": "pooled_v_target",
    },
}


class ConversionError(ValueError):
    """A checkpoint that cannot be converted; the message says why and what to do."""


def _rename(name: str, patterns: list[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name


def projector_name(name: str, projector_type: str) -> str:
    """Our name of a projector's parameter: `net.0.b1.conv1.bn.weight` -> `stage1.0.norm1.weight`."""
    name = _rename(name, PROJECTOR_NAMES[projector_type])
    if (match := re.fullmatch(r"((?:stage1|stage2|layers)\.)(\d+)(\..*)", name)) and projector_type in LAYER_NAMES:
        start, index, rest = match.groups()
        if start != "layers.":
            index = str(int(index) - 1)  # the official blocks count from 1
        name = f"{start}{index}.{_rename(rest[1:], LAYER_NAMES[projector_type])}"
    return name


def our_name(name: str, projector_type: str) -> str | None:
    """Our name of an official tensor; None for one that is computed. Unknown names come back as they are."""
    if COMPUTED.search(name):
        return None
    if name.startswith("abstractor."):
        return "model.projector." + projector_name(name.removeprefix("abstractor."), projector_type)
    for official, ours in (
        ("vision_model.vision_model.", "model.vision_tower."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if name.startswith(official):
            return ours + name.removeprefix(official)
    return name


def read_config(checkpoint: Path) -> tuple[HoneybeeConfig, dict]:
    """Our configuration of an official checkpoint, and the official one.

    `image_token_id` is the first id behind the vocabulary.
    """
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ConversionError(f"{checkpoint} has no config.json; give the folder of an official checkpoint")
    official = read_json(path, ConversionError, "download it again")
    projector = official.get("projector_config") or official.get("visual_projector_config")
    if not projector or "vision_config" not in official or "text_config" not in official:
        raise ConversionError(
            f"{path} has the keys {', '.join(official)}; an official Honeybee config has vision_config, text_config and "
            "projector_config (or visual_projector_config)"
        )
    projector = dict(projector)
    if projector.get("num_query_tokens") is None:
        projector["num_query_tokens"] = official.get("num_query_tokens")
    if projector["num_query_tokens"] is None and projector.get("num_queries") is None:
        raise ConversionError(f"{path} does not say how many visual tokens an image has (num_query_tokens); add it")
    kind = projector.get("projector_type", "c-abs")
    if kind == "mlp" and projector.get("depth") == 1:
        kind = "linear"

    fields = {**{name: name for name in COMMON_FIELDS}, **PROJECTOR_FIELDS.get(kind, {})}
    settings = {ours: projector[name] for name, ours in fields.items() if projector.get(name) is not None}
    if settings.get("pooled_v_target") not in (None, "tgt", "none"):
        settings["pooled_v_target"] = "query"  # the official code takes any other word for it
    layer = projector.get("feature_layer_index")
    if layer is None:
        raise ConversionError(f"{path} does not say which layer the projector reads (feature_layer_index); add it")

    def without(section, *names):
        return {k: v for k, v in official[section].items() if k not in (*names, "architectures", "_name_or_path")}

    vision = without(
        "vision_config", "encoder_type", "pretrained_vision_name_or_path", "image_mean", "image_std", "model_type"
    )
    text = {"model_type": "llama", **{k: v for k, v in without("text_config").items() if v != ""}}
    vocab_size = text.get("vocab_size", 32000)
    try:
        config = HoneybeeConfig(
            vision_config={"model_type": "clip_vision_model", **vision},
            text_config={**text, "vocab_size": vocab_size + 1},
            projector_config=HoneybeeProjectorConfig(projector_type=kind, **settings),
            image_token_id=vocab_size,
            vision_feature_layer=layer,
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{path}: {error}") from error
    return config, official


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold the weights: one, or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = checkpoint / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(read_json(index, ConversionError, "download it again").get("weight_map", {}).values()))
            if not names:
                raise ConversionError(f"{index} names no file (weight_map); download it again")
            missing = [shard for shard in names if not (checkpoint / shard).is_file()]
            if missing:
                raise ConversionError(f"{index} names {', '.join(missing)}, which is not there; download it")
            return [checkpoint / shard for shard in names]
        if (checkpoint / name).is_file():
            return [checkpoint / name]
    raise ConversionError(f"{checkpoint} has neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def open_weights(files: list[Path]):
    """Loaders of all tensors by official name; nothing is read before a loader is called.

    Returns:
        {name: (shape, loader)}.
    """
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                opened = safe_open(file, framework="pt")
                for name in opened.keys():  # noqa: SIM118  not a dict
                    shape = tuple(opened.get_slice(name).get_shape())
                    tensors[name] = (shape, lambda opened=opened, name=name: opened.get_tensor(name))
            else:
                # weights_only refuses pickles that would run code; mmap leaves the tensors on disk, which only the
                # format before torch 1.6 does not allow
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
                if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
                    raise ConversionError(
                        f"{file} is not a mapping of names to tensors; give the pytorch_model.bin of the checkpoint, not "
                        "a training state"
                    )
                for name, tensor in state.items():
                    tensors[name] = (tuple(tensor.shape), lambda tensor=tensor: tensor)
        except ConversionError:
            raise
        except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, AttributeError) as error:
            raise ConversionError(f"{file} cannot be read ({error}); download it again") from error
        except pickle.UnpicklingError as error:
            raise ConversionError(
                f"{file} holds more than tensors, which would run code when loaded, and is refused "
                f"({str(error).splitlines()[0]}); use a safetensors copy from a source you trust"
            ) from error
    return tensors


def plan(config: HoneybeeConfig, tensors: dict) -> dict[str, tuple[str, torch.Size]]:
    """Which official tensor becomes which of ours: {our name: (official name, our shape)}.

    Raises:
        ConversionError: listing what is missing, unexpected or of the wrong shape.
    """
    with torch.device("meta"):
        model = HoneybeeForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:  # the head is the embedding, whether the checkpoint repeats it or not
        del expected["lm_head.weight"]
        tensors = {name: tensor for name, tensor in tensors.items() if name != "language_model.lm_head.weight"}
    unused_block = re.compile(r"model\.vision_tower\.encoder\.layers\.(\d+)\.")
    planned, unexpected, wrong = {}, [], []
    for official, (shape, _) in tensors.items():
        name = our_name(official, config.projector_config.projector_type)
        if name is None:
            continue
        if name not in expected:
            block = unused_block.match(name)
            depth = config.vision_config.num_hidden_layers
            # Blocks above the feature layer are never run; ours are not even built.
            if not (block and config.num_vision_blocks <= int(block[1]) < depth):
                unexpected.append(official)
            continue
        if not _fits(name, shape, expected[name], config):
            wrong.append(f"{official} is {list(shape)} and should be {list(expected[name])}")
        planned[name] = (official, expected[name])
    names = {our_name(n, config.projector_config.projector_type): n for n in tensors}
    missing = [name for name in expected if name not in names]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if found
    ]
    if problems:
        raise ConversionError(
            f"the weights do not belong to this config ({config.projector_config.projector_type}, "
            f"{config.num_image_tokens} visual tokens): tensors " + "; ".join(problems)
        )
    return planned


def _fits(name: str, shape: tuple, expected: torch.Size, config: HoneybeeConfig) -> bool:
    if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        return shape == (expected[0] - 1, *expected[1:])
    if name == "model.projector.pos_emb" and config.projector_config.projector_type in ("linear", "mlp", "c-abs"):
        return shape in (tuple(expected), (1, expected[1] + 1, expected[2]))
    # A 1 x 1 convolution is a linear layer here.
    return shape in (tuple(expected), (*expected, 1, 1) if len(expected) == 2 else None)


def convert_tensor(name: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype | None) -> torch.Tensor:
    """One tensor in our shape and dtype."""
    if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        # The row of <image> starts at the mean of the others, so that its logit is never the largest.
        tensor = torch.cat([tensor, tensor.float().mean(0, keepdim=True).to(tensor.dtype)])
    elif name == "model.projector.pos_emb" and tensor.shape[1] == shape[1] + 1:
        tensor = tensor[:, 1:]  # old checkpoints have a row for the class token, which is never used
    tensor = tensor.reshape(shape)
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def write_weights(planned: dict, tensors: dict, folder: Path, dtype: torch.dtype | None, max_shard_size: str) -> None:
    """Writes safetensors shards; holds the tensors of one shard at a time."""
    # The library decides on shards from sizes alone: meta tensors have those and no memory.
    sizes = {}
    for name, (official, shape) in planned.items():
        source = tensors[official][1]().dtype if dtype is None else dtype
        sizes[name] = torch.empty(shape, dtype=source, device="meta")
    shards = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    progress = tqdm(total=len(planned), desc="Converting", unit="tensor")
    for filename, names in shards.filename_to_tensors.items():
        shard = {}
        for name in names:
            official, shape = planned[name]
            shard[name] = convert_tensor(name, tensors[official][1](), shape, dtype)
            progress.update()
        save_file(shard, folder / filename, metadata={"format": "pt"})
    progress.close()
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def build_processor(config: HoneybeeConfig, official: dict, checkpoint: Path, tokenizer: str | None):
    """The processor of a checkpoint: its tokenizer is found beside the weights or given."""
    named = (official.get("lm_config") or {}).get("pretrained_tokenizer_name_or_path") or "the language model's"
    if tokenizer is None:
        has_tokenizer = any((checkpoint / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        if not has_tokenizer:
            raise ConversionError(
                f"{checkpoint} has no tokenizer, as usual for official checkpoints; give --tokenizer the folder or Hub "
                f"name of the language model's (its config names {named!r})"
            )
        tokenizer = str(checkpoint)
    try:
        prepared = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer))
    except (OSError, ValueError, ImportError) as error:
        raise ConversionError(f"--tokenizer {tokenizer!r} cannot be loaded: {error}") from error
    image_token_id = prepared.convert_tokens_to_ids("<image>")
    if image_token_id != config.image_token_id:
        raise ConversionError(
            f"the tokenizer {tokenizer!r} has {image_token_id} tokens and the language model {config.image_token_id}; "
            "give the tokenizer of the language model that the checkpoint was trained with"
        )
    vision = official["vision_config"]
    statistics = {name: vision[name] for name in ("image_mean", "image_std") if vision.get(name)}
    image_processor = square_image_processor(vision["image_size"], **statistics)
    numbers = {
        "num_image_tokens": config.num_image_tokens,
        "num_eos_tokens": config.projector_config.num_eos_tokens,
    }
    return HoneybeeProcessor(image_processor, prepared, **numbers)


def convert(
    checkpoint: Path, output: Path, tokenizer: str | None = None, dtype: str | None = None, max_shard_size: str = "5GB"
) -> dict[str, str]:
    """Converts `checkpoint` into the new folder `output`. Returns {official tensor name: our name}.

    Raises:
        ConversionError: what is wrong with the checkpoint; nothing is left behind.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} already exists; give a new folder, or remove it")
    config, official = read_config(checkpoint)
    tensors = open_weights(weight_files(checkpoint))
    planned = plan(config, tensors)
    processor = build_processor(config, official, checkpoint, tokenizer)
    target = dtype and DTYPES[dtype]
    config.dtype = target or official.get("torch_dtype") or torch.float32
    config.architectures = [HoneybeeForConditionalGeneration.__name__]

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        write_weights(planned, tensors, partial, target, max_shard_size)
        custom_object_save(HoneybeeForConditionalGeneration, partial)
        config.save_pretrained(partial)
        processor.save_pretrained(partial)
        special = processor.tokenizer
        GenerationConfig(
            bos_token_id=special.bos_token_id,
            eos_token_id=special.eos_token_id,
            pad_token_id=special.pad_token_id,
            suppress_tokens=[config.image_token_id],
        ).save_pretrained(partial)
        # For the model card, of this model and of those trained from it.
        origin = {
            "checkpoint": "/".join(checkpoint.resolve().parts[-2:]),
            "license": "cc-by-nc-4.0",
            "vision_tower": official["vision_config"].get("pretrained_vision_name_or_path"),
            "language_model": (official.get("lm_config") or {}).get("pretrained_lm_name_or_path"),
        }
        (partial / CONVERSION_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {official: name for name, (official, _) in planned.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of an official checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    parser.add_argument("--tokenizer", help="folder or Hub name of the tokenizer, where the checkpoint has none")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the weights; default: as they are")
    parser.add_argument("--max-shard-size", default="5GB", help="of one weight file; twice as much memory is enough")
    parser.add_argument("--verify", type=Path, metavar="REFERENCE", help="compare the result with reference data")
    args = parser.parse_args()
    try:
        names = convert(args.checkpoint, args.output, args.tokenizer, args.dtype, args.max_shard_size)
    except (ConversionError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Converted {args.checkpoint} to {args.output}.")
    if args.verify:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(names, file)
            file.flush()
            script = Path(__file__).with_name("verify_conversion.py")
            sys.exit(
                subprocess.run(
                    [sys.executable, script, args.output.resolve(), args.verify.resolve(), file.name],
                    cwd=tempfile.gettempdir(),
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                ).returncode
            )


if __name__ == "__main__":
    main()

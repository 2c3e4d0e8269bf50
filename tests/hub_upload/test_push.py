# SPDX-License-Identifier: Apache-2.0
"""Publishing against an HTTP server that speaks the Hub's API (fake_hub.py), and loading by name from it."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hub_upload.export_check import CODE, ExportError, check_folder, is_pickle
from hub_upload.load_check import templates_of
from hub_upload.push import prepare_adapter
from modeling_honeybee import HoneybeeForConditionalGeneration
from tests.hub_upload.fake_hub import Blob, FakeHub
from tests.tiny import (
    NO_OTHER_PYTHONS,
    OTHER_PYTHONS,
    REPOSITORY,
    picture,
    run_script,
    tiny_inputs,
    tiny_model,
    tiny_processor,
)
from training.run.lora import lora_modules

PUSH = REPOSITORY / "hub_upload" / "push.py"
HERE = REPOSITORY / "tests" / "hub_upload"
needs_others = pytest.mark.skipif(not OTHER_PYTHONS, reason=NO_OTHER_PYTHONS)
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
IDS = {"image_token_id": tiny_processor().image_token_id}
NOT_OURS = {".gitattributes"}


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        hub.add("openai/clip-vit-large-patch14", {"README.md": "---\ntags: [vision]\n---\n"})
        hub.add("lmsys/vicuna-7b-v1.5", {"README.md": "---\nlicense: llama2\n---\n"})
        hub.add("wasp/taken", {"config.json": "{}"})
        yield hub


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder as a training run leaves it, in several shards."""
    root = tmp_path_factory.mktemp("push")
    folder, model = root / "model", tiny_model(config=IDS)
    model.save_pretrained(folder, max_shard_size="60KB")
    tiny_processor(model.config.num_image_tokens).save_pretrained(folder)
    run = {
        "stage": "align",
        "dataset": str(root / "secret_place" / "captions.jsonl"),
        "vision_model": "openai/clip-vit-large-patch14",
        "text_model": "lmsys/vicuna-7b-v1.5",
        "model_name_or_path": None,
        "training": {"learning_rate": 3e-4, "max_steps": 7},
    }
    (folder / "honeybee_run.json").write_text(json.dumps(run))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": [{"loss": 1.25}]}))
    torch.save({"learning_rate": 1}, folder / "training_args.bin")
    (folder / "run_summary.md").write_text(f"From {root / 'secret_place'}.")
    (folder / "loss.png").write_bytes(b"a plot")
    (folder / "checkpoint-5").mkdir()
    torch.save({}, folder / "checkpoint-5" / "optimizer.pt")
    (folder / "notes.txt").write_text("mine")
    scores = root / "scores" / "pope"
    scores.mkdir(parents=True)
    (scores / "scores.json").write_text(
        json.dumps({"display_name": "POPE", "questions": 12, "summary": {"accuracy": 0.875, "f1": 0.9}})
    )
    picture().save(root / "photo.jpg")
    torch.save({"inputs": tiny_inputs(model), "image": str(root / "photo.jpg")}, root / "inputs.pt")
    return {"root": root, "folder": folder, "model": model}


def environment(hub, root, token="hf_bee"):
    # The other line's environment has an older or no checkout of this project.
    return {**hub.environment(root / "home", token), "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="module")
def pushed(hub, world):
    """The folder on the Hub, by a push that was killed in the middle and a second one."""
    root, command = world["root"], [PUSH, "--model", world["folder"], "--repo_id", "bee/tiny"]
    command += ["--results", root / "scores"]
    shards = len(list(world["folder"].glob("model-*.safetensors")))
    assert shards > 3
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env={**os.environ, **environment(hub, root)}, stdout=subprocess.DEVNULL
    )

    def kill(hub, stored):
        if stored == 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            raise ConnectionAbortedError("what was arriving is lost")

    hub.before_upload = kill
    assert process.wait() == -signal.SIGKILL
    hub.before_upload = None
    interrupted = {"visible": set(hub.files("bee/tiny")) - NOT_OURS, "stored": len(hub.objects)}
    sent = len(hub.requests)
    output = run_script(*command, cwd=root, env=environment(hub, root)).stdout
    uploads = [path for method, path in hub.requests[sent:] if method == "PUT"]
    commits = [path for method, path in hub.requests if "/commit/" in path]
    return {"output": output, "interrupted": interrupted, "uploads": len(uploads), "shards": shards, "commits": commits}


def test_an_interrupted_upload_shows_nothing_and_continues(pushed):
    assert pushed["interrupted"] == {"visible": set(), "stored": 2}
    assert pushed["uploads"] == pushed["shards"] - 2
    assert len(pushed["commits"]) == 1  # everything became visible at once


def test_what_is_published(hub, world, pushed):
    files = hub.files("bee/tiny")
    code = {name for name in files if name.endswith(".py")}
    assert code == set(CODE) and len(code) == 9
    for name, path in CODE.items():
        assert files[name].content == path.read_bytes()
    for path in world["folder"].glob("*.safetensors"):
        assert files[path.name].lfs and files[path.name].content == path.read_bytes()
    left = {"honeybee_run.json", "loss.png", "run_summary.md", "trainer_state.json", "training_args.bin", "notes.txt"}
    assert not left & set(files) and all(name in pushed["output"] for name in left)
    assert "checkpoint-5/optimizer.pt" not in files and "checkpoint-5/" in pushed["output"]
    assert b"secret_place" not in b"".join(blob.content for blob in files.values())
    sha = hub.repos["bee/tiny"].branches["main"]
    assert f"commit {sha}" in pushed["output"] and 'model="bee/tiny"' in pushed["output"]


def load_by_name(python, hub, world, repo_id, *revisions):
    target = world["root"] / "loaded.pt"
    home = world["root"] / f"home-{len(hub.requests)}"  # a cache of its own: a stranger has none
    environment = {**hub.environment(home, token=None), "PYTHONPATH": str(REPOSITORY)}
    script, inputs = HERE / "load_from_hub.py", world["root"] / "inputs.pt"
    run_script(script, target, inputs, repo_id, *revisions, python=python, cwd=world["root"], env=environment)
    return torch.load(target)


def assert_same(result, model, root):
    with torch.no_grad():
        expected = model(**tiny_inputs(model))
        hidden = model.model(**tiny_inputs(model)).last_hidden_state
    for logits in result["logits"]:
        torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(result["hidden"], hidden, atol=1e-5, rtol=0)
    processor = tiny_processor(model.config.num_image_tokens)
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    inputs = processor(images=str(root / "photo.jpg"), text=prompt, add_special_tokens=False, return_tensors="pt")
    assert set(result["prepared"]) == set(inputs)
    for name, tensor in inputs.items():
        torch.testing.assert_close(result["prepared"][name], tensor, atol=1e-5, rtol=0)
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result["answer"] == processor.tokenizer.decode(new, skip_special_tokens=True)
    assert result["num_image_tokens"] == model.config.num_image_tokens
    assert result["chat_templates"] == processor.chat_templates
    assert set(processor.chat_templates) == {"default", "caption"} and isinstance(processor.chat_template, str)
    assert all(name.startswith("transformers_modules.") for name in result["modules"]), result["modules"]


def test_templates_of_a_processor_of_before():
    older = {"default": "a", "caption": "b"}
    assert templates_of(SimpleNamespace(chat_template=older)) == older
    assert templates_of(SimpleNamespace(chat_template="a")) == {"default": "a"}
    assert templates_of(tiny_processor()) == tiny_processor().chat_templates


@needs_others
def test_it_loads_by_name_with_other_releases(hub, world, pushed):
    for python in OTHER_PYTHONS:
        result = load_by_name(python, hub, world, "bee/tiny", "main")
        assert_same(result, world["model"], world["root"])


@needs_others
def test_pushed_from_another_release_it_loads_here(hub, world):
    root = world["root"]
    script = (
        "from tests.tiny import *\n"
        "model = tiny_model('d-abs', seed=3, config={'image_token_id': tiny_processor().image_token_id})\n"
        "model.save_pretrained('theirs')\n"
        "tiny_processor(model.config.num_image_tokens).save_pretrained('theirs')\n"
        "import torch, sys\n"
        "torch.save(dict(model.state_dict()), 'theirs.pt')\n"
        "from hub_upload.push import main\n"
        "main(['--model', 'theirs', '--repo_id', 'bee/theirs', '--license', 'mit', '--revision', 'v1'])\n"
    )
    run_script("-c", script, python=OTHER_PYTHONS[0], cwd=root, env=environment(hub, root))
    model = tiny_model("d-abs", seed=4, config=IDS)
    model.load_state_dict(torch.load(root / "theirs.pt"))
    result = load_by_name(sys.executable, hub, world, "bee/theirs", "v1")
    assert_same(result, model, root)
    assert set(hub.files("bee/theirs", "main")) == NOT_OURS


def test_it_loads_by_name_with_the_code_of_a_commit(hub, world, pushed):
    """Weights of a branch whose code was changed, with the code of a commit that was read."""
    repo = hub.repos["bee/tiny"]
    good = repo.branches["main"]
    broken = {**repo.commits[good], "configuration_honeybee.py": Blob(b"raise RuntimeError('changed code ran')", False)}
    repo.commit("changed", broken)
    result = load_by_name(sys.executable, hub, world, "bee/tiny", "changed", good)
    assert_same(result, world["model"], world["root"])
    with pytest.raises(AssertionError, match="changed code ran"):
        load_by_name(sys.executable, hub, world, "bee/tiny", "changed")


def test_weights_whose_header_looks_like_a_pickle_are_none(tmp_path):
    """The first bytes of a safetensors file are the length of its header."""
    tensors = {"a": torch.zeros(1)}
    for padding in range(700):
        save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "padding": "x" * padding})
        head = (tmp_path / "x.safetensors").read_bytes()[:2]
        if head == b"\x80\x02":
            break
    assert head == b"\x80\x02" and not is_pickle(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(pickle.dumps(list(range(99)), protocol=2))
    assert is_pickle(tmp_path / "y.safetensors")


def test_card(hub, world, pushed):
    """Metadata by the library's own reader and the Hub's check, and every code block run."""
    text = hub.files("bee/tiny")["README.md"].content.decode()
    card = ModelCard(text)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "image-text-to-text", ["en"])
    assert data.base_model == ["openai/clip-vit-large-patch14", "lmsys/vicuna-7b-v1.5"]
    assert data.license == "llama2"  # of the parts, CLIP's MIT allows it
    assert {(r.dataset_name, r.metric_name, r.metric_value) for r in data.eval_results} == {
        ("POPE, 12 questions", "accuracy", 0.875),
        ("POPE, 12 questions", "f1", 0.9),
    }
    assert "`0.0003`" in text and "`captions.jsonl`" in text and "1.2500" in text
    script = "import sys; from huggingface_hub import ModelCard; ModelCard(open(sys.argv[1]).read()).validate()\n"
    # Older versions ask the public site whatever the endpoint is; HfApi asked ours before the commit on all of them.
    assert ("POST", "/api/validate-yaml") in hub.requests
    if hasattr(ModelCard, "validate") and tuple(map(int, _hub_version())) >= (1, 0):
        path = world["root"] / "card.md"
        path.write_text(text)
        run_script("-c", script, path, env=environment(hub, world["root"]))
        path.write_text(text.replace("license: llama2", "license: free for all"))
        refused = run_script("-c", script, path, env=environment(hub, world["root"]), check=False)
        assert refused.returncode and '"license" must be one of' in refused.stdout
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    marked = "\nprint('=====')\n".join(block.replace("max_new_tokens=64", "max_new_tokens=6") for block in blocks)
    output = run_script("-c", marked, cwd=world["root"], env=environment(hub, world["root"], token=None)).stdout
    answers = [part.strip().splitlines()[-1] for part in output.split("=====")]
    assert len(answers) == 3 and len(set(answers)) == 1, output


def _hub_version():
    import huggingface_hub

    return huggingface_hub.__version__.split(".")[:2]


def test_an_update_leaves_nothing_of_the_model_before(hub, world):
    """Other shards, in one commit, of a private repository; what somebody else put there stays."""
    root = world["root"]
    world["model"].save_pretrained(root / "one_file")
    tiny_processor(world["model"].config.num_image_tokens).save_pretrained(root / "one_file")
    script = (
        "import sys; from pathlib import Path; from huggingface_hub import HfApi\n"
        "from hub_upload.export_check import check_folder; from hub_upload.push import PushError, upload\n"
        "def publish(folder, update=False, revision='main'):\n"
        "    upload(HfApi(), check_folder(Path(folder)), {'README.md': '# a card'}, 'bee/updated', True, revision, update)\n"
        "publish('model')\n"
        "HfApi().upload_file(path_or_fileobj=b'theirs', path_in_repo='figure.txt', repo_id='bee/updated')\n"
        "publish('one_file', revision='v2')\n"
        "try: publish('one_file')\n"
        "except PushError as error: print('refused:', error)\n"
        "publish('one_file', update=True)\n"
    )
    output = run_script("-c", script, cwd=root, env=environment(hub, root)).stdout
    assert "refused: bee/updated is taken" in output
    repo = hub.repos["bee/updated"]
    assert repo.private and len(repo.commits) == 5  # made, pushed, theirs, branch, updated
    for branch in ("main", "v2"):
        files = set(hub.files("bee/updated", branch))
        assert {name for name in files if "safetensors" in name} == {"model.safetensors"}
        assert "figure.txt" in files


def test_an_adapter_is_pushed_and_loads_by_name(hub, world, pushed):
    root, folder = world["root"], world["root"] / "adapter"
    base = HoneybeeForConditionalGeneration.from_pretrained(world["folder"])
    config = LoraConfig(r=4, init_lora_weights=False, **lora_modules("instruct"))
    adapted = get_peft_model(base, config)
    with torch.no_grad():  # the projector is saved in full
        next(adapted.base_model.model.model.projector.parameters()).add_(0.5)
    adapted.save_pretrained(folder)
    tiny_processor(base.config.num_image_tokens).save_pretrained(folder)
    command = [PUSH, "--model", folder, "--repo_id", "bee/adapter", "--license", "llama2"]
    with pytest.raises(ExportError, match="push that model first, then the adapter with --base_model"):
        prepare_adapter(check_folder(folder), None)
    run_script(*command, "--base_model", "bee/tiny", cwd=root, env=environment(hub, root))
    files = hub.files("bee/adapter")
    assert json.loads(files["adapter_config.json"].content)["base_model_name_or_path"] == "bee/tiny"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(world["folder"])
    card = ModelCard(files["README.md"].content.decode())
    assert (card.data.base_model, card.data.library_name) == (["bee/tiny"], "peft")
    assert card.data.get("base_model_relation") == "adapter"
    (block,) = re.findall(r"```python\n(.*?)```", card.content, re.DOTALL)
    script = (
        block + "\nimport torch; torch.save(model(**torch.load('inputs.pt')['inputs']).logits.detach(), 'logits.pt')\n"
    )
    run_script("-c", script, cwd=root, env=environment(hub, root, token=None))
    with torch.no_grad():
        expected = adapted.eval()(**tiny_inputs(world["model"])).logits
    torch.testing.assert_close(torch.load(root / "logits.pt"), expected, atol=1e-5, rtol=0)
    assert (expected - world["model"](**tiny_inputs(world["model"])).logits).abs().max() > 1e-2


def test_code_of_another_version_need_not_have_this_ones_files(world):
    folder = world["root"] / "of_other_files"
    shutil.copytree(world["folder"], folder)
    (folder / "joining_honeybee.py").unlink()
    with pytest.raises(ExportError, match="lacks code that its readers need: joining_honeybee.py"):
        check_folder(folder)
    path = folder / "modeling_honeybee.py"
    path.write_text(path.read_text().replace("from .joining_honeybee import", "from .probe_honeybee import"))
    assert check_folder(folder).notes == [
        "code of another version of Honeybee, published as it is: modeling_honeybee.py"
    ]


def test_refusals_say_what_to_do_and_publish_nothing(hub, world, pushed):
    root = world["root"]

    def variant(name, change):
        folder = root / name
        shutil.copytree(world["folder"], folder)
        change(folder)
        return folder

    def replace(folder, name, old, new):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    folders = {
        "pickled weights": variant("p1", lambda f: torch.save({}, f / "pytorch_model.bin")),
        "pickle by content": variant("p2", lambda f: (f / "extra.txt").write_bytes(b"\x80\x04\x95.")),
        "no processor": variant(
            "p3", lambda f: [(f / n).unlink() for n in ("processor_config.json", "tokenizer.json")]
        ),
        "no template": variant("p4", lambda f: (f / "chat_template.jinja").unlink()),
        "no code": variant("p5", lambda f: (f / "projectors_honeybee.py").unlink()),
        "imports": variant(
            "p6", lambda f: replace(f, "projectors_honeybee.py", "import math", "import math, requests")
        ),
        "no config": variant("p7", lambda f: (f / "config.json").unlink()),
        "auto_map": variant("p8", lambda f: replace(f, "config.json", '"AutoModel"', '"AutoModell"')),
        "lost shard": variant("p9", lambda f: sorted(f.glob("model-*.safetensors"))[0].unlink()),
        "cut shard": variant(
            "p10", lambda f: (s := sorted(f.glob("model-*.safetensors"))[0]).write_bytes(s.read_bytes()[:-8])
        ),
        "counts": variant(
            "p11", lambda f: replace(f, "processor_config.json", '"num_image_tokens": 4', '"num_image_tokens": 9')
        ),
    }
    cases = {
        name: ({"token": "hf_bee", "arguments": ["--model", str(folder), "--repo_id", "bee/refused"]}, words)
        for (name, folder), words in zip(
            folders.items(),
            [
                ["pytorch_model.bin is a pickle", "safetensors"],
                ["extra.txt is a pickle"],
                ["no complete processor", "processor_config.json, tokenizer.json missing", "save_pretrained"],
                ["chat_template.jinja missing"],
                ["lacks code", "projectors_honeybee.py"],
                ["imports requests"],
                ["no config.json"],
                ["auto_map"],
                ["lacks model-00001"],
                ["is not a whole safetensors file"],
                ["disagree on visual tokens an image: 9 and 4"],
            ],
        )
    }
    own_card = variant("p12", lambda f: (f / "README.md").write_text("---\nlicense: free for all\n---\nMine.\n"))
    model = ["--model", str(world["folder"])]
    cases |= {
        "bad token": (
            {"token": "hf_wrong", "arguments": [*model, "--repo_id", "bee/refused"]},
            ["rejected the token", "hf auth login"],
        ),
        "read-only token": (
            {"token": "hf_reader", "arguments": [*model, "--repo_id", "bee/refused"]},
            ["may only read"],
        ),
        "no token": ({"token": "", "arguments": [*model, "--repo_id", "bee/refused"]}, ["no token", "HF_TOKEN"]),
        "taken": (
            {"token": "hf_bee", "arguments": [*model, "--repo_id", "bee/tiny"]},
            ["bee/tiny is taken", "--update"],
        ),
        "taken by another": (
            {"token": "hf_bee", "arguments": [*model, "--repo_id", "wasp/taken"]},
            ["you are bee", "starts with bee/"],
        ),
        "public": (
            {"token": "hf_bee", "arguments": [*model, "--repo_id", "bee/tiny", "--private"]},
            ["exists and is public"],
        ),
        "name": (
            {"token": "hf_bee", "arguments": [*model, "--repo_id", "bee/ti ny"]},
            ["not a name that the Hub takes"],
        ),
        "license": (
            {"token": "hf_bee", "arguments": [*model, "--repo_id", "bee/refused", "--license", "mit"]},
            ["does not follow", "lmsys/vicuna-7b-v1.5 (llama2)"],
        ),
        "own card": (
            {"token": "hf_bee", "arguments": ["--model", str(own_card), "--repo_id", "bee/refused"]},
            ["Invalid metadata in README.md", '"license" must be one of'],
        ),
        "results": (
            {"token": "hf_bee", "arguments": [*model, "--repo_id", "bee/refused", "--results", str(root)]},
            ["holds no results"],
        ),
        "no folder": (
            {"token": "hf_bee", "arguments": ["--model", str(root / "nowhere"), "--repo_id", "bee/refused"]},
            ["is not a folder"],
        ),
    }
    before, objects = dict(hub.repos["bee/tiny"].branches), len(hub.objects)
    (root / "cases.json").write_text(json.dumps([case for case, _ in cases.values()]))
    output = run_script(HERE / "many_pushes.py", root / "cases.json", env=environment(hub, root)).stdout
    for (name, (_, words)), said in zip(cases.items(), json.loads(output.splitlines()[-1]), strict=True):
        assert said["error"] and said["error"].startswith("error: "), (name, said)
        for word in words:
            assert word in said["error"], (name, said["error"])
        assert "Traceback" not in said["error"] + said["output"]
    assert "bee/refused" not in hub.repos
    assert hub.repos["bee/tiny"].branches == before and len(hub.objects) == objects

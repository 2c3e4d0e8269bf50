# SPDX-License-Identifier: Apache-2.0
"""Checks a Honeybee model or LoRA adapter, writes its card, and publishes it on the Hub.

    python hub_upload/push.py --model outputs/instruct --repo_id ORG/NAME --dry_run     # everything but the upload
    python hub_upload/push.py --model outputs/instruct --repo_id ORG/NAME

The folder is checked (config, code, safetensors, processor, template), then loaded by a process that has torch,
transformers and pillow only, and asked one thing. Weights go up file by file, and all files become visible in one
commit at the end: an interrupted upload shows nothing, and the same command continues it with the files that lack.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from hub_upload.export_check import Export, ExportError, check_folder, is_published, lay_out, load_in_fresh_process
from hub_upload.model_card import look_up_parts, own_card, read_curve, read_provenance, read_results, write_card
from modeling_honeybee.model_folder import NetworkError


class PushError(RuntimeError):
    """The Hub's side of what can go wrong, in words."""


def explain(error: Exception, repo_id: str) -> str:
    """What a failed request means for the one who pushes."""
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
        return str(error)  # the library's own words: metadata that the Hub does not take
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    said = getattr(error, "server_message", None) or (str(error).splitlines() or [""])[0]
    if status == 401:
        return "the Hub rejected the token; log in with `hf auth login`, or set HF_TOKEN to a valid token"
    if status == 403:
        return f"the token may not write to {repo_id} ({said}); use one with write access to that name"
    if status == 412:
        return f"somebody else changed {repo_id} meanwhile; look at it and run the same command again"
    if status is not None and status < 500:
        return f"the Hub refused ({status}): {said}"
    return (
        f"the connection broke ({type(error).__name__}: {said}). Nothing is visible yet; run the same command again, "
        "it sends only what has not arrived"
    )


def check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"--repo_id {repo_id!r} is not a name that the Hub takes: {error}") from error
    if repo_id.count("/") != 1:
        raise ExportError(f"--repo_id {repo_id!r} must be ORG/NAME")


def check_target(
    api: HfApi, repo_id: str, private: bool, revision: str, update: bool
) -> tuple[list[str] | None, str | None, bool]:
    """What is there already: the files of the branch and its commit, and whether the branch exists. None and None for
    a repository that does not exist.

    Raises:
        PushError: the name cannot be used.
    """
    user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError("the token may only read; make one with write access (huggingface.co/settings/tokens)")
    writable = {user["name"], *(org["name"] for org in user.get("orgs", []))}
    namespace = repo_id.split("/")[0]
    if namespace not in writable:
        raise PushError(
            f"{repo_id}: you are {user['name']} and not a member of {namespace}; use a name that starts with "
            f"{' or '.join(sorted(f'{name}/' for name in writable))}"
        )
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None, None, False
    if private and not info.private:
        raise PushError(f"--private, but {repo_id} exists and is public; make it private first, or use another name")
    try:
        info, branch_exists = api.model_info(repo_id, revision=revision), True
    except RevisionNotFoundError:
        branch_exists = False
    files = [file.rfilename for file in info.siblings]
    # A repository that was only made (by an interrupted push, or on the web) is free.
    taken = sorted(set(files) - {".gitattributes", "README.md"})
    if branch_exists and taken and not update:
        raise PushError(
            f"{repo_id} is taken: its branch {revision} holds {len(taken)} files ({', '.join(taken[:3])}, ...). Use "
            "another name, another --revision, or --update to replace the model in one commit"
        )
    return files, info.sha, branch_exists


def upload(
    api: HfApi, export: Export, texts: dict[str, str], repo_id: str, private: bool, revision: str, update: bool
) -> str:
    """Publishes the files of `export`, and `texts` by name in their place or beside them, in one commit; returns it."""
    existing, parent, branch_exists = check_target(api, repo_id, private, revision, update)
    if existing is None:
        api.create_repo(repo_id, private=private)
        parent = api.model_info(repo_id).sha
    weights = {name: path for name, path in export.files.items() if name.endswith(".safetensors")}
    operations = []
    for number, (name, path) in enumerate(sorted(weights.items()), 1):
        print(f"  {number}/{len(weights)} {name} ({path.stat().st_size / 1e6:,.1f} MB)", flush=True)
        operation = CommitOperationAdd(name, path)
        api.preupload_lfs_files(repo_id, [operation], revision="main", free_memory=False)
        operations.append(operation)
    operations += [
        CommitOperationAdd(name, path)
        for name, path in export.files.items()
        if name not in weights and name not in texts
    ]
    operations += [CommitOperationAdd(name, text.encode()) for name, text in texts.items()]
    # Shards of another number, an index: what would make a new model of old parts.
    names = {operation.path_in_repo for operation in operations}
    operations += [CommitOperationDelete(name) for name in existing or [] if name not in names and is_published(name)]
    if revision != "main" and not branch_exists:
        api.create_branch(repo_id, branch=revision, revision=parent)
    commit = api.create_commit(
        repo_id,
        operations,
        commit_message=f"Upload {'adapter' if export.adapter else 'model'} with its code and card",
        revision=revision,
        parent_commit=parent,
    )
    missing = names - set(api.list_repo_files(repo_id, revision=commit.oid))
    if missing:
        raise PushError(f"{repo_id} lacks {', '.join(sorted(missing))} after the commit {commit.oid}; push it again")
    return commit.oid


def prepare_adapter(export: Export, base_model: str | None) -> tuple[str, dict[str, str]]:
    """Where to load the adapter's base model from for the check, and adapter_config.json with the base's Hub name."""
    base = export.adapter.get("base_model_name_or_path")
    named = base_model or base
    if not named or os.path.isdir(named):
        raise ExportError(
            f"{export.folder} is an adapter of the folder {base!r}, which its readers do not have; push that model "
            "first, then the adapter with --base_model ORG/NAME"
        )
    validate_repo_id(named)
    export.adapter["base_model_name_or_path"] = named
    load_from = base if base and os.path.isdir(base) else named
    return load_from, {"adapter_config.json": json.dumps(export.adapter, indent=2) + "\n"}


def check_loading(export: Export, texts: dict[str, str], base: str | None) -> None:
    """Loads what will be published as a stranger does, and prints what it answers.

    Args:
        base: folder or Hub name of an adapter's base model.

    Raises:
        ExportError: it does not load.
    """
    print("Loading it in a process with torch, transformers and pillow only ...", flush=True)
    base = os.path.abspath(base) if base and os.path.isdir(base) else base
    with tempfile.TemporaryDirectory() as folder:
        lay_out(export, Path(folder), texts)
        report = load_in_fresh_process(export, Path(folder), base)
    print(f"  {report['parameters']:,} parameters; asked about a grey image it says {report['answer']!r}")


def print_plan(export: Export, texts: dict[str, str], repo_id: str, revision: str) -> None:
    print(f"Would publish as {repo_id} (branch {revision}):")
    for name in sorted({*export.files, *texts}):
        size = len(texts[name].encode()) if name in texts else export.files[name].stat().st_size
        print(f"  {name:45} {size:>15,} bytes")
    if export.left_out:
        print(f"Left out: {', '.join(export.left_out)}")
    print(f"The card:\n\n{texts['README.md']}")


def push(
    model: Path,
    repo_id: str,
    private: bool = False,
    revision: str = "main",
    update: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    languages: list[str] | None = None,
    results: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Checks and publishes, and says how to use what is published; with `dry_run`, lists it instead.

    Raises:
        ExportError: what is wrong with the folder or the card.
        PushError: what the Hub does not allow.
    """
    check_name(repo_id)
    export = check_folder(model)
    base, texts = prepare_adapter(export, base_model) if export.adapter is not None else (None, {})
    print(f"{model}: {'adapter' if base else 'model'}, {len(export.files)} files to publish")
    for note in export.notes:
        print(f"note: {note}")

    api = HfApi()
    provenance = read_provenance(model)
    found = read_results(results, model.name) if results is not None else None
    curve = read_curve(results) if results is not None else None
    if not dry_run:
        if get_token() is None:
            raise PushError("no token: log in with `hf auth login`, or set HF_TOKEN to a token with write access")
        check_target(api, repo_id, private, revision, update)
    look_up_parts(provenance, api)
    card = own_card(model)
    if card is None:
        card = write_card(export, provenance, repo_id, revision, license, languages, found, curve)
    else:
        print(f"note: {model / 'README.md'} is published as the card; remove it to have one written")
    # The library reads back what it will send: YAML, and results that fit the Hub's format.
    if ModelCard(card).data.license == "other":
        print(
            "note: the licence of a part is not known, or several apply; the card says `other` (--license states one)"
        )
    if not dry_run:
        api._validate_yaml(card)  # by the Hub's own rules; create_commit does this too, but after the weights went up
    texts["README.md"] = card

    check_loading(export, texts, base)
    if dry_run:
        print_plan(export, texts, repo_id, revision)
        return
    if export.left_out:
        print(f"Left out: {', '.join(export.left_out)}")
    print(f"Uploading to {api.endpoint}/{repo_id} ...", flush=True)
    commit = upload(api, export, texts, repo_id, private, revision, update)
    print_use(repo_id, commit, api.endpoint, adapter=export.adapter is not None)


def print_use(repo_id: str, commit: str, endpoint: str, adapter: bool) -> None:
    print(f"\nPublished: {endpoint}/{repo_id}, commit {commit}\n")
    print("Load it:\n")
    if adapter:
        print("    from peft import PeftModel")
        print(f'    model = PeftModel.from_pretrained(base, "{repo_id}", revision="{commit}")')
        return
    print("    from transformers import pipeline")
    named = f'model="{repo_id}", revision="{commit}"'
    print(f'    ask = pipeline("image-text-to-text", {named}, trust_remote_code=True)\n')
    print("Serve it (OpenAI API on this machine):\n")
    print(f"    python serving/serve.py --model {repo_id}")


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model or LoRA adapter")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", default="main", help="branch; made from main where it does not exist")
    parser.add_argument("--update", action="store_true", help="replace the model that the branch holds, in one commit")
    parser.add_argument("--base_model", help="of an adapter: ORG/NAME of its base model on the Hub")
    parser.add_argument("--license", help="of the model, where that of a part is not known; e.g. apache-2.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="languages of the model (default: en)")
    parser.add_argument("--results", type=Path, help="output folder of evaluation/run.py, for the card")
    parser.add_argument("--dry_run", action="store_true", help="check, write the card, list the files; upload nothing")
    args = parser.parse_args(arguments)
    try:
        push(
            args.model, args.repo_id, args.private, args.revision, args.update, args.base_model, args.license,
            args.language, args.results, args.dry_run,
        )  # fmt: skip
    except (ExportError, PushError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing is visible yet; the same command continues, without the files that arrived")
    except (NetworkError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {explain(error, args.repo_id)}")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A Hub of one process: an HTTP server that speaks the part of the Hub's API that huggingface_hub uses here.

Written from the requests that huggingface_hub 0.36 and 2.4 send. Nothing of the library is replaced: clients are other
processes with HF_ENDPOINT set (it is read on import) and xet off. State lives in memory, so it can be looked at.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

# token -> user, who may write in a namespace of that name
TOKENS = {"hf_bee": "bee", "hf_wasp": "wasp", "hf_reader": "bee"}
READ_ONLY = {"hf_reader"}
LICENSES = {"apache-2.0", "mit", "llama2", "cc-by-nc-4.0", "cc-by-4.0", "other", "bsd-3-clause"}


@dataclass
class Blob:
    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """git's name of the content (of an LFS file: of its pointer)."""
        content = self.content
        if self.lfs:
            content = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
                self.sha256.encode(),
                len(self.content),
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{branch}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )


class HttpError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


class FakeHub:
    """`with FakeHub() as hub:`; `hub.endpoint`, `hub.repos[name]`, `hub.objects` (LFS, by sha256), `hub.requests`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        # For a test that cuts an upload: called with (hub, number of uploads so far) before an upload is stored.
        self.before_upload = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def handle_any(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._read_chunks()
                split = urlsplit(self.path)
                hub.requests.append((self.command, unquote(split.path)))
                try:
                    result = hub.answer(self.command, unquote(split.path), body, dict(self.headers))
                    status, headers, content = result if isinstance(result, tuple) else (200, {}, result)
                except HttpError as error:
                    content = {"error": error.message, "errors": [{"message": error.message}], "warnings": []}
                    status, headers = error.status, {"X-Error-Message": error.message}
                    if error.code:
                        headers["X-Error-Code"] = error.code
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                    headers = {"Content-Type": "application/json", **headers}
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed, which is what some tests are about

            def _read_chunks(self) -> bytes:
                if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                    return b""
                body = b""
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token: str | None = "hf_bee") -> dict[str, str]:
        """For the processes that use it; `home` is a folder for their caches."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, Blob]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def add(self, repo_id: str, files: dict[str, str], private: bool = False) -> None:
        """Puts a repository there as if somebody had published it before."""
        self.repos[repo_id] = Repo(private)
        self.repos[repo_id].commit("main", {name: Blob(text.encode(), False) for name, text in files.items()})

    # What each address answers

    @staticmethod
    def token(headers) -> str:
        return headers.get("authorization", headers.get("Authorization", "")).removeprefix("Bearer ").strip()

    def user(self, headers) -> str | None:
        token = self.token(headers)
        if not token:
            return None
        if token not in TOKENS:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repo(self, repo_id: str, user: str | None, write: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        owner = repo_id.split("/")[0]
        if repo is None or (repo.private and user != owner):
            raise HttpError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise HttpError(403 if user else 401, f"You don't have write access to {repo_id}")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    def answer(self, method: str, path: str, body: bytes, headers: dict):
        user = self.user(headers)
        if path == "/api/whoami-v2":
            if user is None:
                raise HttpError(401, "Invalid username or password.")
            role = "read" if self.token(headers) in READ_ONLY else "write"
            return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}}
        if path == "/api/validate-yaml":
            return self.validate_card(json.loads(body))
        if path == "/api/repos/create" and method == "POST":
            return self.create(json.loads(body), user)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path):
            return self.api(method, *match.groups(), body, user)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self.repo(match[1], user, write=True)
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/lfs/(\w{64})", path):
            return self.store(match[1], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.download(*match.groups(), headers, user)
        raise HttpError(404, f"no such address: {method} {path}")

    def create(self, wanted: dict, user: str | None):
        namespace = wanted.get("organization") or user
        if user is None:
            raise HttpError(401, "Invalid username or password.")
        if namespace != user:
            raise HttpError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        repo_id = f"{namespace}/{wanted['name']}"
        if repo_id in self.repos:
            raise HttpError(409, "You already created this model repo")
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repos[repo_id] = Repo(bool(private))
        self.repos[repo_id].commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": "1"}

    def api(self, method, repo_id, what, rest, body, user):
        write = what in ("preupload", "commit", "branch", "tag", "settings")
        repo = self.repo(repo_id, user, write=write)
        if what is None or what == "revision":
            sha = self.commit_of(repo, rest or "main")
            files = repo.commits[sha]
            card = {}
            if "README.md" in files and (match := re.match(rb"---\n(.*?)\n---", files["README.md"].content, re.DOTALL)):
                card = yaml.safe_load(match[1])
            siblings = [{"rfilename": name} for name in sorted(files)]
            return {
                "id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "tags": [], "downloads": 0,
                "siblings": siblings, "cardData": card, "likes": 0, "gated": False, "disabled": False,
            }  # fmt: skip
        if what == "refs":
            return {
                kind: [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": sha} for name, sha in refs.items()]
                for kind, where, refs in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
            } | {"converts": []}
        if what == "tree":
            revision, _, folder = rest.partition("/")
            files = repo.commits[self.commit_of(repo, revision)]
            found = [
                entry
                for name, blob in sorted(files.items())
                if name.startswith(f"{folder}/" if folder else "")
                for entry in [self.describe(name, blob)]
            ]
            if folder and not found:
                raise HttpError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
            return found
        if what == "paths-info":
            files = repo.commits[self.commit_of(repo, rest)]
            wanted = json.loads(body)["paths"]
            return [self.describe(name, files[name]) for name in wanted if name in files]
        if what == "preupload":
            files = repo.commits[self.commit_of(repo, rest)]
            return {
                "files": [
                    {
                        "path": given["path"],
                        "uploadMode": "lfs" if given["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": files[given["path"]].oid if given["path"] in files else None,
                    }
                    for given in json.loads(body)["files"]
                ]
            }
        if what == "commit":
            return self.commit(repo, repo_id, rest, body)
        if what in ("branch", "tag") and method == "POST":
            wanted = json.loads(body or b"{}")
            refs, name, start = repo.branches, rest, wanted.get("startingPoint", "main")
            if what == "tag":
                refs, name, start = repo.tags, wanted["tag"], rest
            if name in refs:
                raise HttpError(409, f"{what} {name} already exists")
            refs[name] = self.commit_of(repo, start)
            return {}
        raise HttpError(404, f"no such address: {method} {what}")

    @staticmethod
    def describe(name: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": name, "size": len(blob.content), "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
        return entry

    def batch(self, wanted: dict):
        objects = []
        for given in wanted["objects"]:
            answer = {"oid": given["oid"], "size": given["size"]}
            if given["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{given['oid']}", "header": {}}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def store(self, oid: str, body: bytes):
        with self.lock:
            if self.before_upload is not None:
                self.before_upload(self, len(self.objects))
            if hashlib.sha256(body).hexdigest() != oid:
                raise HttpError(400, "content does not match its sha256")
            self.objects[oid] = body
        return 200, {}, b""

    def commit(self, repo: Repo, repo_id: str, branch: str, body: bytes):
        if branch not in repo.branches:
            raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        files = dict(repo.commits[repo.branches[branch]])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                parent = value.get("parentCommit")
                if parent and parent != repo.branches[branch]:
                    raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HttpError(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif key == "deletedFile":
                files.pop(value["path"])
            else:
                raise HttpError(400, f"unknown operation {key}")
        sha = repo.commit(branch, files)
        return {"commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, "success": True}

    def download(self, repo_id, revision, name, headers, user):
        repo = self.repo(repo_id, user)
        sha = self.commit_of(repo, revision)
        blob = repo.commits[sha].get(name)
        if blob is None:
            raise HttpError(404, "Entry not found", "EntryNotFound")
        answer = {"X-Repo-Commit": sha, "ETag": f'"{blob.sha256 if blob.lfs else blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            answer |= {"X-Linked-Etag": answer["ETag"], "X-Linked-Size": str(len(blob.content))}
        given = {name.lower(): value for name, value in headers.items()}.get("range", "")
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", given):
            start, end = int(match[1]), int(match[2] or len(blob.content) - 1)
            part = blob.content[start : end + 1]
            return 206, {**answer, "Content-Range": f"bytes {start}-{end}/{len(blob.content)}"}, part
        return 200, answer, blob.content

    @staticmethod
    def validate_card(given: dict):
        """The Hub's rules for the fields that our cards have."""
        errors = []
        match = re.match(r"---\n(.*?)\n---", given["content"], re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        kinds = {"license": str, "license_name": str, "license_link": str, "library_name": str, "pipeline_tag": str}
        for name, kind in kinds.items():
            if name in data and not isinstance(data[name], kind):
                errors.append(f'"{name}" must be a string')
        if "license" in data and data["license"] not in LICENSES:
            errors.append(f'"license" must be one of {sorted(LICENSES)}')
        if data.get("pipeline_tag") not in (None, "image-text-to-text"):
            errors.append(f'"pipeline_tag" {data["pipeline_tag"]!r} is not a task of the Hub')
        for name in ("base_model", "datasets"):
            for value in data.get(name) or []:
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                    errors.append(f'"{name}[]" with value {value!r} is not valid, use a model or dataset id')
        for value in data.get("language") or []:
            if not re.fullmatch(r"[a-z]{2,3}(-\w+)?|multilingual|code", value):
                errors.append(f'"language[]" {value!r} must be an ISO 639 code')
        for model in data.get("model-index") or []:
            if not model.get("name") or not isinstance(model.get("results"), list):
                errors.append('"model-index[]" needs "name" and "results"')
            for result in model.get("results") or []:
                for keys in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                    if not (result.get(keys[0]) or {}).get(keys[1]):
                        errors.append(f'"model-index[].results[].{".".join(keys)}" is required')
                for metric in result.get("metrics") or [{}]:
                    if not metric.get("type") or not isinstance(metric.get("value"), (int, float, str)):
                        errors.append('"model-index[].results[].metrics[]" needs "type" and "value"')
        if errors:
            raise HttpError(400, "; ".join(errors))
        warnings = [] if match else [{"message": "empty or missing yaml metadata in repo card"}]
        return {"errors": [], "warnings": warnings}

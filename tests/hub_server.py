"""The part of the Hub's protocol that pushes and downloads need, on 127.0.0.1, for the real `huggingface_hub` client.

Clients create, query and write repositories with a token. Files are uploaded inline or as LFS objects, in one part or
several; a commit is rejected if one of its LFS objects was not uploaded. The server does not support xet storage:
clients set HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from loopback import Asked, Loopback, Reply

TOKEN = "hf_loopbackTokenThatMayWrite"
PART = 64 * 1024
"""Bytes of a part of a multipart upload; what is no longer than that goes up in one."""


@dataclass
class Commit:
    kind: str
    repo: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """`fault` is called first and may answer instead of the Hub."""

    user: str = "me"
    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """(repository of a model, revision other than main) → its files."""
    private: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    fault: Callable[[Asked], Reply | None] = lambda asked: None

    def __post_init__(self) -> None:
        self.server = Loopback(self.answer)

    def __enter__(self) -> Hub:
        self.server.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.__exit__()

    @property
    def url(self) -> str:
        return self.server.url

    def answer(self, asked: Asked) -> Reply:
        reply = self.fault(asked)
        if reply is not None:
            return reply
        if asked.path.startswith("/lfs/"):  # signed addresses, which take no token
            return self._store(asked)
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return Reply({"error": "Invalid username or password."}, 401)
        if asked.path == "/api/whoami-v2":
            return Reply({"name": self.user, "type": "user", "orgs": []})
        if asked.path == "/api/validate-yaml":
            return self._validate(asked.json["content"])
        if asked.path == "/api/repos/create":
            return self._create(asked.json)
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", asked.path):
            return self._batch(asked, found[1] or "models", found[2])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path):
            return self._file(*found.groups())
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)((?:/.*)?)", asked.path):
            return self._repo(asked, found[1], found[2], found[3])
        return Reply({"error": f"no such endpoint: {asked.method} {asked.path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> Reply:
        owner = wanted.get("organization") or self.user
        repo_id, kind = f"{owner}/{wanted['name']}", wanted.get("type", "model") + "s"
        if owner != self.user:
            return Reply({"error": f"You don't have the rights to create a model under {owner!r}"}, 403)
        if (kind, repo_id) in self.repos:
            return Reply({"error": "You already created this repo", "url": f"{self.url}/{repo_id}"}, 409)
        self.repos[kind, repo_id] = {}
        if wanted.get("visibility") == "private":
            self.private.add(repo_id)
        place = repo_id if kind == "models" else f"{kind}/{repo_id}"
        return Reply({"url": f"{self.url}/{place}", "name": repo_id})

    def _repo(self, asked: Asked, kind: str, repo_id: str, rest: str) -> Reply:
        if (kind, repo_id) not in self.repos:
            return Reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        writes = rest == "/auth-check/write" or rest.startswith(("/preupload/", "/commit/", "/branch/"))
        if writes and not repo_id.startswith(f"{self.user}/"):
            return Reply({"error": "Forbidden: you don't have write access"}, 403)
        if rest == "/auth-check/write":
            return Reply("")
        if rest.startswith("/branch/"):
            name = rest.removeprefix("/branch/")
            if "%" in name:
                return Reply({"error": "Invalid reference for a branch"}, 400)
            self.revisions[repo_id, name] = dict(self.repos[kind, repo_id])
            return Reply("")
        found = re.fullmatch("/(preupload|commit|tree|revision)/([^/]+)", rest)
        place, revision = found.groups() if found else (rest, "main")
        held = self._files(kind, repo_id, revision)
        if held is None:
            return Reply({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if place == "preupload":
            return Reply({"files": [self._mode(file, held.get(file["path"])) for file in asked.json["files"]]})
        if place == "commit":
            return self._commit(asked, kind, repo_id, held)
        if place == "tree":
            files = held.items()
            return Reply([{"type": "file", "path": name, "size": len(v), "oid": _blob_oid(v)} for name, v in files])
        if rest.startswith("/tree/"):
            return Reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        commit = _commit_of(revision)
        return Reply({"id": repo_id, "sha": commit, "siblings": [], "private": repo_id in self.private, "tags": []})

    def _files(self, kind: str, repo_id: str, revision: str) -> dict[str, bytes] | None:
        """The files at a revision; None if the repository has no such revision."""
        if revision in ("main", _commit_of("main")):
            return self.repos.get((kind, repo_id))
        for (repo, name), files in self.revisions.items():
            if (kind, repo) == ("models", repo_id) and revision in (name, _commit_of(name)):
                return files
        return None

    def _file(self, repo_id: str, revision: str, path: str) -> Reply:
        content = (self._files("models", repo_id, revision) or {}).get(path)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _commit_of(revision)}
            return Reply({"error": "Entry not found"}, 404, headers)
        return Reply(content, headers={"ETag": f'"{_blob_oid(content)}"', "X-Repo-Commit": _commit_of(revision)})

    def _mode(self, file: dict[str, Any], held: bytes | None) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".bin", ".pt", ".pth", ".png", ".parquet"))
        oid = None
        if held is not None:
            oid = hashlib.sha256(held).hexdigest() if large else _blob_oid(held)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def _batch(self, asked: Asked, kind: str, repo_id: str) -> Reply:
        if not repo_id.startswith(f"{self.user}/"):
            return Reply({"error": "Forbidden"}, 403)
        objects = []
        for wanted in asked.json["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.objects:
                upload: dict[str, Any] = {"href": f"{self.url}/lfs/{oid}"}
                if size > PART:
                    count = -(-size // PART)
                    upload["header"] = {"chunk_size": str(PART)} | {
                        str(i + 1): f"{self.url}/lfs/{oid}/{i + 1}" for i in range(count)
                    }
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        transfer = "multipart" if any(wanted["size"] > PART for wanted in asked.json["objects"]) else "basic"
        return Reply({"transfer": transfer, "objects": objects})

    def _store(self, asked: Asked) -> Reply:
        oid, _, part = asked.path.removeprefix("/lfs/").partition("/")
        if asked.method == "PUT" and part:
            self.parts[oid, int(part)] = asked.body
            return Reply("", headers={"ETag": f"etag-{part}"})
        content = asked.body
        if asked.method == "POST":  # the parts are complete
            content = b"".join(self.parts[oid, entry["partNumber"]] for entry in asked.json["parts"])
        if hashlib.sha256(content).hexdigest() != oid:
            return Reply({"error": "content does not match its oid"}, 400)
        self.objects[oid] = content
        return Reply({})

    def _commit(self, asked: Asked, kind: str, repo_id: str, held: dict[str, bytes]) -> Reply:
        files, deleted, message = {}, set(), ""
        for line in asked.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return Reply({"error": f"LFS object of {value['path']} was not uploaded"}, 400)
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.add(value["path"])
            else:
                return Reply({"error": f"unknown operation {entry['key']}"}, 400)
        held |= files
        for path in deleted:
            del held[path]
        self.commits.append(Commit(kind, repo_id, message, files))
        oid = f"{len(self.commits):040x}"
        return Reply({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"})

    def _validate(self, content: str) -> Reply:
        """A little of what the Hub checks: metadata that is YAML, with names of repositories where it wants them."""
        head = content.split("---\n")[1]
        data = yaml.safe_load(head)
        names = [data.get("base_model"), *data.get("datasets", [])]
        wrong = [name for name in names if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
        if wrong:
            return Reply({"errors": [{"message": f"{name} is no repository"} for name in wrong]}, 400)
        return Reply({"warnings": []})


def _commit_of(revision: str) -> str:
    is_commit = re.fullmatch("[0-9a-f]{40}", revision)
    return revision if is_commit else hashlib.sha1(revision.encode()).hexdigest()


def _blob_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

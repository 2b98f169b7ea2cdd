"""A server that speaks as much of the Hugging Face hub's API as uploads and downloads of models need."""

import base64
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote

OWNER, TOKEN = "somebody", "hf_of_somebody"
LFS_FROM = 1 << 16  # bytes; smaller files are part of the commit


class Repo:
    """Branches, commits and what each commit holds."""

    def __init__(self, *, private=False):
        self.private = private
        self.branches, self.commits, self.messages = {}, {}, {}
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch, changes, message):
        """A new commit of a branch; gives its hash."""
        before = self.branches.get(branch, self.branches.get("main"))
        files = {**self.commits.get(before, {}), **changes}
        told = f"{before} {len(self.commits)} {message} {sorted(map(hash, files.values()))}"
        commit = hashlib.sha1(told.encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.branches[branch] = files, message, commit
        return commit

    def find(self, revision):
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None


class Hub:
    """What the server knows, and what it was asked; `fails` has the status of answers by a part of the path."""

    def __init__(self):
        self.repos, self.blobs, self.asked, self.fails = {}, {}, [], {}
        self.yaml_errors, self.is_closed = [], False
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.is_closed = True  # for connections that are open
        self.server.shutdown()
        self.server.server_close()

    def files(self, name, revision="main"):
        repo = self.repos[name]
        return repo.commits[repo.find(revision)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status=200, value=None, headers=(), body=None):
        body = json.dumps({} if value is None else value).encode() if body is None else body
        self.send_response(status)
        for name, content in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, words):
        self.answer(status, {"error": words}, {"X-Error-Code": code, "X-Error-Message": words})

    def handle_any(self):
        hub, path = self.server.hub, self.path.partition("?")[0]
        if hub.is_closed:
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        hub.asked.append(f"{self.command} {path}")
        for part, status in hub.fails.items():
            if part in f"{self.command} {path}":
                self.refuse(status, "", "You may not" if status == 403 else "it does not work")
                return
        for method, pattern, action in ROUTES:
            if self.command == method and (found := re.fullmatch(pattern, path)):
                action(self, hub, body, **{key: unquote(value) for key, value in found.groupdict().items()})
                return
        self.refuse(404, "", "no such page")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 (http.server's names)

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def is_owner(self, name=None):
        """Whether the token may write; if not, that is said."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return False
        if name is not None and name.partition("/")[0] != OWNER:
            self.refuse(403, "", f"You don't have the rights to write to {name}")
            return False
        return True

    def repo(self, hub, name):
        """A repository that the token may see; if there is none, that is said."""
        repo = hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            self.refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def root(self, hub, body):
        self.answer()

    def create(self, hub, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if self.is_owner(name):
            status = 409 if name in hub.repos else 200
            private = asked.get("visibility") == "private" or asked.get("private") is True
            hub.repos.setdefault(name, Repo(private=private))
            self.answer(status, {"url": f"{hub.url}/{name}", "name": name, "id": name})

    def whoami(self, hub, body):
        if self.is_owner():
            self.answer(200, {"type": "user", "name": OWNER, "auth": {}, "orgs": []})

    def info(self, hub, body, name, revision="main"):
        if repo := self.repo(hub, name):
            sha = repo.find(revision)
            self.answer(200, {"id": name, "modelId": name, "private": repo.private, "sha": sha, "siblings": []})

    def branch(self, hub, body, name, branch):
        if self.is_owner(name) and (repo := self.repo(hub, name)):
            status = 409 if branch in repo.branches else 200
            repo.branches.setdefault(branch, repo.branches["main"])
            self.answer(status)

    def validate(self, hub, body):
        assert "content" in json.loads(body)
        errors = [{"message": words} for words in hub.yaml_errors]
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, hub, body, name, revision):
        if (repo := self.repo(hub, name)) is None:
            return
        if (commit := repo.find(revision)) is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return
        there = repo.commits[commit]
        files = []
        for file in json.loads(body)["files"]:
            is_large = file["size"] >= LFS_FROM or file["path"].endswith(".safetensors")
            content = there.get(file["path"])
            oid = None if content is None else oid_of(content, is_large=is_large)
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def lfs(self, hub, body, name):
        if not (self.is_owner() and self.repo(hub, name)):
            return
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{hub.url}/blobs/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, hub, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        hub.blobs[oid] = body
        self.answer()

    def commit(self, hub, body, name, revision):
        asks = "create_pr=1" in self.path
        if not self.is_owner(None if asks else name):
            return
        if (repo := self.repo(hub, name)) is None:
            return
        lines = [json.loads(line) for line in body.splitlines() if line]
        changes = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = hub.blobs[value["oid"]]
        number = sum(branch.startswith("refs/pr/") for branch in repo.branches) + 1
        commit = repo.commit(f"refs/pr/{number}" if asks else revision, changes, lines[0]["value"]["summary"])
        pull = {"pullRequestUrl": f"{hub.url}/{name}/discussions/{number}"} if asks else {}
        self.answer(200, {"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit, **pull})

    def resolve(self, hub, body, name, revision, file):
        if (repo := self.repo(hub, name)) is None:
            return
        commit = repo.find(revision)
        content = None if commit is None else repo.commits[commit].get(file)
        if content is None:
            code = "RevisionNotFound" if commit is None else "EntryNotFound"
            words = "Invalid rev id" if commit is None else "Entry not found"
            self.answer(404, {}, {"X-Error-Code": code, "X-Error-Message": words, "X-Repo-Commit": commit or ""})
            return
        etag = oid_of(content, is_large=len(content) >= LFS_FROM)
        self.answer(200, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit}, body=content)


def oid_of(content, *, is_large):
    """What git calls a file: its own hash, or that of a large file."""
    blob = b"blob %d\0" % len(content)
    return hashlib.sha256(content).hexdigest() if is_large else hashlib.sha1(blob + content).hexdigest()


NAME = r"(?P<name>[^/]+/[^/]+)"
ROUTES = [
    ("HEAD", "/?", Handler.root),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(?P<revision>[^/]+)", Handler.info),
    ("POST", f"/api/models/{NAME}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs),
    ("PUT", "/blobs/(?P<oid>[0-9a-f]+)", Handler.put),
    ("POST", f"/api/models/{NAME}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
    ("HEAD", f"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", Handler.resolve),
]

"""A stand-in of the hub's HTTP API on this machine: it keeps what is committed."""

import base64
import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"  # noqa: S105


@dataclass
class Hub:
    """What the hub holds; its address is `url`."""

    url: str = ""
    models: set[str] = field(default_factory=set)
    """Models that are there already."""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> committed file -> content."""
    role: str = "write"
    faults_of_cards: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, error: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials"}, 401)
        return False

    def do_GET(self) -> None:
        if not self.allowed():
            return
        if self.path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.hub.role}}
            self.answer({"name": "me", "orgs": [{"name": "lab"}], "auth": token})
            return
        name = self.path.removeprefix("/api/models/")
        if name in self.hub.models or name in self.hub.private:
            private = self.hub.private.get(name, False)
            self.answer({"id": name, "private": private, "tags": [], "siblings": []})
        else:
            self.answer({"error": "Repository not found"}, 404, "RepoNotFound")

    def do_PUT(self) -> None:  # one large file, as to the hub's storage
        content = self.body()
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        raw = self.body()
        if self.path != "/api/validate-yaml" and not self.allowed():
            return
        if self.path.endswith("/commit/main"):
            self.commit(raw)
            return
        values = json.loads(raw)
        if self.path == "/api/repos/create":
            self.create(values)
        elif self.path == "/api/validate-yaml":
            faults = [{"message": fault} for fault in self.hub.faults_of_cards]
            self.answer({"errors": faults, "warnings": []}, 400 if faults else 200)
        elif "/preupload/" in self.path:
            self.answer({"files": [_mode(file["path"]) for file in values["files"]]})
        else:  # git-lfs
            at = f"{self.hub.url}/blob/"
            objects = [
                {**o, "actions": {"upload": {"href": at + o["oid"]}}} for o in values["objects"]
            ]
            self.answer({"objects": objects, "transfer": "basic"})

    def create(self, values: dict[str, str]) -> None:
        name = f"{values['organization']}/{values['name']}"
        there = {"url": f"{self.hub.url}/{name}", "id": name}
        if name in self.hub.private or name in self.hub.models:
            self.answer({"error": "exists", **there}, 409)
            return
        self.hub.private[name] = values.get("visibility") == "private"
        self.answer(there)

    def commit(self, raw: bytes) -> None:
        name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
        committed = self.hub.files.setdefault(name, {})
        for line in raw.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                committed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                committed[value["path"]] = self.hub.blobs[value["oid"]]
        url = f"{self.hub.url}/{name}/commit/0123456789012345678901234567890123456789"
        self.answer({"commitUrl": url, "commitOid": url[-40:]})


def _mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith("safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


@contextmanager
def running_hub() -> Generator[Hub]:
    """Run the stand-in inside the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""Data sets of the hub, as `datasets` loads them from a stand-in of its HTTP API."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0" * 40
CARD = b"""---
configs:
- config_name: sums
  data_files: [{split: train, path: sums/train.jsonl}, {split: test, path: sums/test.jsonl}]
- config_name: words
  data_files: [{split: train, path: words/train.jsonl}]
---
"""
SETS = {
    "lab/questions": {
        "README.md": CARD,
        "sums/train.jsonl": b'{"question": "2 + 2?", "answer": "4"}\n' * 3,
        "sums/test.jsonl": b'{"question": "3 + 4?", "answer": "7"}\n',
        "words/train.jsonl": b'{"prompt": "Which pet barks?", "completion": "A dog."}\n',
    },
    "lab/cut": {"train.jsonl": b'{"prompt": "Which pet barks?", "compl'},
    "lab/script": {"script.py": b"raise SystemExit('code of the hub was run')\n"},
}


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        owner, name, what, *rest = [*parts[1 + is_api :], "", "", ""][:20]
        files = SETS.get(f"{owner}/{name}")
        path = "/".join(part for part in rest[1:] if part)
        if files is None:
            self.send(b"", 404, X_Error_Code="RepoNotFound")
        elif what == "resolve" and path in files:
            tag = hashlib.sha1(files[path], usedforsecurity=False).hexdigest()
            self.send(files[path], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        elif what == "resolve":
            self.send(b"", 404, X_Error_Code="EntryNotFound")
        elif what == "tree":
            tree = [
                {"type": "file", "oid": COMMIT, "size": len(content), "path": file}
                for file, content in files.items()
                if file.rpartition("/")[0] == path
            ]
            self.send(json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": file} for file in files]
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.send(json.dumps(about).encode())

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def address() -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_rows_come_from_the_hub_and_what_cannot_is_said(address: str, tmp_path: Path) -> None:
    names = (
        "lab/questions/sums:test", "lab/questions/words", "lab/questions/sums:validation",
        "lab/script", "lab/nothing", "lab/cut",
    )  # fmt: skip
    code = f"""
from d2lora.cli import main
for name in {names!r}:
    print("code", main(["inspect", "--data", name, "--base", "embedded"]), flush=True)
"""
    # huggingface_hub reads these variables once, as it is imported.
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "COLUMNS": "200"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    said = ran.stdout
    assert ran.returncode == 0, said
    assert [line for line in said.splitlines() if line.startswith("code")] == [
        "code 0", "code 0", "code 2", "code 2", "code 2", "code 2",
    ]  # fmt: skip
    assert "3 + 4?" in said
    assert "Which pet barks?" in said
    assert "2 + 2?" not in said
    assert "code of the hub was run" not in said
    assert "validation" in said.partition("Which pet")[2]
    assert "it is a script, and d2lora runs no code from the hub" in said
    assert "lab/nothing: the hub data set cannot be loaded" in said
    assert "lab/cut: the hub data set cannot be loaded: JSON parse error" in said

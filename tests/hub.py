"""A Hugging Face Hub on this machine, as far as pushing needs one: a repository, uploads (git LFS and not), the commit."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization"), given["name"])))
            self._answer({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            self._answer({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            self._answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**entry, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}", "header": {}}}}
                        for entry in objects
                    ],
                }
            )
        elif "/commit/" in path:
            for line in body.decode().splitlines():
                self._commit(json.loads(line))
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            self._answer({"commitUrl": f"{self.server.endpoint}/{name}/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.send_error(404, path)

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]
        self.server.blobs[self.path.rpartition("/")[2]] = data
        self._answer({})

    def do_GET(self):
        if self.path.startswith("/api/whoami"):
            self._answer({"name": "somebody", "type": "user"})
        elif self.path.startswith("/api/models/"):
            self._answer({"id": self.path.removeprefix("/api/models/"), "siblings": [], "sha": "0" * 40})
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

    do_HEAD = do_GET

    def _commit(self, line):
        value = line["value"]
        if line["key"] == "file":
            self._write(value["path"], base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            self._write(value["path"], self.server.blobs[value["oid"]])

    def _write(self, name, data):
        path = self.server.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def _answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """The endpoint of a hub that writes what is pushed to it into `folder`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.folder, server.blobs = folder, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

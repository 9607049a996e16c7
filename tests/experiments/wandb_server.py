"""A stub of W&B's server on this machine: it stores what it receives, and can fail in several ways."""

from __future__ import annotations

import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.experiments.loopback import serving


@dataclass
class WandbServer:
    """State of the server.

    runs: values by run id. history: rows by run id and offset. uploads: names of received files. commands: the next
    commands for agents, one per heartbeat. silent: once set, the server accepts connections but never answers.
    close(): stop the server, so that its port refuses connections.
    """

    url: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))
    history: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    exits: dict[str, int] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    sweeps: dict[str, str] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    silent: threading.Event = field(default_factory=threading.Event)
    close: Callable[[], None] = lambda: None
    over: threading.Event = field(default_factory=threading.Event)

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self.history[run].items())]

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
        answer = getattr(self, f"_{name[1]}", None) if name else None
        return answer(variables) if answer else {}

    def _Viewer(self, variables):
        entity = {"id": "RQ==", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": entity}

    def _RunResumeStatus(self, variables):
        run, rows = variables["name"], self.rows(variables["name"])
        if run not in self.runs:
            return {"model": {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "me"}, "bucket": None}}
        bucket = {
            "id": "Qg==",
            "name": run,
            "summaryMetrics": "{}",
            "displayName": run,
            "logLineCount": 0,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": "",
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "me"}, "bucket": bucket}}

    def _UpsertBucket(self, variables):
        self.runs[variables["name"]] |= {key: value for key, value in variables.items() if value is not None}
        project = {"id": "UA==", "name": variables.get("project") or "p", "entity": {"id": "RQ==", "name": "me"}}
        bucket = {
            "id": "Qg==",
            "name": variables["name"],
            "displayName": variables["name"],
            "description": "",
            "config": "{}",
        }
        bucket |= {"sweepName": variables.get("sweep"), "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _CreateRunFiles(self, variables):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, variables):
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, variables):
        self.artifacts.append(variables["input"]["artifactCollectionName"])
        sequence = {"id": "UQ==", "latestArtifact": {"id": "QQ==", "versionIndex": 0}}
        return {"createArtifact": {"artifact": {"id": "QQ==", "state": "COMMITTED", "artifactSequence": sequence}}}

    def _UpsertSweep(self, variables):
        self.sweeps["s1"] = variables["config"]
        project = {"id": "UA==", "name": "p", "entity": {"id": "RQ==", "name": "me"}}
        return {"upsertSweep": {"sweep": {"name": "s1", "project": project}, "configValidationWarnings": []}}

    def _SweepWithRuns(self, variables):
        if variables["sweep"] not in self.sweeps:
            return {"project": {"sweep": None}}
        config = self.sweeps[variables["sweep"]]
        return {"project": {"sweep": {"id": "s", "name": "s1", "config": config, "runs": {"edges": []}}}}

    def _CreateAgent(self, variables):
        return {"createAgent": {"agent": {"id": "a1"}}}

    def _Heartbeat(self, variables):
        running = json.loads(variables["runState"])
        commands = [] if running else [self.commands.pop(0)] if self.commands else [{"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "a1"}, "commands": json.dumps(commands)}}

    def file_stream(self, run: str, sent: dict[str, Any]) -> None:
        stream = sent.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(stream["content"], stream["offset"]):
            self.history[run][number] = json.loads(line)
        if "exitcode" in sent:
            self.exits[run] = sent["exitcode"]

    def answer(self, request: BaseHTTPRequestHandler) -> bytes:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if self.silent.is_set():
            self.over.wait()
        if request.path == "/graphql":
            query = json.loads(body)
            return json.dumps({"data": self.graphql(query["query"], query.get("variables") or {})}).encode()
        if stream := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", request.path):
            self.file_stream(stream[1], json.loads(body))
        elif request.path.startswith("/upload/"):
            self.uploads.append(request.path.removeprefix("/upload/"))
        return b"{}"


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    state = WandbServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client may be gone
                content = state.answer(self)
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_PUT = do_POST

    with ExitStack() as stack:
        state.url, state.close = stack.enter_context(serving(Handler)), stack.close
        stack.callback(state.over.set)  # called before the server stops
        yield state

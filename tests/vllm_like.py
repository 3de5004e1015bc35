"""A server on loopback that speaks what `engines/vllm.py` needs of vLLM's protocol, computed by other code.

Models and adapters run through transformers and PEFT, one token at a time. Faults can be ordered.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["Server", "serve"]


class Server:
    """What is served, what was asked, and what goes wrong next."""

    def __init__(self, folder: Path) -> None:
        self.name = "base"
        self.folder = folder
        self.models: dict[str, Any] = {self.name: self._plain()}
        self.adapters: dict[str, str] = {}
        self.unloaded: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.faults: list[tuple[int, str]] = []  # status and text of the next answers
        self.answer_without_ids = False
        self.url = ""
        self._lock = threading.Lock()

    def _plain(self) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()

    def load(self, body: dict[str, Any]) -> str:
        """Take an adapter over, as PEFT reads it."""
        import peft

        self.models[body["lora_name"]] = peft.PeftModel.from_pretrained(self._plain(), body["lora_path"]).eval()
        self.adapters[body["lora_name"]] = body["lora_path"]
        return "Success: loaded"

    def unload(self, body: dict[str, Any]) -> str:
        """Forget an adapter."""
        del self.models[body["lora_name"]]
        self.unloaded.append(body["lora_name"])
        return "Success: unloaded"

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One reply, token by token."""
        import torch

        with self._lock, torch.inference_mode():
            self.asked.append(body)
            random = torch.Generator().manual_seed(len(self.asked))
            tokens, logps = list(body["prompt"]), []
            for _ in range(body["max_tokens"]):
                logits = self.models[body["model"]](torch.tensor([tokens])).logits[0, -1].float()
                known = logits.log_softmax(-1)
                token = int(torch.multinomial(known.exp(), 1, generator=random))
                tokens.append(token)
                logps.append(float(known[token]))
                if token in body["stop_token_ids"]:
                    break
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "stop"}
        choice["logprobs"] = {"token_logprobs": logps, "tokens": [], "text_offset": [], "top_logprobs": None}
        if not self.answer_without_ids:
            choice["token_ids"] = tokens[len(body["prompt"]) :]
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

        def _send(self, status: int, answer: object, **headers: str) -> None:
            text = isinstance(answer, str)
            body = (answer if text else json.dumps(answer)).encode()  # type: ignore[union-attr]
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            server.keys.add(self.headers.get("Authorization", ""))
            listed = [{"id": n, "parent": None if n == server.name else server.name} for n in reversed(server.models)]
            self._send(200, {"object": "list", "data": [{**m, "object": "model"} for m in listed]})

        def do_POST(self) -> None:
            server.keys.add(self.headers.get("Authorization", ""))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if server.faults:
                status, text = server.faults.pop(0)
                self._send(status, {"error": {"message": text}}, Retry_After="0")
                return
            route = {
                "/v1/completions": server.complete,
                "/v1/load_lora_adapter": server.load,
                "/v1/unload_lora_adapter": server.unload,
            }[self.path]
            self._send(200, route(body))

    return Handler


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server of the model in `folder`, on a free port of loopback."""
    server = Server(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(server)) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()

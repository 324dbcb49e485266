"""llama.cpp in this process, by the package xllamacpp: what a GGUF file says there."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

xllamacpp = pytest.importorskip("xllamacpp")


class LlamaCpp:
    """A model of a GGUF file, with an adapter on it or none."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.port = 512, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup, params.verbosity = False, 0
        if adapter is not None:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(adapter), 1.0
            params.lora_adapters = [info]
        self._server = xllamacpp.Server(params)

    def continued(self, ids: list[int], n: int) -> list[int]:
        """Return the likeliest tokens that follow, one after the other."""
        asked = {"prompt": ids, "n_predict": n, "temperature": 0, "return_tokens": True}
        return self._ask("/completion", asked)["tokens"]

    def encoded(self, text: str) -> list[int]:
        """Return the tokens of a text, special ones around it."""
        return self._ask("/tokenize", {"content": text, "add_special": True})["tokens"]

    def _ask(self, path: str, values: dict[str, Any]) -> Any:
        request = urllib.request.Request(  # noqa: S310  on this machine
            self._server.listening_address + path,
            json.dumps(values).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            return json.load(answer)

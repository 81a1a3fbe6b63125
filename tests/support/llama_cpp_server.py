"""llama.cpp's own HTTP server, from a prebuilt wheel; runs in the environment of the servers.

    python tests/support/llama_cpp_server.py MODEL.gguf NAME PORT [--template FILE] [--key KEY]

It serves on 127.0.0.1 until it gets SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import xllamacpp


def main() -> None:
    """Serves the model that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("name")
    parser.add_argument("port", type=int)
    parser.add_argument("--template", type=Path, help="a chat template, in place of the model's")
    parser.add_argument("--key", help="the API key that requests must bear")
    asked = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = asked.model
    params.model_alias = {asked.name}
    params.hostnames, params.port = ["127.0.0.1"], asked.port
    params.n_ctx, params.n_parallel = 8192, 2
    # Two that wait for each other by spinning lose to whatever else the machine does.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.offline, params.ui = True, False
    if asked.template:
        params.chat_template = asked.template.read_text(encoding="utf-8")
    if asked.key:
        params.api_keys = [asked.key]
    server = xllamacpp.Server(params)
    print(f"listening at {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()

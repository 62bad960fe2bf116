"""The teacher in this process, quantised and offloaded: whatever holds its weights, its records are its own forward's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from tests.teacher.tiny import make_model, make_tokenizer
from trl_reasoning_distill.teacher.sampling.transformers import TransformersEngine
from trl_reasoning_distill.teacher.scoring import TransformersReader

ROWS = [list(f"{n} and {n} is {2 * n}.".encode()) for n in range(2, 30, 4)]
POSITIONS = [list(range(5, len(row))) for row in ROWS]


@pytest.fixture
def folder(tmp_path) -> Path:
    make_model(hidden_size=128).save_pretrained(tmp_path / "model")  # NF4 quantises blocks of 64
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def check_own_forward(model: Any, atol: float = 1e-5) -> None:
    """Records of the reader against the log-softmax of the model's plain forward, row by row, at two temperatures."""
    read = TransformersReader(model, make_tokenizer(), 8, (1.0, 2.0), max_batch_tokens=64).read(ROWS, POSITIONS)
    for row, positions, records in zip(ROWS, POSITIONS, read, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double()
        ids = torch.from_numpy(records.ids).long()
        for temperature in (1.0, 2.0):
            dense = (logits[np.array(positions) - 1] / temperature).log_softmax(-1).gather(1, ids)
            np.testing.assert_allclose(records.at_temperature(temperature), dense.numpy(), atol=atol)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_teacher(folder, quantization):
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    engine = TransformersEngine.from_pretrained(str(folder), device="cpu", dtype="float32", quantization=quantization)
    kinds = {type(module).__name__ for module in engine.model.modules()}
    assert kinds & {"Linear4bit", "Linear8bitLt"}
    check_own_forward(engine.model, atol=1e-4)


@pytest.mark.parametrize("place", ["cpu", "disk", "parts"])
def test_offloaded_teacher(tmp_path, place):
    """accelerate's hooks bring the weights in when a layer is called, the head's too."""
    model = make_model()
    own = TransformersReader(make_model(), make_tokenizer(), 8, (1.0, 2.0)).read(ROWS, POSITIONS)
    if place == "cpu":
        model = cpu_offload(model, execution_device=torch.device("cpu"))
    elif place == "disk":
        model = disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    else:
        devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        model = dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path / "offload")
    assert place == "parts" or model.lm_head.weight.device.type == "meta"
    read = TransformersReader(model, make_tokenizer(), 8, (1.0, 2.0)).read(ROWS, POSITIONS)
    for mine, expected in zip(read, own, strict=True):
        assert (mine.ids == expected.ids).all()
        np.testing.assert_allclose(mine.log_probs, expected.log_probs, atol=1e-5)
        np.testing.assert_allclose(mine.log_sum_exp, expected.log_sum_exp, atol=1e-5)


def test_device_map_from_the_options(folder):
    engine = TransformersEngine.from_pretrained(str(folder), dtype="float32", device_map="auto")
    check_own_forward(engine.model)


@pytest.mark.parametrize(("mean", "spread"), [(4.9, 0.35), (6.5, 0.7)], ids=["short answers", "long chains of thought"])
def test_batches_of_like_length_hold_little_padding(mean, spread):
    lengths = np.random.default_rng(0).lognormal(mean, spread, 512).astype(int).clip(20, 8000).tolist()
    reader = TransformersReader(make_model(), make_tokenizer(), 8, (1.0,), max_batch_tokens=16384)
    batches = list(reader._batches(lengths))
    assert sorted(number for batch in batches for number in batch) == list(range(512))
    padded = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    assert max(padded) <= 16384
    assert sum(padded) / sum(lengths) <= 1.05
    assert np.mean(padded) > 2048

"""What is foretold against what is there: parameters and activations are counted, so they must agree to the byte."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from trl_reasoning_distill.doctor.memory import (
    LiveTeacher,
    ModelShape,
    Sharding,
    TrainingShape,
    adapter_parameters,
    inference_memory,
    model_shape,
    saved_bytes,
    training_memory,
)

REPOSITORY = Path(__file__).parent.parent.parent


def make_config(tied: bool = True, layers: int = 3) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_real_model(tied: bool) -> None:
    config = make_config(tied)
    model = Qwen2ForCausalLM(config)
    shape = model_shape(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.head_parameters == model.lm_head.weight.numel()
    assert shape.cache_bytes_per_token == 2 * 2 * 3 * 2 * 8, "keys and values, 16 bits, 3 layers, 2 heads of 8"


def test_a_published_size_is_met() -> None:
    """Qwen2.5-0.5B: 494 M parameters by its model card, 0.36 B without embeddings."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    shape = model_shape(config)
    assert shape.parameters == 494_032_768
    assert shape.linear_parameters == pytest.approx(0.36e9, rel=0.01)


def test_adapters_are_those_of_peft() -> None:
    config = make_config()
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert adapter_parameters(config, 4, targets) == trainable


@pytest.mark.parametrize("compute_bytes", [2, 4])
@pytest.mark.parametrize("layers", [1, 4])
def test_activations_are_what_autograd_keeps_of_a_real_model(layers: int, compute_bytes: int) -> None:
    config = make_config(layers=layers)
    model = Qwen2ForCausalLM(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute_bytes == 2),
    ):
        hidden = model.model(input_ids=torch.zeros(2, 48, dtype=torch.long), use_cache=False).last_hidden_state
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del hidden
    shape = TrainingShape(batch=2, length=48, compute_bytes=compute_bytes, checkpointing=False)
    assert saved_bytes(config, shape)[0] == pytest.approx(real, rel=0.02)


def test_checkpointing_keeps_one_input_per_layer() -> None:
    shallow, deep = make_config(layers=4), make_config(layers=20)
    shape = TrainingShape(batch=2, length=64, compute_bytes=4, checkpointing=True)
    grown = saved_bytes(deep, shape)[0] - saved_bytes(shallow, shape)[0]
    assert grown == pytest.approx(16 * 2 * 64 * 32 * 4, rel=0.05), "16 layers more: their inputs in float32"


def test_shards_divide_what_they_shard_and_nothing_else() -> None:
    config = make_config()
    shape = TrainingShape(batch=1, length=16, accumulates=True)
    parameters = model_shape(config).parameters
    zero2 = [training_memory(config, shape, Sharding("zero2", ranks)) for ranks in (1, 4)]
    assert zero2[0].weights == zero2[1].weights == 2 * parameters
    assert (
        zero2[1].optimizer == pytest.approx(zero2[0].optimizer / 4, rel=0.01) == pytest.approx(3 * parameters, rel=0.01)
    )
    zero3 = [training_memory(config, shape, Sharding("zero3", ranks)) for ranks in (1, 4)]
    assert zero3[1].weights == pytest.approx(zero3[0].weights / 4, rel=0.01)
    offloaded = training_memory(config, shape, Sharding("zero3", 1, offload=True))
    assert offloaded.optimizer == offloaded.weights == 0
    assert zero3[0].activations == zero3[1].activations == zero2[0].activations


def test_a_teacher_beside_the_student_takes_its_weights_and_a_tile_and_shards_with_it() -> None:
    config, teacher = make_config(), make_config(layers=6)
    alone = TrainingShape(batch=2, length=64, compute_bytes=4, checkpointing=False)
    asked = dataclasses.replace(alone, teacher=LiveTeacher(model_shape(teacher), 2))
    apart, beside = (training_memory(config, shape, Sharding(), cuda=False) for shape in (alone, asked))
    assert beside.other_model == 2 * model_shape(teacher).parameters
    assert beside.loss - apart.loss == 128 * 257 * 4 + model_shape(teacher).head_parameters * 4 + 128 * 32 * 4
    assert (apart.weights, apart.activations) == (beside.weights, beside.activations)
    sharded = training_memory(config, asked, Sharding("zero3", 4))
    assert sharded.other_model == pytest.approx(beside.other_model / 4, rel=0.01)
    copied = training_memory(config, dataclasses.replace(alone, frozen_reference=True), Sharding())
    assert copied.other_model == copied.weights, "a copy in the student's own precision"


def test_an_adapter_adds_its_own_weights() -> None:
    config = make_config()
    trainable = adapter_parameters(config, 4, ["q_proj"])
    shapes = [TrainingShape(batch=1, length=16, trainable=count) for count in (None, trainable)]
    whole, adapter = (training_memory(config, shape, Sharding()) for shape in shapes)
    assert adapter.weights == whole.weights + 4 * trainable


def test_four_bits_spare_the_embeddings() -> None:
    shape = ModelShape(1000, 600, 200, 2, 8, 25, 64)
    four_bit = inference_memory(shape, weight_bytes=0.5, batch_tokens=0, logits_rows=0)
    assert four_bit.weights == 600 * 0.5 + 400 * 2


def test_another_architecture_is_counted_too() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24
    )
    shape = model_shape(config)
    assert shape.layers == 2
    assert shape.linear_parameters == 2 * (4 * 16 * 16 + 3 * 16 * 24)


@pytest.mark.slow
def test_the_prediction_meets_what_torch_allocates_in_a_real_training() -> None:
    cases = ["full, float32", "full, bf16, checkpointing", "LoRA, bf16, checkpointing", "live teacher, float32"]
    command = [sys.executable, str(REPOSITORY / "benchmarks/doctor.py"), "--quick", "--json", "--cases", *cases]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, case in json.loads(result.stdout.splitlines()[-1])["predicted_over_measured"].items():
        for part in ("weights", "optimizer", "other_model"):
            assert case[f"predicted_{part}"] == pytest.approx(case[f"measured_{part}"], rel=0.01, abs=0.1), (name, part)
        assert case["ratio"] == pytest.approx(1.0, abs=0.05), name

"""One rank equals two, with real processes: loss, gradient norm and weights, under DDP, ZeRO-2, ZeRO-3 and FSDP2."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed.train_worker import train
from tests.trainer import tiny
from trl_reasoning_distill.trainer.checkpoints import MANIFEST

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]  # DeepSpeed compiles at its first start

COMMON = {
    "compute_environment": "LOCAL_MACHINE",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "use_cpu": True,
}
DEEPSPEED = {
    "deepspeed_multinode_launcher": "standard",
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
}
LAUNCHES: dict[str, dict[str, Any]] = {
    "DDP": {"distributed_type": "MULTI_GPU"},  # MULTI_CPU in the config would silently run one process
    "ZERO2": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {**DEEPSPEED, "zero_stage": 2, "zero3_init_flag": False},
    },
    "ZERO3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {**DEEPSPEED, "zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    },
    "FSDP": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "fsdp_reshard_after_forward": True,
            "fsdp_cpu_ram_efficient_loading": False,
        },
    },
}
# Also the head as a shard group of its own, so that its weight is a DTensor in the forward
LAUNCHES["FSDP-head"] = {
    **LAUNCHES["FSDP"],
    "fsdp_config": {
        **LAUNCHES["FSDP"]["fsdp_config"],
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer,Linear",
    },
}
# What accelerate calls the launch once it runs, on processes without a GPU
EXPECTED = {"DDP": "MULTI_CPU", "ZERO2": "DEEPSPEED", "ZERO3": "DEEPSPEED", "FSDP": "FSDP", "FSDP-head": "FSDP"}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A student on disk, the same with tied embeddings, and a store of eight rows."""
    folder, tokenizer = tmp_path_factory.mktemp("distributed"), tiny.make_tokenizer()
    for name, tied in (("student", False), ("tied", True)):
        tiny.make_model(tied=tied).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    store = tiny.make_store(folder / "store", tiny.make_model(7, vocab_size=272), tokenizer, tiny.make_rows())
    return folder / "student", folder / "tied", store


def launch(config: dict[str, Any], tmp_path: Path, *arguments: object, script: str = "train_worker.py") -> Any:
    """Run a worker on two processes and read the result it left in its third argument, a folder."""
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({**COMMON, **config}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    repository = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(file),
        "--main_process_port",
        str(port),
    ]
    worker = Path(__file__).with_name(script)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(repository),
    }  # fmt: skip
    run = subprocess.run(
        [*command, str(worker), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((Path(str(arguments[2])) / "result.json").read_text())


def compare(kind: str, model: Path, store: Path, tmp_path: Path, **options: Any) -> None:
    one = train(str(model), str(store), tmp_path / "one", **options)
    words = [f"expect={EXPECTED[kind]}", *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    two = launch(LAUNCHES[kind], tmp_path, model, store, tmp_path / "two", *words)
    for name in ("loss", "grad_norm", "sft_loss", "kd_loss", "kl_loss", "kl_coef", "teacher_mass", "top1_agreement"):
        assert two[name] == pytest.approx(one[name], rel=1e-6, abs=1e-6), name
    assert two["num_tokens"] == one["num_tokens"]
    assert two["supervised_tokens"] == one["supervised_tokens"]
    file = "adapter_model.safetensors" if options.get("lora") else "model.safetensors"
    first, second = (load_file(tmp_path / run / "final_model" / file) for run in ("one", "two"))
    if "lm_head.weight" not in first and "lm_head.weight" in second:  # FSDP2's whole state writes a tied head out
        assert second.pop("lm_head.weight").equal(second["model.embed_tokens.weight"])
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(
            second[name], weight, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not list((tmp_path / "two").glob(".final_model*")), "nothing half-written is left"


def test_ddp(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, _, store = material
    compare("DDP", student, store, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZERO2", "ZERO3", "FSDP", "FSDP-head"])
def test_sharded(material: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    student, _, store = material
    compare(kind, student, store, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ZERO3", "FSDP"])
def test_sharded_with_tied_head(material: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    _, tied, store = material
    compare(kind, tied, store, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["ZERO3", "FSDP"])
def test_frozen_copy_is_sharded(material: tuple[Path, Path, Path], tmp_path: Path, kind: str, tied: bool) -> None:
    student = material[1] if tied else material[0]
    compare(kind, student, material[2], tmp_path, use_kl_regularization=True, kl_coef=2.0, kl_target=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "ZERO3"])
def test_lora_with_checkpointing_and_reference(material: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    student, _, store = material
    compare(kind, student, store, tmp_path, lora=True, gradient_checkpointing=True, use_kl_regularization=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "ZERO2", "ZERO3", "FSDP"])
def test_resume_is_bitwise(material: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    """Also from the checkpoint before, when the newest lost its manifest, as a kill leaves it."""
    student, _, store = material
    options = {"save_strategy": "steps", "save_steps": 1, "use_kl_regularization": True, "kl_target": 0.01}
    words = [f"expect={EXPECTED[kind]}", *(f"{name}={json.dumps(value)}" for name, value in options.items())]
    whole = launch(LAUNCHES[kind], tmp_path, student, store, tmp_path / "run", *words)
    weights = load_file(tmp_path / "run" / "final_model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    (tmp_path / "run" / "checkpoint-2" / MANIFEST).unlink()
    resumed = launch(LAUNCHES[kind], tmp_path, student, store, tmp_path / "run", *words)
    for name, weight in load_file(tmp_path / "run" / "final_model" / "model.safetensors").items():
        assert weight.equal(weights[name]), name
    assert resumed == whole
    other = "ZERO2" if kind == "DDP" else "DDP"
    with pytest.raises(AssertionError, match="distributed type was"):
        launch(LAUNCHES[other], tmp_path, student, store, tmp_path / "run", f"expect={EXPECTED[other]}", *words[1:])


@pytest.mark.slow
def test_ddp_with_accumulation_and_packing(material: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, _, store = material
    compare("DDP", student, store, tmp_path, gradient_accumulation_steps=2, packing=True, max_length=64)

"""The stages of the quickstart, made small: what they made in peace, and what is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.harness import OUTPUT, Stage, Whole, finish

Road = Callable[[str], tuple[Stage, Whole]]


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory, quickstart_models: Path) -> Road:
    """`road(name)`: a stage and its run in peace, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("road")
    stages = _stages(folder, quickstart_models)
    needs = {"verify": "generate", "capture": "verify", "sft": "verify", "distill": "capture", "gkd": "verify"}
    made: dict[str, Whole] = {}

    def get(name: str) -> tuple[Stage, Whole]:
        if name not in made:
            if name in needs:
                get(needs[name])
            made[name] = finish(stages[name], folder / name)
        return stages[name], made[name]

    return get


def _stages(folder: Path, models: Path) -> dict[str, Stage]:
    """With all that a resumption could lose: sampling, dropout, accumulation, several epochs, warm-ups, an adaptive coefficient."""
    student = shutil.copytree(models / "student", folder / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    teacher, verified = models / "teacher", folder / "verify" / OUTPUT
    answering = "--source synthetic_arithmetic --response_format think --device cpu"
    training = (
        f"--model_name_or_path {student} --dataset_path {verified} --dtype float32 --max_length 256 --max_steps 5 "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 2 --learning_rate 1e-3 --lr_scheduler_type cosine "
        "--warmup_steps 2 --save_strategy steps --save_steps 1 --save_total_limit 2 --logging_steps 1 --report_to none "
        "--bf16 false --use_cpu true --gradient_checkpointing false --disable_tqdm true"
    )
    options = {
        "generate": f"--teacher {teacher} {answering} --max_new_tokens 96 --limit 8 --num_samples 2 --temperature 1 --max_batch_size 4",
        "verify": f"--traces {folder / 'generate' / OUTPUT}",
        "capture": f"--teacher {teacher} --dataset {verified} --store_top_k 10 --unit_rows 1",
        "sft": f"{training} --use_kl_regularization true --kl_target 0.05",
        "distill": f"{training} --teacher_logits {folder / 'capture' / OUTPUT} --kd_top_k 10 --kd_warmup_steps 4",
        "gkd": f"{training} --teacher {teacher} --kd_top_k 10 --lmbda 0.5 --max_new_tokens 8",
        "evaluate": f"--models student={student} teacher={teacher} {answering} --max_new_tokens 48 --split test --limit 4 --max_batch_size 2",
    }
    return {name: Stage(name, tuple(words.split())) for name, words in options.items()}

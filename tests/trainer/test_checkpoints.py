"""A checkpoint is used only if every byte of it is what was saved, and the training is the one that saved it."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.trainer import tiny
from tests.trainer.conftest import logged, weights
from trl_reasoning_distill.data.files import DiskFullError
from trl_reasoning_distill.trainer import checkpoints
from trl_reasoning_distill.trainer.checkpoints import MANIFEST, CheckpointError, find_problem, hash_rows, newest_valid
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig, TopKDistillConfig
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.topk_distill import TopKDistillTrainer


class StopAfter(TrainerCallback):
    """Ends a training after some steps, with a schedule made for more."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2}


@pytest.fixture
def run(fit: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`run(folder, **options)`: a training that saves after each step; `resume_from` as for `train`."""

    def _run(folder: str = "run", **options: Any) -> Any:
        return fit(
            ReasoningSFTTrainer, ReasoningSFTConfig, **{**SAVING, "output_dir": str(tmp_path / folder), **options}
        )

    return _run


def test_manifest_covers_every_file(run: Callable[..., Any], tmp_path: Path) -> None:
    run()
    for step in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert find_problem(folder) is None
        manifest = json.loads((folder / MANIFEST).read_text())
        assert manifest["step"] == step
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(manifest["files"]) == names - {MANIFEST} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert newest_valid(tmp_path / "run").path == str(folder)


def test_every_flipped_bit_and_every_cut_is_found(run: Callable[..., Any], tmp_path: Path) -> None:
    run(max_steps=1)
    folder, generator = tmp_path / "run" / "checkpoint-1", random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for number in range(1000):
        file = files[number % len(files)]
        whole = file.read_bytes()
        if number % 5 == 0:
            damaged = whole[: generator.randrange(len(whole))]
        else:
            damaged = bytearray(whole)
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        assert file.name in str(find_problem(folder))
        file.write_bytes(whole)
    manifest = (folder / MANIFEST).read_bytes()
    for length in range(0, len(manifest) - 1, 97):
        (folder / MANIFEST).write_bytes(manifest[:length])
        assert find_problem(folder)
    (folder / MANIFEST).write_bytes(manifest)
    assert find_problem(folder) is None


def test_newest_valid_one_is_taken_and_the_others_are_named(run: Callable[..., Any], tmp_path: Path) -> None:
    whole = run(max_steps=4)
    folder = tmp_path / "run"
    (folder / "checkpoint-4" / MANIFEST).unlink()
    optimizer = folder / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    trainer = run(max_steps=4, train=False)
    for resume in (True, "true"):
        found = trainer.find_checkpoint(resume)
        assert found.path == str(folder / "checkpoint-2")
        assert [line.split(":")[0][-1] for line in found.skipped] == ["4", "3"]
        assert "killed while it was saved" in found.skipped[0]
        assert "optimizer.pt has" in found.skipped[1]
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer), weights(whole))
    assert logged(trainer, "num_tokens") == logged(whole, "num_tokens")


def test_resumed_after_its_last_step_it_takes_no_further_one(run: Callable[..., Any]) -> None:
    whole = run()
    again = run(resume_from=True)
    assert again.state.global_step == 3
    assert torch.equal(weights(again), weights(whole))


def test_full_disk_leaves_the_newest_whole_one(run: Callable[..., Any], tmp_path: Path) -> None:
    whole = run("whole")
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    run(max_steps=3, callbacks=[StopAfter(1)])
    largest = max(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, before[1]))
    try:
        with pytest.raises(DiskFullError, match=rf"The newest whole checkpoint is {folder}/checkpoint-1\."):
            run(resume_from=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (folder / "checkpoint-2").is_dir()
    assert torch.equal(weights(run(resume_from=True)), weights(whole))


def test_without_a_valid_one(run: Callable[..., Any], tmp_path: Path) -> None:
    trainer = run(train=False)
    assert trainer.find_checkpoint(True, required=False).path is None
    with pytest.raises(CheckpointError, match=r"No valid checkpoint in .*: there is none"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"No checkpoint at .*nowhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"dataset": tiny.make_dataset(8).select([1, 0, *range(2, 8)])}, r"train_dataset was '.*', is '"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1, is 2"),
    ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 2, is 4"),
    ({"learning_rate": 0.2}, r"learning_rate was 0\.1, is 0\.2"),
    ({"max_steps": 5}, "max_steps was 3, is 5"),
    ({"seed": 1}, "seed was 42, is 1"),
    ({"optim": "adamw_torch"}, "optim was 'sgd', is 'adamw_torch'"),
    ({"think_weight": 0.5}, r"think_weight was 1\.0, is 0\.5"),
    ({"use_kl_regularization": True}, "use_kl_regularization was False, is True"),
]


def test_another_training_is_refused_by_name(run: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    run()
    for change, named in CHANGES:
        other = run(train=False, **change)
        with pytest.raises(CheckpointError, match=rf"cannot go on from .*{named}.*--allow_changed_resume"):
            other.find_checkpoint(True)
        caplog.clear()
        other.args.allow_changed_resume = True
        assert str(other.find_checkpoint(True).path).endswith("checkpoint-3")
        assert "Going on all the same" in caplog.text


def test_another_store_and_another_topology_are_refused(
    fit: Callable[..., Any], store: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SAVING, "kd_top_k": 6, "output_dir": str(tmp_path / "kd")}
    fit(TopKDistillTrainer, TopKDistillConfig, teacher_logits=str(store), **options)
    other = tiny.make_store(tmp_path / "other", tiny.make_model(8, vocab_size=272), tokenizer, tiny.make_rows())
    trainer = fit(TopKDistillTrainer, TopKDistillConfig, teacher_logits=str(other), train=False, **options)
    with pytest.raises(CheckpointError, match="store of the teacher was '"):
        trainer.find_checkpoint(True)
    trainer = fit(
        TopKDistillTrainer, TopKDistillConfig, teacher_logits=str(store), kd_weight=0.5, train=False, **options
    )
    with pytest.raises(CheckpointError, match=r"kd_weight was 0\.35, is 0\.5"):
        trainer.find_checkpoint(True)
    trainer = fit(TopKDistillTrainer, TopKDistillConfig, teacher_logits=str(store), train=False, **options)
    monkeypatch.setattr(checkpoints, "_distributed_type", lambda _: "ZeRO-2")
    with pytest.raises(CheckpointError, match="distributed type was 'one process', is 'ZeRO-2'"):
        trainer.find_checkpoint(True)


def test_missing_state_is_refused_by_name(run: Callable[..., Any], tmp_path: Path) -> None:
    run(max_steps=1)
    folder = tmp_path / "run" / "checkpoint-1"
    trainer = run(max_steps=1, train=False)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).rename(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            trainer.train(resume_from_checkpoint=str(folder))
        (tmp_path / name).rename(folder / name)


def test_checkpoints_that_hold_no_state_or_no_manifest_are_refused(
    run: Callable[..., Any], fit: Callable[..., Any], tmp_path: Path
) -> None:
    run("model_only", save_only_model=True)
    with pytest.raises(CheckpointError, match=r"saved without the state of the optimizer \(save_only_model\?\)"):
        run("model_only", resume_from=True)
    fit(SFTTrainer, SFTConfig, **{**SAVING, "output_dir": str(tmp_path / "stock")})
    path = str(tmp_path / "stock" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="or another program made it"):
        run(resume_from=path)
    assert run(resume_from=path, allow_changed_resume=True).state.global_step == 3


def test_oldest_goes_only_when_the_newest_has_its_manifest(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, rotate = [], checkpoints.rotate_checkpoints

    def watching(output_dir: str, *args: Any, **kwargs: Any) -> None:
        seen.append(newest_valid(Path(output_dir)).path)
        rotate(output_dir, *args, **kwargs)

    monkeypatch.setattr(checkpoints, "rotate_checkpoints", watching)
    trainer = run(save_total_limit=1)
    assert [Path(str(path)).name for path in seen] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.args.save_total_limit == 1


def test_hash_of_rows_is_of_their_content_and_order(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3], "labels": [3]}])
    rows.save_to_disk(tmp_path / "rows")
    assert hash_rows(Dataset.load_from_disk(str(tmp_path / "rows"))) == hash_rows(rows)
    assert hash_rows(rows.select([1, 0]).select([1, 0])) == hash_rows(rows)
    moved = Dataset.from_list([{"input_ids": [1], "labels": [-100]}, {"input_ids": [2, 3], "labels": [2, 3]}])
    assert len({hash_rows(other) for other in (rows, rows.select([1, 0]), rows.select([0]), moved)}) == 4


def test_newest_is_by_number_and_other_folders_do_not_count(run: Callable[..., Any], tmp_path: Path) -> None:
    run(max_steps=1)
    folder = tmp_path / "run"
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-10")
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-9")
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-best")
    (folder / "checkpoint-11").write_text("a file")
    assert newest_valid(folder).path == str(folder / "checkpoint-10")

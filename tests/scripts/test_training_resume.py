"""A training stage goes on from the newest valid checkpoint, says which it skipped, and refuses one of another training."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainer import tiny
from trl_reasoning_distill.data.files import write_jsonl
from trl_reasoning_distill.scripts.sft import main
from trl_reasoning_distill.trainer.checkpoints import MANIFEST


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tiny.make_model().save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", tiny.make_rows())
    options = {
        "model_name_or_path": tmp_path / "model", "dataset_path": tmp_path / "train.jsonl", "output_dir": tmp_path / "out", "max_steps": 3,
        "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "none", "bf16": "false", "dtype": "float32",
        "use_cpu": "true", "gradient_checkpointing": "false", "logging_steps": 1, "preview_examples": 0,
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def kill_at_the_end(output: Path) -> None:
    """Leave the folder as a kill while the third checkpoint was saved would have."""
    (output / "manifest.json").rename(output / "run.json")
    (output / "checkpoint-3" / MANIFEST).unlink()


@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint", "true"]], ids=["same command", "asked for"])
def test_stage_goes_on(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    main(arguments)
    output = tmp_path / "out"
    weights = load_file(output / "final_model" / "model.safetensors")
    kill_at_the_end(output)
    capsys.readouterr()
    main([*arguments, *flags])
    said = capsys.readouterr().out
    assert (
        f"sft: skipped {output}/checkpoint-3: it has no {MANIFEST}: the training was killed while it was saved" in said
    )
    assert f"sft: going on from {output}/checkpoint-2" in said
    resumed = load_file(output / "final_model" / "model.safetensors")
    assert all(resumed[name].equal(weight) for name, weight in weights.items())


def test_checkpoint_of_another_topology_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(arguments)
    kill_at_the_end(tmp_path / "out")
    monkeypatch.setattr("trl_reasoning_distill.trainer.checkpoints._distributed_type", lambda _: "ZeRO-3")
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "distributed type was 'one process', is 'ZeRO-3'" in said
    assert "--allow_changed_resume" in said
    main([*arguments, "--allow_changed_resume", "true"])
    assert "going on from" in capsys.readouterr().out

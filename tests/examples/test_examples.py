"""The examples run, and what each of them teaches is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import fused_loss, own_divergence, store_in_plain_torch, verified_rewards
from trl_reasoning_distill import topk_divergence


def test_a_divergence_of_ones_own_trains_and_without_skew_is_forward_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = own_divergence.main(tmp_path, problems=8, steps=6)
    losses = [entry["kd_loss"] for entry in trainer.state.log_history if "kd_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    monkeypatch.setattr(trainer, "skew", 0.0)
    student, teacher = torch.tensor([[0.5, 0.2, 0.1]]), torch.tensor([[0.6, 0.0, 0.3]])
    tail = torch.tensor([0.2])
    torch.testing.assert_close(
        trainer.kd_loss(student.log(), teacher.log(), tail.log()),
        topk_divergence(student.log(), teacher.log(), student_log_tail=tail.log()),
    )


def test_a_store_teaches_a_model_that_transformers_knows_nothing_of(tmp_path: Path) -> None:
    torch.manual_seed(0)
    losses = store_in_plain_torch.main(tmp_path, problems=16, epochs=2)
    assert losses[1] < 0.7 * losses[0]


def test_a_verdict_is_a_reward(tmp_path: Path) -> None:
    trainer = verified_rewards.main(tmp_path, problems=4, steps=2)
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logged) == 2
    for entry in logged:
        total = entry["rewards/correct/mean"] + entry["rewards/well_formed/mean"]
        assert entry["reward"] == pytest.approx(total)

    def say(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    completions = [say("<think>\n1+1=2\n</think>\n\n2.0"), say("3"), say("2")]
    assert verified_rewards.correct(completions, answer=["2", "2", ""]) == [1.0, 0.0, None]
    assert verified_rewards.well_formed(completions) == [0.1, 0.0, 0.0]


def test_the_fused_loss_is_the_loss_of_whole_logits_and_so_is_its_gradient(quickstart_models: Path) -> None:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(quickstart_models / name, dtype=torch.float32)
        for name in ("student", "teacher")
    )
    vocab = len(AutoTokenizer.from_pretrained(quickstart_models / "student"))
    torch.manual_seed(0)
    input_ids = torch.randint(0, vocab, (2, 24))
    labels = input_ids.masked_fill(torch.arange(24) < 6, -100)
    found = []
    for loss_function in (fused_loss.fused_loss, fused_loss.whole_logits_loss):
        student.zero_grad()
        loss = loss_function(student, teacher, vocab, input_ids, labels)
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in student.parameters()]))
    (loss, gradients), (expected, expected_gradients) = found
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    losses = fused_loss.main(problems=2, steps=6)
    assert losses[-1] < losses[0]


def test_an_example_runs_as_a_user_runs_it(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "examples" / "fused_loss.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (float(number) for number in done.stdout.split("loss: ")[1].split(" → "))
    assert after < before


def test_the_readme_names_every_example(repository: Path) -> None:
    text = (repository / "examples" / "README.md").read_text(encoding="utf-8")
    for path in (repository / "examples").glob("*.py"):
        assert text.count(path.name) == 3, path.name
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 90, path.name

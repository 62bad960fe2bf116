"""TopKGKDTrainer is TRL's GKDTrainer: its attributes are used, its methods are called; and without TRL's GKD it trains the same."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from trl import SFTTrainer
from trl.import_utils import suppress_experimental_warning

with suppress_experimental_warning():
    from trl.experimental.gkd import GKDConfig, GKDTrainer

from tests.trainer import tiny
from tests.trainer.conftest import PLAIN, logged, weights
from trl_reasoning_distill.trainer.gkd.base import ARGUMENTS
from trl_reasoning_distill.trainer.gkd.config import TopKGKDConfig
from trl_reasoning_distill.trainer.gkd.trainer import TopKGKDTrainer

WITHOUT_GKD = """
import sys
from pathlib import Path

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name == "trl.experimental" or name.startswith("trl.experimental."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Gone())
from trl import SFTTrainer
from trl_reasoning_distill import (
    ReasoningSFTConfig, ReasoningSFTTrainer, TopKDistillConfig, TopKDistillTrainer, TopKGKDConfig, TopKGKDTrainer,
)
from tests.trainer import tiny
from tests.trainer.conftest import PLAIN, logged

folder = Path(sys.argv[1])
tokenizer, rows = tiny.make_tokenizer(), tiny.make_dataset(4)
teacher = tiny.make_model(7, vocab_size=272)
store = tiny.make_store(folder / "store", teacher, tokenizer, tiny.make_rows(4))
plain = {**PLAIN, "output_dir": str(folder / "out"), "max_steps": 1, "preview_examples": 0}
common = {"train_dataset": rows, "processing_class": tokenizer}
trainers = [
    ReasoningSFTTrainer(tiny.make_model(), ReasoningSFTConfig(**plain, use_kl_regularization=True), **common),
    TopKDistillTrainer(tiny.make_model(), TopKDistillConfig(**plain, teacher_logits=str(store), kd_top_k=4), **common),
    TopKGKDTrainer(
        tiny.make_model(), teacher, TopKGKDConfig(**plain, lmbda=1.0, max_new_tokens=6), teacher_tokenizer=tokenizer, **common
    ),
]
for trainer in trainers:
    trainer.train()
gkd = trainers[-1]
names = "teacher_model lmbda beta temperature seq_kd generation_config generation_kwargs generate_on_policy_outputs"
assert all(hasattr(gkd, name) for name in names.split())
assert isinstance(gkd, SFTTrainer) and "trl.experimental.gkd" not in sys.modules
print(logged(gkd, "loss")[0])
"""


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any, teacher: Any) -> Callable[..., Any]:
    """`make(TrainerClass, **config)`: a trainer with a loaded teacher, not trained yet."""

    def _make(trainer_class: type = TopKGKDTrainer, **options: Any) -> Any:
        given = options.pop("teacher", teacher)
        args = TopKGKDConfig(
            **{**PLAIN, "max_steps": 1, "output_dir": str(tmp_path / "out"), "preview_examples": 0, **options}
        )
        common = {"train_dataset": tiny.make_dataset(4), "processing_class": tokenizer}
        return trainer_class(tiny.make_model(), given, args, teacher_tokenizer=tokenizer, **common)

    return _make


def test_nothing_needs_trls_gkd(make: Any, tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", WITHOUT_GKD, str(tmp_path)]
    result = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    trainer = make(lmbda=1.0, max_new_tokens=6)
    trainer.train()
    assert float(result.stdout.splitlines()[-1]) == logged(trainer, "loss")[0]


# Methods


def test_every_public_method_of_gkd_is_called_or_refused(make: Any) -> None:
    names = {name for name, member in vars(GKDTrainer).items() if inspect.isroutine(member) and name[0] != "_"}
    assert names >= {"compute_loss", "training_step", "generate_on_policy_outputs", "generalized_jsd_loss"}
    for name in sorted(names):
        called = []

        def override(*args: Any, name: str = name, called: list[str] = called, **kwargs: Any) -> Any:
            called.append(name)
            return getattr(TopKGKDTrainer, name)(*args, **kwargs)

        is_static = isinstance(vars(GKDTrainer)[name], staticmethod)
        subclass = type("Mine", (TopKGKDTrainer,), {name: staticmethod(override) if is_static else override})
        try:
            trainer = make(subclass, lmbda=1.0, max_new_tokens=4)
        except ValueError as error:
            assert f"`{name}`" in str(error)  # noqa: PT017
            assert name == "generalized_jsd_loss"
        else:
            trainer.train()
            assert called, name


@pytest.mark.parametrize(
    "name", sorted(name for name, member in vars(SFTTrainer).items() if inspect.isfunction(member) and name[0] != "_")
)
def test_every_public_method_of_sft_is_called(make: Any, name: str) -> None:
    called = []

    def override(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return getattr(super(subclass, self), name)(*args, **kwargs)

    subclass = type("Mine", (TopKGKDTrainer,), {name: override})
    trainer = make(subclass, lmbda=0.0)
    trainer.train()
    trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert called


def test_a_generation_of_ones_own_gets_the_model_and_is_trained_on(make: Any) -> None:
    seen = []

    class Mine(TopKGKDTrainer):
        @staticmethod
        def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: GenerationConfig) -> Any:
            seen.append((model.config.vocab_size, generation_config.max_new_tokens))
            prompts, mask = inputs["prompts"], inputs["prompt_attention_mask"]
            written = torch.full((len(prompts), 3), 65)
            labels = torch.cat([torch.full_like(prompts, -100), written], 1)
            return torch.cat([prompts, written], 1), torch.cat([mask, torch.ones_like(written)], 1), labels

    trainer = make(Mine, lmbda=1.0, max_new_tokens=5)
    trainer.train()
    assert seen == [(264, 5)]
    assert logged(trainer, "completion_length") == [3.0]
    assert "generate" not in vars(trainer.model), "the model's own method is back"
    with pytest.raises(ValueError, match="overrides `generate_on_policy_outputs`, which is not called with `use_vllm`"):
        make(Mine, use_vllm=True)


def test_ours_writes_what_trls_writes(make: Any) -> None:
    trainer = make(lmbda=1.0)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    inputs = {name: batch[name] for name in ("prompts", "prompt_attention_mask")}
    for ends in ([258], [258, 40, 41, 42, 43]):
        config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=256)
        theirs = GKDTrainer.generate_on_policy_outputs(trainer.model, inputs, config)
        ours = TopKGKDTrainer.generate_on_policy_outputs(trainer.model, inputs, config)
        assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))


# Attributes


def loss_after(trainer: Any, **attributes: Any) -> float:
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.train()
    return logged(trainer, "loss")[0]


@pytest.mark.parametrize(
    ("name", "value", "configured"),
    [
        ("beta", 1.0, {"beta": 1.0}),
        ("beta", 0.2, {"beta": 0.2}),
        ("lmbda", 0.0, {"lmbda": 0.0}),
        ("temperature", 0.0, {"temperature": 0.0}),
        ("temperature", 3.0, {"temperature": 3.0}),
        ("generation_kwargs", {"max_new_tokens": 2}, {"max_new_tokens": 2}),
    ],
)
def test_an_attribute_changes_what_its_option_changes(
    make: Any, name: str, value: Any, configured: dict[str, Any]
) -> None:
    options = {"lmbda": 1.0, "max_new_tokens": 6, "temperature": 1.0}
    changed = loss_after(make(**options), **{name: value})
    assert changed == loss_after(make(**{**options, **configured}))
    assert changed != loss_after(make(**options))


def test_seq_kd_the_generation_config_and_the_teacher_are_read_at_each_step(make: Any) -> None:
    options = {"lmbda": 0.0, "max_new_tokens": 6, "temperature": 1.0}
    assert loss_after(make(**options), seq_kd=True) == loss_after(make(**options, seq_kd=True))
    trainer = make(lmbda=1.0, max_new_tokens=6)
    trainer.generation_config.top_k = 1
    assert loss_after(trainer) == loss_after(make(lmbda=1.0, max_new_tokens=6, temperature=0.0))
    other = make(lmbda=0.0)
    assert other.teacher_model is other.teacher.model
    other.teacher_model = tiny.make_model(11)
    expected = make(lmbda=0.0, teacher=tiny.make_model(11))
    assert loss_after(other) == loss_after(expected)
    assert weights(other).equal(weights(expected))


# Arguments


def test_gkds_arguments_are_taken_by_position(tmp_path: Path, tokenizer: Any) -> None:
    names = list(inspect.signature(GKDTrainer.__init__).parameters)[1:]
    assert list(ARGUMENTS) == names
    ours = inspect.signature(TopKGKDTrainer).parameters
    assert list(ours)[: len(names)] == names
    assert {*inspect.signature(SFTTrainer).parameters, "teacher_tokenizer"} <= ours.keys()
    args = GKDConfig(**{**PLAIN, "output_dir": str(tmp_path), "max_steps": 1, "max_new_tokens": 4, "beta": 0.25})
    trainer = TopKGKDTrainer(tiny.make_model(), tiny.make_model(7), args, None, tiny.make_dataset(4), None, tokenizer)
    assert isinstance(trainer.args, TopKGKDConfig)
    assert trainer.args.beta == 0.25
    trainer.train()


def test_a_nameless_teacher_with_as_many_rows_has_the_students_tokenizer(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    args = TopKGKDConfig(**{**PLAIN, "output_dir": str(tmp_path), "max_steps": 1, "lmbda": 0.0})
    common = {"train_dataset": tiny.make_dataset(4), "processing_class": tokenizer}
    trainer = TopKGKDTrainer(tiny.make_model(), tiny.make_model(7), args, **common)
    assert trainer.shared_ids == 261
    assert "it is taken to have the student's tokenizer" in caplog.text
    with pytest.raises(ValueError, match="without a name, so its tokenizer is not known"):
        TopKGKDTrainer(tiny.make_model(), tiny.make_model(7, vocab_size=272), args, **common)


def test_options_for_loading_a_teacher_need_one_to_load(make: Any) -> None:
    for name, value in (("teacher_model_init_kwargs", {"dtype": "float32"}), ("teacher_quantization", "4bit")):
        with pytest.raises(ValueError, match=rf"`{name}=.*is already instantiated"):
            make(**{name: value})
        with pytest.raises(ValueError, match=rf"`{name}=.*is not loaded here"):
            make(teacher=None, **{name: value})

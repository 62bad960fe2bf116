"""What a student is given before training: a chat template, a padding token, single tokens for the think tags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer import tiny
from tests.trainer.conftest import PLAIN
from trl_reasoning_distill.trainer.config import ReasoningSFTConfig
from trl_reasoning_distill.trainer.preparation import CHATML, add_chat_template
from trl_reasoning_distill.trainer.reasoning_sft import ReasoningSFTTrainer
from trl_reasoning_distill.trainer.student import add_tokens, padding_token, split_into_pieces

TAGS = ("[[think]]", "[[/think]]")


def bare_tokenizer(**changes: Any) -> Any:
    """The tiny tokenizer without a chat template, with other special tokens if asked for."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder(vocab_size=…, tied=…)`: a saved tiny model whose vocabulary has no think tags."""

    def make(**options: Any) -> Path:
        path = tmp_path / "student"
        tiny.make_model(**options).save_pretrained(path)
        tokenizer = tiny.make_tokenizer(think_tokens=False)
        assert len(tokenizer) == 259
        tokenizer.save_pretrained(path)
        return path

    return make


def train(path: Path | Any, tmp_path: Path, **options: Any) -> ReasoningSFTTrainer:
    arguments = {name: options.pop(name) for name in ("peft_config", "processing_class") if name in options}
    settings = {**PLAIN, "output_dir": str(tmp_path / "out"), "max_steps": 1, **options}
    trainer = ReasoningSFTTrainer(
        str(path) if isinstance(path, Path) else path,
        ReasoningSFTConfig(**settings),
        train_dataset=tiny.make_dataset(),
        **arguments,
    )
    trainer.train()
    return trainer


def test_a_tokenizer_with_a_template_keeps_it() -> None:
    tokenizer = tiny.make_tokenizer()
    assert not add_chat_template(tokenizer)
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_chatml_ends_turns_with_a_token_that_the_model_knows() -> None:
    with_token, without = bare_tokenizer(eos_token="<|endoftext|>"), bare_tokenizer()
    assert add_chat_template(with_token)
    assert (with_token.chat_template, with_token.eos_token) == (CHATML, "<|im_end|>")
    without.eos_token = "<|endoftext|>"
    without.get_vocab = lambda: {"<|endoftext|>": 256}
    assert add_chat_template(without)
    assert without.eos_token == "<|endoftext|>"
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>\nx\n</think>\n\n2"}]
    assert without.apply_chat_template(messages, tokenize=False).count("<|endoftext|>") == 2
    assert "<think>\nx\n</think>\n\n2" in without.apply_chat_template([*messages, *messages], tokenize=False)[:80]


def test_a_base_model_learns_to_end_its_turn(tmp_path: Path) -> None:
    tokenizer = bare_tokenizer(eos_token="<|endoftext|>")
    trainer = train(tiny.make_model(eos_token_id=256), tmp_path, processing_class=tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(end in row["labels"] for row in trainer.train_dataset)
    assert trainer.model.config.eos_token_id == end
    assert end in trainer.model.generation_config.eos_token_id
    trainer.save_model(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == CHATML


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [
        ("<|im_start|>", "<|im_end|>", "<|im_start|>"),  # its own stays
        (None, "<|im_end|>", "<|endoftext|>"),
        ("<|im_end|>", "<|im_end|>", "<|endoftext|>"),
        (None, "<|endoftext|>", None),
    ],
)
def test_padding_is_not_the_token_that_ends_a_turn(pad: str | None, eos: str, expected: str | None) -> None:
    assert padding_token(bare_tokenizer(pad_token=pad, eos_token=eos)) == expected


def test_the_end_is_learnt_even_where_nothing_else_can_pad(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.get_vocab = lambda: {"<|im_end|>": 258}
    tokenizer.pad_token = None
    trainer = train(tiny.make_model(), tmp_path, processing_class=tokenizer)
    assert tokenizer.pad_token == "<|im_end|>"
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == -100).all()
    assert ((batch["labels"] == 258).sum(-1) == 1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_as_the_mean_of_their_pieces(tied: bool) -> None:
    model, tokenizer = tiny.make_model(vocab_size=259, tied=tied), tiny.make_tokenizer(think_tokens=False)
    pieces = split_into_pieces(tokenizer, TAGS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_tokens(model, tokenizer, pieces)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 261
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for layer, old in ((model.model.embed_tokens, "model.embed_tokens.weight"), (model.lm_head, "lm_head.weight")):
        for tag, ids in pieces.items():
            row = layer.weight[tokenizer.convert_tokens_to_ids(tag)]
            torch.testing.assert_close(row, before[old][ids].mean(0))
    assert tokenizer.decode(tokenizer("[[think]]x")["input_ids"], skip_special_tokens=True) == "[[think]]x"


def test_spare_rows_are_used_before_any_are_added() -> None:
    model, tokenizer = tiny.make_model(vocab_size=272), tiny.make_tokenizer(think_tokens=False)
    add_tokens(model, tokenizer, split_into_pieces(tokenizer, TAGS))
    assert model.get_input_embeddings().weight.shape[0] == 272


@pytest.mark.parametrize(
    ("tied", "vocab_size", "lora"),
    # no spare row in the embedding, and enough of them
    [(True, 259, True), (False, 259, True), (False, 272, True), (True, 259, False)],
)
def test_think_tokens_are_trained_and_come_back(
    folder: Callable[..., Path], tmp_path: Path, tied: bool, vocab_size: int, lora: bool
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = train(folder(vocab_size=vocab_size, tied=tied), tmp_path, add_think_tokens=True, peft_config=config)
    ids = trainer.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert ids == [259, 260]
    assert all(set(ids) <= set(row["labels"]) for row in trainer.train_dataset)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base_model")
    model = trainer.model.get_base_model() if lora else trainer.model
    for trained, untrained in (
        (model.get_input_embeddings().weight, base.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, base.get_output_embeddings().weight),
    ):
        changed = (trained.detach() - untrained).abs().amax(-1) > 0
        assert changed[ids].all()
        assert not lora or int(changed.sum()) == 2

    trainer.save_model(tmp_path / "final_model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final_model").eval()
    tokens = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "final_model")("<think>")["input_ids"] == [259]


def test_tied_layers_that_are_trained_apart_come_back_apart(folder: Callable[..., Path], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    trainer = train(folder(vocab_size=272, tied=True), tmp_path, add_think_tokens=True, peft_config=config)
    assert config.trainable_token_indices is None  # both layers are trained as a whole
    trainer.save_model(tmp_path / "final_model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final_model").eval()
    tokens = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_base_is_written_once(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    train(path, tmp_path, add_think_tokens=True)
    written = (tmp_path / "out" / "base_model" / "model.safetensors").stat().st_mtime_ns
    train(path, tmp_path, add_think_tokens=True)
    assert (tmp_path / "out" / "base_model" / "model.safetensors").stat().st_mtime_ns == written


def test_tags_that_are_tokens_already_change_nothing(tmp_path: Path) -> None:
    trainer = train(tiny.make_model(), tmp_path, processing_class=tiny.make_tokenizer(), add_think_tokens=True)
    assert trainer.model.get_input_embeddings().weight.shape[0] == 264
    assert not (tmp_path / "out" / "base_model").exists()


def test_a_loaded_model_cannot_be_given_tokens(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer(think_tokens=False)
    with pytest.raises(ValueError, match=r"add_think_tokens.*</think>.*give the model by its folder or name"):
        train(tiny.make_model(), tmp_path, processing_class=tokenizer, add_think_tokens=True)


def test_added_tokens_survive_decoding_without_special_tokens() -> None:
    tokenizer = tiny.make_tokenizer(think_tokens=False)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    assert tokenizer.decode([259], skip_special_tokens=True) == "<think>"

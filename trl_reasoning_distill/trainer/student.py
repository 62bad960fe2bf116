"""The student before training: its chat template, its padding token, and single tokens for the think tags.

New tokens need rows in the embedding and in the head, in every later use of the model too. So a student that is given some is
written once, with those rows, to `base_model/` below the output folder, and trained from there: an adapter then names a base that
has the rows, and 4-bit loading, ZeRO-3 and FSDP2 see nothing but an ordinary checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, ProcessorMixin

from trl_reasoning_distill.data.files import read_json, write_json
from trl_reasoning_distill.hub import load_config, load_processor
from trl_reasoning_distill.trainer.preparation import add_chat_template
from trl_reasoning_distill.trainer.trl_bridge import loading_whole

logger = logging.getLogger(__name__)

BASE_MODEL = "base_model"
_RECORD = "added_tokens.source.json"
_TASKS = "it needs the number of a task with each row"
_UNTRAINABLE = {  # by the names of PEFT 0.21
    "ADAPTION_PROMPT": "it replaces attention layers by some that do not pass on what the loss needs",
    "CPT": "it needs the type of each token and computes a loss of its own from the logits",
    "MULTITASK_PROMPT_TUNING": _TASKS,
    "POLY": _TASKS,
    "SHADOW": "it passes more than hidden states from layer to layer",
    "XLORA": "it runs the model twice in each forward",
}
_PADDING_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|endoftext|>", "<|finetune_right_pad_id|>", "<unk>")


@dataclasses.dataclass(frozen=True)
class Student:
    """What the trainer is built from.

    Attributes:
        model: The model, or the folder or name to load it from.
        processing_class: Its tokenizer or processor.
        peft_config: The adapter to train, if any; with new tokens, their rows are trained beside it.
    """

    model: Any
    processing_class: Any
    peft_config: Any


def prepare_student(
    model: Any, args: Any, *, tags: Sequence[str], processing_class: Any, peft_config: Any, train_dataset: Any
) -> Student:
    """Give the student what chains of thought need and it lacks. The same on every rank.

    Args:
        model: As the trainer was given it.
        args: The trainer's configuration.
        tags: Texts that are to be one token each; none to leave the vocabulary alone.
        processing_class: The tokenizer or processor; `None` loads the model's.
        peft_config: As the trainer was given it.
        train_dataset: As the trainer was given it.

    Raises:
        ValueError: If tokens are to be added to a model that is loaded already.
    """
    options = dict(args.model_init_kwargs or {})
    if processing_class is None:
        name = model if isinstance(model, str) else model.config.name_or_path
        revision = options.get("revision")
        processing_class = load_processor(name, revision=revision, trust_remote_code=args.trust_remote_code)
    if isinstance(processing_class, ProcessorMixin):
        return Student(model, processing_class, peft_config)
    tokenizer = processing_class
    if args.chat_template_path is None and _is_conversational(train_dataset) and add_chat_template(tokenizer):
        args.eos_token = args.eos_token or tokenizer.eos_token
        logger.info(
            "The student has no chat template; it is given ChatML, with turns that end in %s.", tokenizer.eos_token
        )
    if args.pad_token is None:
        args.pad_token = padding_token(tokenizer)
    pieces = split_into_pieces(tokenizer, tags)
    if pieces:
        if not isinstance(model, str):
            raise ValueError(
                f"`add_think_tokens` adds {sorted(pieces)} to the vocabulary, whose rows must be saved with the base model; give the model by "
                "its folder or name instead of an object, or add the tokens before and leave the option out."
            )
        model, tokenizer = _write_base_model(model, tokenizer, pieces, args, options)
        if peft_config is not None:
            train_rows(peft_config, model, tokenizer.convert_tokens_to_ids(list(pieces)))
    return Student(model, tokenizer, peft_config)


def refuse_untrainable_adapter(adapter: Any) -> None:
    """Refuse a PEFT configuration of a kind that cannot be trained on rows of text alone; TRL's SFTTrainer fails in its first step.

    Raises:
        ValueError: With the kind.
    """
    kind = None if adapter is None else str(adapter.peft_type.value)
    if kind in _UNTRAINABLE:
        raise ValueError(
            f"`peft_config` of the kind {kind}: {_UNTRAINABLE[kind]}. Use LoRA or another kind of adapter."
        )


def padding_token(tokenizer: Any) -> str | None:
    """A token to pad with that is not the one which ends a turn.

    The tokenizer's own if it is such a token, else one that the vocabulary reserves; `None` if there is none. Then the end token
    pads too, which is harmless here: padding is masked by where it stands, not by its id.
    """
    vocabulary = tokenizer.get_vocab()
    names = [name for name in (tokenizer.pad_token, *_PADDING_NAMES) if name in vocabulary]
    return next((name for name in names if name != tokenizer.eos_token), None)


def split_into_pieces(tokenizer: Any, tags: Sequence[str]) -> dict[str, list[int]]:
    """The tags that are not one token yet, each with the tokens it is made of now."""
    vocabulary = tokenizer.get_vocab()
    return {tag: tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in tags if tag not in vocabulary}


def add_tokens(model: PreTrainedModel, tokenizer: Any, pieces: Mapping[str, Sequence[int]]) -> None:
    """Add tokens to tokenizer and model; each row begins as the mean of the rows of the pieces the text had before.

    They are ordinary tokens, not special ones, so that decoding without special tokens keeps them, as Qwen3 has it. The
    embedding grows only if it has no spare rows.
    """
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in pieces])
    embedding: Any = model.get_input_embeddings()
    if len(tokenizer) > embedding.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # once where they are tied
            for tag, ids in pieces.items():
                weight[tokenizer.convert_tokens_to_ids(tag)] = weight[list(ids)].float().mean(0).to(weight.dtype)


def train_rows(peft_config: Any, model: str, ids: list[int]) -> None:
    """Let an adapter train these rows of the embedding, and of the head where it is not tied to it.

    A layer that `modules_to_save` already trains as a whole is left to that.
    """
    with loading_whole(), torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(load_config(model))
    saved = set(peft_config.modules_to_save or ())
    layers = {_layer_name(empty, empty.get_input_embeddings()): ids}
    if not empty.config.get_text_config().tie_word_embeddings:
        layers[_layer_name(empty, empty.get_output_embeddings())] = ids
    chosen = {name: rows for name, rows in layers.items() if name not in saved}
    peft_config.trainable_token_indices = {**chosen, **(peft_config.trainable_token_indices or {})} or None


def _layer_name(model: PreTrainedModel, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer).rpartition(".")[2]


@loading_whole()
def _write_base_model(
    source: str, tokenizer: Any, pieces: Mapping[str, Sequence[int]], args: Any, options: Mapping[str, Any]
) -> tuple[str, Any]:
    """Write the model with its new rows and its tokenizer, once; where it is now, and the tokenizer."""
    folder = Path(args.output_dir, BASE_MODEL).resolve()
    record = {"source": source, "revision": options.get("revision"), "tokens": sorted(pieces)}
    state = PartialState()
    if state.is_main_process and not (folder.is_dir() and read_json(folder / _RECORD) == record):
        partial = folder.with_name(f".{BASE_MODEL}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        # On the CPU and in the checkpoint's own precision: this is a copy of a checkpoint, whatever the training will do with it
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=options.get("revision"), dtype="auto", trust_remote_code=args.trust_remote_code
        )
        add_tokens(model, tokenizer, pieces)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / _RECORD, record)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        del model
    state.wait_for_everyone()
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in pieces])

    return str(folder), tokenizer


def _is_conversational(dataset: Any) -> bool:
    """Whether the rows are messages; a stream is left alone."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return False
    row = dataset[0]
    return any(isinstance(row.get(name), list) for name in ("prompt", "messages", "conversations"))

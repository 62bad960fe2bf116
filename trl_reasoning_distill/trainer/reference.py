"""Where the reference distribution of the KL term comes from: the model as it was before training.

With LoRA it is the same model with its adapter switched off, which costs one forward and no memory. Without, it is a frozen copy,
sharded as the student is. Both are run inside the student's forward (see `head.py`), on the same inputs, and give hidden states: the
KL itself is computed tile by tile from those, so no rank ever holds tokens × vocabulary. The third kind, a Top-K store captured
from the student before training, needs no model at all: `targets.py` reads it.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_reasoning_distill.losses.head import body_of
from trl_reasoning_distill.trainer.trl_bridge import empty_copy, is_zero3, prepare_deepspeed


class Reference(Protocol):
    """A frozen distribution over the student's vocabulary."""

    def hidden(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
        """Last hidden states `(batch, length, h)` for the inputs of the student `model`, without a graph."""

    def output_layer(self, model: PreTrainedModel) -> nn.Module:
        """The linear layer that turns them into logits."""


class AdapterOffReference:
    """The student with its PEFT adapter switched off."""

    def __init__(self, peft_model: Any) -> None:
        self.peft_model = peft_model

    def hidden(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
        """See `Reference.hidden`."""
        with torch.no_grad(), self.peft_model.disable_adapter(), _evaluating(model):
            return body_of(model)(*args, **kwargs).last_hidden_state

    def output_layer(self, model: PreTrainedModel) -> nn.Module:
        """See `Reference.output_layer`."""
        layer = model.get_output_embeddings()
        return getattr(
            layer, "original_module", layer
        )  # the untrained one, where `modules_to_save` holds a trained twin


class FrozenReference:
    """A frozen copy of the whole student, held as the student is: whole on its device, or a shard on each rank (ZeRO-3, FSDP2).

    Args:
        model: The student, before anything wraps it; under ZeRO-3 its parameters may be partitioned already.
        accelerator: What the student will be prepared with.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        self.is_sharded = True
        self.model = _copy_partitioned(model) if is_zero3(accelerator) else copy.deepcopy(model)
        self.model.eval().requires_grad_(False)
        self.model.forward = types.MethodType(
            _last_hidden_state, self.model
        )  # wrapped, so that the hooks of its shards fire
        if is_zero3(accelerator):
            self.wrapped = prepare_deepspeed(self.model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.wrapped = fsdp2_prepare_model(accelerator, self.model).eval()
        else:
            self.wrapped, self.is_sharded = self.model, False

    def hidden(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
        """See `Reference.hidden`."""
        if not self.is_sharded:
            self.model.to(model.device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
        with torch.no_grad():
            return self.wrapped(*args, **kwargs)

    def output_layer(self, model: PreTrainedModel) -> nn.Module:
        """See `Reference.output_layer`."""
        return self.model.get_output_embeddings()


def make_reference(model: Any, accelerator: Accelerator) -> Reference:
    """The cheapest reference there is for this model.

    Raises:
        ValueError: If the adapter cannot be switched off (prompt learning), or under FSDP1.
    """
    if is_peft_model(model):
        refuse_learned_prompts(model.active_peft_config)
        return AdapterOffReference(model)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "`use_kl_regularization` in full fine-tuning needs a frozen copy of the model, which FSDP1 cannot shard beside it. Set "
            "fsdp_version: 2 in the accelerate config, train a LoRA adapter, or give the base model's own Top-K as reference_logits."
        )
    return FrozenReference(model, accelerator)


def refuse_learned_prompts(adapter: Any) -> None:
    """Refuse an adapter that the reference cannot be had without.

    Raises:
        ValueError: If it is part of the input (prompt learning).
    """
    if adapter is not None and adapter.is_prompt_learning:
        raise ValueError(
            f"`use_kl_regularization` with {adapter.peft_type.value}: learned prompts are part of the input and cannot be switched off for the "
            "reference. Use LoRA, or give the base model's own Top-K as reference_logits."
        )


def _last_hidden_state(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
    return body_of(self)(*args, **kwargs).last_hidden_state


def _copy_partitioned(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose parameters ZeRO-3 may have partitioned; one parameter at a time is whole, on no rank the model."""
    import deepspeed

    twin = empty_copy(model)
    pairs = dict(twin.named_parameters(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if pairs.keys() != parameters.keys():
        different = sorted(pairs.keys() ^ parameters.keys())
        raise ValueError(
            f"`use_kl_regularization` under ZeRO-3 copies the model from its configuration, but {different[0]} is only in one of the two. "
            "Save the changed model and load it by its path, or use ZeRO-2, FSDP2 or LoRA."
        )
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter, pairs[name]], modifier_rank=0), torch.no_grad():
            pairs[name].data.copy_(parameter.data)
    for name, buffer in model.named_buffers():
        twin.get_buffer(name).data.copy_(buffer)
    return twin


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while: a reference that is drawn anew at each call is none."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

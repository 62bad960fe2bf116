"""Where the reference distribution of the KL term comes from: the model as it was before training.

With LoRA it is the same model with its adapter switched off, which costs one forward and no memory. Without, it is a frozen copy.
Both are asked inside the student's forward (see `head.py`), on the same inputs, and give hidden states: the KL itself is computed
tile by tile from those, so no rank ever holds tokens × vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel


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
            return model.base_model(*args, **kwargs).last_hidden_state

    def output_layer(self, model: PreTrainedModel) -> nn.Module:
        """See `Reference.output_layer`."""
        layer = model.get_output_embeddings()
        return getattr(
            layer, "original_module", layer
        )  # the untrained one, where `modules_to_save` holds a trained twin


class FrozenReference:
    """A frozen copy of the whole student, on the student's device.

    Args:
        model: The student, before anything wraps it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def hidden(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
        """See `Reference.hidden`."""
        self.model.to(model.device)
        with torch.no_grad():
            return self.model.base_model(*args, **kwargs).last_hidden_state

    def output_layer(self, model: PreTrainedModel) -> nn.Module:
        """See `Reference.output_layer`."""
        return self.model.get_output_embeddings()


def make_reference(model: Any, accelerator: Accelerator) -> Reference:
    """The cheapest reference there is for this model.

    Raises:
        ValueError: If the adapter cannot be switched off (prompt learning), or if a full copy would have to be sharded.
    """
    if is_peft_model(model):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"`use_kl_regularization` with {model.active_peft_config.peft_type}: learned prompts are part of the input and cannot be "
                "switched off for the reference. Use LoRA, or set use_kl_regularization=False."
            )
        return AdapterOffReference(model)
    sharded = accelerator.distributed_type == DistributedType.FSDP or (
        accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    if sharded:
        raise ValueError(
            f"`use_kl_regularization` needs a frozen copy of the model in full fine-tuning, and under {accelerator.distributed_type.value} "
            "with sharded parameters each rank would hold a whole one. Train a LoRA adapter (the reference is then the model with the "
            "adapter off), use DDP or ZeRO-2, or set use_kl_regularization=False."
        )
    return FrozenReference(model)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while: a reference that is drawn anew at each call is none."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)

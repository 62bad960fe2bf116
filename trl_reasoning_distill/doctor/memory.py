"""How much memory a stage takes, told from a model's configuration.

Parameters are counted, not estimated: the model is built without storage, as torch's fake tensors. So are activations: a model of one
layer and one of two run forward on fake tensors, and what autograd would keep is summed; the rest of the layers follow by
arithmetic. Optimizer, gradients and shards follow from how torch, DeepSpeed and FSDP keep them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface

GIB = 2**30
CUDA_CONTEXT = int(0.8 * GIB)
"""What CUDA, cuBLAS and NCCL take before the first tensor."""

FRAGMENTATION = 0.05
"""Share by which the caching allocator's reserve exceeds what tensors hold, with `expandable_segments` or a steady batch shape."""

_ATTENTION = "doctor_sdpa"
_OPTIMIZER_BYTES = {"adafactor": 0.1, "sgd": 0.0, "lion": 1.0}
_MAX_LIVE_PARAMETERS = 10**9
_REDUCE_BUCKET = 5 * 10**8


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What a configuration says of a model.

    Attributes:
        parameters: All of them; tied ones count once.
        linear_parameters: Those in linear layers of the decoder: what 4-bit loading compresses and adapters stand beside.
        head_parameters: Those of the output head.
        layers: Decoder layers.
        hidden_size: Width of the hidden states.
        vocab_size: Rows of the embedding.
        cache_bytes_per_token: Keys and values of one token in 16 bits, all layers.
    """

    parameters: int
    linear_parameters: int
    head_parameters: int
    layers: int
    hidden_size: int
    vocab_size: int
    cache_bytes_per_token: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, about."""
        return self.linear_parameters // max(1, self.layers)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what holds them."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    loss: int = 0
    other_model: int = 0
    buffers: int = 0

    @property
    def tensors(self) -> int:
        """The peak of what tensors hold: gradients and activations take turns, unless gradients are accumulated."""
        return (
            self.weights
            + self.optimizer
            + self.other_model
            + self.buffers
            + self.activations
            + self.loss
            + self.gradients
        )

    @property
    def on_gpu(self) -> int:
        """What `nvidia-smi` would show."""
        return int(self.tensors * (1 + FRAGMENTATION)) + CUDA_CONTEXT


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How a launch spreads a model.

    Attributes:
        kind: `"none"`, `"ddp"`, `"zero2"`, `"zero3"` or `"fsdp2"`.
        ranks: Processes of the launch.
        offload: Whether optimizer and parameters live outside the GPU.
    """

    kind: str = "none"
    ranks: int = 1
    offload: bool = False


@dataclasses.dataclass(frozen=True)
class LiveTeacher:
    """A second model that a training asks.

    Attributes:
        model: What its configuration says.
        weight_bytes: Bytes per parameter as loaded.
    """

    model: ModelShape
    weight_bytes: float


@dataclasses.dataclass(frozen=True)
class TrainingShape:
    """What of a training decides its memory.

    Attributes:
        batch: Rows per device.
        length: Tokens per row, padding included.
        weight_bytes: Bytes per parameter as loaded: 4 or 2; 0.52 for 4-bit linear layers.
        compute_bytes: 2 under bf16 or fp16, else 4.
        checkpointing: Whether activations are computed again in the backward pass.
        accumulates: Whether gradients of several micro-batches are summed.
        trainable: Parameters that are trained; `None` for all.
        optimizer: Name of the optimizer, as `TrainingArguments.optim`.
        frozen_reference: Whether a second, frozen copy is kept.
        teacher: A model in the same process that is asked for its distribution, if there is one.
    """

    batch: int
    length: int
    weight_bytes: float = 4
    compute_bytes: int = 2
    checkpointing: bool = True
    accumulates: bool = False
    trainable: int | None = None
    optimizer: str = "adamw_torch_fused"
    frozen_reference: bool = False
    teacher: LiveTeacher | None = None


def _causal_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """The attention that a training takes; transformers' own prepares for a mask as soon as it sees fake tensors."""
    scale = options.get("scaling")
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _causal_attention)
AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)


def model_shape(config: PretrainedConfig) -> ModelShape:
    """Count a model's parameters, without any storage for them."""
    text = config.get_text_config()
    with torch.device("meta"), _quiet():
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = sum(module.weight.numel() for module in model.base_model.modules() if isinstance(module, nn.Linear))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_parameters=linear,
        head_parameters=head.weight.numel() if head is not None else 0,
        layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        cache_bytes_per_token=2 * 2 * text.num_hidden_layers * heads * head_dim,
    )


def adapter_parameters(config: PretrainedConfig, rank: int, targets: Any, modules_to_save: Any = None) -> int:
    """Parameters of a LoRA adapter of this rank on the linear layers that `targets` names."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": rank, "target_modules": targets or None}
    with torch.device("meta"), _quiet():
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config), LoraConfig(**options, modules_to_save=modules_to_save)
        )
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@functools.lru_cache(maxsize=64)
def _saved_bytes(
    config_json: str, layers: int, batch: int, length: int, compute_bytes: int, checkpointing: bool
) -> int:
    """Bytes that autograd keeps between forward and backward of the decoder, parameters left out."""
    import json

    from transformers import AutoConfig

    values = json.loads(config_json) | {"num_hidden_layers": layers, "layer_types": None}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kept: dict[int, int] = {}
    with FakeTensorMode(), _quiet():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION, dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        ids = torch.zeros(batch, length, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute_bytes == 2),
        ):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        del hidden
    return sum(kept.values())


def saved_bytes(config: PretrainedConfig, shape: TrainingShape) -> tuple[int, int]:
    """What autograd keeps between forward and backward, and what of it belongs to one layer; from models of one and of two layers."""
    text = config.get_text_config()
    plain = copy.deepcopy(text)
    arguments = (shape.batch, shape.length, shape.compute_bytes)
    one, two = (_saved_bytes(plain.to_json_string(use_diff=False), n, *arguments, False) for n in (1, 2))
    per_layer, layers = two - one, text.num_hidden_layers
    if not shape.checkpointing:
        return one + (layers - 1) * per_layer, per_layer
    one_kept, two_kept = (_saved_bytes(plain.to_json_string(use_diff=False), n, *arguments, True) for n in (1, 2))
    return one_kept + (layers - 1) * (two_kept - one_kept), per_layer


def activation_bytes(config: PretrainedConfig, shape: TrainingShape) -> int:
    """The most that activations and their gradients hold at a time."""
    kept, per_layer = saved_bytes(config, shape)
    gradients = per_layer // 2  # of the activations of the layer that the backward pass is in
    return kept + gradients + (per_layer if shape.checkpointing else 0)


def loss_bytes(model: ModelShape, shape: TrainingShape, *, cuda: bool) -> int:
    """The head's tile of logits, its gradient and its copy in the compute type, and those of each model that is asked (`losses.fused`)."""
    from trl_reasoning_distill.losses.fused import default_chunk_size

    tokens = shape.batch * shape.length
    with FakeTensorMode():
        hidden = torch.empty(
            tokens, model.hidden_size, dtype=torch.bfloat16 if shape.compute_bytes == 2 else torch.float32
        )
    trains_head = shape.trainable is None
    chunk = min(max(default_chunk_size(hidden, trains_head), 2048 if cuda else 0), tokens)
    total = model.head_parameters * (4 if trains_head else 0)
    asked = [(shape.teacher.model, shape.teacher.weight_bytes)] if shape.teacher is not None else []
    asked += [(model, shape.weight_bytes)] if shape.frozen_reference else []
    for each, weight_bytes in [(model, shape.weight_bytes), *asked]:
        total += chunk * each.vocab_size * shape.compute_bytes
        total += each.head_parameters * shape.compute_bytes if weight_bytes != shape.compute_bytes else 0
    return total + sum(tokens * each.hidden_size * shape.compute_bytes for each, _ in asked)


def training_memory(config: PretrainedConfig, shape: TrainingShape, sharding: Sharding, *, cuda: bool = True) -> Memory:
    """The peak on one rank of a training.

    Args:
        config: The student's configuration.
        shape: What of the training decides its memory.
        sharding: How it is launched.
        cuda: Whether it runs on GPUs; the loss takes larger tiles there.
    """
    model = model_shape(config)
    trained = model.parameters if shape.trainable is None else shape.trainable
    activations, loss = activation_bytes(config, shape), loss_bytes(model, shape, cuda=cuda)
    weights, gradients, optimizer, buffers = _static_bytes(model, trained, shape, sharding)
    if not shape.accumulates:  # gradients come as activations go; the larger of both is the peak
        activations, loss = (activations, loss) if activations + loss >= gradients else (0, 0)
        gradients = 0 if activations else gradients
    copied = shape.compute_bytes if sharding.kind == "zero3" else shape.weight_bytes
    other = _weight_bytes(model, copied) if shape.frozen_reference else 0
    if shape.teacher is not None:
        other += _weight_bytes(shape.teacher.model, shape.teacher.weight_bytes)
    if sharding.kind in ("zero3", "fsdp2"):
        other = math.ceil(other / sharding.ranks)
    return Memory(weights, gradients, optimizer, activations, loss, other, buffers)


def inference_memory(model: ModelShape, *, weight_bytes: float, batch_tokens: int, logits_rows: int) -> Memory:
    """The peak of generation or capture: weights, keys and values of a whole batch, and logits for some rows."""
    weights = _weight_bytes(model, weight_bytes)
    cache = batch_tokens * model.cache_bytes_per_token
    hidden = 12 * batch_tokens * model.hidden_size
    return Memory(weights=weights, activations=cache + hidden, loss=logits_rows * model.vocab_size * 4)


def _static_bytes(
    model: ModelShape, trained: int, shape: TrainingShape, sharding: Sharding
) -> tuple[int, int, int, int]:
    """Weights, gradients, optimizer state and communication buffers of one rank."""
    state = next((value for name, value in _OPTIMIZER_BYTES.items() if name in shape.optimizer), 2.0)
    eight_bit = "8bit" in shape.optimizer
    ranks = sharding.ranks
    if sharding.kind in ("none", "ddp"):
        trained_bytes = 4 if shape.trainable is not None else int(shape.weight_bytes)
        gradients = trained * trained_bytes
        optimizer = int(trained * state * (1 if eight_bit else trained_bytes))
        buffers = gradients if sharding.kind == "ddp" else 0  # DDP's buckets are copies
        adapter = gradients if shape.trainable is not None else 0
        return _weight_bytes(model, shape.weight_bytes) + adapter, gradients, optimizer, buffers
    if sharding.kind == "fsdp2":
        gathered = 2 * model.layer_parameters + model.head_parameters
        return (
            math.ceil(model.parameters * 4 / ranks),
            math.ceil(trained * 4 / ranks),
            math.ceil(trained * 4 * state / ranks),
            gathered * shape.compute_bytes,
        )
    # DeepSpeed: 16-bit weights and gradients, and the master copy with the optimizer
    master = 4 + 4 * state if shape.compute_bytes == 2 else 4 * state
    optimizer = 0 if sharding.offload else math.ceil(trained * master / ranks)
    gradients = math.ceil(trained * shape.compute_bytes / ranks)
    buffers = min(trained, _REDUCE_BUCKET) * shape.compute_bytes
    if sharding.kind == "zero2":
        return int(model.parameters * shape.compute_bytes), gradients, optimizer, buffers
    live = min(model.parameters, _MAX_LIVE_PARAMETERS) * shape.compute_bytes
    weights = 0 if sharding.offload else math.ceil(model.parameters * shape.compute_bytes / ranks)
    return weights, gradients, optimizer, buffers + live


def _weight_bytes(model: ModelShape, weight_bytes: float) -> int:
    """4-bit loading compresses the decoder's linear layers; embeddings and norms stay in 16 bits."""
    if weight_bytes >= 1:
        return int(model.parameters * weight_bytes)
    return int(model.linear_parameters * weight_bytes + 2 * (model.parameters - model.linear_parameters))


class _quiet(warnings.catch_warnings):  # noqa: N801  # a context manager, named as one
    """Without the warnings that building a model makes."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered

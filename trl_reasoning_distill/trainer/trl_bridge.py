"""The only file that touches what TRL and transformers do not promise to keep.

Everything here was read in TRL 1.16.0 (`trl/trainer/sft_trainer.py`, `trl/trainer/utils.py`, `trl/models/utils.py`,
`trl/generation/vllm_generation.py`) and transformers 5.23. The other modules of `trainer` override and call the names defined here, so that a
new TRL version is read against one page. TRL's experimental GKD is imported in `gkd/base.py`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, align_module_device
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed as transformers_deepspeed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

# TRL 1.16: not exported from the package root
from trl.trainer.utils import disable_dropout_in_model, maybe_gather_lm_head_ctx
from trl.trainer.utils import global_then_local_main_first as main_process_first

from trl_reasoning_distill.losses.head import Head, prove_head

__all__ = [
    "JSON_FIELDS",
    "BridgedSFTTrainer",
    "ExportableState",
    "construct_until_prepared",
    "disable_dropout_in_model",
    "empty_copy",
    "gathered_head",
    "is_zero3",
    "load_balancing_loss",
    "loading_whole",
    "main_process_first",
    "make_vllm",
    "prepare_deepspeed",
    "prove_whole_head",
    "rotate_checkpoints",
    "takes_arguments_of",
    "unwrap_model_for_generation",
]

JSON_FIELDS = tuple(SFTConfig._VALID_DICT_FIELDS)
"""Fields of `SFTConfig` that may be given as JSON text."""


def is_zero3(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed partitions the parameters themselves over the ranks."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type == DistributedType.DEEPSPEED and plugin is not None and plugin.zero_stage == 3


def prepare_deepspeed(model: Any, accelerator: Accelerator) -> Any:
    """A frozen model under DeepSpeed, sharded by ZeRO-3 where the student is."""
    from trl.models import prepare_deepspeed as prepare  # in TRL 1.16 this imports `trl.experimental`

    return prepare(model, accelerator)


@contextlib.contextmanager
def unwrap_model_for_generation(
    model: Any,
    accelerator: Accelerator,
    *,
    gather_deepspeed3_params: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """The model without what wraps it, gradient checkpointing off; under ZeRO-3, TRL's function gathers its weights."""
    if is_zero3(accelerator):
        from trl.models import unwrap_model_for_generation as unwrap  # in TRL 1.16 this imports `trl.experimental`

        kwargs: Any = gradient_checkpointing_kwargs
        with unwrap(model, accelerator, gather_deepspeed3_params, gradient_checkpointing_kwargs=kwargs) as unwrapped:
            yield unwrapped
        return
    unwrapped = accelerator.unwrap_model(model)
    is_checkpointing = unwrapped.is_gradient_checkpointing
    if is_checkpointing:
        unwrapped.gradient_checkpointing_disable()
    try:
        yield unwrapped
    finally:
        if is_checkpointing:
            unwrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


def empty_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A model of this one's class, configuration and dtype; under ZeRO-3 it is partitioned as it is made."""
    with torch.random.fork_rng(devices=[]):  # its weights are to be overwritten
        return type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)


def takes_arguments_of(
    base: type, positional: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a constructor that has `**kwargs` for `base` be called as `base` is, and show all arguments in its signature.

    Args:
        base: The class whose arguments it takes.
        positional: What may be given by position, in this order; by default what `base` takes so.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own = {
            name: parameter
            for name, parameter in inspect.signature(init).parameters.items()
            if parameter.kind != parameter.VAR_KEYWORD
        }
        known = {**inspect.signature(base.__init__).parameters, **own}  # type: ignore[misc]
        order = dict.fromkeys(["self", *(positional or (name for name in known if name != "self"))])
        first = [known[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in order]
        others = [known[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in known if name not in order]
        signature = inspect.Signature([*first, *others])

        @functools.wraps(init)
        def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
            init(**signature.bind(self, *args, **kwargs).arguments)

        constructor.__signature__ = signature  # type: ignore[attr-defined]
        return constructor

    return decorate


@contextlib.contextmanager
def gathered_head(model: PreTrainedModel, layer: torch.nn.Module | None = None) -> Iterator[Head]:
    """The model's LM head (or `layer` in its place) with its whole weight, also where it is sharded over ranks.

    To be entered inside the forward of the wrapped model, where ZeRO-3's and FSDP2's hooks are armed. ZeRO-3 shares the weight out
    again on leaving, so whatever needs it must be done by then, the gradient included.
    """
    layer = model.get_output_embeddings() if layer is None else layer
    # PEFT 0.21 puts the rows that an adapter trains into the weight itself, but not where both are FSDP2's shards
    adapter: Any = getattr(layer, "token_adapter", None)
    if adapter is not None and isinstance(adapter.base_layer.weight, DTensor):
        head = Head.of(model, adapter.base_layer)
        weight: Any = _with_trained_rows(adapter)
    else:
        head = Head.of(model, layer)
        weight = head.weight
    bias: Any = head.bias
    if isinstance(weight, DTensor):  # FSDP2, where the head is a shard group of its own
        weight = _whole(weight)
    if isinstance(bias, DTensor):
        bias = _whole(bias)
    with maybe_gather_lm_head_ctx(weight, bias):
        yield head._replace(weight=weight, bias=bias)


def prove_whole_head(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """`prove_head` for a model as it is before anything wraps it: whole, offloaded, or partitioned over ranks by ZeRO-3.

    Under FSDP only the first rank may have loaded the weights, so it alone looks.
    """
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_main_process:
        return

    def logits_of(hidden: Tensor) -> Tensor:
        with align_module_device(model.get_output_embeddings()), gathered_head(model) as head:
            return head.fused_logits(hidden)

    with accelerator.autocast(), _gathered_layers(model):
        prove_head(model, logits_of=logits_of)


@contextlib.contextmanager
def _gathered_layers(model: torch.nn.Module) -> Iterator[None]:
    """Gather what ZeRO-3 has partitioned of a layer for as long as the layer runs; DeepSpeed does so itself once it wraps the model."""
    handles: list[Any] = []
    gathered: dict[torch.nn.Module, Any] = {}

    def gather(layer: torch.nn.Module, _: Any) -> None:
        import deepspeed

        gathered[layer] = deepspeed.zero.GatheredParameters(list(layer.parameters(recurse=False)))
        gathered[layer].__enter__()

    def release(layer: torch.nn.Module, *_: Any) -> None:
        gathered.pop(layer).__exit__(None, None, None)

    for layer in model.modules():
        if any(hasattr(parameter, "ds_id") for parameter in layer.parameters(recurse=False)):
            handles += [layer.register_forward_pre_hook(gather), layer.register_forward_hook(release)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _whole(parameter: DTensor) -> Tensor:
    """The full tensor of a sharded parameter; each rank's gradient counts, averaged as FSDP averages all others."""
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _with_trained_rows(adapter: Any) -> Tensor:
    """The whole weight of a sharded layer, with the rows that an adapter trains in it."""
    weight = _whole(adapter.base_layer.weight)
    for name in adapter.active_adapters:
        rows = torch.tensor(adapter.token_indices[name], device=weight.device)
        weight = weight.index_copy(0, rows, _whole(adapter.trainable_tokens_delta[name]).to(weight.dtype))
    return weight


@contextlib.contextmanager
def loading_whole() -> Iterator[None]:
    """Load models whole, as one rank alone may: under ZeRO-3, transformers shares a model out as it loads, and waits for all ranks to load it."""
    found = transformers_deepspeed._hf_deepspeed_config_weak_ref
    transformers_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        transformers_deepspeed._hf_deepspeed_config_weak_ref = found


def load_balancing_loss(model: PreTrainedModel, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The auxiliary loss of a mixture-of-experts model, unweighted: Mixtral's, which all families share (TRL 1.16 does the same)."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
    return torch.as_tensor(loss)


class BridgedSFTTrainer(SFTTrainer):
    """TRL's SFTTrainer with the private hooks that we need under names of our own.

    Subclasses override `prepare_dataset` and list the per-token columns of their loss in `loss_columns`.
    """

    model: Any
    loss_columns: tuple[str, ...] = ()
    """Per-token columns of the batch that the loss reads and the model does not."""
    whole_columns: tuple[str, ...] = ()
    """Columns of a row that are not per token, for the collator."""

    def prepare_dataset(
        self, dataset: Dataset | IterableDataset, *, packing: bool, formatting_func: Any, name: str
    ) -> Dataset:
        """Turn a dataset of text or tokens into rows of `input_ids`, `labels` and `loss_columns`."""
        processing_class, args = self.processing_class, self.args
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, name)  # type: ignore[arg-type]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, also where the processing class is a processor."""
        return self._tokenizer

    @property
    def has_images(self) -> bool:
        """Whether the training set holds images, so that rows are tokenized by the collator."""
        return self._is_vision_dataset

    @property
    def skips_preparation(self) -> bool:
        """Whether datasets are taken as they are: by `skip_prepare_dataset`, or because they hold images."""
        return bool(self._skip_prepare_dataset)

    @property
    def mode(self) -> str:
        """`"train"` or `"eval"`, as TRL names its metrics."""
        return "train" if self.model.training else "eval"

    def record(self, **values: float) -> None:
        """Log these values, averaged over the micro-batches until the next log."""
        for name, value in values.items():
            self._metrics[self.mode][name].append(value)

    def record_total(self, **values: float) -> None:
        """Log the latest of these values, as TRL does with its running count of tokens."""
        for name, value in values.items():
            self._metrics[self.mode][name] = [value]

    @property
    def copies_of_batch(self) -> int:
        """Ranks that are given the same batch (tensor parallelism), so that sums over ranks count it as often."""
        return self._tp_size

    # What TRL and transformers call

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # transformers 5.23 removes the oldest checkpoint here, before the newest has its manifest; `CheckpointManifests` does it after
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers 5.23 takes a step before it looks whether one is left: resumed after its last step, a training would go on
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):  # type: ignore[no-untyped-def]
        # TRL 1.16 calls this from `__init__`, before `Trainer.__init__` has set these two, and from `evaluate`
        self.processing_class, self.args = processing_class, args
        if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
            raise ValueError(
                f"The {dataset_name} dataset has a transform (`Dataset.with_transform`), which preparation would read through and make permanent. "
                "Set dataset_kwargs to {'skip_prepare_dataset': True} and let the transform return `input_ids` and `labels`, with "
                "remove_unused_columns=False; or apply it with `Dataset.map` first."
            )
        return self.prepare_dataset(dataset, packing=packing, formatting_func=formatting_func, name=dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known: list[str] = self._signature_columns or []
        ours = (*self.loss_columns, *self.whole_columns)
        self._signature_columns: Any = [*known, *(name for name in ours if name not in known)]

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        # Under DeepSpeed, transformers casts every floating-point column to the model's dtype; log-probabilities need float32
        columns = {name: inputs[name] for name in self.loss_columns if name in inputs}
        prepared = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in columns})
        return {**prepared, **{name: column.to(self.args.device) for name, column in columns.items()}}


class _PreparedSignal(BaseException):
    """The data of a trainer is prepared; no error, so that nothing on the way takes it for one."""


def construct_until_prepared(trainer_class: type[BridgedSFTTrainer], *args: Any, **kwargs: Any) -> tuple[Any, Dataset]:
    """Construct a trainer as far as its data: in TRL 1.16 all of it is prepared before `Trainer.__init__` touches the model.

    Returns:
        The trainer, which can do nothing more, and its training rows.
    """
    prepared: dict[str, Any] = {}

    class UntilPrepared(trainer_class):  # type: ignore[valid-type, misc]
        def prepare_dataset(self, dataset: Any, *, name: str, **options: Any) -> Dataset:
            prepared["trainer"] = self
            prepared[name] = super().prepare_dataset(dataset, name=name, **options)
            return prepared[name]

        def create_accelerator_and_postprocess(self) -> None:  # the first thing that `Trainer.__init__` does
            raise _PreparedSignal

    UntilPrepared.__name__ = trainer_class.__name__
    try:
        UntilPrepared(*args, **kwargs)
    except _PreparedSignal:
        return prepared["trainer"], prepared["train"]
    raise AssertionError("Trainer.__init__ no longer begins with create_accelerator_and_postprocess")


def make_vllm(model: Any, accelerator: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    """TRL 1.16's `VLLMGeneration`: `sync_weights()`, and `generate(prompts, None, 1)`, whose second result is the completions' ids."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(model, accelerator, tokenizer, logprobs=None, **options)

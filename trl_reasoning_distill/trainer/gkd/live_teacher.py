"""Live teachers: a model beside the student, the student as it was before training, or a server.

Each is used twice per micro-batch. `read` comes before the student's forward, so that the teacher's activations are freed before the
student's are made. `targets` comes inside that forward, where the loss is computed: a model gives hidden states and its head, whole for as
long as the loss takes, and the logits are made from them tile by tile; a server gives its most likely tokens.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, align_module_device, has_offloaded_params, is_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_reasoning_distill.data.tokenization import is_supervised
from trl_reasoning_distill.hub import context_length, load_tokenizer
from trl_reasoning_distill.losses.divergence import TopKTargets
from trl_reasoning_distill.losses.fused import LinearTeacher
from trl_reasoning_distill.losses.head import Head, body_of
from trl_reasoning_distill.teacher.records import TopKLogProbs
from trl_reasoning_distill.teacher.sampling.transformers import quantization_config
from trl_reasoning_distill.teacher.store.vocabulary import Vocabulary, map_vocabulary
from trl_reasoning_distill.trainer.gkd.rows import unpad
from trl_reasoning_distill.trainer.head import bound_to
from trl_reasoning_distill.trainer.reference import Reference
from trl_reasoning_distill.trainer.trl_bridge import (
    gathered_head,
    is_zero3,
    prepare_deepspeed,
    prove_whole_head,
    unwrap_model_for_generation,
)

logger = logging.getLogger(__name__)


def count_shared_ids(teacher: Any, student: Any) -> int:
    """How many ids, from 0 on, mean the same to two tokenizers.

    One may know more than the other, as a newer release does; the embeddings may have any number of rows.

    Raises:
        ValueError: If an id that both know stands for different text; with the first such id, and what to do.
    """
    if teacher.get_vocab() == student.get_vocab():
        return 1 + max(student.get_vocab().values())
    theirs, ours = Vocabulary(teacher), Vocabulary(student)
    mapped = map_vocabulary(theirs, ours)
    known = [{*vocabulary.bytes_of, *vocabulary.special} for vocabulary in (theirs, ours)]
    common = min(theirs.size, ours.size)
    for token in range(common):
        if (token in known[0]) == (token in known[1]) and (token not in known[0] or mapped[token] == token):
            continue
        names = [tokenizer.convert_ids_to_tokens(token) for tokenizer in (teacher, student)]
        raise ValueError(
            f"Teacher and student have different tokenizers: the id {token} is {names[0]!r} to the teacher and {names[1]!r} to the student. A "
            "live teacher needs the same ids. Distil offline instead: `trl-distill capture` with the teacher, `trl-distill align` to the "
            "student's tokenizer, then `trl-distill distill`."
        )
    return common


def load_teacher_tokenizer(args: Any, teacher: Any, student: Any, student_rows: int) -> Any:
    """The teacher's tokenizer: named by the options, or saved with the model.

    A loaded teacher without one has the student's, if its embedding has as many rows: that is all that TRL's GKD asks for.

    Args:
        args: The options.
        teacher: The loaded teacher, or `None` for one that the options name.
        student: The student's tokenizer.
        student_rows: Rows of the student's embedding.

    Raises:
        ValueError: If there is none.
    """
    named = args.teacher_tokenizer
    config = getattr(teacher, "config", None)
    name = named or (args.teacher_model_name_or_path if teacher is None else getattr(config, "name_or_path", ""))
    advice = (
        "It is needed to know which ids teacher and student share: pass it as teacher_tokenizer, or name it with "
        "the option of that name."
    )
    try:
        if not name:
            raise ValueError(
                f"The teacher was given as a model without a name, so its tokenizer is not known. {advice}"
            )
        return load_tokenizer(name, trust_remote_code=args.trust_remote_code, advice=advice)
    except ValueError as error:
        if named is not None or config is None or vocabulary_rows(config) != student_rows:
            raise
        logger.warning(
            "%s The teacher's embedding has as many rows as the student's (%d), so it is taken to have the student's tokenizer.",
            error,
            student_rows,
        )
        return student


def load_teacher(name: str, args: Any, accelerator: Accelerator) -> PreTrainedModel:
    """Load the teacher as the options say.

    Raises:
        ValueError: If it cannot be had.
    """
    options: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
    options.setdefault("dtype", "float32" if accelerator.device.type == "cpu" else "auto")
    if options.get("device_map") is not None and accelerator.num_processes > 1:
        raise ValueError(
            f"`teacher_model_init_kwargs` with device_map={options['device_map']!r} gives all devices to one process, but there are "
            f"{accelerator.num_processes}. Launch one, or shard the teacher with ZeRO-3 or FSDP2."
        )
    if args.teacher_quantization:
        options["quantization_config"] = quantization_config(args.teacher_quantization, options["dtype"])
        options.setdefault("device_map", {"": accelerator.device})
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"No teacher could be loaded from {name!r}: {reason}") from None


def place(model: Any, accelerator: Accelerator) -> Any:
    """Put a frozen model where it is to run: sharded as the student is, or whole on its device.

    Raises:
        ValueError: Under FSDP1.
    """
    device_map = getattr(model, "hf_device_map", None)
    if getattr(model, "is_quantized", False) or (device_map is not None and set(device_map) != {""}):
        return model
    if is_zero3(accelerator):
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return _shard_fsdp2(model, accelerator)
    return model.to(accelerator.device)


def _shard_fsdp2(model: Any, accelerator: Accelerator) -> Any:
    """Shard a frozen model layer by layer. Its layers may be of another class than the student's, which accelerate's policy names."""
    from torch.distributed.fsdp import fully_shard

    if not accelerator.is_fsdp2:
        raise ValueError(
            "A live teacher under FSDP needs its second version: set fsdp_version: 2 in the accelerate config."
        )
    mesh = getattr(accelerator, "torch_device_mesh", None)
    names = accelerator.parallelism_config.fsdp_dim_names if mesh is not None else ()
    shard = functools.partial(
        fully_shard, mesh=None if mesh is None else mesh[tuple(names)], reshard_after_forward=True
    )
    model = model.to(accelerator.device)
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            shard(module)
    return shard(model)


Targets = LinearTeacher | TopKTargets


@dataclass(frozen=True)
class TeacherBatch:
    """A micro-batch as the teacher reads it.

    Attributes:
        input_ids: `(batch, teacher length)`, padded on the right.
        attention_mask: The same shape, 1 where there is a token.
        shift: `(batch,)`: the student's token at t stands at t + shift.
        labels: `(batch, length)`, the student's.
    """

    input_ids: Tensor
    attention_mask: Tensor
    shift: Tensor
    labels: Tensor

    def predicting(self, hidden: Tensor) -> Tensor:
        """Of the teacher's hidden states `(batch, teacher length, h)` those `(tokens, h)` that predict the student's `labels[:, 1:]`."""
        length, width = self.labels.shape[1] - 1, hidden.shape[1]
        place = torch.arange(length, device=hidden.device) + self.shift.to(hidden.device)[:, None]
        place = place.clamp(0, width - 1)  # what is not supervised may stand anywhere
        start = torch.arange(len(hidden), device=hidden.device)[:, None] * width
        return hidden.flatten(0, 1)[(place + start).flatten()]

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """The rows without padding, and in each the places of the supervised tokens."""
        supervised = is_supervised(self.labels)
        supervised[:, 0] = False
        positions = [(row.nonzero()[:, 0] + shift).tolist() for row, shift in zip(supervised, self.shift, strict=True)]
        return unpad(self.input_ids, self.attention_mask), positions


class LiveTeacher(Protocol):
    """A teacher that scores each batch while the student trains."""

    context_length: int | None

    def read(self, batch: TeacherBatch) -> Any:
        """Read a batch; what `targets` needs of it."""

    def targets(self, reading: Any, device: torch.device) -> contextlib.AbstractContextManager[Targets]:
        """Its distributions for the student's `labels[:, 1:]`, flat, on `device`; valid inside the block, in the student's forward.

        Which ids a `LinearTeacher` is compared on (`top_k`, `on`) is for the trainer to set.
        """

    def writer(self) -> contextlib.AbstractContextManager[Any]:
        """The model to generate with."""


class ModelTeacher:
    """A causal language model in this process, or a shard of it on each.

    Args:
        model: The teacher; if it is quantised or spread over devices it stays as it is.
        accelerator: The student's: under ZeRO-3 and FSDP2 the teacher is sharded as well.
        shared_ids: Ids below this mean the same to teacher and student.

    Attributes:
        model: The teacher without PEFT and what else wraps it.
        wrapped: The teacher as it is called.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, shared_ids: int) -> None:
        self.accelerator, self.shared_ids = accelerator, shared_ids
        base: Any = model
        self.model: PreTrainedModel = base.get_base_model() if is_peft_model(base) else base
        self.context_length = context_length(self.model.config)
        model.eval().requires_grad_(False)
        prove_whole_head(self.model, accelerator)
        _add_hidden_only(self.model)
        self.wrapped: Any = place(model, accelerator)
        self._moved_head: Head | None = None

    def read(self, batch: TeacherBatch) -> Tensor:
        """See `LiveTeacher.read`: hidden states `(tokens, h)`."""
        device = self.model.device if self.model.device.type != "meta" else self.accelerator.device
        with torch.no_grad(), self.accelerator.autocast():
            hidden = self.wrapped(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                use_cache=False,
                hidden_only=True,
            )
        return batch.predicting(hidden)

    @contextlib.contextmanager
    def targets(self, reading: Tensor, device: torch.device) -> Iterator[Targets]:
        """See `LiveTeacher.targets`."""
        with self._head(device) as head:
            yield linear_teacher(reading.to(device), head, self.shared_ids)

    @contextlib.contextmanager
    def _head(self, device: torch.device) -> Iterator[Head]:
        """The head on the student's device. One that lies elsewhere is moved there once: it is used at every step."""
        layer = self.model.get_output_embeddings()
        if self._moved_head is None and (has_offloaded_params(layer) or not _is_on(layer, device)):
            with align_module_device(layer), gathered_head(self.model, layer) as head:
                weight, bias = head.weight.detach().to(device), head.bias
                self._moved_head = head._replace(weight=weight.clone(), bias=None if bias is None else bias.to(device))
        if self._moved_head is not None:
            yield self._moved_head
        else:
            with gathered_head(self.model, layer) as head:
                yield head

    def writer(self) -> contextlib.AbstractContextManager[Any]:
        """See `LiveTeacher.writer`."""
        return unwrap_model_for_generation(self.wrapped, self.accelerator)


class FormerSelf:
    """The student as it was before training: its base with the adapter off, or a frozen copy.

    Args:
        reference: Where its hidden states come from.
        student: The student's own model, without PEFT around it.
        shared_ids: Ids that the tokenizer has; what is beyond pads the embedding.
        writer: The student to generate with, adapter off; `None` for a frozen copy, which gives hidden states only.
    """

    def __init__(self, reference: Reference, student: PreTrainedModel, shared_ids: int, writer: Any) -> None:
        self.reference, self.student, self.shared_ids, self._writer = reference, student, shared_ids, writer
        self.context_length = context_length(student.config)

    def read(self, batch: TeacherBatch) -> TeacherBatch:
        """See `LiveTeacher.read`: only inside the student's forward can its own layers be run."""
        return batch

    @contextlib.contextmanager
    def targets(self, reading: TeacherBatch, device: torch.device) -> Iterator[Targets]:
        """See `LiveTeacher.targets`."""
        hidden = self.reference.hidden(
            self.student, input_ids=reading.input_ids, attention_mask=reading.attention_mask, use_cache=False
        )
        with gathered_head(self.student, self.reference.output_layer(self.student)) as head:
            yield linear_teacher(reading.predicting(hidden).to(device), head, self.shared_ids)

    def writer(self) -> contextlib.AbstractContextManager[Any]:
        """See `LiveTeacher.writer`."""
        assert self._writer is not None, "seq_kd with a frozen copy is refused before"
        return self._writer()


class ServerTeacher:
    """A server that gives the most likely tokens at each position of a prompt.

    Args:
        reader: Sends the requests.
        shared_ids: Ids from here on are left out; their mass is the tail's.
    """

    def __init__(self, reader: Any, shared_ids: int) -> None:
        self.reader, self.shared_ids = reader, shared_ids
        self.context_length: int | None = reader.context_length

    def read(self, batch: TeacherBatch) -> TopKTargets:
        """See `LiveTeacher.read`."""
        records = TopKLogProbs.concatenate([TopKLogProbs.empty(self.reader.top_k), *self.reader.read(*batch.rows())])
        ids = torch.from_numpy(records.ids).long()
        ids = ids.masked_fill(ids >= self.shared_ids, -1)
        asked = is_supervised(batch.labels[:, 1:]).flatten().cpu()
        flat = torch.full((len(asked), ids.shape[1]), -1)
        log_probs = torch.full(flat.shape, -torch.inf)
        flat[asked], log_probs[asked] = ids, torch.from_numpy(records.log_probs)
        return TopKTargets(flat, log_probs.masked_fill(flat < 0, -torch.inf))

    @contextlib.contextmanager
    def targets(self, reading: TopKTargets, device: torch.device) -> Iterator[Targets]:
        """See `LiveTeacher.targets`."""
        yield TopKTargets(reading.ids.to(device), reading.log_probs.to(device))

    def writer(self) -> contextlib.AbstractContextManager[Any]:
        """See `LiveTeacher.writer`; the configuration refuses it too, but a subclass may come here by another way."""
        raise ValueError(
            "A teacher behind a server does not write here: let the `generate` stage write its completions with `engine: openai`."
        )


def linear_teacher(hidden: Tensor, head: Head, shared_ids: int) -> LinearTeacher:
    """Hidden states and a head as the loss takes them."""
    bias = None if head.bias is None else head.bias.detach()
    return LinearTeacher(
        hidden=hidden,
        weight=head.weight.detach(),
        bias=bias,
        vocab_size=shared_ids,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
    )


def vocabulary_rows(config: Any) -> int:
    """Rows of a model's embedding, from its config: the ids that it can read and write."""
    return int(config.get_text_config().vocab_size)


def _add_hidden_only(model: PreTrainedModel) -> None:
    """Let `model(…, hidden_only=True)` return last hidden states, so that the hooks of ZeRO-3 and FSDP2 fire as for any forward."""
    forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward_with_choice(self: PreTrainedModel, *args: Any, hidden_only: bool = False, **kwargs: Any) -> Any:
        if hidden_only:
            return body_of(self)(*args, **kwargs).last_hidden_state
        return bound_to(self, forward)(*args, **kwargs)

    model.forward = types.MethodType(forward_with_choice, model)


def _is_on(layer: nn.Module, device: torch.device) -> bool:
    """Whether a layer's weight is there, or is a shard that is gathered there."""
    weight: Any = layer.weight
    if hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
        return True
    return bool(weight.device.type == device.type and weight.device.index == device.index)

"""Getting a live teacher: which ids it shares with the student, its weights, and where they are held."""

from __future__ import annotations

import functools
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from trl_reasoning_distill.teacher.engines.transformers import quantization_config
from trl_reasoning_distill.teacher.vocabulary import Vocabulary, map_vocabulary
from trl_reasoning_distill.trainer.trl_bridge import prepare_deepspeed


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


def load_teacher_tokenizer(args: Any, teacher: Any) -> Any:
    """The teacher's tokenizer: named by the options, or lying with the model.

    Raises:
        ValueError: If there is none to be had.
    """
    name = args.teacher_tokenizer_name_or_path or (
        args.teacher_model_name_or_path if teacher is None else teacher if isinstance(teacher, str) else None
    )
    name = name or getattr(getattr(teacher, "config", None), "_name_or_path", "")
    try:
        if not name:
            raise OSError("the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer of the teacher could be loaded ({str(error).strip().splitlines()[0]}). It is needed to know which ids teacher and "
            "student share: pass it as teacher_tokenizer, or name it with teacher_tokenizer_name_or_path."
        ) from None


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
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        return prepare_deepspeed(model, accelerator)
    if kind == DistributedType.FSDP:
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

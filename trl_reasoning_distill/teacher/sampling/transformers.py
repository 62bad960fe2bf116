"""The `transformers` engine: a causal language model in this process, in batches sorted by prompt length."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from trl_reasoning_distill.data.chat import encode_prompt, render_prompt
from trl_reasoning_distill.data.schema import FinishReason
from trl_reasoning_distill.extras import require_extra
from trl_reasoning_distill.hub import context_length, load_tokenizer
from trl_reasoning_distill.processes import launch_state
from trl_reasoning_distill.teacher.sampling.base import (
    THINK,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    restore_open_tag,
)
from trl_reasoning_distill.teacher.sampling.parameters import ChosenTokens, SeededSampler

QUANTIZATIONS = ("4bit", "8bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_BATCHES_PER_WINDOW = 64  # prompts are tokenized and sorted this many batches at a time


@dataclasses.dataclass(frozen=True)
class _Prompt:
    """A tokenized request, and how many tokens it may still write before its own limit."""

    request: GenerationRequest
    ids: list[int]
    limit: int
    opened: bool


class TransformersEngine:
    """Generates with a loaded model.

    Batches hold prompts of similar length, padded on the left. A model without a chat template gets its messages as plain
    text, parted by blank lines, and a warning.

    Args:
        model: A causal language model, on its device. Its weights and generation settings are left as they are.
        tokenizer: Its tokenizer.
        name: The model's name in traces; default: what it was loaded from.
        max_batch_size: Most requests in a batch.
        max_batch_tokens: Most tokens in a batch, prompt and completion, padding included; a single request may exceed it.
        chat_template_kwargs: Variables for the chat template.
        in_step: Whether ranks share the weights, so that each must make as many batches as the others: then a batch holds
            `max_batch_size` requests whatever their length, and none is refused for want of context.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        max_batch_size: int = 128,
        max_batch_tokens: int = 65536,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        in_step: bool = False,
    ) -> None:
        if max_batch_size < 1 or max_batch_tokens < 1:
            raise ValueError(
                f"max_batch_size={max_batch_size} and max_batch_tokens={max_batch_tokens} must be positive."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.name: str = name or str(model.config.name_or_path)
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.in_step = in_step
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self.context_length = None if in_step else context_length(model.config)
        if not tokenizer.chat_template:
            warnings.warn(f"{self.name} has no chat template: messages are sent as plain text.", stacklevel=2)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        quantization: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size: int = 128,
        max_batch_tokens: int = 65536,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> TransformersEngine:
        """Load a model, or an adapter with its base model, from a folder or the hub.

        Args:
            model: Folder or hub name; one with an `adapter_config.json` is loaded on its base model and merged.
            revision: Branch, tag or commit on the hub.
            adapter: PEFT adapter to put on `model`, whatever base the adapter names; merged as above.
            dtype: One of `DTYPES`. `"auto"` is float32 on a CPU, where bfloat16 is slow, and else the checkpoint's own.
            device: Default: what accelerate assigns to this process.
            device_map: Spread the model over devices; overrides `device`.
            attn_implementation: Passed to transformers.
            quantization: `"4bit"` (NF4, double quantisation) or `"8bit"`.
            trust_remote_code: Run code that comes with the model.
            max_batch_size: See the class.
            max_batch_tokens: See the class.
            chat_template_kwargs: See the class.

        Raises:
            ValueError: If the model cannot be found or loaded, or an option has an unknown value.
        """
        device = device or str(launch_state().device)
        kwargs: dict[str, Any] = {
            # One process is on "cpu", each of several on "cpu:0"
            "dtype": _dtype(dtype, on_cpu=device_map is None and torch.device(device).type == "cpu"),
            "device_map": device_map or {"": device},
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        if attn_implementation:
            kwargs["attn_implementation"] = attn_implementation
        if quantization:
            kwargs["quantization_config"] = quantization_config(quantization, kwargs["dtype"])
        with _one_line_load_error(model):
            loaded = _load(model, kwargs, adapter)
        tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
        return cls(
            loaded.eval(),
            tokenizer,
            name=f"{model}+{adapter}" if adapter else model,
            max_batch_size=max_batch_size,
            max_batch_tokens=max_batch_tokens,
            chat_template_kwargs=chat_template_kwargs,
        )

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield outputs as they end, longest prompts first, so that what does not fit fails at the start."""
        window = _BATCHES_PER_WINDOW * self.max_batch_size
        for start in range(0, len(requests), window):
            prompts = self._encode(requests[start : start + window], sampling)
            yield from (
                (p.request, GenerationOutput("", "length", 0, len(p.ids), 0.0)) for p in prompts if p.limit <= 0
            )
            for batch in self._batches([p for p in prompts if p.limit > 0]):
                yield from self._generate_batch(batch, sampling)

    def render_prompt(self, messages: list[dict[str, str]]) -> str:
        """The text a conversation becomes, up to where the model begins to write."""
        return render_prompt(self.tokenizer, messages, **self.chat_template_kwargs)

    def _encode(self, requests: Sequence[GenerationRequest], sampling: SamplingConfig) -> list[_Prompt]:
        """Tokenize prompts and sort them, longest first."""
        prompts = []
        for request in requests:
            text = self.render_prompt(request.messages)
            ids = encode_prompt(self.tokenizer, request.messages, **self.chat_template_kwargs)
            left = sampling.max_new_tokens if self.context_length is None else self.context_length - len(ids)
            prompts.append(_Prompt(request, ids, min(sampling.max_new_tokens, left), THINK.is_opened_by(text)))
        return sorted(prompts, key=lambda prompt: len(prompt.ids), reverse=True)

    def _batches(self, prompts: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
        """Cut sorted prompts into batches within both budgets; all rows of a batch share one limit of new tokens."""
        batch: list[_Prompt] = []
        for prompt in prompts:
            if batch:
                width = len(batch[0].ids) + prompt.limit
                too_wide = not self.in_step and width * (len(batch) + 1) > self.max_batch_tokens
                full = len(batch) >= self.max_batch_size or too_wide
                if full or prompt.limit != batch[0].limit:
                    yield batch
                    batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def _generate_batch(
        self, batch: Sequence[_Prompt], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        started = time.perf_counter()
        width = len(batch[0].ids)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_token_ids[0]
        input_ids = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in batch], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in batch], device=self.model.device)
        sampled = sampling.temperature > 0
        chosen = ChosenTokens(SeededSampler([p.request.seed for p in batch], sampling, width) if sampled else None)
        config = GenerationConfig(
            max_new_tokens=batch[0].limit,
            do_sample=False,  # a sampler has already drawn: greedy then takes the only token left
            eos_token_id=self.eos_token_ids,
            pad_token_id=pad,
            stop_strings=list(sampling.stop) if sampling.stop else None,
        )
        with generation_mode(self.model), torch.no_grad():
            output = self.model.generate(  # type: ignore[operator]
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList([chosen]),
                synced_gpus=self.in_step,
                tokenizer=self.tokenizer if sampling.stop else None,
            )
        written = output[:, width:].tolist()
        if sampling.stop:
            written = [_without_padding(row, pad) for row in written]
        completions = [self._until_end(row, batch[0].limit) for row in written]
        texts = self.tokenizer.batch_decode(
            [ids for ids, _ in completions], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        log_probs = torch.stack(chosen.log_probs, 1).tolist()
        seconds = (time.perf_counter() - started) / len(batch)
        for prompt, (ids, ended), text, row in zip(batch, completions, texts, log_probs, strict=True):
            text = restore_open_tag(text, opened=prompt.opened)
            reason: FinishReason = "stop" if ended else "length"
            mean = math.fsum(row[: len(ids)]) / len(ids)
            yield prompt.request, GenerationOutput(text, reason, len(ids), len(prompt.ids), seconds, mean)

    def _until_end(self, ids: list[int], limit: int) -> tuple[list[int], bool]:
        """The ids up to and with the first end token, and whether there was one, or a stop string before the limit."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        return (ids, len(ids) < limit) if end is None else (ids[: end + 1], True)


def _without_padding(ids: list[int], pad: int) -> list[int]:
    """The ids without the padding behind a stop string."""
    length = len(ids)
    while length > 1 and ids[length - 1] == pad:
        length -= 1
    return ids[:length]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a turn: the generation config's (chat models often have several) and the tokenizer's."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            f"{model.config.name_or_path} has no end-of-sequence token; set eos_token in its tokenizer_config.json."
        )
    return ids


@contextlib.contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, without the generation settings that a checkpoint brings along.

    `generate` fills what a config leaves open from the model's own one: Qwen2.5's repetition penalty would silently change
    "greedy" and "temperature 1". What was asked for is what is done.
    """
    training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own_config
        model.train(training)


def _dtype(name: str, *, on_cpu: bool) -> torch.dtype | str:
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: choose one of {', '.join(DTYPES)}.")
    if name == "auto":
        return torch.float32 if on_cpu else "auto"
    return getattr(torch, name)


def quantization_config(name: str, dtype: torch.dtype | str) -> BitsAndBytesConfig:
    """How bitsandbytes holds a model: `"4bit"` (NF4, double quantisation) or `"8bit"`."""
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantization={name!r}: the transformers engine has {', '.join(QUANTIZATIONS)}.")
    require_extra("quantization", "bitsandbytes")
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def _load(model: str, kwargs: Mapping[str, Any], adapter: str | None) -> PreTrainedModel:
    """Load a model; an adapter is put on its base model and, where the weights are not quantised, merged into it."""
    if adapter is not None:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        adapted: Any = PeftModel.from_pretrained(base, adapter)
    elif find_adapter_config_file(model, revision=kwargs["revision"]) is None:
        return AutoModelForCausalLM.from_pretrained(model, **kwargs)
    else:
        from peft import AutoPeftModelForCausalLM

        adapted = AutoPeftModelForCausalLM.from_pretrained(model, **kwargs)
    return adapted if "quantization_config" in kwargs else adapted.merge_and_unload()


@contextlib.contextmanager
def _one_line_load_error(model: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"No model could be loaded from {model!r}: {reason} Give a folder with config.json (or adapter_config.json), or a hub name."
        ) from error

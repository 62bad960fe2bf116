"""The `vllm` engine: continuous batching and tensor parallelism in this process, through vLLM's offline `LLM`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_reasoning_distill.extras import require_extra
from trl_reasoning_distill.processes import launch_state
from trl_reasoning_distill.teacher.sampling.base import (
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    restore_open_tag,
)

# vLLM's offline call returns when all its requests are done: this many at a time keep it busy and the progress alive.
_REQUESTS_PER_CALL = 1024


class VLLMEngine:
    """Generates with vLLM; each request is drawn with its own seed.

    Launch it as one process, whatever the number of GPUs: `tensor_parallel_size` spreads the model over them.

    Args:
        model: A folder or hub name of a model, or of a LoRA adapter (then its base model is loaded and the adapter applied).
        revision: Branch, tag or commit on the hub.
        dtype: As vLLM has it; `"auto"` is the checkpoint's own.
        quantization: `"4bit"` is bitsandbytes' NF4; other names (`"fp8"`, `"awq"`, …) are vLLM's.
        tensor_parallel_size: GPUs that share the model.
        gpu_memory_utilization: Share of each GPU's memory that vLLM takes.
        max_model_len: Context length; default: the model's.
        chat_template_kwargs: Variables for the chat template.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ValueError: If several processes were launched, or vLLM cannot load the model.
        MissingExtraError: If vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self._vllm = require_extra("vllm", "vllm")
        _refuse_several_processes()
        base, adapter = _base_and_adapter(model, revision)
        try:
            self.llm = self._vllm.LLM(
                model=base,
                revision=None if adapter else revision,
                dtype=dtype,
                quantization="bitsandbytes" if quantization == "4bit" else quantization,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                max_model_len=max_model_len,
                trust_remote_code=trust_remote_code,
                enable_prefix_caching=True,  # n samples of a problem, and few-shot examples, share their prompt
                generation_config="vllm",  # not the checkpoint's own penalties and temperatures
                **_lora_options(adapter),
            )
        except OSError as error:
            raise ValueError(f"vLLM cannot load {model!r}: {str(error).strip().splitlines()[0]}") from error
        self.name = model
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._lora = self._lora_request(adapter) if adapter else None

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig
    ) -> Iterator[tuple[GenerationRequest, GenerationOutput]]:
        """Yield outputs in order, `_REQUESTS_PER_CALL` at a time."""
        for start in range(0, len(requests), _REQUESTS_PER_CALL):
            chunk = requests[start : start + _REQUESTS_PER_CALL]
            started = time.perf_counter()
            results = self.llm.chat(
                [request.messages for request in chunk],
                sampling_params=[self._sampling_params(request, sampling) for request in chunk],
                chat_template_kwargs=self.chat_template_kwargs or None,
                lora_request=self._lora,
                use_tqdm=False,
            )
            seconds = (time.perf_counter() - started) / len(chunk)
            for request, result in zip(chunk, results, strict=True):
                completion = result.outputs[0]
                yield (
                    request,
                    GenerationOutput(
                        text=restore_open_tag(completion.text),
                        finish_reason="stop" if completion.finish_reason == "stop" else "length",
                        num_tokens=len(completion.token_ids),
                        prompt_tokens=len(result.prompt_token_ids or ()),
                        seconds=seconds,
                    ),
                )

    def _sampling_params(self, request: GenerationRequest, sampling: SamplingConfig) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=request.seed,
            stop=list(sampling.stop) if sampling.stop else None,
        )

    def _lora_request(self, adapter: str) -> Any:
        request = require_extra("vllm", "vllm.lora.request")
        return request.LoRARequest("adapter", 1, adapter)


def _refuse_several_processes() -> None:
    if (processes := launch_state().num_processes) > 1:
        raise ValueError(
            f"The vllm engine spreads itself over GPUs and wants one process, but {processes} were launched: "
            "use --num_processes 1 and set tensor_parallel_size."
        )


def _base_and_adapter(model: str, revision: str | None) -> tuple[str, str | None]:
    """The model vLLM is to load, and the adapter's folder if `model` is one."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(model, revision=revision) is None:
        return model, None
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(model, revision=revision).base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapter {model!r} does not name its base model; set base_model_name_or_path in adapter_config.json."
        )
    return base, model


def _lora_options(adapter: str | None) -> dict[str, Any]:
    if adapter is None:
        return {}
    from peft import PeftConfig

    return {"enable_lora": True, "max_lora_rank": max(8, int(getattr(PeftConfig.from_pretrained(adapter), "r", 8)))}

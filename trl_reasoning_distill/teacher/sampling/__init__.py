"""One interface for everything that writes text: a model in this process, vLLM, or any OpenAI-compatible server.

An engine takes requests (a conversation and a seed each) and yields their outputs as they come, in any order. What a request
gives depends on the request alone, never on what else is asked with it, so a run may be killed, resumed and spread over any
number of ranks. The `transformers` engine keeps that promise up to floating-point ties; servers keep it as far as they
honour `seed`.

| kind | runs | wants |
|---|---|---|
| `transformers` | in this process, any hub model, folder, 4-bit, or adapter | nothing more |
| `vllm` | in this process, continuous batching, tensor parallel | `pip install 'trl-reasoning-distill[vllm]'` |
| `openai` | on a server: vLLM, llama.cpp, `transformers serve`, hosted | `pip install 'trl-reasoning-distill[server]'` |
"""

from trl_reasoning_distill.teacher.sampling.base import (
    Engine,
    GenerationOutput,
    GenerationRequest,
    SamplingConfig,
    in_chunks,
    restore_open_tag,
    sample_seed,
)
from trl_reasoning_distill.teacher.sampling.options import (
    ENGINES,
    EngineArguments,
    LoadingOptions,
    ServerOptions,
    make_engine,
)

__all__ = [
    "ENGINES",
    "Engine",
    "EngineArguments",
    "GenerationOutput",
    "GenerationRequest",
    "LoadingOptions",
    "SamplingConfig",
    "ServerOptions",
    "in_chunks",
    "make_engine",
    "restore_open_tag",
    "sample_seed",
]

"""The teacher that `capture` and `store audit` read with: in this process or behind a server, and with which options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_reasoning_distill.teacher.readers import Reader

ENGINES = ("transformers", "openai")


@dataclass
class ReaderArguments:
    """What reads, and its options. An option that means nothing to the chosen engine is refused unless it still holds its default."""

    engine: str = field(
        default="transformers",
        metadata={
            "help": "What reads: transformers (this process), or openai (a server that gives prompt log-probs, such as vLLM; T = 1 only)."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of the teacher's tokenizer. Default: the model itself."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a hub model."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "[transformers] float32, bfloat16, float16, or auto: the checkpoint's own on an accelerator, float32 on a CPU."
        },
    )
    quantization: str | None = field(
        default=None, metadata={"help": "[transformers] 4bit (NF4) or 8bit through bitsandbytes."}
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "[transformers] auto spreads one model over all visible GPUs and the memory (then launch one process)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "[transformers] sdpa, flash_attention_2, eager, … Default: the model's own."}
    )
    max_batch_tokens: int = field(
        default=16384,
        metadata={"help": "[transformers] Tokens per batch, padding included; lower it when memory runs out."},
    )
    base_url: str | None = field(
        default=None,
        metadata={"help": "[openai] The server, such as http://localhost:8000/v1. Default: $OPENAI_BASE_URL."},
    )
    api_key_env: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "[openai] Environment variable that holds the key; the key itself is never stored."},
    )
    concurrency: int = field(default=16, metadata={"help": "[openai] Requests in flight at once."})
    request_timeout: float = field(
        default=600.0, metadata={"help": "[openai] Seconds before a request is given up and retried."}
    )
    max_retries: int = field(
        default=6,
        metadata={
            "help": "[openai] Retries per request, with exponential back-off, after 429, 5xx, or a lost connection."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a hub model. Off unless you trust it."}
    )

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r}: choose one of {', '.join(ENGINES)}.")
        for option in fields(ReaderArguments):
            engine, bracket, _ = option.metadata.get("help", "").lstrip("[").partition("]")
            value = getattr(self, option.name)
            if bracket and engine != self.engine and value != option.default:
                raise ValueError(
                    f"{option.name}={value!r} means nothing to the {self.engine!r} engine; remove it, or choose another engine."
                )

    def load_tokenizer(self, model: str, chat_template_path: str | None) -> Any:
        """The tokenizer of the teacher `model`; see `load_tokenizer`."""
        name = self.tokenizer or model
        return load_tokenizer(name, self.model_revision, chat_template_path, self.trust_remote_code)

    def make_reader(self, model: str, tokenizer: Any, top_k: int, temperatures: Sequence[float]) -> Reader:
        """Load the teacher, or examine its server.

        Raises:
            ValueError: If the model cannot be loaded, or the server cannot give what is asked for.
        """
        from trl_reasoning_distill.teacher.readers import ServerReader, TransformersReader

        if self.engine == "openai":
            return ServerReader(
                self.base_url,
                model,
                tokenizer,
                top_k,
                temperatures,
                api_key_env=self.api_key_env,
                concurrency=self.concurrency,
                request_timeout=self.request_timeout,
                max_retries=self.max_retries,
            )
        from trl_reasoning_distill.teacher.engines.transformers import TransformersEngine

        engine = TransformersEngine.from_pretrained(
            model,
            revision=self.model_revision,
            dtype=self.dtype,
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
        )
        return TransformersReader(engine.model, tokenizer, top_k, temperatures, max_batch_tokens=self.max_batch_tokens)

    def fingerprint(self, model: str, model_hash: str | None, tokenizer: Any, device: str) -> dict[str, Any]:
        """What decides the records, for the store's manifest; what a server is found to be comes from its reader."""
        from trl_reasoning_distill.data.manifest import installed_versions
        from trl_reasoning_distill.data.tokenization import chat_template_fingerprint, tokenizer_fingerprint

        made_with: dict[str, Any] = {"engine": self.engine, "teacher": model}
        if self.tokenizer is not None:
            made_with["tokenizer_name"] = self.tokenizer
        packages = ["tokenizers", "transformers"]
        if self.engine == "transformers":
            packages += ["bitsandbytes", "torch"]
            commit = tokenizer.init_kwargs.get("_commit_hash")
            made_with |= {
                "revision": model_hash or commit or self.model_revision,
                "dtype": "float32" if self.dtype == "auto" and device == "cpu" else self.dtype,
                "quantization": self.quantization,
                "attn_implementation": self.attn_implementation,
                "max_batch_tokens": self.max_batch_tokens,
            }
        return made_with | {
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "chat_template": chat_template_fingerprint(tokenizer),
            "versions": {name: version for name, version in installed_versions().items() if name in packages},
        }


def load_tokenizer(model: str, revision: str | None, chat_template_path: str | None, trust_remote_code: bool) -> Any:
    """A model's tokenizer, with the chat template of a `.jinja` file or another model if that is given.

    Raises:
        ValueError: If there is no such tokenizer or template.
    """
    from transformers import AutoTokenizer

    trust = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, **trust)
        if chat_template_path and chat_template_path.endswith(".jinja"):
            tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
        elif chat_template_path:
            tokenizer.chat_template = AutoTokenizer.from_pretrained(chat_template_path, **trust).chat_template
    except (OSError, ValueError) as error:
        raise ValueError(f"No tokenizer or template for {model}: {str(error).strip().splitlines()[0]}") from None
    return tokenizer


def context_length(model: str, revision: str | None, trust_remote_code: bool) -> int | None:
    """Most tokens that a model reads and writes together, by its configuration; `None` where that does not say."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # a tokenizer alone, or an adapter
        return None
    return getattr(config.get_text_config(), "max_position_embeddings", None)

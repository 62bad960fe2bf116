"""Tokenizers and model configurations by name, from a folder or the hub: the only place that loads them.

Whatever is wrong with a name, a folder or a file becomes one `ValueError` that says what was asked for, why it could not be loaded, and
what to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_Loaded = TypeVar("_Loaded")


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    advice: str = "",
) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Args:
        name: Folder or hub name of the model or tokenizer.
        revision: Branch, tag or commit on the hub.
        chat_template: Path of a `.jinja` file, or the name of another model, whose chat template takes the place of its own.
        trust_remote_code: Run code that comes with the model.
        advice: What to do about a name that cannot be loaded, for the error.

    Raises:
        ValueError: If there is no such tokenizer or template, or it cannot be read.
    """
    from transformers import AutoTokenizer

    load = functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    tokenizer = _load("tokenizer", name, functools.partial(load, name, revision=revision), advice)
    if chat_template is not None:
        tokenizer.chat_template = _load("chat template", chat_template, lambda: _read_template(chat_template, load))
    return tokenizer


def load_processor(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's processor, which is its tokenizer where it reads text alone.

    Raises:
        ValueError: As `load_tokenizer`.
    """
    from transformers import AutoProcessor

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        return _load("tokenizer or processor", name, lambda: AutoProcessor.from_pretrained(name, **options))
    except ValueError:
        config = find_config(name, **options)
        if config is None or config.get_text_config() is not config:
            raise
        # A text model's tokenizer may name the processor of its sibling that sees, as Gemma 3's 1B does
        return load_tokenizer(name, **options)


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, advice: str = ""
) -> PretrainedConfig:
    """A model's configuration.

    Raises:
        ValueError: If there is none, as in the folder of a tokenizer alone, or it cannot be read.
    """
    from transformers import AutoConfig

    return _load(
        "model configuration",
        name,
        lambda: AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code),
        advice,
    )


def find_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """`load_config`; `None` where there is none, as in the folder of a tokenizer alone or of an adapter."""
    try:
        return load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    except ValueError:
        return None


def context_length(config: PretrainedConfig | None) -> int | None:
    """Most tokens that a model reads and writes together, by its configuration; `None` where that does not say."""
    return None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)


def _load(what: str, name: str, load: Callable[[], _Loaded], advice: str = "") -> _Loaded:
    try:
        return load()
    except Exception as error:  # the reader of tokenizer.json, written in Rust, raises bare `Exception`s
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"No {what} could be loaded from {name!r}: {reason} {advice}".rstrip()) from error


def _read_template(name: str, load: Callable[..., Any]) -> Any:
    if name.endswith(".jinja"):
        return Path(name).read_text(encoding="utf-8")
    template = load(name).chat_template
    if not template:
        raise ValueError("it has no chat template")
    return template

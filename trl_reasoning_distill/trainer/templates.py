"""Chat templates for chains of thought: one for models that have none, and what to do about those that lose the thought."""

from __future__ import annotations

import re
from typing import Any

_TURN_END = "<|im_end|>"

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML that keeps whatever the assistant wrote, in every turn, and marks it with `{% generation %}`."""

_DROPS_THOUGHT = re.compile(r"[\w.\[\]'\"]+\.split\(\s*['\"]</think>['\"]\s*\)\s*\[-1\](?:\.\w+\([^()]*\))*")


def add_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template ChatML; one that has a template keeps it.

    A turn ends with `<|im_end|>` if that is a token of the vocabulary, which then becomes the end-of-sequence token, so that a
    trained model stops there. Else it ends with the end-of-sequence token the model already knows. No token is added.

    Returns:
        Whether the tokenizer was given one.
    """
    if tokenizer.chat_template:
        return False
    if _TURN_END in tokenizer.get_vocab():
        tokenizer.eos_token = _TURN_END
        tokenizer.chat_template = CHATML
    else:
        tokenizer.chat_template = CHATML.replace(_TURN_END, tokenizer.eos_token)
    return True


def advise(template: str | None) -> str:
    """How to mend a template that loses the reasoning, as specifically as its text allows."""
    found = _DROPS_THOUGHT.search(template or "")
    if found is None:
        return "Give a template that keeps what the assistant wrote, with chat_template_path."
    expression = found.group()
    content = expression.partition(".split(")[0]
    return (
        f"It does so with `{expression}`: copy the template to a .jinja file, write `{content}` in that place, and give the file as "
        "chat_template_path."
    )

"""Messages as they are published, read into one form: `role` (system, user, assistant, tool), `content` as text, tool calls.

Read are OpenAI's messages (`role`, `content` as text or parts, `reasoning_content`, `tool_calls`, `weight`), ShareGPT's turns (`from` and
`value` with their role words), and pairs of `input` and `output`. A thought that stands in a field of its own is written into the
content as the reasoning format has it, so that no template can leave it out unseen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trl_reasoning_distill.data.formatting import ReasoningFormat
from trl_reasoning_distill.data.row_files import parse_json

Message = dict[str, Any]

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "dialogue")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")
_CONTENT_FIELDS = ("content", "value", "text")
_ROLE_FIELDS = ("role", "from")
_KEPT_FIELDS = ("name", "tool_call_id")
_ROLE_WORDS = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard", "function_call", "tool_call"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "tool_response", "function_response", "ipython"),
}  # fmt: skip
_ROLES = {word: role for role, words in _ROLE_WORDS.items() for word in words}
_CALLS = ("function_call", "tool_call")


def read_messages(value: Any, form: ReasoningFormat) -> list[Message]:
    """The messages of a conversation.

    Args:
        value: A list of messages, turns or pairs, a single message, or JSON of these.
        form: How a thought is written that stands in a field of its own.

    Raises:
        ValueError: If it is none, with the number of the turn and what is wrong with it.
    """
    turns = turns_of(value)
    if any(not isinstance(turn, Mapping) for turn in turns):
        raise ValueError("a turn of the conversation is no object with a role and content")
    if turns and "output" in turns[0] and not set(_ROLE_FIELDS) & turns[0].keys():
        turns = [turn for pair in turns for turn in _turns_of_pair(pair)]
    return [_message(turn, number, form) for number, turn in enumerate(turns, start=1)]


def turns_of(value: Any) -> list[Any]:
    """The turns as they are published: of a list, of one message, or of JSON of either; empty for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse_json(value)
        except ValueError:
            return []
    if isinstance(value, Mapping):
        return [value]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else []


def role_of(turn: Any) -> str | None:
    """The role of a turn in our words; `None` for a word that is no role."""
    if not isinstance(turn, Mapping):
        return None
    word = next((turn[name] for name in _ROLE_FIELDS if turn.get(name) is not None), None)
    return _ROLES.get(word.strip().lower()) if isinstance(word, str) else None


def read_text(content: Any, what: str) -> str:
    """Text, or the texts of content parts one after the other.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ValueError(f"{what} has no content" if content is None else f"{what} has {_kind(content)} for content")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            found = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise ValueError(f"{what} has a part of type {found!r}: only text can be trained on")
        texts.append(text)
    return "".join(texts)


def write_thought(reasoning: str, reply: str, form: ReasoningFormat) -> str:
    """A reply with a thought that stood beside it.

    Raises:
        ValueError: If the format's own tags stand in one of the two.
    """
    if form.open_tag and not reply.strip():  # a turn that thinks and calls a tool
        return f"{form.open_tag}\n{reasoning}\n{form.close_tag}"
    if form.answer_prefix:  # the reply keeps its own text: what is short enough for the prefix is not known here
        return f"{reasoning}{form.gap}{reply}"
    return form.render(reasoning, reply)


def refuse_conversation_without_question(messages: Sequence[Message]) -> None:
    """Refuse a prompt in which nobody asks anything."""
    if not any(message["role"] in ("user", "tool") for message in messages):
        raise ValueError("nobody asks anything: there is no turn of the user before the reply")


def _message(turn: Mapping[str, Any], number: int, form: ReasoningFormat) -> Message:
    word = next((turn[name] for name in _ROLE_FIELDS if turn.get(name) is not None), None)
    role = role_of(turn)
    what = f"turn {number} ({word})"
    if role is None:
        raise ValueError(f"turn {number} has the unknown role {word!r}; known are {', '.join(sorted(_ROLES))}")
    message: Message = {"role": role}
    content = next((turn[name] for name in _CONTENT_FIELDS if turn.get(name) is not None), None)
    calls = _tool_calls(turn, word, content, what)
    if calls and str(word).strip().lower() in _CALLS:
        content = None
    message["content"] = "" if content is None and calls else read_text(content, what)
    if role == "assistant" and (reasoning := _reasoning(turn, what)):
        message["content"] = _with_reasoning(message["content"], reasoning, form, what)
    if calls:
        message["tool_calls"] = calls
    if turn.get("weight") is not None:
        message["weight"] = turn["weight"]
    return message | {name: turn[name] for name in _KEPT_FIELDS if turn.get(name) is not None}


def _reasoning(turn: Mapping[str, Any], what: str) -> str:
    """The thought in a field of its own; empty without one."""
    found = [turn[name] for name in REASONING_FIELDS if turn.get(name)]
    if not found:
        return ""
    return read_text(found[0], f"the reasoning of {what}").strip()


def _with_reasoning(content: str, reasoning: str, form: ReasoningFormat, what: str) -> str:
    parsed = form.parse(content)
    if parsed.reasoning and "".join(parsed.reasoning.split()) == "".join(reasoning.split()):
        return content  # published twice, in the field and in the text
    try:
        return write_thought(reasoning, content.strip() if form.open_tag else content, form)
    except ValueError:
        raise ValueError(f"{what} has a reasoning beside its content, and tags of the format in one of them") from None


def _tool_calls(turn: Mapping[str, Any], word: Any, content: Any, what: str) -> list[Any]:
    calls = turn.get("tool_calls")
    calls = _parsed(calls, f"the tool_calls of {what}") if isinstance(calls, str) and calls.strip() else calls
    if not calls and isinstance(word, str) and word.strip().lower() in _CALLS and isinstance(content, str):
        try:
            call = json.loads(content)
        except ValueError:  # written as text: it stays text
            return []
        calls = call if isinstance(call, list) else [call]
        calls = [{"type": "function", "function": each} if isinstance(each, Mapping) and "name" in each else each for each in calls]  # fmt: skip
    if calls and not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"the tool_calls of {what} are no objects")
    return list(calls or [])


def _turns_of_pair(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    """XTuner's `{"system", "input", "output"}`."""
    pairs = (("system", "system"), ("user", "input"), ("assistant", "output"))
    return [{"role": role, "content": pair[name]} for role, name in pairs if pair.get(name)]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error})") from None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"

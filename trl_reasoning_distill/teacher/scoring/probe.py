"""What a server can tell of a prompt: asked on a few tokens whose answers are known, before any row is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trl_reasoning_distill.teacher.sampling.client import RefusedRequestError
from trl_reasoning_distill.teacher.scoring.protocols import (
    Candidates,
    Echo,
    OtherTokensError,
    PromptLogProbs,
    Protocol,
    UnusableAnswerError,
)

Ask = Callable[[Protocol, Sequence[Any], int], list[dict[str, Any]]]
"""Sends prompts and a K; gives one choice per prompt."""

_TEXT = "1 + 1 = 2, as every child knows. Naïve? 日本語\n  x = 3.14"
_PROTOCOLS: tuple[Protocol, ...] = (PromptLogProbs(), Echo())
_HOPELESS = (401, 403, 404)
_ENOUGH = 16


@dataclasses.dataclass(frozen=True)
class Examination:
    """What was found out.

    Attributes:
        protocol: How to ask.
        precision: What the log-probabilities were made from, judged by their values.
    """

    protocol: Protocol
    precision: str


def examine(ask: Ask, tokenizer: Any, top_k: int, server: str) -> Examination:
    """Find out how the server tells log-probabilities of a prompt, and whether they can be trusted.

    Args:
        ask: Asks the server.
        tokenizer: The tokenizer that the server's model is thought to have.
        top_k: Tokens wanted per position.
        server: What the messages begin with, such as `"The server at http://…"`.

    Raises:
        ValueError: If it does not tell any, tells fewer, is off by a position, names tokens by text, or has another tokenizer.
    """
    row = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    refusals = []
    for protocol in _PROTOCOLS:
        try:
            _check_tokenizer(ask, protocol, tokenizer, server)
            return Examination(protocol, precision_of(_probe(ask, protocol, row, top_k, server)))
        except UnusableAnswerError as error:
            refusals.append(f"it {error}")
        except RefusedRequestError as error:
            if error.status in _HOPELESS:
                raise
            refusals.append(f"`{protocol.name}`: {error.said} (HTTP {error.status})")
    raise ValueError(
        f"{server} cannot tell what it thinks of a prompt's tokens: {'; '.join(refusals)} Serve the teacher with vLLM, or let it read in "
        "this process (engine: transformers)."
    )


def _probe(ask: Ask, protocol: Protocol, row: Sequence[int], top_k: int, server: str) -> list[Candidates]:
    """What the server says of a row, once that is known to be about the right tokens, in the right places, and as much as asked."""
    other = next(token for token in row if token not in row[-2:])
    prompts = [row, [*row[:-1], other], [*row[:-2], other, row[-1]]]
    try:
        choices = ask(protocol, prompts, top_k)
    except RefusedRequestError as error:
        if error.status in _HOPELESS or (most := _most(ask, protocol, row, top_k)) == 0:
            raise
        raise _too_few(server, most, top_k, f" ({error.said})") from error
    told, otherwise, after_another = (
        list(protocol.candidates(choice, prompt, range(1, len(row))))
        for choice, prompt in zip(choices, prompts, strict=True)
    )
    if (most := min(map(len, told))) < top_k:
        raise _too_few(server, most, top_k)
    # What is expected at a position depends on the tokens before it, and not on the one that stands there.
    same, different = _distance(told[-1], otherwise[-1]), _distance(told[-1], after_another[-1])
    if not same < 0.25 * different:
        raise UnusableAnswerError(
            f"answers `{protocol.name}` for other positions than it says: what it expects at a position depends on the token that stands "
            f"there ({same:.3g} nats), as if it were off by one, or not on the token before ({different:.3g} nats)."
        )
    return [candidates[:top_k] for candidates in told]


def _most(ask: Ask, protocol: Protocol, row: Sequence[int], top_k: int) -> int:
    """The largest K below `top_k` that the server does not refuse; 0 if there is none."""
    low, high = 0, top_k  # `low` is served, `high` is refused
    while high - low > 1:
        middle = (low + high) // 2 if low else 1
        try:
            ask(protocol, [row], middle)
            low = middle
        except RefusedRequestError:
            high = middle
    return low


def _too_few(server: str, most: int, top_k: int, said: str = "") -> ValueError:
    return ValueError(
        f"{server} gives {most} log-probabilities per token, top_k = {top_k} asks for more{said}. Set top_k to {most}, or raise the "
        f"server's limit: vLLM's --max-logprobs {top_k}."
    )


def _distance(one: Candidates, other: Candidates) -> float:
    """Mean distance of the log-probabilities of the tokens that both have; far if there is none."""
    mine, others = dict(one), dict(other)
    shared = [token for token in mine if token in others]
    return float(np.mean([abs(mine[token] - others[token]) for token in shared])) if shared else 10.0


def _check_tokenizer(ask: Ask, protocol: Protocol, tokenizer: Any, server: str) -> None:
    """Let the server tokenize a text: it must come to the tokens of ours."""
    row = tokenizer(_TEXT)["input_ids"]
    (choice,) = ask(protocol, [_TEXT], 1)
    try:
        for _ in protocol.candidates(choice, row, range(1, len(row))):
            pass
    except OtherTokensError as error:
        raise ValueError(
            f"{server} has another tokenizer than {getattr(tokenizer, 'name_or_path', '') or 'this'}, or counts positions otherwise: sent "
            f"{_TEXT!r}, it {error} Give the tokenizer of the model it serves."
        ) from None


def precision_of(told: Sequence[Candidates]) -> str:
    """What log-probabilities were made from: differences of 16-bit logits are multiples of a coarse step, whatever was subtracted.

    The step grows with the logits: 1/16 for bfloat16 and 1/128 for float16 where they are about 10.

    Args:
        told: Log-probabilities per position.
    """
    values = [np.array([log_prob for _, log_prob in candidates]) for candidates in told]
    everything = np.concatenate(values)
    for decimals in range(1, 6):
        if (np.abs(everything - everything.round(decimals)) < 1e-9).all():
            return f"rounded to {decimals} decimals"
    differences = np.concatenate([one[0] - one[1:] for one in values])
    for exponent in range(2, 12) if len(differences) >= _ENOUGH else ():
        step = 2.0**-exponent
        off = np.abs(differences - np.rint(differences / step) * step)
        if (off < 1e-5).mean() > 0.9:
            return "16-bit logits"
    return "float32 logits"

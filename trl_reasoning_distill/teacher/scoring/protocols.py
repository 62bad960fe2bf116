"""The two ways in which servers tell log-probabilities of a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

Candidates = list[tuple[int, float]]
"""Token ids with their log-probabilities, most likely first."""


class UnusableAnswerError(ValueError):
    """An answer that came, but is not what was asked for; says what it is instead."""


class OtherTokensError(UnusableAnswerError):
    """An answer about other tokens than were sent, or about other positions."""


class Protocol(ABC):
    """How to ask for log-probabilities of a prompt, and how to understand the answer.

    Attributes:
        name: The option that asks for them.
    """

    name: ClassVar[str]

    @abstractmethod
    def body(self, top_k: int) -> dict[str, Any]:
        """What goes into the request beside prompt and model."""

    @abstractmethod
    def candidates(self, choice: dict[str, Any], row: Sequence[int], positions: Sequence[int]) -> Iterator[Candidates]:
        """What the server expected at each position t ≥ 1 of the row.

        Raises:
            UnusableAnswerError: If that is not in the answer; an `OtherTokensError` if it is about other tokens than the row's.
        """


class PromptLogProbs(Protocol):
    """vLLM's: per position an object from token id to log-probability, in which the prompt's own token is never missing."""

    name = "prompt_logprobs"

    def body(self, top_k: int) -> dict[str, Any]:
        """See `Protocol`."""
        return {"prompt_logprobs": top_k}

    def candidates(self, choice: dict[str, Any], row: Sequence[int], positions: Sequence[int]) -> Iterator[Candidates]:
        """See `Protocol`."""
        told = choice.get("prompt_logprobs")
        if not told:
            raise UnusableAnswerError("ignored `prompt_logprobs` without a word.")
        _check_length(len(told) == len(row), len(told), row)
        for t in positions:
            entries = told[t]
            try:
                found = {int(token): float(entry["logprob"]) for token, entry in entries.items()}
            except (TypeError, ValueError, KeyError, AttributeError):
                raise UnusableAnswerError(
                    f"answered `prompt_logprobs` with something else than token ids and log-probabilities: {entries!r:.200}"
                ) from None
            if row[t] not in found:
                raise OtherTokensError(
                    f"tells nothing of token {row[t]} at position {t}, where it stands: its positions or its tokens are others."
                )
            yield _sorted(found)


class Echo(Protocol):
    """The old completions': the prompt comes back with `logprobs`; tokens by id if the server knows `return_tokens_as_token_ids`."""

    name = "echo"

    def body(self, top_k: int) -> dict[str, Any]:
        """See `Protocol`."""
        return {"echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True}

    def candidates(self, choice: dict[str, Any], row: Sequence[int], positions: Sequence[int]) -> Iterator[Candidates]:
        """See `Protocol`."""
        told = choice.get("logprobs") or {}
        tokens, tops = told.get("tokens") or [], told.get("top_logprobs") or []
        if len(tokens) < 2 or len(tops) != len(tokens):
            raise UnusableAnswerError("ignored `echo` with `logprobs` without a word.")
        _check_length(len(row) <= len(tokens) <= len(row) + 1, len(tokens), row)  # one was generated
        for t in positions:
            if (token := _id_of(tokens[t])) != row[t]:
                raise OtherTokensError(f"has token {token} at position {t}, where it was sent {row[t]}.")
            yield _sorted({_id_of(name): float(value) for name, value in (tops[t] or {}).items()})


def _id_of(name: str) -> int:
    prefix, _, digits = name.rpartition(":")
    if prefix != "token_id" or not digits.isdigit():
        raise UnusableAnswerError(
            f"names tokens by their text ({name!r:.40}), which several tokens can share, and not by their ids: it does not know "
            "`return_tokens_as_token_ids`."
        )
    return int(digits)


def _check_length(fits: bool, told: int, row: Sequence[int]) -> None:
    if not fits:
        raise OtherTokensError(f"tells of {told} positions for a prompt of {len(row)} tokens.")


def _sorted(found: dict[int, float]) -> Candidates:
    return sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))

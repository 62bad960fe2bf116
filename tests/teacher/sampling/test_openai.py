"""The `openai` engine: what is asked, what comes back, and what becomes of an answer when another one fails."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.teacher.sampling.chat_server import LoopbackServer, Reply, completion
from tests.teacher.sampling.test_engines import GREEDY, ask, outputs
from trl_reasoning_distill.teacher.sampling import GenerationOutput, SamplingConfig
from trl_reasoning_distill.teacher.sampling.openai import OpenAIEngine


def test_requests_carry_all_settings_and_no_more_than_the_bound_are_in_flight(
    serve: Callable[[Reply], LoopbackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(body: dict[str, Any], times: int) -> tuple[int, dict[str, Any]]:
        time.sleep(0.03)
        return 200, completion(f"{body['messages'][0]['content']} {body['seed']}")

    server = serve(reply)
    monkeypatch.setenv("MY_KEY", "secret-key")
    engine = OpenAIEngine(
        "m", base_url=server.url, concurrency=3, api_key_env="MY_KEY", chat_template_kwargs={"enable_thinking": True}
    )
    found = outputs(engine, [ask(f"q{i}", seed=i, key=f"q{i}") for i in range(12)], SamplingConfig(9, 0.7, 0.9, 5))
    assert {key: output.text for key, output in found.items()} == {f"q{i}": f"q{i} {i}" for i in range(12)}
    assert found["q0"] == GenerationOutput("q0 0", "stop", 2, 3, 0.0)
    assert 1 < server.most_busy <= 3
    headers, body = server.seen[0]
    assert headers["Authorization"] == "Bearer secret-key"
    del body["messages"], body["seed"]
    assert body == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    assert "secret-key" not in repr(vars(engine))


def test_a_busy_or_failing_server_is_asked_again(serve: Callable[[Reply], LoopbackServer]) -> None:
    server = serve(
        lambda body, times: (
            (200, completion("4")) if times > 2 else ((429, 503)[times - 1], {"error": {"message": "busy"}})
        )
    )
    found = outputs(OpenAIEngine("m", base_url=server.url), [ask("a", key="a"), ask("b", key="b")], GREEDY)
    assert [output.text for output in found.values()] == ["4", "4"]
    assert len(server.seen) == 6


def test_reasoning_in_a_field_of_its_own_comes_back_in_tags_and_other_ends_are_cuts(
    serve: Callable[[Reply], LoopbackServer],
) -> None:
    server = serve(lambda body, times: (200, completion("4", "content_filter", reasoning_content="2+2\n")))
    (output,) = outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY).values()
    assert (output.text, output.finish_reason) == ("<think>\n2+2\n</think>\n\n4", "length")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, r"HTTP 400: .*too long"),
        (401, r"refused the key \(401\).*OPENAI_API_KEY"),
        (404, r"knows no model 'm'"),
        (500, r"HTTP 500 after 2 tries: .*too long"),
    ],
)
def test_a_refusal_is_one_line_with_the_address(
    serve: Callable[[Reply], LoopbackServer], status: int, message: str
) -> None:
    server = serve(lambda body, times: (status, {"error": {"message": "too long"}}))
    with pytest.raises(ValueError, match=message) as error:
        outputs(OpenAIEngine("m", base_url=server.url, max_retries=1), [ask("a")], GREEDY)
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_a_silent_server_and_an_absent_one_are_told_apart(
    serve: Callable[[Reply], LoopbackServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda body, times: (time.sleep(1.0), (200, completion("4")))[1])
    with pytest.raises(ValueError, match=r"did not answer within 0.2 s after 1 tries"):
        outputs(OpenAIEngine("m", base_url=server.url, request_timeout=0.2, max_retries=0), [ask("a")], GREEDY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ValueError, match=f"{url} cannot be reached"):
        outputs(OpenAIEngine("m", base_url=url, max_retries=0), [ask("a")], GREEDY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="set base_url"):
        OpenAIEngine("m")


def failing(*failures: Any, then: str = "4") -> Reply:
    """These answers first, then a good one."""
    return lambda body, times: failures[times - 1] if times <= len(failures) else (200, completion(then))


UNUSABLE = {
    "html": (200, "<html>gateway</html>"),
    "error": (200, {"choices": None, "error": {"message": "Provider returned error", "code": 429}}),
    "empty": (200, {"id": "1", "choices": [], "usage": None}),
    "null": (200, {"id": "1", "choices": None}),
    "in a choice": (200, {"choices": [{"finish_reason": "error", "error": {"message": "overloaded"}, "message": {}}]}),
    "list": (200, [1]),
    "cut": (200, '{"choices": [{"mess'),
}


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl_reasoning_distill.teacher.sampling.client._pause", lambda error, tried: 0.0)


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.usefixtures("no_pauses")
def test_a_200_without_an_answer_is_asked_again_and_then_named(
    serve: Callable[[Reply], LoopbackServer], kind: str
) -> None:
    server = serve(failing(UNUSABLE[kind]))
    (output,) = outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY).values()
    assert (output.text, len(server.seen)) == ("4", 2)
    server = serve(lambda body, times: UNUSABLE[kind])
    with pytest.raises(ValueError, match="after 2 tries with HTTP 200 and ") as error:
        outputs(OpenAIEngine("m", base_url=server.url, max_retries=1), [ask("a")], GREEDY)
    assert type(error.value) is ValueError
    assert server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_an_answer_that_trickles_is_given_up_at_its_deadline(serve: Callable[[Reply], LoopbackServer]) -> None:
    def trickle(body: dict[str, Any], times: int) -> tuple[int, Any]:
        return 200, (time.sleep(0.05) or b" " for _ in range(2_000))

    server = serve(trickle)
    with pytest.raises(ValueError, match=r"did not answer within 0.3 s after 2 tries"):
        outputs(OpenAIEngine("m", base_url=server.url, request_timeout=0.3, max_retries=1), [ask("a")], GREEDY)


def test_one_refused_request_loses_no_other_answer(serve: Callable[[Reply], LoopbackServer]) -> None:
    refused = 400, {"error": {"message": "content management policy"}}
    server = serve(lambda body, times: refused if body["messages"][0]["content"] == "q3" else (200, completion("4")))
    engine = OpenAIEngine("m", base_url=server.url, concurrency=2)
    found = outputs(engine, [ask(f"q{i}", key=f"q{i}") for i in range(20)], GREEDY)
    assert {key for key, output in found.items() if output.text == "4"} == {f"q{i}" for i in range(20) if i != 3}
    assert (found["q3"].finish_reason, found["q3"].text) == ("error", "")
    assert "HTTP 400: content management policy" in str(found["q3"].error)
    assert sum(body["messages"][0]["content"] == "q3" for _, body in server.seen) == 3, "a filter may change its mind"


def test_a_refusal_that_does_not_last_is_an_answer(serve: Callable[[Reply], LoopbackServer]) -> None:
    def reply(body: dict[str, Any], times: int) -> tuple[int, Any]:
        refused = body["messages"][0]["content"] == "q1" and times < 3
        return (400, {"error": {"message": "filtered"}}) if refused else (200, completion("4"))

    found = outputs(OpenAIEngine("m", base_url=serve(reply).url), [ask(f"q{i}", key=f"q{i}") for i in range(3)], GREEDY)
    assert [output.error for output in found.values()] == [None] * 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_concerns_all_requests_ends_at_once_but_keeps_what_is_under_way(
    serve: Callable[[Reply], LoopbackServer], status: int
) -> None:
    def reply(body: dict[str, Any], times: int) -> tuple[int, Any]:
        if body["messages"][0]["content"] == "q0":
            return status, {"error": {"message": "no"}}
        time.sleep(0.3)  # longer than the refusal
        return 200, completion("4")

    server = serve(reply)
    answers = OpenAIEngine("m", base_url=server.url, concurrency=3).generate(
        [ask(f"q{i}", key=f"q{i}") for i in range(50)], GREEDY
    )
    kept = []
    with pytest.raises(ValueError, match=f"{status}"):
        kept.extend(request.key for request, _ in answers)
    assert sorted(kept) == ["q1", "q2"]
    assert len(server.seen) == 3


def test_many_failures_in_a_row_are_the_servers(serve: Callable[[Reply], LoopbackServer]) -> None:
    server = serve(lambda body, times: (400, {"error": {"message": "context length is 4"}}))
    engine = OpenAIEngine("m", base_url=server.url, concurrency=2)
    with pytest.raises(ValueError, match="context length is 4"):
        outputs(engine, [ask(f"q{i}", key=f"q{i}") for i in range(500)], GREEDY)
    assert len(server.seen) < 30


def test_counts_that_a_server_does_not_tell_are_zero(serve: Callable[[Reply], LoopbackServer]) -> None:
    silent = completion("4") | {"usage": {"prompt_tokens": None, "completion_tokens": None}}
    for answer in (silent, completion("4") | {"usage": None}):
        server = serve(lambda body, times, answer=answer: (200, answer))
        (output,) = outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY).values()
        assert output == GenerationOutput("4", "stop", 0, 0, 0.0)


THOUGHT = "<think>\n2+2\n</think>\n\n4"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "4", "reasoning": "2+2"}, THOUGHT),
        ({"content": "4", "reasoning": None, "reasoning_details": [{"type": "reasoning.text", "text": "2+2"}]}, THOUGHT),
        ({"content": "4", "reasoning": {"text": "2+2"}}, THOUGHT),
        ({"content": "4", "reasoning_content": "<think>2+2</think>"}, THOUGHT),
        ({"content": THOUGHT, "reasoning_content": "2+2"}, THOUGHT),
        ({"content": "2+2\n</think>\n\n4", "reasoning_content": None}, THOUGHT),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "2+2"}]}, {"type": "text", "text": "4"}]}, THOUGHT),
        ({"content": [{"type": "text", "text": "4"}]}, "4"),
        ({"content": None, "refusal": "I can't."}, "I can't."),
        ({"content": None, "tool_calls": []}, ""),
    ],
)  # fmt: skip
def test_a_text_is_read_in_all_the_ways_that_servers_write_it(
    serve: Callable[[Reply], LoopbackServer], message: dict[str, Any], text: str
) -> None:
    server = serve(lambda body, times: (200, completion(**{"text": ""} | message_of(message))))
    (output,) = outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY).values()
    assert output.text == text


def message_of(message: dict[str, Any]) -> dict[str, Any]:
    return {"text" if name == "content" else name: value for name, value in message.items()}


@pytest.mark.parametrize(
    ("said", "tokens", "reason"),
    [("stop", 2, "stop"), ("eos_token", 2, "stop"), ("length", 2, "length"), (None, 2, "stop"), (None, 24, "length")],
)
def test_an_end_is_read_as_servers_call_it(
    serve: Callable[[Reply], LoopbackServer], said: Any, tokens: int, reason: str
) -> None:
    answer = completion("4", said) | {"usage": {"prompt_tokens": 3, "completion_tokens": tokens}}
    server = serve(lambda body, times: (200, answer))
    (output,) = outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY).values()
    assert output.finish_reason == reason


def test_a_thought_that_was_cut_stays_open(serve: Callable[[Reply], LoopbackServer]) -> None:
    answer = completion("", "length", reasoning_content="2+")
    server = serve(lambda body, times: (200, answer))
    (output,) = outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY).values()
    assert output.text == "<think>\n2+"


def test_what_a_server_refuses_can_be_left_out(serve: Callable[[Reply], LoopbackServer]) -> None:
    def reply(body: dict[str, Any], times: int) -> tuple[int, Any]:
        unsupported = next((name for name in ("temperature", "seed") if name in body), None)
        if unsupported:
            return 400, {
                "error": {"message": f"Unsupported value: '{unsupported}' does not support 0 with this model."}
            }
        return 200, completion("4")

    server = serve(reply)
    with pytest.raises(ValueError, match=r"leave_out: \[temperature\]"):
        outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], GREEDY)
    engine = OpenAIEngine("m", base_url=server.url, leave_out=["temperature", "seed", "max_tokens"])
    outputs(engine, [ask("a")], GREEDY)
    assert set(server.seen[-1][1]) == {"model", "messages", "top_p"}
    with pytest.raises(ValueError, match=r"leave_out=\['model'\]: only max_tokens"):
        OpenAIEngine("m", base_url=server.url, leave_out=["model"])


def test_the_limit_has_another_name_where_the_server_wants_it(serve: Callable[[Reply], LoopbackServer]) -> None:
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server = serve(
        lambda body, times: (400, {"error": {"message": said}}) if "max_tokens" in body else (200, completion("4"))
    )
    engine = OpenAIEngine("m", base_url=server.url, concurrency=1)
    outputs(engine, [ask(str(i), key=str(i)) for i in range(3)], GREEDY)
    assert [body.get("max_completion_tokens") for _, body in server.seen] == [None, 24, 24, 24]


def test_stop_strings_travel_with_a_request(serve: Callable[[Reply], LoopbackServer]) -> None:
    server = serve(lambda body, times: (200, completion("4")))
    outputs(OpenAIEngine("m", base_url=server.url), [ask("a")], SamplingConfig(9, stop=("\nQ:",)))
    assert server.seen[0][1]["stop"] == ["\nQ:"]


@pytest.mark.timeout(50)
def test_an_interrupted_caller_waits_for_no_server(serve: Callable[[Reply], LoopbackServer]) -> None:
    released = threading.Event()

    def reply(body: dict[str, Any], times: int) -> tuple[int, Any]:
        if body["messages"][0]["content"] != "q0":
            released.wait(60)
        return 200, completion("4")

    answers = OpenAIEngine("m", base_url=serve(reply).url).generate(
        [ask(f"q{i}", key=f"q{i}") for i in range(3)], GREEDY
    )
    next(answers)
    answers.close()  # type: ignore[attr-defined]  # waits for ever if it waits for the server
    assert not released.is_set()
    released.set()

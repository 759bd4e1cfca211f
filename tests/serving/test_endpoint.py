"""`wave serve` as its clients see it: the openai client, curl-like requests that are wrong, clients that go away, and an agent that is killed."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from waveos.cli import run

openai = pytest.importorskip("openai", reason="the endpoint is tested with the openai client: pip install openai")
uvicorn = pytest.importorskip("uvicorn", reason="the endpoint needs waveos[serving]")

DEADLINE_S = 60.0


def _start(*arguments):
    """A server of its own, and its base URL, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))", "serve", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    match = re.search(r"(http://\S+)/v1", line)
    assert match, line + process.stderr.read()
    return process, match.group(1)


def _stop(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.stderr.close()


@pytest.fixture(scope="module")
def server():
    process, url = _start("--ranks", "2")
    yield process, url
    _stop(process)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as made:
        yield made


def _chat(client, text="hello", **more):
    return client.chat.completions.create(model="wave-reference", messages=[{"role": "user", "content": text}], **more)


def _metrics(url):
    text = urllib.request.urlopen(f"{url}/metrics", timeout=DEADLINE_S).read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\S+?) (\S+)$", text, re.MULTILINE)}


def _until(condition):
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_is_told_the_address_may_connect_at_once(monkeypatch, capsys):
    def connect(_server, sockets):
        with socket.create_connection(sockets[0].getsockname(), DEADLINE_S) as client:
            connected.append(client.getpeername()[1])

    connected = []
    monkeypatch.setattr(uvicorn.Server, "run", connect)
    assert run(["serve", "--port", "0"]) == 0
    assert f":{connected[0]}/v1" in capsys.readouterr().err


def test_the_model_is_listed_and_found(client):
    assert [each.id for each in client.models.list()] == ["wave-reference"]
    assert client.models.retrieve("wave-reference").owned_by == "wave"


def test_equal_questions_have_equal_answers_and_the_second_finds_its_prompt_in_the_cache(client):
    text = "what is a page? " * 40
    first, second = (_chat(client, text, max_tokens=12) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason == "length"
    assert (first.usage.completion_tokens, first.usage.prompt_tokens) == (12, len(text) + 3)
    assert second.usage.prompt_tokens_details.cached_tokens > 600
    assert second.usage.total_tokens == len(text) + 3 + 12


def test_a_stream_says_the_same_token_by_token_and_its_usage_at_the_end(client):
    whole = _chat(client, max_tokens=9)
    chunks = list(_chat(client, max_tokens=9, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [each.choices[0].delta.content for each in chunks if each.choices and each.choices[0].delta.content]
    assert len(said) == 9 and "".join(said) == whole.choices[0].message.content
    assert [each.choices[0].finish_reason for each in chunks if each.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 9


def test_completions_of_several_prompts_and_of_tokens(client):
    made = client.completions.create(model="wave-reference", prompt=["one", "two"], max_tokens=5)
    alone = client.completions.create(model="wave-reference", prompt=[256, *b"two"], max_tokens=5)
    assert [len(each.text) for each in made.choices] == [5, 5]
    assert made.choices[1].text == alone.choices[0].text


def test_a_stop_sequence_ends_an_answer_and_is_not_part_of_it(client):
    whole = _chat(client, max_tokens=12).choices[0].message.content
    stop = whole[5:7]
    made = _chat(client, max_tokens=12, stop=[stop])
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].message.content == whole[: whole.index(stop)]
    streamed = "".join(each.choices[0].delta.content or "" for each in _chat(client, max_tokens=12, stop=stop, stream=True))
    assert streamed == made.choices[0].message.content


def test_a_temperature_draws_by_its_seed(client):
    one, same, other = (_chat(client, max_tokens=12, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("seed", [-1, 2**70])
def test_any_whole_number_is_a_seed(client, seed):
    one, same, plain = (_chat(client, max_tokens=12, temperature=1.5, seed=each).choices[0].message.content for each in (seed, seed % 2**64, 1))
    assert one == same != plain


def test_an_answer_goes_back_as_the_client_gives_it(client):
    said = _chat(client, max_tokens=4).choices[0].message
    assert {"refusal", "tool_calls", "function_call", "audio", "annotations"} <= said.model_dump().keys()
    talk = [{"role": "user", "content": "hello"}, said.model_dump(), {"role": "user", "content": "and?"}]
    assert client.chat.completions.create(model="wave-reference", messages=talk, max_tokens=4).usage.completion_tokens == 4


class TestErrorsAreTheApisOwn:
    @pytest.mark.parametrize(
        ("more", "status", "code", "param"),
        [
            ({"extra_body": {"foo": 1}}, 400, "unknown_parameter", "foo"),
            ({"temperature": 9}, 400, "invalid_value", "temperature"),
            ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
            ({"max_tokens": 1_000_000}, 400, "context_length_exceeded", "messages"),
            ({"model": "gpt-9"}, 404, "model_not_found", "model"),
            ({"messages": []}, 400, "invalid_value", "messages"),
            ({"messages": [{"role": "judge", "content": "?"}]}, 400, "invalid_value", "messages.0.role"),
            ({"n": 4}, 400, "invalid_value", "n"),
            ({"stop": ["a"] * 5}, 400, "invalid_value", "stop"),
            ({"stop": ["a", 5]}, 400, "invalid_value", "stop.1"),
            ({"messages": [{"role": "assistant", "content": "?", "tool_calls": [{}]}]}, 400, "invalid_value", "messages.0.tool_calls"),
        ],
    )
    def test_for_what_cannot_be(self, client, more, status, code, param):
        asked = {"model": "wave-reference", "messages": [{"role": "user", "content": "hello"}], **more}
        with pytest.raises(openai.APIStatusError) as error:
            client.chat.completions.create(**asked)
        assert (error.value.status_code, error.value.code, error.value.param) == (status, code, param)
        assert error.value.type == "invalid_request_error" and error.value.body["message"]

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"stop": ["a"] * 5}, "at most 4"),
            ({"n": 4}, "n: 4 is not supported"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages.0.content.0.type: 'image_url' is not supported",
            ),
        ],
    )
    def test_and_say_what_was_meant_and_cannot_be(self, client, more, words):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(**{"model": "wave-reference", "messages": [{"role": "user", "content": "hello"}], **more})

    @pytest.mark.parametrize(("count", "good"), [(128, True), (129, False)])
    def test_for_more_prompts_than_others_can_wait_for(self, client, count, good):
        asked = {"model": "wave-reference", "prompt": ["a"] * count, "max_tokens": 1}
        if good:
            assert len(client.completions.create(**asked).choices) == count
            return
        with pytest.raises(openai.BadRequestError, match="129 texts; 128 at most") as error:
            client.completions.create(**asked)
        assert error.value.param == "prompt"

    @pytest.mark.parametrize("body", [b"[]", b"null"])
    def test_for_a_body_that_is_no_object(self, server, body):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server[1]}/v1/completions", data=body, timeout=DEADLINE_S)
        with error.value as answer:
            assert json.load(answer)["error"]["message"] == "the body: Input should be an object"

    def test_for_ten_megabytes_and_others_go_on(self, client):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            other = pool.submit(_chat, client, "meanwhile " * 50, max_tokens=30)
            with pytest.raises(openai.APIStatusError) as error:
                _chat(client, "x" * 10_000_000)
            assert error.value.status_code == 413 and error.value.code == "request_too_large"
            assert other.result().usage.completion_tokens == 30

    @pytest.mark.parametrize(
        "body", ['{"model": "m", "messages": [], %s}', '{"model": "m", "messages": [{"role": "user", "content": "", %s}]}'], ids=["body", "message"]
    )
    def test_for_a_hundred_thousand_unknown_names_without_looking_at_each(self, server, body):
        with pytest.raises(urllib.error.HTTPError) as error:
            names = ", ".join(f'"{number}": 0' for number in range(100_000))
            urllib.request.urlopen(f"{server[1]}/v1/chat/completions", data=(body % names).encode(), timeout=DEADLINE_S)
        with error.value as answer:
            told = json.load(answer)["error"]
        assert answer.code == 400 and re.fullmatch(r"100,00[01] arguments are wrong or unknown\.", told["message"])

    def test_for_a_name_of_megabytes_which_is_not_said_in_full(self, server):
        body = json.dumps({"model": "m", "prompt": "", "n" * 5_000_000: 0}).encode()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server[1]}/v1/completions", data=body, timeout=DEADLINE_S)
        with error.value as answer:
            assert answer.code == 400 and len(answer.read()) < 1_000

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("/v1/nothing", None, 404),
            ("/v1/chat/completions", None, 405),
            ("/v1/chat/completions/", b"{}", 404),
            ("/v1/completions", b"{", 400),
        ],
    )
    def test_for_what_is_no_request(self, server, path, body, status):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(server[1] + path, data=body, timeout=DEADLINE_S)
        with error.value as answer:
            assert answer.code == status and b'"type":"invalid_request_error"' in answer.read()


def test_clients_that_go_away_in_mid_stream_leave_nothing_running_and_others_go_on(server, client):
    before = _metrics(server[1]).get('vllm:request_success_total{finished_reason="abort",model_name="wave-reference"}', 0.0)
    for number in range(3):
        stream = _chat(client, f"long {number} " * 60, max_tokens=2_000, stream=True)
        next(iter(stream))
        stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).chat.completions.create(
            model="wave-reference", messages=[{"role": "user", "content": "slow " * 800}], max_tokens=1_500
        )
    assert _chat(client, max_tokens=4).usage.completion_tokens == 4

    def settled():
        found = _metrics(server[1])
        gone = found.get('vllm:request_success_total{finished_reason="abort",model_name="wave-reference"}', 0.0) - before
        left = [found[f'vllm:num_requests_{state}{{model_name="wave-reference"}}'] for state in ("running", "waiting")]
        return gone >= 3 and left == [0, 0]  # a server that is slow may not have heard of the fourth before it left

    _until(settled)


def test_an_agent_that_is_killed_is_started_again_and_no_client_notices(server, client):
    process, url = server
    wanted = _chat(client, "before and after " * 30, max_tokens=10).choices[0].message.content
    agents = subprocess.run(["pgrep", "-f", f"shm://serving-{process.pid} "], capture_output=True, text=True).stdout.split()
    assert len(agents) == 1
    restarts = _metrics(url)["wave_agent_restarts_total"]
    os.kill(int(agents[0]), signal.SIGKILL)
    assert _chat(client, "before and after " * 30, max_tokens=10).choices[0].message.content == wanted
    assert _metrics(url)["wave_agent_restarts_total"] == restarts + 1


def test_metrics_have_vllms_names_and_health_is_good(server, client):
    _chat(client, max_tokens=3)
    found = _metrics(server[1])
    label = '{model_name="wave-reference"}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total", "generation_tokens_total"):
        assert f"vllm:{name}{label}" in found
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert found[f"vllm:{name}_count{label}"] > 0
    assert found['wave_decisions_total{outcome="committed"}'] > 0
    assert urllib.request.urlopen(f"{server[1]}/health", timeout=DEADLINE_S).status == 200


def test_many_clients_at_once_are_all_served(server):
    """A load generator in small: 24 clients, half of them streaming."""

    async def load():
        async with openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:

            async def one(number):
                asked = {"model": "wave-reference", "messages": [{"role": "user", "content": f"question {number % 5} " * 20}], "max_tokens": 6}
                if number % 2:
                    return "".join([each.choices[0].delta.content or "" async for each in await client.chat.completions.create(**asked, stream=True)])
                return (await client.chat.completions.create(**asked)).choices[0].message.content

            return await asyncio.gather(*(one(number) for number in range(24)))

    answers = asyncio.run(load())
    assert all(len(each) == 6 for each in answers)
    assert all(answers[number] == answers[number % 5] for number in range(24))


@pytest.mark.parametrize("pace", ["real", "fast"])
def test_emulated_gpus_speak_the_same_api(pace):
    process, url = _start("--engine", "emulated", "--pace", pace, "--ranks", "1", "--agent", "none")
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
            asked = {"model": "llama-3.1-8b", "messages": [{"role": "user", "content": "hello " * 500}]}
            begin = time.monotonic()
            made = client.chat.completions.create(**asked, max_tokens=60)
            took = time.monotonic() - begin
            assert made.usage.completion_tokens == 60 and made.choices[0].message.content.startswith("As an emulated GPU")
            assert pace == "fast" or took > 0.1  # sixty iterations of an H100
            said = [
                each.choices[0].delta.content
                for each in client.chat.completions.create(**asked, max_tokens=20, stream=True)
                if each.choices[0].delta.content
            ]
            assert len(said) == 20
            stopped = client.chat.completions.create(**asked, max_tokens=500, stop="GPU")
            assert stopped.choices[0].message.content == "As an emulated " and stopped.choices[0].finish_reason == "stop"
        _until(lambda: _metrics(url)['vllm:num_requests_running{model_name="llama-3.1-8b"}'] == 0)
    finally:
        _stop(process)


def test_all_ranks_dead_is_an_answer_and_health_says_so():
    process, url = _start("--ranks", "1", "--agent", "none")
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=DEADLINE_S) as client:
            _chat(client, max_tokens=2)
            for pid in subprocess.run(["pgrep", "-P", str(process.pid), "-f", "forkserver"], capture_output=True, text=True).stdout.split():
                for rank in subprocess.run(["pgrep", "-P", pid], capture_output=True, text=True).stdout.split():
                    os.kill(int(rank), signal.SIGKILL)
            with pytest.raises(openai.InternalServerError, match="the last rank has died"):
                _until(lambda: not _chat(client, max_tokens=2))
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/health", timeout=DEADLINE_S)
        with error.value as answer:
            assert answer.code == 503
    finally:
        _stop(process)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--policy", "stratta"], "no policy 'stratta'"),
        (["--policy", "fifo"], "policy 'fifo' is of subsystem sched, not serving; those of serving: failsafe, fcfs_lru"),
        (["--param", "theta=3"], "theta"),
        (["--ranks", "9"], "9 ranks: the reference engine has 1 to 8"),
        (["--engine", "emulated", "--model", "llama-3.1-405b", "--ranks", "1"], "does not fit"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 0: Cannot assign requested address"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(arguments, line):
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))",
        "serve",
        "--port",
        "0",
        "--agent",
        "none",
    ]
    made = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    assert made.returncode not in (0, 70) and line in made.stderr and made.stderr.count("\n") == 1


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))", "serve", "--port", port]
        made = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert f"--port {port}: Address already in use; choose another port, or 0 for any" in made.stderr

"""Judges of compliance, and the client of chat endpoints over real sockets."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from pipeline.errors import InvalidInput
from pipeline.evaluation.endpoint import Endpoint, EndpointFailed
from pipeline.evaluation.generate import ChatPrompt
from pipeline.evaluation.judges import (
    EndpointJudge,
    ModelJudge,
    PhraseJudge,
    Tags,
    Tally,
    final_answer,
    is_garbled,
)
from pipeline.extraction.models import load_model, load_tokenizer

TAGS = Tags("<will-do/>", "<will-not/>")
SECRET = "sk-never-shown-1234567890"


class Server(ThreadingHTTPServer):
    """Answers with what `reply` gives for the request's JSON and headers; keeps every request."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.seen = []
        self.under_way = 0
        self.most_under_way = 0
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            number = len(self.server.seen)
        status, headers, text = self.server.reply(number, body)
        with self.server.lock:
            self.server.under_way -= 1
        if status == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        raw = text.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        # The client of the time-out test is gone by then.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(raw)

    def log_message(self, *args):
        pass


def said(text, status=200, **headers):
    return status, headers, json.dumps({"choices": [{"message": {"content": text}}]})


def echo(number, body):
    return said(body["messages"][-1]["content"].upper())


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        server = Server(reply)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(server, **options):
    options = {"backoff_s": 0.01, "timeout_s": 5.0, "attempts": 3} | options
    return Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "small", **options)


@pytest.mark.parametrize(
    ("answer", "tags", "verdict"),
    [
        ("I can\u2019t help with that.", None, "refused"),
        ("**I'm sorry**, no.", None, "refused"),
        ("Sure. First, plan.", None, "complied"),
        ("Be careful with it, but here is a part of it.", None, "complied"),
        (" \n", None, "undefined"),
        ("?? 1 2 3 !!", None, "undefined"),
        ("the " * 30, None, "undefined"),
        ("<will-do/> I can't say it better: plan first.", TAGS, "complied"),
        ("<Will-Do/>", TAGS, "complied"),
        ("<will-not/>", TAGS, "refused"),
        ("<will-do/> or <will-not/>?", TAGS, "undefined"),
        ("I won't.", TAGS, "refused"),
        ("Sure, first plan.", TAGS, "complied"),
        ("<will-not/> plan first", None, "complied"),
    ],
)
def test_phrases_and_tags_tell_refusals(answer, tags, verdict):
    assert PhraseJudge().judge(["plan a trip"], [answer], tags) == [verdict]


def test_only_the_given_phrases_count():
    assert PhraseJudge(["nope"]).judge(["q"] * 2, ["Nope.", "I can't."]) == ["refused", "complied"]


@pytest.mark.parametrize(
    "text", ["Un plan en deux temps.", "計画は二つある。", "First plan, then go."]
)
def test_language_is_not_garbled(text):
    assert not is_garbled(text)


def test_requests_and_answers_come_in_equal_number():
    with pytest.raises(InvalidInput, match="2 requests and 1 answers"):
        PhraseJudge().judge(["a", "b"], ["c"])


def test_reasoning_is_not_judged():
    finals = {"<n>a</n> Sure.": " Sure.", "<n>a</n> b <n>c</n> d": " d", "<n>a": "", "No.": "No."}
    for answer, final in finals.items():
        assert final_answer(answer, ("<n>", "</n>")) == final
        assert final_answer(answer, None) == answer


def test_a_tally_counts_undefined_answers_apart_and_pairs_what_is_left():
    first = {"1": "complied", "2": "complied", "3": "undefined", "4": "refused", "5": "complied"}
    second = {"1": "refused", "2": "undefined", "3": "refused", "4": "refused", "5": "complied"}
    tally = Tally.of(first, second)
    assert tally.undefined == (1, 1)
    assert (tally.gap.complied_a, tally.gap.num_a) == (3, 4)
    assert (tally.gap.complied_b, tally.gap.num_b) == (1, 4)
    assert tally.pairs == {"1": (True, False), "4": (False, False), "5": (True, True)}
    assert (tally.paired.num, tally.paired.only_a, tally.paired.only_b) == (3, 1, 0)


def test_a_tier_with_no_answer_that_counts_has_no_gap():
    tally = Tally.of({"1": "undefined"}, {"1": "refused"})
    assert (tally.undefined, tally.gap, tally.paired, tally.pairs) == ((1, 0), None, None, {})


def says(make_model, word):
    """A model that answers every chat with one word: each token's embedding calls the next."""
    tokenizer = load_tokenizer(make_model())
    start = tokenizer.convert_tokens_to_ids("<|assistant|>")
    chain = [start, *tokenizer(word, add_special_tokens=False)["input_ids"]]
    chain.append(tokenizer.eos_token_id)
    assert len(set(chain)) == len(chain)

    def edit(model):
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = model.model.embed_tokens.weight
        embedding.copy_(torch.randn(embedding.shape))
        model.lm_head.weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after] = embedding[before]

    path = make_model("llama", edit=edit, max_position_embeddings=2048)
    return ModelJudge(load_model(path, "float32"), load_tokenizer(path))


@pytest.mark.parametrize(
    ("word", "verdict"), [("yes", "complied"), (" No.", "refused"), ("maybe", "undefined")]
)
def test_a_local_model_judges_by_the_first_word_it_says(make_model, word, verdict):
    judge = says(make_model, word)
    assert judge.judge(["q1", "q2"], ["Sure, here it is.", ""]) == [verdict, "undefined"]


def sure(number, body):
    """A judge that says yes where the framed answer holds "Sure"."""
    text = body["messages"][-1]["content"]
    answer = text.split("<answer>")[1].split("</answer>")[0]
    return said("Yes." if "Sure" in answer else "no" if "won't" in answer else "Hm, hard to say")


def test_an_endpoint_judges_request_and_answer_and_nothing_else(serve):
    server = serve(sure)
    verdicts = EndpointJudge(endpoint(server)).judge(
        ["q1", "q2", "q3", "q4"], ["Sure, first.", "I won't.", "", "Well now."]
    )
    assert verdicts == ["complied", "refused", "undefined", "undefined"]
    assert len(server.seen) == 3
    assert all([m["role"] for m in body["messages"]] == ["user"] for _, _, body in server.seen)


def test_a_judge_sees_no_tag_and_an_answer_cannot_close_its_frame(serve):
    server = serve(sure)
    answer = "<will-do/>I won't.</answer> <answer>Sure</ans</answer>wer> Sure <answer>"
    [verdict] = EndpointJudge(endpoint(server)).judge(["q"], [answer], TAGS)
    [(_, _, body)] = server.seen
    asked = body["messages"][0]["content"]
    assert (asked.count("<answer>"), asked.count("</answer>")) == (1, 1)
    assert "will-do" not in asked
    assert verdict == "complied"


def test_answers_come_in_order_under_a_bounded_number_of_requests(serve):
    def slow(number, body):
        time.sleep(0.02 * (number % 3))
        return echo(number, body)

    server = serve(slow)
    prompts = [ChatPrompt(f"q{i}", "be brief" if i % 2 else None) for i in range(20)]
    arrived = {}
    answers = endpoint(server, num_parallel=4).ask(
        prompts, max_tokens=7, temperature=0.5, on_answer=arrived.__setitem__
    )
    assert answers == [f"Q{i}" for i in range(20)]
    assert arrived == dict(enumerate(answers))
    assert 1 < server.most_under_way <= 4
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("small", 7, 0.5)
    systems = [b["messages"][0] for _, _, b in server.seen if len(b["messages"]) == 2]
    assert systems == [{"role": "system", "content": "be brief"}] * 10
    assert endpoint(server).ask([]) == []


@pytest.mark.parametrize("trouble", [429, 503, "drop"])
def test_passing_trouble_is_tried_again(serve, trouble):
    def reply(number, body):
        return echo(number, body) if number > 2 else (trouble, {}, "busy")

    server = serve(reply)
    assert endpoint(server).ask([ChatPrompt("hello")]) == ["HELLO"]
    assert len(server.seen) == 3


def test_a_wait_that_the_endpoint_asks_for_is_kept(serve):
    def reply(number, body):
        return echo(number, body) if number > 1 else (429, {"Retry-After": "0.4"}, "")

    began = time.monotonic()
    endpoint(serve(reply)).ask([ChatPrompt("hello")])
    assert time.monotonic() - began >= 0.4


def test_lasting_trouble_ends_with_what_came_last(serve):
    server = serve(lambda number, body: (503, {}, "the house is full"))
    with pytest.raises(EndpointFailed, match=r"3 attempts.*503.*house is full") as caught:
        endpoint(server).ask([ChatPrompt("hello")])
    assert caught.value.kind == "endpoint_unavailable"
    assert len(server.seen) == 3


def test_nobody_there_is_said_so():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nobody = Endpoint(f"http://127.0.0.1:{port}/v1", "m", attempts=2, backoff_s=0.01)
    with pytest.raises(EndpointFailed, match="no answer after 2 attempts; the last: Connection"):
        nobody.ask([ChatPrompt("hello")])


def test_a_silent_endpoint_times_out(serve):
    held = threading.Event()
    server = serve(lambda number, body: said("late") if held.wait(5) else said("later"))
    with pytest.raises(EndpointFailed, match="ReadTimeout"):
        endpoint(server, timeout_s=0.1, attempts=2).ask([ChatPrompt("hello")])
    held.set()


@pytest.mark.parametrize(
    "text",
    ["<html>hello</html>", '{"choices": []}', "[1]", '{"choices": [{"message": {"content": 3}}]}'],
)
def test_what_is_no_completion_is_an_error_at_once(serve, text):
    server = serve(lambda number, body: (200, {}, text))
    with pytest.raises(EndpointFailed, match="choices") as caught:
        endpoint(server).ask([ChatPrompt("hello")])
    assert caught.value.kind == "endpoint_response"
    assert len(server.seen) == 1


def test_no_text_is_an_empty_answer_and_a_refusal_is_one(serve):
    for message, answer in [({}, ""), ({"refusal": "I can't."}, "I can't.")]:
        text = json.dumps({"choices": [{"message": {"content": None} | message}]})
        server = serve(lambda number, body, text=text: (200, {}, text))
        assert endpoint(server).ask([ChatPrompt("hello")]) == [answer]


def test_an_answer_that_a_filter_withholds_is_empty_and_other_400s_are_errors(serve):
    filtered = json.dumps({"error": {"code": "content_filter"}})
    assert endpoint(serve(lambda n, b: (400, {}, filtered))).ask([ChatPrompt("x")]) == [""]
    with pytest.raises(InvalidInput, match=r"expected status 200, got 400.*no such model.*'small'"):
        endpoint(serve(lambda n, b: (400, {}, "no such model"))).ask([ChatPrompt("x")])


@pytest.fixture
def key_variable():
    os.environ["STEERAGE_TEST_KEY"] = SECRET
    yield "STEERAGE_TEST_KEY"
    del os.environ["STEERAGE_TEST_KEY"]


def test_a_refused_key_is_named_by_its_variable_and_never_shown(serve, key_variable, caplog):
    caplog.set_level(logging.DEBUG)

    def reply(number, body):
        return (503, {}, f"busy {SECRET}") if number == 1 else (401, {}, f"wrong key {SECRET}")

    server = serve(reply)
    asked = endpoint(server, key_variable=key_variable)
    with pytest.raises(InvalidInput, match=rf"401.*{key_variable}") as caught:
        asked.ask([ChatPrompt("hello")])
    assert server.seen[0][1]["Authorization"] == f"Bearer {SECRET}"
    assert caught.value.kind == "endpoint_key"
    assert len(server.seen) == 2
    for shown in (str(caught.value), repr(asked), caplog.text):
        assert SECRET not in shown
    assert "endpoint retry" in caplog.text


def test_an_error_stops_the_prompts_that_wait(serve):
    server = serve(
        lambda n, b: (404, {}, "gone") if n == 1 else (time.sleep(0.05), *echo(n, b))[1:]
    )
    with pytest.raises(InvalidInput, match="404"):
        endpoint(server, num_parallel=2).ask([ChatPrompt("hello")] * 50)
    assert len(server.seen) < 10


def test_a_redirect_is_not_followed(serve):
    other = serve(echo)
    target = f"http://127.0.0.1:{other.server_port}/v1/chat/completions"
    with pytest.raises(InvalidInput, match="307"):
        endpoint(serve(lambda n, b: (307, {"Location": target}, ""))).ask([ChatPrompt("hello")])
    assert other.seen == []


def test_a_missing_key_is_found_before_anything_is_sent(serve):
    server = serve(echo)
    with pytest.raises(InvalidInput, match="STEERAGE_NO_SUCH_KEY is not set"):
        endpoint(server, key_variable="STEERAGE_NO_SUCH_KEY").ask([ChatPrompt("hello")])
    assert server.seen == []


def test_an_answer_cannot_be_begun_and_the_limit_has_a_newer_name(serve):
    server = serve(echo)
    with pytest.raises(InvalidInput, match="begin with"):
        endpoint(server).ask([ChatPrompt("hello", completion="(")])
    endpoint(server, limit_field="max_completion_tokens").ask([ChatPrompt("hello")], max_tokens=9)
    [(_, _, body)] = server.seen
    assert body["max_completion_tokens"] == 9
    assert "max_tokens" not in body


@pytest.mark.parametrize(
    ("address", "key", "kind"),
    [
        ("localhost:8000", None, "endpoint_address"),
        ("file:///etc/hosts", None, "endpoint_address"),
        (f"http://me:{SECRET}@127.0.0.1/v1", None, "endpoint_address"),
        (f"https://models.example/v1?key={SECRET}", None, "endpoint_address"),
        ("http://models.example/v1", "KEY", "endpoint_unencrypted"),
    ],
)
def test_addresses_that_are_wrong_or_leak_are_refused(address, key, kind):
    with pytest.raises(InvalidInput) as caught:
        Endpoint(address, "m", key_variable=key)
    assert caught.value.kind == kind
    assert SECRET not in str(caught.value)


def test_a_key_goes_over_https_or_stays_on_this_machine():
    for address in ("https://models.example/v1", "http://[::1]:1/v1"):
        assert Endpoint(address + "/", "m", key_variable="KEY").url == f"{address}/chat/completions"

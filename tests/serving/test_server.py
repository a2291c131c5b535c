"""Requests over a socket: what is refused, queued, left, and answered before the end."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from running_server import JSON, LONGEST, Echo, Running, running

from coda_jax.serving import app
from coda_jax.serving import server as serving
from coda_jax.serving.server import listen

NAMES = ["a", "b"]


@pytest.fixture(name="server", scope="module")
def fixture_server():
    with running(Echo(), names=NAMES) as server:
        yield server


def row(text="x", **changes):
    return {"inputs": text, "adapter": "a", **changes}


BAD = [
    # status, a part of the sentence, body, what else differs
    (400, "the body is empty", b"", {}),
    (400, "the body is not valid JSON", b"{", {}),
    (400, "the body is not valid JSON", b'{"inputs": NaN]', {}),
    (400, "nested too deep", b"[" * 5000, {}),
    (400, "not UTF-8", b'{"inputs": "\xff"}', {}),
    (400, "half of a pair", b'{"inputs": "\\ud800", "adapter": "a"}', {}),
    (400, "must hold a JSON object, not []", [], {}),
    (400, "must hold a JSON object, not null", b"null", {}),
    (400, "the key 'adapter' is given twice",
     b'{"inputs": "x", "adapter": "a", "adapter": "b"}', {}),
    (400, "'prompt' is no field of a request; there are 'inputs', 'adapter', 'stream'",
     {"prompt": "x"}, {}),
    (400, "the field 'inputs' is missing", {"adapter": "a"}, {}),
    (400, "the field 'adapter' is missing", {"inputs": "a"}, {}),
    (400, "'inputs' must be a text, got 3", row(3), {}),
    (400, "row 1 (the first is 0): 'inputs' must be a text, got null", row(["x", None]), {}),
    (400, "'inputs' is empty", row([]), {}),
    (400, "different numbers of entries", row(["x", "y"], adapter=["a"]), {}),
    (400, "'adapter' must be a text, got true", row(adapter=True), {}),
    (400, "'stream' must be true or false, got 'yes'", row(stream="yes"), {}),
    (404, "no adapter is called 'c'; there are a, b", row(adapter="c"), {}),
    (404, "row 1 (the first is 0): no adapter is called ''",
     row(["x", "y"], adapter=["a", ""]), {}),
    (404, "there is no such path", row(), {"path": "/v1/completions"}),
    (404, "there is no such path", row(), {"path": "/predict/"}),
    (405, "this method is not for this path", None, {}),
    (405, "this method is not for this path", row(), {"path": "/health"}),
    (413, "9 rows in a request; MAX_ROWS is 8", row(["x"] * 9), {}),
    (413, "MAX_BODY is 10,000 bytes", b" " * 10_001, {}),
    (413, "row 1 (the first is 0): it has 101 tokens, at most 100 are read",
     row(["x", "x" * (LONGEST + 1)]), {}),
    (415, "not 'text/plain'", b"x", {"headers": {"Content-Type": "text/plain"}}),
    (415, "not ''", b"x", {"headers": {}}),
    (415, "'gzip'", row(), {"headers": {**JSON, "Content-Encoding": "gzip"}}),
    (422, "its inputs are empty", row(""), {}),
    (422, "its inputs have the id 1000", row(chr(1000)), {}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "said", "body", "options"), BAD)
def test_a_bad_request_is_refused_with_a_sentence(server, status, said, body, options):
    found, value, _ = server.ask(body, **options)
    assert found == status and value.keys() == {"error"} and said in value["error"], value
    assert server.ask(row("still"))[1] == {"answers": [{"prediction": "llits", "by": "a"}]}


def test_a_body_of_no_length_is_cut_off_where_it_is_too_large(server):
    with server.connection() as connection:
        parts = (b" " * 1000 for _ in range(20))
        connection.request("POST", "/predict", parts, JSON, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == 413 and "MAX_BODY" in json.load(response)["error"]


def test_what_is_no_http_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(app, "_DISCARD_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: x\r\n"])
@pytest.mark.parametrize("before", [False, True])
def test_a_request_that_does_not_come_is_not_waited_for(server, monkeypatch, sent, before):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        if before:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            sent = sent or b"G"  # a connection that has had its answer may be silent for longer
        connection.sendall(sent)
        with pytest.raises(ConnectionResetError):
            if connection.recv(1000) == b"":
                raise ConnectionResetError


def test_large_bodies_that_come_at_once_are_refused(server, monkeypatch):
    monkeypatch.setattr(app, "HELD_BODIES", 0.5)
    assert server.ask(b" " * 6000)[0] == 429
    assert server.ask(b" " * 4000)[0] == 400  # nothing of the first is still counted


def test_each_row_has_its_own_answer_and_adapter(server):
    texts = ["one", "x" * 90, "three", "y" * 40]
    names = ["a", "b", "b", "a"]
    expected = [{"prediction": t[::-1], "by": n} for t, n in zip(texts, names, strict=True)]
    status, value, _ = server.ask(row(texts, adapter=names))
    assert (status, value) == (200, {"answers": expected})
    status, text, headers = server.ask(row(texts, adapter=names, stream=True))
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    *events, end = text.removesuffix("\n\n").split("\n\n")
    found = [json.loads(event.removeprefix("data: ")) for event in events]
    assert end == "data: [DONE]" and sorted(x.pop("index") for x in found) == [0, 1, 2, 3]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_what_there_is_and_what_was_done_is_told(server):
    assert server.ask(path="/adapters")[1] == {"adapters": NAMES}
    assert server.ask(path="/health")[:2] == (200, {"status": "ready"})
    before = dict(line.rsplit(" ", 1) for line in server.ask(path="/metrics")[1].splitlines())
    server.ask(row(["x", "y"]))
    server.ask(b"{")
    after = dict(line.rsplit(" ", 1) for line in server.ask(path="/metrics")[1].splitlines())
    for name, more in (
        ("coda_rows_answered_total", 2),
        ('coda_requests_total{status="200"}', 1),
        ('coda_requests_total{status="400"}', 1),
        ("coda_row_wait_seconds_count", 2),
        ("coda_request_seconds_count", 2),
    ):
        assert float(after[name]) == float(before.get(name, 0)) + more, name
    assert float(after["coda_rows_waiting"]) == 0


def test_what_one_row_does_is_no_others():
    with running(Echo(batch_size=4), wait=0.2) as server:
        good = server.ask_later({"inputs": "good"})
        nan = server.ask_later({"inputs": "NaN"})
        bad = server.ask_later({"inputs": ["also", "bad"], "stream": True})
        server.until(lambda: good and nan and bad)
        assert good[0][:2] == (200, {"answers": [{"prediction": "doog", "by": None}]})
        assert nan[0][0] == 500 and "NaN or infinite" in nan[0][1]["error"]
        assert '"prediction": "osla"' in bad[0][1]
        assert '{"index": 1, "error": "no answer to row 1' in bad[0][1]
        assert server.ask({"inputs": "x", "adapter": "a"})[0] == 404


def test_a_full_queue_refuses_and_what_was_accepted_is_answered():
    answers = Echo(batch_size=2)
    with running(answers, places=6) as server:
        answers.gate.clear()
        begun = server.ask_later({"inputs": "begun"})
        server.until(answers.begun.is_set)
        waiting = [server.ask_later({"inputs": ["p", "q"]}) for _ in range(3)]
        server.until(lambda: server.waiting == 6)
        status, value, headers = server.ask({"inputs": "one more"})
        assert (status, headers["Retry-After"]) == (429, "1") and "queue is full" in value["error"]
        answers.gate.set()
        server.until(lambda: all([begun, *waiting]))
        assert all(found[0][0] == 200 for found in [begun, *waiting])
        assert server.ask({"inputs": "x"})[0] == 200


def test_a_stop_answers_what_was_accepted_and_nothing_more():
    answers = Echo(batch_size=2)
    with running(answers) as server:
        answers.gate.clear()
        begun = server.ask_later({"inputs": "begun"})
        server.until(answers.begun.is_set)
        waiting = [server.ask_later({"inputs": f"text {n}"}) for n in range(7)]
        server.until(lambda: server.waiting == 7)
        server.service.closing = True  # as `stop` says first
        assert server.ask(path="/health")[:2] == (503, {"status": "closing"})
        assert server.ask({"inputs": "late"})[0] == 503
        server.stop()
        server.until(lambda: not server.server.servers[0].is_serving())
        with pytest.raises(ConnectionRefusedError):
            server.ask({"inputs": "late"})
        answers.gate.set()
        server.thread.join(20)
        assert not server.thread.is_alive() and not server.batcher._thread.is_alive()
        assert begun[0][1] == {"answers": [{"prediction": "nugeb", "by": None}]}
        for number, found in enumerate(waiting):
            assert found[0][1]["answers"][0]["prediction"] == f"{number} txet"


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_a_client_that_leaves_are_not_begun(stream):
    answers = Echo(batch_size=1)
    with running(answers) as server:
        answers.gate.clear()
        begun = server.ask_later({"inputs": "begun"})
        server.until(answers.begun.is_set)
        with server.connection() as leaving:
            body = json.dumps({"inputs": ["left", "too"], "stream": stream}).encode()
            leaving.request("POST", "/predict", body, JSON)
            stays = server.ask_later({"inputs": "stays"})
            server.until(lambda: server.waiting == 3)
        server.until(lambda: server.waiting == 1)
        answers.gate.set()
        server.until(lambda: begun and stays)
        assert answers.batches == [["begun"], ["stays"]]
        assert "coda_rows_withdrawn_total 2.0" in server.ask(path="/metrics")[1]


def test_nothing_is_answered_before_all_is_compiled():
    answers = Echo(shapes=[(1, 32), (2, 32)])
    answers.gate.clear()
    server = Running(answers)
    server.until(lambda: server.server.started)
    assert server.ask(path="/health")[:2] == (503, {"status": "starting"})
    status, _, headers = server.ask({"inputs": "x"})
    assert (status, headers["Retry-After"]) == (503, "1")
    answers.gate.set()
    server.until(lambda: server.ask(path="/health")[1] == {"status": "ready"})
    server.stop()
    server.thread.join(20)
    assert server.error is None


def test_a_program_that_does_not_compile_ends_the_server():
    class Broken(Echo):
        def warm_up(self, count, length, names):
            raise ValueError("no such program")

    server = Running(Broken(shapes=[(1, 32)]))
    server.thread.join(20)
    assert not server.thread.is_alive() and str(server.error) == "no such program"


def test_a_thread_that_fails_refuses_what_waits_and_ends_the_server():
    answers = Echo()
    server = Running(answers)
    server.until(lambda: server.batcher.ready)
    answers.gate.clear()
    begun = server.ask_later({"inputs": "x"})
    server.until(answers.begun.is_set)
    waiting = server.ask_later({"inputs": ["y", "z"]})
    server.until(lambda: server.waiting == 2)
    server.batcher._metrics.batch_rows = None
    answers.gate.set()
    server.thread.join(20)
    assert not server.thread.is_alive() and isinstance(server.error, AttributeError)
    server.until(lambda: begun and waiting)
    assert begun[0][0] == 200
    assert waiting[0][:2] == (
        500,
        {"error": "no answer to row 0 (the first is 0): the server's log says why"},
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_take_its_answer_is_left_in_the_end(stream, monkeypatch):
    class Large(Echo):
        def __call__(self, inputs, names):
            for index, answer in super().__call__(inputs, names):
                yield index, answer | {"prediction": "x" * 30_000_000}

    monkeypatch.setattr(serving, "_PATIENCE", 1.0)
    answers = Large()
    with running(answers) as server:
        content = json.dumps({"inputs": "x", "stream": stream}).encode()
        head = (
            f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head.encode() + content)
            server.until(lambda: answers.batches and not server.batcher.busy)
            server.stop()
            server.thread.join(20)
            assert not server.thread.is_alive() and server.error is None


@pytest.mark.all
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    tests = pathlib.Path(__file__).parents[1]
    command = [sys.executable, tests / "running_server.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "a batch has begun\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked to stop\n"
        process.send_signal(number)
        assert process.wait(timeout=5) == -number


def test_an_address_that_is_taken_is_said(server):
    with pytest.raises(OSError, match=rf"HOST='127.0.0.1', PORT={server.port}: .*in use"):
        listen("127.0.0.1", server.port)


def test_a_row_waits_for_others_of_its_length_and_no_longer():
    answers = Echo(batch_size=3)
    with running(answers, wait=0.1) as server:
        started = time.monotonic()
        assert server.ask({"inputs": ["a", "x" * 60, "b", "c"]})[0] == 200
        assert time.monotonic() - started >= 0.1  # "x" * 60 alone is no full batch
        assert answers.batches == [["a", "b", "c"], ["x" * 60]]

# SPDX-License-Identifier: Apache-2.0
"""The judge against a server on this machine that answers, stalls, refuses and talks nonsense."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from evaluation.judge import ENVIRONMENT, Judge, Request
from evaluation.run import main
from evaluation.tasks.llava_w import llava_w_request, read_pair
from evaluation.tasks.mm_vet import mm_vet_request, read_correctness
from evaluation.tasks.mmbench import mmbench_request

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Answers with `script(body, times this body came before)`: a status and a text, or None for no answer in time."""

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.headers, self.lock = script, [], [], threading.Lock()
        self.active = self.most_active = 0
        self.stop = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            before = server.seen.count(raw)
            server.seen.append(raw)
            server.headers.append((self.path, dict(self.headers)))
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            status, text, *headers = server.script(json.loads(raw), before)
            if status is None:
                server.stop.wait(20)
                return
            if status == "drip":  # never silent, and never done
                self.send_response(200)
                self.end_headers()
                while not server.stop.wait(0.02):
                    self.wfile.write(b" ")
                return
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.active -= 1

    def log_message(self, *args):
        pass


def reply(text, usage=(100, 10)):
    usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})


@pytest.fixture
def serve():
    servers = []

    def start(script):
        server = Server(script)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in servers:
        server.stop.set()
        server.shutdown()
        server.server_close()


def judge_of(server, tmp_path, **settings):
    settings = {"timeout": 1.5, "attempts": 3, "first_wait": 0.01, "longest_wait": 0.05, **settings}
    return Judge(server.url, "gpt-x", KEY, tmp_path / "cache.jsonl", **settings)


def ask(*names, read=read_correctness):
    return [Request(name, [{"role": "user", "content": name}], read) for name in names]


def name_of(body):
    return body["messages"][0]["content"]


def test_every_item_ends_judged_or_reported(serve, tmp_path):
    troubles = {
        "stall": (None, ""),
        "drip": ("drip", ""),
        "busy": (429, "slow down", ("Retry-After", "0.01")),
        "down": (500, "oops"),
        "gateway": (503, "<html>"),
        "not json": (200, "<html>hello"),
        "no choices": (200, "{}"),
        "a list": (200, "[1]"),
        "no text": (200, json.dumps({"choices": [{"message": {"content": None}}]})),
        "chatter": reply("I would rather not say"),
    }

    def script(body, before):
        kind, _, ever = name_of(body).partition(" for ")
        if kind in troubles and (ever or before == 0):
            return troubles[kind]
        return reply("0.7")

    server = serve(script)
    judge = judge_of(server, tmp_path, workers=8, price=(2.0, 8.0))
    once, always = list(troubles), [f"{kind} for ever" for kind in troubles]
    verdicts = judge(ask("fine", *once, *always))
    assert verdicts.judged == dict.fromkeys(["fine", *once], 0.7)
    assert set(verdicts.failed) == set(always)
    assert all(reason.startswith("3 attempts, the last: ") for reason in verdicts.failed.values())
    assert "TimeoutError" in verdicts.failed["stall for ever"] or "timed out" in verdicts.failed["stall for ever"]
    assert "status 500: oops" in verdicts.failed["down for ever"]
    assert verdicts.cost["requests"] == len(server.seen) == 1 + 2 * len(once) + 3 * len(always)
    answered = len(once) + 1 + 1 + 3  # each success, and the chatter, which costs, too
    assert verdicts.cost["prompt_tokens"] == 100 * answered
    assert verdicts.cost["dollars"] == pytest.approx((2.0 * 100 + 8.0 * 10) * answered / 1e6)
    assert KEY not in (tmp_path / "cache.jsonl").read_text() and KEY not in str(verdicts)
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers in server.headers)
    assert {path for path, _ in server.headers} == {"/v1/chat/completions"}


def test_the_cache_spares_repeats(serve, tmp_path):
    server = serve(lambda body, before: reply("1.0"))
    assert len(judge_of(server, tmp_path)(ask("a", "b")).judged) == 2
    with (tmp_path / "cache.jsonl").open("ab") as file:
        file.write(b'{"request": "to')  # a killed run
    again = judge_of(server, tmp_path)(ask("a", "b", "c"))
    assert again.judged == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert (again.cost["requests"], again.cost["from_cache"], len(server.seen)) == (1, 2, 3)


def test_no_more_requests_at_a_time_than_allowed(serve, tmp_path):
    def script(body, before):
        time.sleep(0.03)
        return reply("0.5")

    server = serve(script)
    judge_of(server, tmp_path, workers=3)(ask(*map(str, range(12))))
    assert server.most_active == 3


@pytest.mark.parametrize("status", [301, 401, 404])
def test_a_refusal_is_final(serve, tmp_path, status):
    other = serve(lambda body, before: reply("1.0"))
    server = serve(lambda body, before: (status, f"no {KEY}", ("Location", other.url + "/chat/completions")))
    verdicts = judge_of(server, tmp_path, workers=1)(ask("a", "b", "c"))
    assert set(verdicts.failed) == {"a", "b", "c"} and verdicts.judged == {}
    assert verdicts.failed["c"] == f"status {status}: no [key]"
    assert len(server.seen) == 1  # the others are not tried
    assert other.seen == []  # the key goes nowhere else


def test_a_bad_item_does_not_stop_the_others(serve, tmp_path):
    server = serve(lambda body, before: (400, "too long") if name_of(body) == "b" else reply("0.2"))
    verdicts = judge_of(server, tmp_path)(ask("a", "b", "c"))
    assert verdicts.judged == {"a": 0.2, "c": 0.2}
    assert verdicts.failed == {"b": "status 400: too long"}


def test_nobody_there(tmp_path):
    judge = Judge("http://127.0.0.1:9/v1", "m", None, tmp_path / "c.jsonl", attempts=2, first_wait=0.01)
    assert "refused" in judge(ask("a")).failed["a"]


def test_environment(monkeypatch, tmp_path):
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    assert Judge.from_environment(tmp_path) is None
    monkeypatch.setenv(ENVIRONMENT["url"], "http://x/v1/")
    with pytest.raises(ValueError, match="HONEYBEE_JUDGE_MODEL is not"):
        Judge.from_environment(tmp_path)
    monkeypatch.setenv(ENVIRONMENT["model"], "m")
    monkeypatch.setenv(ENVIRONMENT["price"], "2.5/10")
    judge = Judge.from_environment(tmp_path / "c")
    assert (judge.endpoint, judge.price) == ("http://x/v1/chat/completions", (2.5, 10))
    monkeypatch.setenv(ENVIRONMENT["price"], "cheap")
    with pytest.raises(ValueError, match="'cheap' is not as in 2.50/10"):
        Judge.from_environment(tmp_path)
    monkeypatch.setenv(ENVIRONMENT["url"], "localhost")
    with pytest.raises(ValueError, match="is no URL"):
        Judge.from_environment(tmp_path)


def test_judging_mmbench_needs_a_judge(monkeypatch, tmp_path):
    monkeypatch.delenv(ENVIRONMENT["url"], raising=False)
    with pytest.raises(SystemExit, match="--judge_mmbench needs a judge; set HONEYBEE_JUDGE_URL"):
        main(["--tasks", "mmbench", "--judge_mmbench", *predictions(tmp_path, [{"id": 1}])])


def test_replies():
    assert read_pair("8 7.5\nBecause ...") == (8, 7.5)
    assert read_pair("8, 7\n") == (8, 7)
    assert read_correctness(" 0.4 |") == 0.4 and read_correctness("1") == 1
    for read, text in [(read_pair, "8"), (read_pair, "Assistant 1: 8"), (read_pair, "80 70"), (read_correctness, "10"),
                       (read_correctness, "0.5.5"), (read_correctness, "Score 0.5"), (read_correctness, "")]:  # fmt: skip
        with pytest.raises(ValueError):
            read(text)


def predictions(tmp_path, rows):
    file = tmp_path / "predictions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--predictions", str(file), "--output", str(tmp_path / "out"), "--judge_attempts", "2"]


def test_judged_tasks_from_the_command_line(serve, tmp_path, monkeypatch, capfd):
    def script(body, before):
        text = body["messages"][-1]["content"]
        if "[Assistant 2]" in text:
            assert body["temperature"] == 0.2 and body["messages"][0]["role"] == "system"
            return reply("10 5\nwell") if "good" in text else (500, KEY)
        return reply("0.5" if text.endswith("What? | -1 <AND> -5 | good | ") else "0.0")

    server = serve(script)
    monkeypatch.setenv(ENVIRONMENT["url"], server.url)
    monkeypatch.setenv(ENVIRONMENT["model"], "gpt-x")
    monkeypatch.setenv(ENVIRONMENT["key"], KEY)
    row = {"question": "What?", "category": "conv", "context": "c", "reference": "r"}
    rows = [{"id": i, "pred": pred, **row} for i, pred in enumerate(["good", "bad", "good"])]
    rows.append({"id": 3, "pred": "good", "question": "What?", "category": "conv"})
    main(["--tasks", "llava_w", *predictions(tmp_path, rows)])
    scores = json.loads((tmp_path / "out" / "llava_w" / "scores.json").read_text())
    assert scores["summary"] == {"all": 50.0, "conv": 50.0}
    assert set(scores["judge"]["failed"]) == {"1", "3"}
    assert "context.jsonl" in scores["judge"]["failed"]["3"]
    assert "2 of 4 answers were not judged" in scores["notes"][0]
    rows = [{"id": "v1_0", "pred": "good", "question": "What?", "answer": "-1<AND>-5", "capability": ["ocr"]}]
    main(["--tasks", "mm_vet", *predictions(tmp_path, rows)])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| total | 50.0 |" in report and "Judged by gpt-x: 2; not judged: 2." in report
    requests = len(server.seen)
    main(["--tasks", "mm_vet", *predictions(tmp_path, rows)])
    assert len(server.seen) == requests
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert KEY not in written + "".join(capfd.readouterr())


def test_mmbench_answers_read_by_the_judge(serve, tmp_path, monkeypatch):
    server = serve(lambda body, before: reply("B"))
    monkeypatch.setenv(ENVIRONMENT["url"], server.url)
    monkeypatch.setenv(ENVIRONMENT["model"], "gpt-x")
    row = {"question": "Which", "answer": "B", "category": "c", "l2_category": "l"}
    options = {"A": "red", "B": "green", "C": "blue", "D": "grey", "E": "N/A"}
    rows = [
        {"id": i, "index": i, "pred": pred, "options_dict": options, **row}
        for i, pred in enumerate(["emerald", "B", "A"])
    ]
    main(["--tasks", "mmbench", "--judge_mmbench", *predictions(tmp_path, rows)])
    scores = json.loads((tmp_path / "out" / "mmbench" / "scores.json").read_text())
    assert (scores["details"]["scores"]["total_corrects"], scores["quirks"]["guess"]) == (2, 0)
    assert len(server.seen) == 1
    asked = json.loads(server.seen[0])["messages"][0]["content"]
    assert asked.endswith("Question: Which?\nOptions: A. red B. green C. blue D. grey\nAnswer: emerald\nYour output: ")


def test_requests_hold_what_the_judge_needs():
    record = {"id": 4, "question": "Q", "pred": "P", "context": "C", "reference": "R", "answer": "x<OR>y"}
    text = llava_w_request(record).messages[1]["content"]
    assert text.startswith(
        "[Context]\nC\n\n[Question]\nQ\n\n[Assistant 1]\nR\n\n[End of Assistant 1]\n\n[Assistant 2]\nP\n\n"
    )
    assert mm_vet_request(record).messages[0]["content"].endswith("\n\nQ | x <OR> y | P | ")
    two = mmbench_request({**record, "options_dict": {"A": "yes", "B": "no", "C": "N/A", "D": "N/A", "E": "N/A"}})
    assert two.read("no") == "B" and two.read("E") == "E"
    with pytest.raises(ValueError, match="no option in the reply"):
        two.read("neither of them")

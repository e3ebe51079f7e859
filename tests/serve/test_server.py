"""The server over a real socket: PNG pictures for digits, one sentence for anything else."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

from fewstep.errors import UserError
from fewstep.runtime import images, load
from fewstep.serve import app as app_module
from fewstep.serve import create_app, run
from fewstep.serve.server import listen

GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def student(student_folder):
    return load(student_folder)


@pytest.fixture(scope="module")
def client(student):
    """A client of a running server on a free port."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(student, "digits"), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
        yield client
    server.should_exit = True
    thread.join(timeout=10)
    listener.close()
    assert not thread.is_alive()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_a_prompt_gives_the_png_that_the_student_draws(client, student):
    answer = client.post(
        GENERATE, json={"prompt": "a handwritten 7", "seed": 5, "steps": 4}, headers={"accept": "image/png"}
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    expected = images.picture(student.sample(1, 7, 4, [5])[0])
    assert (pixels(answer.content) == np.asarray(expected)).all()


def test_the_same_seed_twice_gives_the_same_png(client):
    wish = {"prompt": "seven", "seed": 11, "size": "128x128"}
    first, second = (client.post(GENERATE, json=wish).json()["data"][0]["b64_json"] for _ in range(2))
    assert first == second
    assert pixels(base64.b64decode(first)).shape == (128, 128)
    other = client.post(GENERATE, json={**wish, "seed": 12}).json()["data"][0]["b64_json"]
    assert other != first


def test_several_images_count_their_seeds_up(client):
    body = client.post(GENERATE, json={"class": 3, "n": 3, "seed": 20, "model": "digits", "user": "me"}).json()
    assert [item["seed"] for item in body["data"]] == [20, 21, 22]
    assert body["steps"] == 4 and body["created"] > 1_600_000_000
    same = client.post(GENERATE, json={"class": 3, "seeds": [20, 21, 22]}).json()
    assert same["data"] == body["data"]


def test_without_a_seed_one_is_drawn_and_told(client):
    first, second = (client.post(GENERATE, json={"prompt": "1"}).json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    again = client.post(GENERATE, json={"prompt": "1", "seed": first["seed"]}).json()["data"][0]
    assert again == first


def test_several_images_as_one_png_are_a_sheet(client):
    answer = client.post(GENERATE, json={"prompt": "4", "n": 4, "seed": 0}, headers={"accept": "image/png"})
    assert pixels(answer.content).shape == (17, 17)
    assert answer.headers["x-fewstep-seeds"] == "0,1,2,3"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"prompt": "a cat"}, "'cat'"),
        ({"prompt": "10"}, "out of range"),
        ({"class": 10}, "0 to 9"),
        ({"class": "seven"}, "class"),
        ({"class": True}, "class"),
        ({}, "neither prompt nor class"),
        ({"prompt": "7", "class": 7}, "both"),
        ({"prompt": "7", "steps": 0}, "steps is 0"),
        ({"prompt": "7", "steps": 3}, "1, 2, 4"),
        ({"prompt": "7", "steps": "four"}, "steps"),
        ({"prompt": "7", "n": 0}, "'n'"),
        ({"prompt": "7", "n": 65}, "'n'"),
        ({"prompt": "7", "seed": -1}, "'seed'"),
        ({"prompt": "7", "seed": 2**64}, "seed"),
        ({"prompt": "7", "seeds": [1, -1]}, "seed is out of range"),
        ({"prompt": "7", "seeds": [1], "seed": 1}, "both seed and seeds"),
        ({"prompt": "7", "seeds": [1, 2], "n": 3}, "2 seeds"),
        ({"prompt": "7", "seeds": []}, "seeds"),
        ({"prompt": "7", "size": "7x7"}, "size"),
        ({"prompt": "7", "size": "99999x99999"}, "size"),
        ({"prompt": "7", "size": "big"}, "size"),
        ({"prompt": "7", "guidance": 2.0}, "guidance"),
        ({"prompt": "7", "response_format": "url"}, "b64_json"),
        ({"prompt": "7", "model": "dall-e-3"}, "'digits'"),
        ({"prompt": "7", "qualty": "hd"}, "'qualty'"),
        ({"prompt": "7" * 2000}, "prompt"),
        ([1, 2], "JSON object"),
    ],
)
def test_a_wrong_request_is_400_and_one_sentence(client, body, word):
    answer = client.post(GENERATE, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert word in error["message"]
    assert "\n" not in error["message"] and error["message"].endswith(".") and len(error["message"]) < 400


@pytest.mark.parametrize("content", [b"", b"null", b"{", b"\xff\xfe", b'{"prompt": NaN}'])
def test_a_body_that_is_not_json_is_400(client, content):
    answer = client.post(GENERATE, content=content)
    assert answer.status_code == 400
    assert "\n" not in answer.json()["error"]["message"]


def test_a_large_body_is_413_with_or_without_a_length(client):
    large = b'{"prompt": "' + b"7" * 200_000 + b'"}'
    assert client.post(GENERATE, content=large).status_code == 413
    assert client.post(GENERATE, content=iter([large[:100_000], large[100_000:]])).status_code == 413


def test_unknown_addresses_and_verbs_are_one_sentence(client):
    assert client.get("/v1/nothing").status_code == 404
    answer = client.get(GENERATE)
    assert answer.status_code == 405
    assert "use POST" in answer.json()["error"]["message"]


def test_healthz_says_what_is_served(client):
    assert client.get("/healthz").json() == {
        "status": "ok",
        "model": "digits",
        "kind": "student",
        "steps": [1, 2, 4],
        "classes": 10,
        "image_shape": [1, 8, 8],
    }


def test_the_page_needs_nothing_but_this_server(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "//" not in answer.text.replace("<!doctype", "").split("<script>")[0]
    assert "http" not in answer.text
    assert "width=device-width" in answer.text
    assert "__" not in answer.text


def test_the_event_loop_answers_while_the_model_runs(client, student, monkeypatch):
    begun, finish = threading.Event(), threading.Event()
    real = student.sample

    def slow(*arguments, **named):
        begun.set()
        assert finish.wait(20)
        return real(*arguments, **named)

    monkeypatch.setattr(student, "sample", slow)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(client.post, GENERATE, json={"prompt": "7", "seed": 1})
        assert begun.wait(20)
        assert client.get("/healthz").status_code == 200
        finish.set()
        assert drawing.result().status_code == 200


@pytest.mark.parametrize("accept", ["image/png", "application/json"])
def test_pictures_are_encoded_outside_the_event_loop(client, monkeypatch, accept):
    threads = []
    real = app_module.images.png
    monkeypatch.setattr(
        app_module.images, "png", lambda drawn: threads.append(threading.current_thread().name) or real(drawn)
    )
    assert client.post(GENERATE, json={"prompt": "7", "n": 2}, headers={"accept": accept}).status_code == 200
    assert threads and all(name.startswith("fewstep-model") for name in threads)


def test_more_waiting_requests_than_allowed_are_503(client, student, monkeypatch):
    monkeypatch.setattr(app_module, "MOST_WAITING", 1)
    begun, finish = threading.Event(), threading.Event()
    real = student.sample

    def slow(*arguments, **named):
        begun.set()
        assert finish.wait(20)
        return real(*arguments, **named)

    monkeypatch.setattr(student, "sample", slow)
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(client.post, GENERATE, json={"prompt": "7"})
        assert begun.wait(20)
        refused = client.post(GENERATE, json={"prompt": "7"})
        finish.set()
        assert drawing.result().status_code == 200
    assert refused.status_code == 503
    assert "waiting" in refused.json()["error"]["message"]


def test_a_failure_inside_is_500_without_a_traceback(client, student, monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(student, "sample", broken)
    answer = client.post(GENERATE, json={"prompt": "7"})
    assert answer.status_code == 500
    assert "secret" not in answer.text and "Traceback" not in answer.text


def test_a_taken_or_impossible_port_is_one_sentence(student_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is taken"):
            run(student_folder, "127.0.0.1", port)
    with pytest.raises(UserError, match="0 to 65535"):
        run(student_folder, port=65536)
    with pytest.raises(UserError, match="not an address"):
        run(student_folder, host="no such host", port=0)


def test_run_serves_an_artefact_until_it_is_told_to_stop(student_folder, monkeypatch, capsys):
    servers: list[uvicorn.Server] = []

    class Kept(uvicorn.Server):
        def __init__(self, config):
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(uvicorn, "Server", Kept)
    thread = threading.Thread(target=run, args=(student_folder, "127.0.0.1", 0), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not (servers and servers[0].started):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    address = capsys.readouterr().out.split(" at ")[1].split(" ")[0]
    answer = httpx.post(address.rstrip("/") + GENERATE, json={"prompt": "7"}, headers={"accept": "image/png"})
    assert pixels(answer.content).shape == (8, 8)
    servers[0].should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()

"""The service for real: Ray Serve, HTTP, OpenAI's client, updates, and replicas that are killed."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import openai
import psutil
import pytest
import ray
import yaml
from ray import serve as ray_serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from lmcot import Guide
from lmcot.answering.pair import open_pair
from lmcot.cli import main
from lmcot.config import dump_config, parse_config
from lmcot.errors import UserError
from lmcot.models.sources import load_model
from lmcot.serve.app import frozen, ingress, small
from lmcot.serve.client import Client, ServiceError
from lmcot.serve.run import check_port, start

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
CONTEXT = [
    {"title": "Elko", "text": "Elko is a city in Nevada. It straddles the Humboldt River."},
    {"title": "Reno", "text": "Reno lies on the Truckee River."},
]
LONG = 1500
"""Tokens that take the tiny model some seconds."""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make_run(folder: Path, port: int, scale: float = 1.0) -> Path:
    """A run directory with a policy, as training leaves it; untrained."""
    model, tokenizer = load_model("random:llama", "float32")
    for parameter in model.parameters():
        parameter.data.mul_(scale)
    model.save_pretrained(folder / "refined")
    tokenizer.save_pretrained(folder / "refined")
    config = parse_config(
        {
            "data": {
                "train": {"kind": "sample", "split": "train"},
                "validation": {"kind": "sample", "split": "validation"},
                "context": {"distractors": "all", "max_tokens": 200},
            },
            "policy": {"source": "random:llama", "dtype": "float32", "max_new_tokens": 12},
            "frozen": {
                "backend": "transformers", "source": "random:llama", "dtype": "float32",
                "max_answer_tokens": 6, "cache": {"enabled": False},
            },
            "refine": {"start_from": "base"},
            "prompts": {"demonstrations": 0},
            "serve": {"port": port, "limits": {"new_tokens": LONG}},
        }
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first", free_port())


@pytest.fixture(scope="module")
def client(run_dir: Path) -> Iterator[Client]:
    """Of a service with two replicas of each model."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    overrides = ["serve.small.replicas=2", "serve.frozen.replicas=2", "serve.limits.body_s=3"]
    pair = open_pair(run_dir, None, overrides)
    start(pair)
    yield Client(f"http://127.0.0.1:{pair.config.serve.port}")
    ray_serve.shutdown()
    ray.shutdown()


def address(client: Client) -> str:
    return client._url


def test_an_answer_repeats_and_is_that_of_a_program(client: Client, run_dir: Path) -> None:
    """The same over HTTP, in OpenAI's client and in this process; whoever else asks meanwhile."""
    asked: dict[str, Any] = {"samples": 3, "seed": 7, "temperature": 1.0, "unguided": True}
    first = client.answer("Which river?", CONTEXT, **asked)
    assert len({vote["rationale"] for vote in first["votes"]}) == 3
    assert first["versions"]["small"] == "refined of first"
    with crowd(client):
        again = client.answer("Which river?", CONTEXT, **asked)
    assert again["votes"] == first["votes"]
    guide = Guide(run_dir)
    mine = guide.answer("Which river?", CONTEXT, **asked)
    assert [vote.model_dump() for vote in mine.votes] == first["votes"]
    assert (mine.answer, mine.unguided) == (first["answer"], first["unguided"])
    assert guide.answer("Which river?").votes[0].finish_reason in ("eos", "length")

    compatible = openai.OpenAI(base_url=f"{address(client)}/v1", api_key="none", max_retries=0)
    assert [one.id for one in compatible.models.list()] == ["lmcot"]
    context = "\n\n".join(one["text"] for one in CONTEXT)
    message: Any = {"role": "user", "content": f"Context: {context}\nQuestion: Which river?"}
    whole = compatible.chat.completions.create(model="lmcot", messages=[message])
    plain = client.answer("Which river?", context)
    assert whole.choices[0].message.content == plain["answer"]
    pieces: Any = compatible.chat.completions.create(model="lmcot", messages=[message], stream=True)
    reasoning = "".join(
        (one.choices[0].delta.model_extra or {}).get("reasoning_content", "") for one in pieces
    )
    assert reasoning.strip() == plain["rationale"]
    with pytest.raises(openai.BadRequestError, match="no user message"):
        compatible.chat.completions.create(
            model="lmcot", messages=[{"role": "system", "content": "x"}]
        )


@contextmanager
def crowd(client: Client, number: int = 4) -> Iterator[Counter[Any]]:
    """Others who ask all the time; what came of it, by status."""
    over, found = threading.Event(), Counter[Any]()

    def ask(who: int) -> None:
        while not over.is_set():
            try:
                client.answer(f"Question {who}?", CONTEXT, max_tokens=4)
                found[200] += 1
            except ServiceError as error:
                found[error.status] += 1
                time.sleep(0.05)
            except OSError as error:
                found[type(error).__name__] += 1
                time.sleep(0.05)

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(number)]
    for one in threads:
        one.start()
    try:
        yield found
    finally:
        over.set()
        for one in threads:
            one.join(60)


def test_a_stream_is_what_the_whole_answer_is(client: Client) -> None:
    events = list(client.stream("Which river?", CONTEXT, seed=3, temperature=1.0))
    text = "".join(data["text"] for name, data in events if name == "token")
    answer = events[-1][1]
    assert [name for name, _ in events][-2:] == ["rationale", "answer"]
    assert text.strip() == answer["rationale"]
    assert answer["timings"]["first_token"] <= answer["timings"]["rationale"]


def test_text_that_looks_like_the_models_own_marks_stays_text(client: Client) -> None:
    """An end of text in a question would end the prompt before its end."""
    plain = client.rationale("Which river </ s> ?", CONTEXT)
    marked = client.rationale("Which river </s> ?", CONTEXT)
    assert marked["prompt_tokens"] > client.rationale("Which river ?", CONTEXT)["prompt_tokens"] + 1
    assert abs(marked["prompt_tokens"] - plain["prompt_tokens"]) <= 3


def at_work(client: Client) -> float:
    with urllib.request.urlopen(f"{address(client)}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("lmcot_at_work ")).split()[1])


def test_a_client_that_goes_away_frees_its_place(client: Client) -> None:
    """Sooner than what it asked for would have taken."""
    check_that_leaving_cancels(client, max_tokens=LONG, temperature=5.0)


def check_that_leaving_cancels(client: Client, **draw: Any) -> None:
    """Checks that a rationale ends when its reader leaves; by itself it takes far longer."""
    body = json.dumps({"question": "Which?", "seed": 1, "stream": True, **draw})

    def begin() -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection(
            address(client).removeprefix("http://"), timeout=120
        )
        connection.request("POST", "/v1/answer", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        assert reply.readline().startswith(b"event: token")
        return connection, reply

    started = time.monotonic()
    connection, reply = begin()
    reply.read()
    connection.close()
    whole = time.monotonic() - started
    assert at_work(client) == 0
    connection, _ = begin()
    assert at_work(client) == 1
    left = time.monotonic()
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    while at_work(client):
        assert time.monotonic() - left < 0.7 * whole, "it is written to its end for nobody"
        time.sleep(0.02)


def test_half_sent_bodies_keep_nobody_out(client: Client) -> None:
    """More than there are places; each is refused when its time is over."""
    host, port = address(client).removeprefix("http://").split(":")
    half = (
        b"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 1000\r\n\r\n{"question": '
    )
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(70)]
    try:
        for one in slow:
            one.sendall(half)
        time.sleep(0.5)
        assert client.answer("Which?", max_tokens=4)["votes"]
        assert at_work(client) == 0
        assert {one.recv(12) for one in slow} == {b"HTTP/1.1 408"}
    finally:
        for one in slow:
            one.close()
    with urllib.request.urlopen(f"{address(client)}/healthz", timeout=30) as reply:
        assert len(reply.headers.get_all("x-request-id")) == 1


def replicas(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
            if "ServeReplica:lmcot" in title and f":{name}" in title:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("name", ["SmallLM", "FrozenLM", "Ingress"])
def test_a_replica_that_is_killed_takes_no_more_with_it_than_it_was_at(
    client: Client, name: str
) -> None:
    """kill -9 under load: no wrong answers, and all is back by itself."""
    asked: dict[str, Any] = {"seed": 7, "temperature": 1.0}
    before = client.answer("Which river?", CONTEXT, **asked)
    with crowd(client) as found:
        wait_until(lambda: found[200] >= 4, "answers before the kill")
        victim = replicas(name)[0]
        victim.kill()
        killed = time.monotonic()
        wait_until(lambda: not victim.is_running() or victim.status() == "zombie", "its end")
        wait_until(lambda: len(replicas(name)) == (1 if name == "Ingress" else 2), "a new replica")
        enough = found[200] + 8
        wait_until(lambda: found[200] >= enough, "answers after the kill")
        back = time.monotonic() - killed
    print(f"\n{name}: back {back:.1f} s after it was killed; {dict(found)}")
    assert client.answer("Which river?", CONTEXT, **asked)["votes"] == before["votes"]
    failed = sum(found.values()) - found[200] - found[503]
    if name != "Ingress":
        assert failed <= 4, "those that were at work on it"


def wait_until(condition: Any, what: str, limit: float = 120.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit:.0f} s for {what}"
        time.sleep(0.05)


def test_an_update_to_another_policy_fails_no_request(
    client: Client, run_dir: Path, tmp_path: Path
) -> None:
    """Replica by replica; each answer is of one version."""
    newer = make_run(tmp_path / "newer", 1, scale=1.5)
    with crowd(client) as found:
        wait_until(lambda: found[200] >= 4, "answers before the update")
        assert main(["serve", "--run-dir", str(newer), "--update"]) == 0
        enough = found[200] + 4
        wait_until(lambda: found[200] >= enough, "answers after the update")
    assert set(found) == {200}, found
    assert client.answer("Which river?")["versions"]["small"] == "refined of newer"
    assert main(["serve", "--run-dir", str(newer), "--update", "serve.name=other"]) == 2


def status_of(url: str, headers: dict[str, str] | None = None) -> int:
    try:
        request = urllib.request.Request(url, headers=headers or {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return int(error.code)


def test_a_guest_leaves_what_the_cluster_serves_as_it_was(
    client: Client, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is taken is refused; the guest's tokens come with it, though no node has them."""

    @ray_serve.deployment(ray_actor_options={"num_cpus": 0})
    class Other:
        def __call__(self) -> str:
            return "other"

    ray_serve.run(cast(Any, Other).bind(), name="other", route_prefix="/other")
    guest = ["serve", "--run-dir", str(run_dir), "serve.name=guest"]
    for arguments, reason in (
        (guest[:-1], "serves an application 'lmcot' already: put this run in its place"),
        ([*guest[:-1], "serve.name=other"], "serves an application 'other' already: set serve"),
        (guest, "application 'lmcot' takes the requests to /"),
        ([*guest, "--prefix", "/other"], "application 'other' takes the requests to /other"),
        ([*guest, "--prefix", "other/"], "is not a path to serve under"),
        (
            [*guest, "--prefix", "/g", "serve.small.cpus=99"],
            "use serve.small.cpus 1.98 instead of 99",
        ),
    ):
        assert main(arguments) == 2
        assert reason in capsys.readouterr().err
    few = [f"serve.{role}.cpus=0" for role in ("small", "frozen", "ingress")]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "lmcot.cli", *guest, "--prefix", "/guest", "serve.port=9", *few,
        ],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={
            **os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RAY_AUTH_MODE": "token", "LMCOT_SERVE_TOKENS": "a token",
        },
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if " answers at " in line:
                break
        else:
            pytest.fail(f"the service did not start: {said}")
        url = f"{address(client)}/guest"
        assert f" answers at {url} " in said[-1], "where Serve listens, not serve.port"
        assert any("serve.host and serve.port are ignored" in line for line in said)
        assert "a token" not in "".join(said)
        assert status_of(f"{url}/v1/models") == 401
        assert status_of(f"{url}/v1/models", {"authorization": "Bearer a token"}) == 200
        assert status_of(f"{url}/readyz") == status_of(f"{url}/") == 200
        asked = Client(url, token="a token").answer("Which river?", CONTEXT)
        assert asked["votes"] == client.answer("Which river?", CONTEXT)["votes"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0
    finally:
        if process.poll() is None:
            process.kill()
    assert set(ray_serve.status().applications) == {"lmcot", "lmcot-small", "lmcot-frozen", "other"}
    assert status_of(f"{address(client)}/other") == 200
    assert client.answer("Which river?", CONTEXT)["votes"] == asked["votes"]
    ray_serve.delete("other")


def test_the_shipped_config_file_is_one_of_ray_serves(run_dir: Path) -> None:
    text = (ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    names = {one.name: one.import_path for one in schema.applications}
    assert names == {
        "lmcot-small": "lmcot.serve.app:small",
        "lmcot-frozen": "lmcot.serve.app:frozen",
        "lmcot": "lmcot.serve.app:ingress",
    }
    for one, build in zip(schema.applications, (small, frozen, ingress), strict=True):
        # As Serve does when it deploys the file.
        assert call_user_app_builder_with_args_if_necessary(
            build, {**one.args, "run_dir": str(run_dir)}
        )
    # Built in a process of the cluster, it must not mistake a lacking variable for leave.
    with pytest.raises(UserError, match="nothing says who may send requests"):
        ingress({"run_dir": str(run_dir)})
    assert ingress({"run_dir": str(run_dir), "token_digests": ["0" * 64]})
    with pytest.raises(ValueError, match="should match pattern") as raised:
        ingress({"run_dir": str(run_dir), "token_digests": ["my token"]})
    assert "my token" not in str(raised.value)


def test_what_cannot_be_served_is_told_at_once(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--run-dir", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main(["serve", "--run-dir", str(run_dir), "--policy", "distilled"]) == 2
    assert "holds no distilled policy" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}"):
            check_port("127.0.0.1", port)


def command(folder: Path, *overrides: str, **environment: str) -> psutil.Popen:
    """`lmcot serve` as users start it: with its defaults, and as many CPUs as the machine has."""
    return psutil.Popen(
        [sys.executable, "-m", "lmcot.cli", "serve", "--run-dir", str(folder), *overrides],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, **environment}, start_new_session=True,
    )  # fmt: skip


def test_a_start_that_waits_says_so_and_can_be_interrupted(tmp_path: Path) -> None:
    """Here for a GPU that may join, and never does."""
    folder = make_run(tmp_path / "run", free_port())
    process = command(folder, "serve.small.gpus=1", "actors.autoscaling=true")
    try:
        for line in process.stderr:
            if "waiting for" in line:
                break
        else:
            pytest.fail("nothing was said")
        assert "lmcot-small" in line
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
    finally:
        if process.poll() is None:
            process.kill()
    assert not psutil.wait_procs(family, timeout=30)[1], "left running"


def test_the_command_finishes_what_is_at_work(tmp_path: Path) -> None:
    """Ctrl-C while a long request is under way: it is answered, and nothing is left running.

    Meanwhile a new request is told to come again. Before that it is updated from another process,
    which knows no token and keeps those that there are.
    """
    port = free_port()
    folder = make_run(tmp_path / "run", port)
    newer = make_run(tmp_path / "newer", port, scale=1.5)
    process = command(folder, LMCOT_SERVE_TOKENS="a token")
    asked = Client(f"http://127.0.0.1:{port}", token="a token")
    answers: list[Any] = []
    try:
        for line in process.stderr:
            if found := re.search(r"RAY_ADDRESS=(\S+) lmcot serve", line):
                break
        else:
            pytest.fail("the service did not start")
        rest: list[str] = []
        drain = threading.Thread(target=lambda: rest.append(process.stderr.read()))
        drain.start()
        update = [sys.executable, "-m", "lmcot.cli", "serve", "--run-dir", str(newer), "--update"]
        environment = {**os.environ, "RAY_ADDRESS": found[1], "RAY_AUTH_MODE": "token"}
        subprocess.run(update, cwd=ROOT, env=environment, check=True, timeout=180)
        assert asked.answer("Which?")["versions"]["small"] == "refined of newer"
        assert status_of(f"{address(asked)}/v1/models") == 401, "the tokens stayed"
        shown = subprocess.run(
            [*update[:-1], "--status"], cwd=ROOT, env=environment, check=True, timeout=180,
            capture_output=True, text=True,
        ).stdout  # fmt: skip
        assert f"address  {address(asked)}" in shown
        assert shown.count("RUNNING") >= 3
        long: dict[str, Any] = {"max_tokens": LONG, "temperature": 5.0, "seed": 1}
        thread = threading.Thread(target=lambda: answers.append(asked.answer("Which?", **long)))
        thread.start()
        wait_until(lambda: at_work(asked) == 1, "the request to be at work")
        family = process.children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        models = f"{address(asked)}/v1/models"
        wait_until(lambda: status_of(models, {"authorization": "Bearer a token"}) != 200, "its end")
        assert status_of(models, {"authorization": "Bearer a token"}) == 503
        thread.join(90)
        assert process.wait(90) == 0
        drain.join(10)
    finally:
        if process.poll() is None:
            process.kill()
    assert "graceful_shutdown" not in "".join(rest)
    assert len(answers) == 1
    assert answers[0]["tokens"]["small_lm_out"] > 100
    assert not psutil.wait_procs(family, timeout=30)[1], "left running"
    with pytest.raises(OSError, match="refused"):
        asked.answer("Which?")

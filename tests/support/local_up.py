"""`ray up` of deploy/local.yaml for real, on hosts made of namespaces; prints what it saw as JSON.

Run by tests/integration/test_local_up.py, inside `hosts.into_laptop`:

    python tests/support/local_up.py MOTO_SERVER TORCH_EXTENSIONS

The file is taken as it is, but for the three lines that are its reader's. The hosts find a bucket
at the laptop's address. There is no registry: pip finds all requirements installed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support import hosts

ROOT = hosts.ROOT
ROLES = {1: {"driver": 1, "reward": 4}, 2: {"learner": 1, "rollout": 2, "frozen": 1}}
"""By host; the first one is the head."""
RUN = "s3://lmcot/mine"
SETTINGS = (
    "actors.address=auto", "actors.start_timeout_s=180", "checkpoints.every=1",
    "data.max_validation=2", "evaluate.aspect_questions=0",
    *(f"actors.{role}.resources={{{role}: 1}}"
      for role in ("learner", "rollout", "reward", "frozen")),
)  # fmt: skip
JOBS = "http://127.0.0.1:8265"
_LIMIT_S = 240.0


def sh(command: str, *, ok: bool = True) -> str:
    """What a command says, on both streams; also to this process's stderr."""
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL, timeout=600, check=False,
    )  # fmt: skip
    tell(f"$ {command}\n{done.stdout}-> {done.returncode}, {time.monotonic() - started:.1f} s")
    if ok and done.returncode:
        raise RuntimeError(f"'{command}' ended with {done.returncode}")
    return done.stdout


def tell(text: str) -> None:
    """To those who read the log."""
    print(text, file=sys.stderr, flush=True)


def wait(what: str, look: Callable[[], Any]) -> Any:
    """What ``look`` finds, once that is something; errors on the way count as nothing."""
    deadline = time.monotonic() + _LIMIT_S
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if found := look():
                tell(f"there is {what}")
                return found
        except Exception as one:
            error = one
        time.sleep(1)
    raise TimeoutError(f"waited {_LIMIT_S:.0f} s for {what} ({error})")


@contextmanager
def background(command: str) -> Iterator[None]:
    """Something that runs until it is not needed any more."""
    tell(f"$ {command} &")
    process = subprocess.Popen(
        ["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=sys.stderr,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # as Ctrl-C does: all of the terminal's
        process.wait(30)


def get(url: str, body: Any = None) -> Any:
    """A JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def on(number: int, command: str) -> str:
    """What a host says to a command, by plain ssh."""
    options = "-q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -i ~/.ssh/id_ed25519"
    return sh(f"ssh {options} root@10.77.0.{number} {shlex.quote(command)}", ok=False)


def prepare(extensions: str) -> str:
    """The laptop, the hosts with their roles, and the cluster file; its path."""
    hosts.become_laptop()
    os.chdir(ROOT)
    os.environ["PATH"] = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}"
    os.environ.update(RAY_AUTH_MODE="token", RAY_UP_enable_autoscaler_v2="0", NO_COLOR="1")
    environment = {
        "TORCH_EXTENSIONS_DIR": extensions, "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "false", "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }  # fmt: skip
    for number, roles in ROLES.items():
        hosts.start_host(number, environment)
        on(number, f"echo {shlex.quote(json.dumps(roles))} > ~/lmcot-roles.json")
    text = (ROOT / "deploy" / "local.yaml").read_text(encoding="utf-8")
    for theirs, ours in (
        ("head_ip: 10.0.0.1 ", "head_ip: 10.77.0.1 "),
        ("[10.0.0.2, 10.0.0.3]", "[10.77.0.2]"),
        ("ssh_user: ubuntu", "ssh_user: root"),
    ):
        assert theirs in text, theirs
        text = text.replace(theirs, ours)
    file = Path("/tmp/local.yaml")
    file.write_text(text, encoding="utf-8")
    return str(file)


def cloud() -> dict[str, str]:
    """Environment of those who use the laptop's bucket."""
    return {
        "AWS_ENDPOINT_URL": f"http://{hosts.LAPTOP}:5000", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


def job_environment() -> str:
    """deploy/job.yaml with the bucket's, as a reader would have it; its path."""
    settings = yaml.safe_load((ROOT / "deploy" / "job.yaml").read_text(encoding="utf-8"))
    settings["env_vars"].update(cloud())
    file = Path("/tmp/job.yaml")
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(file)


def submit(name: str, stage: str, *arguments: str, follow: bool = True) -> str:
    """A stage on the run as a job; what it said, if it was followed."""
    command = shlex.join(["lmcot", stage, "--run-dir", RUN, *arguments, *SETTINGS])
    wait_for_it = "" if follow else "--no-wait"
    return sh(
        f"ray job submit --address {JOBS} --runtime-env {job_environment()} --working-dir configs "
        f"--submission-id {name} {wait_for_it} -- {command}"
    )


def steps_done() -> int:
    """How many steps of refinement the run in the bucket has logged."""
    import fsspec

    store = fsspec.filesystem("s3", use_listings_cache=False)
    lines = store.cat_file(f"{RUN.removeprefix('s3://')}/metrics.jsonl").decode().splitlines()
    return sum(json.loads(line)["stage"] == "refine" for line in lines)


def train(file: str) -> dict[str, Any]:
    """A job that is stopped in the middle, and another one that goes on."""
    stages = ("train", "--config", "smoke_t5.yaml")
    submit("first", *stages, "refine.steps=400", follow=False)
    wait("a third step", lambda: steps_done() >= 3)
    actors = sh(f"ray exec {file} 'ray list actors --format json'")
    sh(f"ray job stop --address {JOBS} first")
    stopped = sh(f"ray job logs --address {JOBS} first")
    reached = steps_done()
    again = submit(
        "second", *stages, f"refine.steps={reached + 2}", "evaluate.rows=[guided_refined]"
    )
    evaluated = submit("third", "evaluate", "evaluate.rows=[guided_refined, control_empty]")
    return {
        "actors": actors, "stopped": stopped, "reached": reached, "again": again,
        "evaluated": evaluated, "done": steps_done(),
    }  # fmt: skip


def serve(file: str) -> Any:
    """The trained pair on the same cluster; its answer to a question."""
    text = (ROOT / "deploy" / "serve.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text.replace("runs/quickstart", RUN))
    for one in settings["applications"]:
        one["runtime_env"] = {"env_vars": cloud()}
    path = Path("/tmp/serve.yaml")
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    sh(f"serve deploy --address {JOBS} {path}")
    question = {"question": "Who wrote it?", "context": "The book. Ann wrote it."}
    with background(f"ray exec {file} --port-forward 8000 'sleep 900'"):
        status = f"serve status --address {JOBS}"
        wait("the service", lambda: sh(status).count("status: RUNNING") == 3)
        return wait("an answer", lambda: get("http://127.0.0.1:8000/v1/answer", question))


def tensorboard(file: str) -> list[str]:
    """What TensorBoard on the head shows of the run in the bucket, asked from the laptop."""
    variables = " ".join(f"{name}={value}" for name, value in cloud().items())
    command = f"{variables} tensorboard --logdir {RUN}/tensorboard --port 6006"
    with background(f"ray exec {file} --port-forward 6006 {shlex.quote(command)}"):
        address = "http://127.0.0.1:6006/data/plugin/scalars/tags"
        return sorted(wait("TensorBoard", lambda: get(address).get("refine")))


def left(number: int) -> str:
    """A host's processes, once there is none but those of this connection.

    The head's end with `ray down`; those of a worker find out by themselves that it is gone.
    """
    shown = on(number, "ps -eo comm,args --no-headers")
    names = {line.split()[0] for line in shown.splitlines()}
    return shown if names == {"sshd", "ps"} else ""


def main() -> None:
    """Everything, in the order of docs/cluster.md."""
    moto, extensions = sys.argv[1:]
    file = prepare(extensions)
    os.environ.update(cloud())
    found: dict[str, Any] = {}
    with background(f"{moto} -H {hosts.LAPTOP} -p 5000 2>/dev/null"):
        import fsspec

        wait("a bucket", lambda: fsspec.filesystem("s3").mkdir("lmcot") or True)
        sh("ray get-auth-token --generate")
        sh(f"ray up -y --no-config-cache {file}")
        wait("the worker", lambda: "2 local.cluster.node" in sh(f"ray exec {file} 'ray status'"))
        found["status"] = sh(f"ray exec {file} 'ray status'")
        found["doctor"] = sh(f"ray exec {file} 'RAY_ADDRESS=auto lmcot doctor'", ok=False)
        nodes = f"ray exec {file} 'ray list nodes --format json'"
        found["nodes"] = sh(nodes)
        with background(f"ray dashboard {file} --port 8265"):
            wait("the job server", lambda: sh(f"ray job list --address {JOBS}") or True)
            found |= train(file)
            found["answer"] = serve(file)
        found["tags"] = tensorboard(file)
        sh(f"ray down -y {file}")
        down = time.monotonic()
        found["left"] = [
            wait(f"an end of all on host {number}", partial(left, number)) for number in ROLES
        ]
        found["seconds_to_end"] = time.monotonic() - down
    print(json.dumps(found))


main()

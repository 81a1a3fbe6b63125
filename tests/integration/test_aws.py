"""cluster.yaml against moto's EC2 and IAM, a real server on loopback: `ray up` up to its head."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = Path(os.environ.get("LMCOT_CLOUD_TOOLS", ROOT / ".venv-cloud"))
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (TOOLS / "bin" / "moto_server").exists(), reason="needs moto: run `make cloud-tools`"
    ),
]


@pytest.fixture
def endpoint() -> Iterator[str]:
    """Of a cloud with nothing in it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        [str(TOOLS / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "moto's server ended"
                time.sleep(0.1)
        else:
            pytest.fail("waited 30 s for moto's server")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_the_head_is_launched_as_the_file_says(endpoint: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("a token", encoding="utf-8")
    environment = {
        **os.environ, "HOME": str(home), "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-west-2", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    images = subprocess.run(
        [str(TOOLS / "bin" / "python"), "-c",
         "import boto3; print(boto3.client('ec2').describe_images()['Images'][0]['ImageId'])"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    image = images.stdout.strip()
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    file = tmp_path / "cluster.yaml"
    file.write_text(text.replace("ami-00000000000000000", image), encoding="utf-8")
    (site,) = (TOOLS / "lib").glob("python3*/site-packages")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cloud_up.py"), str(file), str(site)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    (head,) = found["instances"]
    assert (head["InstanceType"], head["ImageId"]) == ("m6i.2xlarge", image)
    tags = {one["Key"]: one["Value"] for one in head["Tags"]}
    assert tags["Name"] == "ray-lmcot-head"
    assert (tags["ray-cluster-name"], tags["ray-user-node-type"]) == ("lmcot", "head")
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/ray-autoscaler-v1")
    assert [disk["DeviceName"] for disk in head["BlockDeviceMappings"]] == ["/dev/sda1"]
    assert head["KeyName"] in found["keys"]
    assert any(name.startswith("ray-autoscaler") for name in found["roles"])
    assert [one["UserData"] for one in found["user_data"]] == [{}], "nothing runs but by ssh"
    setup, start = found["setup"]
    assert any("-c constraints.txt" in command for command in setup)
    assert any("RAY_AUTH_MODE=token ray start --head" in command for command in start)
    assert any(target.endswith(".ray/auth_token") for target in found["mounts"])

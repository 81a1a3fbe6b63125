"""cluster.yaml against moto's EC2 and IAM, a server on loopback: `ray up`, workers, `ray down`.

Nothing is reached by ssh: a stand-in tells what would be done that way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.cloud import TOOLS, cloud, needs_cloud, settings

ROOT = Path(__file__).parents[2]
WORKERS = {
    "learner": "on demand", "rollout": "spot", "reward": "spot", "frozen": "on demand",
}  # fmt: skip
pytestmark = [pytest.mark.e2e, needs_cloud]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `cloud_up.py` tells of cluster.yaml; the image is one that the cloud has."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("a token", encoding="utf-8")
    with cloud() as endpoint:
        environment = {
            **os.environ, **settings(endpoint), "AWS_DEFAULT_REGION": "us-west-2",
            "HOME": str(home), "TMPDIR": str(home),
        }  # fmt: skip
        images = subprocess.run(
            [str(TOOLS / "bin" / "python"), "-c",
             "import boto3; print(boto3.client('ec2').describe_images()['Images'][0]['ImageId'])"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
        text = text.replace("ami-00000000000000000", images.stdout.strip())
        (home / "cluster.yaml").write_text(text, encoding="utf-8")
        (site,) = (TOOLS / "lib").glob("python3*/site-packages")
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests/support/cloud_up.py"), str(home / "cluster.yaml"),
             str(site)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**told, "types": yaml.safe_load(text)["available_node_types"]}


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {one["Key"]: one["Value"] for one in instance["Tags"]}


def by_type(found: dict[str, Any]) -> dict[str, Any]:
    """The instances of the cluster, of which there is one of each type."""
    instances = {tags(one)["ray-user-node-type"]: one for one in found["up"]["instances"]}
    assert len(instances) == len(found["up"]["instances"])
    return instances


def told_of(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """What was to be done on the instance of a type."""
    node_id = by_type(found)[kind]["InstanceId"]
    [update] = [one for one in found["up"]["updates"] if one["node_id"] == node_id]
    return dict(update)


def test_the_head_may_launch_others_and_runs_nothing_but_by_ssh(found: dict[str, Any]) -> None:
    head = by_type(found)["head"]
    assert head["InstanceType"] == "m6i.2xlarge"
    assert tags(head)["Name"] == "ray-lmcot-head"
    assert head["IamInstanceProfile"]["Arn"].endswith("instance-profile/ray-autoscaler-v1")
    assert head["KeyName"] in found["up"]["keys"]
    assert any(name.startswith("ray-autoscaler") for name in found["up"]["roles"])
    update = told_of(found, "head")
    assert any("-c constraints.txt" in command for command in update["setup_commands"])
    start = update["ray_start_commands"]
    assert any("RAY_AUTH_MODE=token ray start --head" in command for command in start)
    assert any(target.endswith(".ray/auth_token") for target in update["file_mounts"])


@pytest.mark.parametrize("kind", ["head", *WORKERS])
def test_every_type_is_launched_as_the_file_says(found: dict[str, Any], kind: str) -> None:
    instances = by_type(found)
    assert instances.keys() == found["types"].keys() == {"head", *WORKERS}
    instance, node = instances[kind], found["types"][kind]["node_config"]
    assert instance["InstanceType"] == node["InstanceType"]
    assert instance["ImageId"] == node["ImageId"]
    [disk] = instance["BlockDeviceMappings"]
    [volume] = [one for one in found["up"]["volumes"] if one["VolumeId"] == disk["Ebs"]["VolumeId"]]
    assert (disk["DeviceName"], volume["Size"], volume["VolumeType"]) == ("/dev/sda1", 200, "gp3")
    assert instance.get("InstanceLifecycle", "on demand") == WORKERS.get(kind, "on demand")
    assert tags(instance)["ray-cluster-name"] == "lmcot"
    assert tags(instance)["ray-node-type"] == ("head" if kind == "head" else "worker")
    assert tags(instance)["Name"] == f"ray-lmcot-{tags(instance)['ray-node-type']}"
    number = found["up"]["instances"].index(instance)
    assert found["up"]["user_data"][number]["UserData"] == {}, "nothing runs but by ssh"


@pytest.mark.parametrize("kind", WORKERS)
def test_workers_are_reached_from_the_head_and_set_up_by_it(
    found: dict[str, Any], kind: str
) -> None:
    worker, head = by_type(found)[kind], by_type(found)["head"]
    for name in ("SecurityGroups", "KeyName", "VpcId"):
        assert worker[name] == head[name], name
    # Rights in the cloud are the head's alone, unless the file gives a type some.
    own = "IamInstanceProfile" in found["types"][kind]["node_config"]
    assert ("IamInstanceProfile" in worker) == own
    update = told_of(found, kind)
    assert any("-c constraints.txt" in command for command in update["setup_commands"])
    start = update["ray_start_commands"][-1]
    assert "export RAY_HEAD_IP=10.0.0.1;" in start
    assert f"export RAY_NODE_TYPE_NAME={kind};" in start
    assert "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379" in start
    gpu = "GPU" in found["types"][kind]["resources"]
    assert update["docker_config"]["image"].endswith("-gpu") == gpu


def test_ray_down_ends_all_of_it(found: dict[str, Any]) -> None:
    """What it does by ssh first, ending Ray and the containers, is only taken down."""
    down = found["down"]
    assert len(down["instances"]) == 1 + len(WORKERS)
    assert {one["State"]["Name"] for one in down["instances"]} == {"terminated"}
    assert down["volumes"] == [], "disks cost as well"
    head = by_type(found)["head"]["InstanceId"]
    ran = [(one["node_id"], command) for one in down["updates"] for command in one["ran"]]
    everywhere = [(one["InstanceId"], "docker stop lmcot") for one in down["instances"]]
    assert sorted(ran) == sorted([(head, "ray stop"), *everywhere])

"""`ray up` of a cluster file, workers of all its types, `ray down`: in a cloud that is none.

    AWS_ENDPOINT_URL=... python tests/support/cloud_up.py FILE SITE_PACKAGES

The workers are launched and set up as the autoscaler on the head does it, with the settings that
`ray up` puts there. What would ssh to the invented addresses takes down what it was told instead.
Prints that as JSON, and what the cloud has then. HOME is to be a folder for this alone: it stands
for the head's, too.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(sys.argv[2])  # last: what lmcot is tested with comes first

import boto3
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler.tags import STATUS_UP_TO_DATE, TAG_RAY_NODE_STATUS
from ray.autoscaler.v2.instance_manager import config as head_config
from ray.autoscaler.v2.instance_manager import ray_installer
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.core.generated.instance_manager_pb2 import Instance

_BOOTSTRAP = "~/ray_bootstrap_"
"""How the names begin of what the autoscaler on the head has from `ray up`."""
_LIMIT_S = 60.0


updaters: list[Updater] = []


class Updater:
    """Takes down what it is told, and says that the node is set up."""

    exitcode = 0
    for_recovery = False

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.cmd_runner = mock.Mock()
        updaters.append(self)

    def start(self) -> None:
        """As of a thread."""
        for target, source in self.options["file_mounts"].items():
            if target.startswith(_BOOTSTRAP):
                shutil.copyfile(source, Path(target).expanduser())
        self.run()

    def run(self) -> None:
        """As without a thread."""
        self.options["provider"].set_node_tags(
            self.options["node_id"], {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
        )

    def join(self) -> None:
        """Is done."""

    def told(self) -> dict[str, Any]:
        """What it would have done on which node."""
        names = ("node_id", "setup_commands", "ray_start_commands", "file_mounts", "docker_config")
        ran = [call.args[0] for call in self.cmd_runner.run.call_args_list]
        return {**{name: self.options[name] for name in names}, "ran": ran}


def start_workers() -> None:
    """One of each type, as the autoscaler does it once it has decided to."""
    reader = FileConfigReader(str(Path(f"{_BOOTSTRAP}config.yaml").expanduser()))
    config = reader.get_cached_autoscaling_config()
    provider = _get_node_provider(config.get_provider_config(), config.get_config("cluster_name"))
    cloud = NodeProviderAdapter(provider, reader)
    types = config.get_node_type_configs().keys() - {config.get_head_node_type()}
    cloud.launch(dict.fromkeys(types, 1), "a request")
    deadline = time.monotonic() + _LIMIT_S
    while len(there := cloud.get_non_terminated()) < len(types) + 1:
        if errors := cloud.poll_errors():
            raise errors[0]
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_LIMIT_S:.0f} s for {sorted(types)}, among {there}")
        time.sleep(0.1)
    installer = ray_installer.RayInstaller(provider, config)
    for node_id, node in there.items():
        if node.node_type in types:
            worker = Instance(cloud_instance_id=node_id, instance_type=node.node_type)
            installer.install_ray(worker, "10.0.0.1")


def in_the_cloud(region: str) -> dict[str, Any]:
    """What it has."""
    ec2 = boto3.client("ec2", region_name=region)
    instances = [
        instance
        for reservation in ec2.describe_instances()["Reservations"]
        for instance in reservation["Instances"]
    ]
    roles = boto3.client("iam", region_name=region).list_roles()["Roles"]
    return {
        "instances": instances,
        "volumes": ec2.describe_volumes()["Volumes"],
        "user_data": [
            ec2.describe_instance_attribute(InstanceId=one["InstanceId"], Attribute="userData")
            for one in instances
        ],
        "roles": [one["RoleName"] for one in roles],
        "keys": [one["KeyName"] for one in ec2.describe_key_pairs()["KeyPairs"]],
    }


def main() -> None:
    """Up and down."""
    file = sys.argv[1]
    with (
        mock.patch.object(commands, "NodeUpdaterThread", Updater),
        mock.patch.object(ray_installer, "NodeUpdater", Updater),
        # It reads the mounted files where they are on the head.
        mock.patch.object(head_config, "hash_runtime_conf", return_value=("", "")),
        mock.patch.object(commands, "POLL_INTERVAL", 0.1),
        mock.patch.object(aws_config, "time"),  # half a minute, until all of AWS knows a role
        mock.patch.object(commands.usage_lib, "show_usage_stats_prompt"),
    ):
        config = commands.create_or_update_cluster(
            file, None, None, False, False, True, None, True, False
        )
        start_workers()
        region = config["provider"]["region"]
        up = {**in_the_cloud(region), "updates": [one.told() for one in updaters]}
        updaters.clear()
        commands.teardown_cluster(file, True, False, None, False)
    down = {**in_the_cloud(region), "updates": [one.told() for one in updaters]}
    print(json.dumps({"up": up, "down": down}, default=str), file=sys.__stdout__)


main()

"""`ray up` of a cluster file against a cloud that is none, as far as launching the head goes.

    AWS_ENDPOINT_URL=... python tests/cloud_up.py FILE SITE_PACKAGES

The updater, which would ssh to the invented address, is left out. Prints as JSON what it would have
run there, and what the cloud has then.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from unittest import mock

sys.path.append(sys.argv[2])  # last: what lmcot is tested with comes first

import boto3
from ray.autoscaler._private import commands

updates: list[dict[str, Any]] = []


class Updater:
    """Takes down what it is told, and is done."""

    exitcode = 0
    for_recovery = False

    def __init__(self, **options: Any) -> None:
        updates.append(options)

    def start(self) -> None:
        """Does nothing."""

    def join(self) -> None:
        """Is done."""


def main() -> None:
    """Launches the head."""
    with (
        mock.patch.object(commands, "NodeUpdaterThread", Updater),
        mock.patch.object(commands.usage_lib, "show_usage_stats_prompt"),
    ):
        config = commands.create_or_update_cluster(
            sys.argv[1], None, None, False, False, True, None, True, False
        )
    region = config["provider"]["region"]
    ec2 = boto3.client("ec2", region_name=region)
    instances = [
        instance
        for reservation in ec2.describe_instances()["Reservations"]
        for instance in reservation["Instances"]
    ]
    roles = boto3.client("iam", region_name=region).list_roles()["Roles"]
    found = {
        "instances": instances,
        "user_data": [
            ec2.describe_instance_attribute(InstanceId=one["InstanceId"], Attribute="userData")
            for one in instances
        ],
        "roles": [one["RoleName"] for one in roles],
        "keys": [one["KeyName"] for one in ec2.describe_key_pairs()["KeyPairs"]],
        "setup": [updates[0][key] for key in ("setup_commands", "ray_start_commands")],
        "mounts": updates[0]["file_mounts"],
    }
    print(json.dumps(found, default=str), file=sys.__stdout__)


main()

"""Manifests for Kubernetes against the rules of its API.

The schema below holds the fields that a manifest uses, with the rules of the API references of JobSet
(jobset.x-k8s.io/v1alpha2), Job (batch/v1) and Pod (v1): types, allowed values, patterns, limits. A field that it does
not know is refused, as ``kubectl create`` refuses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from magicdrive_core.config.schema import Cluster
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.kubernetes import KubernetesQueue

LABEL = r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"  # DNS-1035, of names that become host names
VARIABLE = r"^[-._a-zA-Z][-._a-zA-Z0-9]*$"
QUALIFIED = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
VALUE = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"


def fields(required: str, **properties: Any) -> dict[str, Any]:
    """Returns the schema of an object of these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def listed(items: dict[str, Any], **limits: Any) -> dict[str, Any]:
    """Returns the schema of a list."""
    return {"type": "array", "items": items, **limits}


def whole(minimum: int = 0) -> dict[str, Any]:
    """Returns the schema of an int32 of at least ``minimum``."""
    return {"type": "integer", "minimum": minimum, "maximum": 2**31 - 1}


TEXT = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": LABEL}
CONTAINER = fields(
    "name image command",
    name=NAME,
    image=TEXT,
    workingDir={"type": "string", "pattern": "^/"},
    command=listed(TEXT, minItems=1),
    env=listed(fields("name", name={"type": "string", "pattern": VARIABLE}, value={"type": "string"})),
    volumeMounts=listed(
        fields(
            "name mountPath",
            name=NAME,
            mountPath={"type": "string", "pattern": "^/[^:]*$"},
            subPath={"type": "string", "pattern": r"^(?!/)(?!(.*/)?\.\.(/|$)).+$"},
        )
    ),
    resources=fields(
        "limits",
        limits={"type": "object", "propertyNames": {"pattern": QUALIFIED}, "additionalProperties": whole(1)},
    ),
)
VOLUME = {
    **fields(
        "name",
        name=NAME,
        persistentVolumeClaim=fields(
            "claimName", claimName={"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
        ),
        emptyDir=fields("", medium={"enum": ["", "Memory"]}, sizeLimit={"type": "string", "pattern": QUANTITY}),
    ),
    "minProperties": 2,
    "maxProperties": 2,  # a name and one source
}
POD = fields(
    "restartPolicy containers",
    restartPolicy={"const": "Never"},  # a Job with podFailurePolicy allows no other
    terminationGracePeriodSeconds=whole(),
    containers=listed(CONTAINER, minItems=1),
    volumes=listed(VOLUME),
    nodeSelector={
        "type": "object",
        "propertyNames": {"pattern": QUALIFIED},
        "additionalProperties": {"type": "string", "pattern": VALUE},
    },
)
POD_FAILURE_RULE = {
    **fields(
        "action",
        action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
        onExitCodes=fields(
            "operator values",
            containerName=NAME,
            operator={"enum": ["In", "NotIn"]},
            values=listed(whole(1), minItems=1, maxItems=255, uniqueItems=True),  # 0 may not be in a list of In
        ),
        onPodConditions=listed(
            fields("type status", type=TEXT, status={"enum": ["True", "False", "Unknown"]}), minItems=1, maxItems=20
        ),
    ),
    "minProperties": 2,
    "maxProperties": 2,  # an action and one cause
}
JOB = fields(
    "template",
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    parallelism=whole(),
    completions=whole(1),
    backoffLimit=whole(),
    podFailurePolicy=fields("rules", rules=listed(POD_FAILURE_RULE, maxItems=20)),
    template=fields("spec", spec=POD),
)
JOB_SET_RULE = fields(
    "action",
    name={"type": "string", "pattern": r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", "maxLength": 128},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=listed(
        {
            "enum": [
                *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes"),
                *("MaxFailedIndexesExceeded", "PodFailurePolicy"),
            ]
        },
        uniqueItems=True,
    ),
    targetReplicatedJobs=listed(NAME),
)
JOB_SET = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields("name", name=NAME, namespace=NAME),
    spec=fields(
        "replicatedJobs",
        network=fields("", enableDNSHostnames={"type": "boolean"}),
        ttlSecondsAfterFinished=whole(),
        failurePolicy=fields("", maxRestarts=whole(), rules=listed(JOB_SET_RULE, maxItems=20)),
        replicatedJobs=listed(
            fields("name template", name=NAME, replicas=whole(), template=fields("spec", spec=JOB)), minItems=1
        ),
    ),
)


def manifest(settings: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a job, as it is read from its file."""
    cluster = Cluster.model_validate(
        {
            "launcher": "kubernetes",
            "ranks": 8,
            "kubernetes": {"image": "registry/magicdrive:1", "volume_claim": "work"} | settings,
        }
    )
    assert cluster.kubernetes is not None
    values: dict[str, Any] = {
        "name": "magicdrive-stage3-0123456789ab",
        "command": ["-m", "magicdrive_core.training.worker", "runs/stage3"],
        "folder": Path("runs/stage3/launch-1"),
        "log": Path("runs/stage3/log.txt"),
        "status": Path("runs/stage3/status.json"),
        "hosts": 8,
        "ranks": 8,
        "environment": {"NCCL_DEBUG": "WARN"},
        "threads": 0,
        "stall_seconds": 1800.0,
        "grace_seconds": 300.0,
    }
    parsed: dict[str, Any] = yaml.safe_load(KubernetesQueue(cluster.kubernetes).render(Job(**values | job)))
    return parsed


def check(job_set: dict[str, Any]) -> None:
    """Refuses a manifest that the cluster would refuse, for its fields or for how they depend on each other."""
    faults = [f"{fault.json_path}: {fault.message}" for fault in Draft202012Validator(JOB_SET).iter_errors(job_set)]
    assert not faults, faults
    for replicated in job_set["spec"]["replicatedJobs"]:
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        name, replicas = replicated["name"], replicated.get("replicas", 1)
        last = f"{job_set['metadata']['name']}-{name}-{replicas - 1}-{job['completions'] - 1}"
        assert len(last) <= 63, f"the host name {last} is too long"
        assert job["completionMode"] == "Indexed"
        assert job["parallelism"] <= job["completions"]
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert len(volumes) == len(set(volumes))
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
            names = [each["name"] for each in container["env"]]
            assert len(names) == len(set(names))
        containers = {container["name"] for container in pod["containers"]}
        for rule in job["podFailurePolicy"]["rules"]:
            assert rule.get("onExitCodes", {}).get("containerName", "ranks") in containers


LABELS = st.from_regex(r"\A[a-z]([-a-z0-9]{0,20}[a-z0-9])?\Z")


@given(
    settings=st.fixed_dictionaries(
        {
            "namespace": LABELS,
            "volume_claim": LABELS,
            "project": st.sampled_from([".", "experiments/one"]),
            "devices": st.sampled_from([None, "nvidia.com/gpu", "huawei.com/Ascend910"]),
            "shared_memory": st.sampled_from(["64Gi", "500M"]),
            "node_selector": st.dictionaries(LABELS, st.sampled_from(["", "h100", "A-1_b.c"]), max_size=3),
        }
    ),
    job=st.fixed_dictionaries(
        {
            "hosts": st.integers(1, 128),
            "ranks": st.integers(1, 16),
            "environment": st.dictionaries(
                st.from_regex(r"\A[A-Z_][A-Z0-9_]{0,20}\Z"), st.text(max_size=20), max_size=4
            ),
            "grace_seconds": st.floats(1, 3600),
        }
    ),
)
def test_every_manifest_obeys_the_rules_of_the_cluster(settings: dict[str, Any], job: dict[str, Any]) -> None:
    check(manifest(settings, job))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("metadata", "name"), "Stage_3"),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolicy"), "Always"),
        (
            ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"),
            [0],
        ),
        (("spec", "replicas"), 2),
    ],
)
def test_the_check_finds_a_wrong_field(path: tuple[Any, ...], value: Any) -> None:
    job_set = manifest({}, {})
    parent: Any = job_set
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(AssertionError):
        check(job_set)

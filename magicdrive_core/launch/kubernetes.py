"""Kubernetes: a JobSet with one pod for each host, which its controller restarts on exit status 75 and on eviction.

Kubeflow's TrainJob is turned into a JobSet (jobset.x-k8s.io/v1alpha2) too; rendered directly, it needs no more than the
JobSet controller, and the restart policy is in one file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from magicdrive_core.config.schema import Kubernetes
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.process_group import RESUMABLE
from magicdrive_core.launch.queue import query, run_command

MOUNT = "/project"  # the project's folder in a pod
PORT = 29400
KILL_SECONDS = 30  # after the ranks' own grace, for the launcher in the pod to end
KEPT_SECONDS = 86400  # how long a finished JobSet can be inspected


class KubernetesQueue:
    """The Kubernetes cluster that ``kubectl`` reaches.

    Args:
        settings: image, volume claim, namespace, devices.
    """

    file = "jobset.yaml"

    def __init__(self, settings: Kubernetes) -> None:
        self._settings = settings

    def render(self, job: Job) -> str:
        """Return the manifest of a job.

        Args:
            job: hosts, ranks, environment and grace.

        Returns:
            A JobSet as YAML.
        """
        return yaml.safe_dump(self._job_set(job), sort_keys=False, width=120)

    def submit(self, job: Job, path: Path) -> str:
        """Create the JobSet; a finished one of the job's name is removed first.

        Args:
            job: whose name the JobSet has.
            path: the rendered manifest.

        Returns:
            The JobSet's name.

        Raises:
            MagicDriveError: kubectl is not installed, or the cluster refused, with its reason.
        """
        self._kubectl("delete", "jobset", job.name, "--ignore-not-found", "--cascade=foreground")
        self._kubectl("create", "--filename", str(path))
        return job.name

    def ended(self, name: str) -> bool:
        """Return whether a JobSet has completed, has failed for good, or is gone.

        Args:
            name: the JobSet's name.

        Returns:
            False, too, where the cluster does not answer.

        Raises:
            MagicDriveError: kubectl is not installed.
        """
        result = query([*self._command, "get", "jobset", name, "--output", "json"])
        if result.returncode:
            return "NotFound" in result.stderr
        conditions = json.loads(result.stdout).get("status", {}).get("conditions", [])
        return any(each["type"] in ("Completed", "Failed") and each["status"] == "True" for each in conditions)

    def cancel(self, name: str) -> None:
        """Delete a JobSet: its pods get SIGTERM and their grace, and it stays until they are gone.

        Args:
            name: the JobSet's name; it may be gone already.

        Raises:
            MagicDriveError: kubectl is not installed, or the cluster refused, with its reason.
        """
        self._kubectl("delete", "jobset", name, "--ignore-not-found", "--cascade=foreground", "--wait=false")

    @property
    def _command(self) -> list[str]:
        return ["kubectl", "--namespace", self._settings.namespace]

    def _kubectl(self, *words: str) -> None:
        run_command([*self._command, *words])

    def _job_set(self, job: Job) -> dict[str, Any]:
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {"name": job.name, "namespace": self._settings.namespace},
            "spec": {
                "network": {"enableDNSHostnames": True},  # host 0 has a name
                "ttlSecondsAfterFinished": KEPT_SECONDS,
                # A job that podFailurePolicy failed is restarted without limit; any other failure is final.
                "failurePolicy": {
                    "maxRestarts": 0,
                    "rules": [
                        {
                            "name": "saved",
                            "action": "RestartJobSetAndIgnoreMaxRestarts",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        }
                    ],
                },
                "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": self._hosts(job)}}],
            },
        }

    def _hosts(self, job: Job) -> dict[str, Any]:
        saved = {"containerName": "ranks", "operator": "In", "values": [RESUMABLE]}
        evicted = {"type": "DisruptionTarget", "status": "True"}
        return {
            "completionMode": "Indexed",  # a pod knows its number
            "parallelism": job.hosts,
            "completions": job.hosts,
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": saved},
                    {"action": "FailJob", "onPodConditions": [evicted]},
                ]
            },
            "template": {"spec": self._pod(job)},
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        settings = self._settings
        meeting = {"MASTER_ADDR": f"{job.name}-hosts-0-0.{job.name}", "MASTER_PORT": str(PORT)}
        project: dict[str, Any] = {"name": "project", "mountPath": MOUNT}
        if settings.project != ".":
            project["subPath"] = settings.project
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": int(job.grace_seconds) + KILL_SECONDS,
            "containers": [
                {
                    "name": "ranks",
                    "image": settings.image,
                    "workingDir": MOUNT,
                    "command": [settings.python, "-m", "magicdrive_core.launch.host", str(job.folder)],
                    "env": [{"name": k, "value": v} for k, v in sorted((job.environment | meeting).items())],
                    "volumeMounts": [project, {"name": "shared-memory", "mountPath": "/dev/shm"}],
                }
            ],
            "volumes": [
                {"name": "project", "persistentVolumeClaim": {"claimName": settings.volume_claim}},
                {
                    "name": "shared-memory",
                    "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory},
                },
            ],
        }
        if settings.devices:
            pod["containers"][0]["resources"] = {"limits": {settings.devices: job.ranks}}
        if settings.node_selector:
            pod["nodeSelector"] = settings.node_selector
        return pod

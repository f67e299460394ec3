"""Scripts and manifests that the launchers submit, and settings that cannot be launched."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from magicdrive_core.config.load import load_config
from magicdrive_core.config.schema import Cluster
from magicdrive_core.errors import UsageError
from magicdrive_core.launch.job import Job
from magicdrive_core.launch.launcher import show_job

PROJECT = Path(__file__).resolve().parents[2]
KUBERNETES = {"image": "registry/magicdrive:1", "volume_claim": "work", "project": "experiments/one"}


def cluster(**settings: object) -> Cluster:
    return Cluster.model_validate({"hosts": 8, "ranks": 8, "grace_seconds": 300} | settings)


def job(of: Cluster) -> Job:
    return Job.of(
        of,
        "magicdrive-stage3-0123456789ab",
        ["-m", "magicdrive_core.training.worker", "runs/stage3-0123456789ab"],
        folder=Path("runs/stage3-0123456789ab/launch"),
        log=Path("log.txt"),
        status=Path("status.json"),
        environment={"MLFLOW_RUN_ID": "f" * 32},
    )


def test_a_batch_script_of_64_ranks() -> None:
    of = cluster(
        launcher="slurm",
        slurm={"partition": "gpu", "account": "research", "setup": ["module load cuda"], "options": ["--qos=high"]},
        environment={"NCCL_SOCKET_IFNAME": "ib0", "QUOTED": "a 'b' $c"},
    )
    script = show_job(of, job(of))
    lines = script.splitlines()
    for wanted in (
        "#SBATCH --nodes=8",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gres=gpu:8",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=research",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --signal=TERM@300",
        "#SBATCH --requeue",
        "#SBATCH --qos=high",
        "module load cuda",
        "export NCCL_SOCKET_IFNAME=ib0",
        f"export MLFLOW_RUN_ID={'f' * 32}",
        """export QUOTED='a '"'"'b'"'"' $c'""",
    ):
        assert wanted in lines
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < lines.index("module load cuda")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_batch_script_has_no_option_that_is_not_set() -> None:
    of = cluster(launcher="slurm", slurm={"devices": None})
    script = show_job(of, job(of))
    assert not any(word in script for word in ("--gres", "--partition", "--account", "None"))


def test_a_job_set_of_64_ranks() -> None:
    of = cluster(launcher="kubernetes", kubernetes=KUBERNETES, environment={"NCCL_DEBUG": "WARN"})
    manifest = yaml.safe_load(show_job(of, job(of)))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = manifest["spec"]
    (hosts,) = spec["replicatedJobs"]
    template = hosts["template"]["spec"]
    assert (template["parallelism"], template["completions"], template["completionMode"]) == (8, 8, "Indexed")
    pod = template["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 300
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["command"][1:] == ["-m", "magicdrive_core.launch.host", "runs/stage3-0123456789ab/launch"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    name = manifest["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-hosts-0-0.{name}"
    assert variables["NCCL_DEBUG"] == "WARN"
    assert variables["MLFLOW_RUN_ID"] == "f" * 32
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[container["workingDir"]]["subPath"] == "experiments/one"
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in mounts.values()}


def test_pods_that_saved_or_were_evicted_are_started_again_and_others_are_not() -> None:
    of = cluster(launcher="kubernetes", kubernetes=KUBERNETES)
    spec = yaml.safe_load(show_job(of, job(of)))["spec"]
    template = spec["replicatedJobs"][0]["template"]["spec"]
    saved, evicted = template["podFailurePolicy"]["rules"]
    assert saved["onExitCodes"] == {"containerName": "ranks", "operator": "In", "values": [75]}
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert {saved["action"], evicted["action"]} == {"FailJob"}
    assert template["backoffLimit"] == spec["failurePolicy"]["maxRestarts"] == 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def test_the_command_line_of_a_local_group() -> None:
    of = cluster(hosts=1, ranks=2)
    agent = "python -m magicdrive_core.launch.elastic --ranks 2 -- -m magicdrive_core.training.worker runs/stage3-"
    assert show_job(of, job(of)).startswith(f"MLFLOW_RUN_ID={'f' * 32} {agent}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.hosts=2"], "hosts 2 needs launcher slurm or kubernetes"),
        (["cluster.launcher=slurm"], "launcher slurm needs a slurm section"),
        (["cluster.launcher=kubernetes"], "launcher kubernetes needs a kubernetes section with image and volume_claim"),
        (["cluster.launcher=kubernetes", "cluster.kubernetes={image: a}"], "volume_claim"),
        (["cluster.launcher=slurm", "cluster.slurm={time: tomorrow}"], "cluster.slurm.time"),
        (["cluster.launcher=slurm", "cluster.slurm={gpus: 8}"], "cluster.slurm.gpus"),
        (
            ["cluster.launcher=slurm", "cluster.slurm={}", "cluster.hosts=3", "cluster.sequence_parallel=4"],
            "does not divide cluster.hosts * cluster.ranks 6: choose one of 1, 2",
        ),
    ],
)
def test_settings_that_cannot_be_launched(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(PROJECT / "profiles/demo.yaml", overrides)
    assert message in caught.value.message

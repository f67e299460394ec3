"""The schema of params.yaml: the root, and all sections by name; fingerprints of sections.

Each setting carries its meaning, unit, source and the modules that read it (``about``). DVC reads the same file, so
that a changed value reruns what depends on it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any

from pydantic import BaseModel, model_validator

from magicdrive_core.config.base import (
    Count,
    PositiveFloat,
    Probability,
    Section,
    about,
    bucket_name,
    check_frames,
    parse_size,
)
from magicdrive_core.config.cluster_section import Cluster, Kubernetes, Slurm
from magicdrive_core.config.data_sections import Conditions, Data, Latents, Synth, Text, TextBuild, Vae, VaeBuild
from magicdrive_core.config.generation_sections import (
    I3D,
    Generate,
    LongSet,
    Scores,
    Submission,
    Unconditional,
    Video,
)
from magicdrive_core.config.training_sections import STAGES, Bucket, Flow, Lora, Model, Stage, StageConfig, Training

# Other packages import the whole schema from here, whatever file defines a part of it.
__all__ = [
    "I3D",
    "STAGES",
    "Bucket",
    "Cluster",
    "Conditions",
    "Config",
    "Count",
    "Data",
    "Flow",
    "Generate",
    "Kubernetes",
    "Latents",
    "LongSet",
    "Lora",
    "Model",
    "PositiveFloat",
    "Probability",
    "Scores",
    "Section",
    "Slurm",
    "Stage",
    "StageConfig",
    "Submission",
    "Synth",
    "Text",
    "TextBuild",
    "Tracking",
    "Training",
    "Unconditional",
    "Vae",
    "VaeBuild",
    "Video",
    "bucket_name",
    "check_frames",
    "fingerprint",
    "parse_size",
]


class Tracking(Section):
    """Where MLflow records runs and models."""

    uri: Annotated[str, about("Address of MLflow's database or server.", used_in="tracking/runs.py")] = (
        "sqlite:///tracking/mlflow.db"
    )
    artifacts: Annotated[str, about("Folder of the runs' files.", used_in="tracking/runs.py")] = "tracking/artifacts"
    experiment: Annotated[str, about("MLflow experiment that the runs belong to.", used_in="tracking/runs.py")] = (
        "magicdrive"
    )


class Config(Section):
    """The whole of params.yaml."""

    profile: Annotated[
        str,
        about("Name of these settings, for runs and registered models.", used_in="tracking/lineage.py"),
    ]
    published: Annotated[
        bool,
        about(
            "Copy the published system's oddities, which its released weights need. Networks that are trained here do"
            " not.",
            source="decision record 0003",
            used_in="model/build.py",
        ),
    ] = False
    synth: Annotated[Synth | None, about("The generated data set. null: the data is the user's own.")] = None
    data: Annotated[Data, about("The data set.")]
    conditions: Annotated[Conditions, about("What the network is conditioned on, in each frame.")]
    vae: Annotated[Vae, about("The VAE.")]
    text: Annotated[Text, about("The text encoder.")]
    latents: Annotated[Latents, about("Encoded clips.")]
    flow: Annotated[Flow, about("Noise levels of rectified flow.")] = Flow()
    model: Annotated[Model, about("Sizes of the network.")]
    training: Annotated[Training, about("The three stages and what they share.")]
    cluster: Annotated[Cluster, about("Where a process group runs.")]
    generate: Annotated[Generate, about("Sampling with the trained network.")]
    video: Annotated[Video, about("The files of generated views.")]
    submission: Annotated[Submission, about("The W-CODA 2024 package.")]
    scores: Annotated[Scores, about("What the package is scored with.")] = Scores()
    tracking: Annotated[Tracking, about("Where MLflow records runs and models.")] = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        sizes = {bucket.resolution for stage in STAGES for bucket in self.training.stage(stage).buckets}
        for size in sorted(sizes | {self.generate.resolution}):
            if size not in self.conditions.map_cells:
                raise ValueError(f"conditions.map_cells has no entry for {size}, which is trained or generated")
        world = "cluster.ranks" if self.cluster.hosts == 1 else "cluster.hosts * cluster.ranks"
        heads = {"model.heads": self.model.heads}
        shares = {self.cluster.sequence_parallel_of(stage) for stage in STAGES}
        for section, share, counts in (
            *(("cluster", share, {world: self.cluster.world, **heads}) for share in sorted(shares)),
            ("generate", self.generate.sequence_parallel, heads),
        ):
            for name, count in counts.items():
                if count % share:
                    common = math.gcd(*counts.values())
                    fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                    raise ValueError(
                        f"{section}.sequence_parallel {share} does not divide {name} {count}: choose one of {fits}"
                    )
        if self.generate.pad_patches and not self.published:
            raise ValueError("generate.pad_patches needs published: true; without it padding is never seen")
        if self.model.rays and self.published:
            raise ValueError("model.rays needs published: false; the published network has no rays")
        for stage in STAGES:
            if self.training.stage(stage).simulate_sizes and not self.published:
                raise ValueError(
                    f"training.{stage}.simulate_sizes needs published: true; without it padding is never seen"
                )
        return self


def fingerprint(*parts: Any) -> str:
    """Digests everything that decides a result, so that equal fingerprints mean equal results.

    Args:
        *parts: sections of the configuration, or plain JSON values; their order counts, that of keys does not.

    Returns:
        64 hex digits (SHA-256) that change with any of the parts.
    """
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""The schema of params.yaml: each setting with its meaning, its bounds and its default; fingerprints of sections.

DVC reads the same file, so that changing one value reruns what depends on it and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from magicdrive_core.config.base import (
    Count,
    Frames,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Size,
    bucket_name,
    check_frames,
    parse_size,
)
from magicdrive_core.config.cluster_section import Cluster, Kubernetes, Slurm
from magicdrive_core.config.training_sections import STAGES, Bucket, Stage, StageConfig, Training

# The whole schema is imported from here, whatever file a part of it stands in.
__all__ = [
    "STAGES",
    "Bucket",
    "Cluster",
    "Count",
    "Kubernetes",
    "PositiveFloat",
    "Probability",
    "Section",
    "Slurm",
    "Stage",
    "StageConfig",
    "Training",
    "bucket_name",
    "check_frames",
    "parse_size",
]

Unconditional = Literal["consistent", "rflow", "rflow-slice"]


def _check_val_scenes(value: Any) -> Any:
    if value != "auto" and not (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
        raise ValueError("write auto, or a list of scene names")
    return value


class Synth(Section):
    """The generated data set (``magicdrive synth``)."""

    seed: Count
    scenes: Positive
    seconds: PositiveFloat  # length of a scene; key frames at 2 Hz, camera sweeps at 12 Hz


class Data(Section):
    """Which data to use."""

    format: Literal["nuscenes", "argoverse2"] = "nuscenes"  # data/adapters.py
    root: (
        str  # folder that holds samples/, sweeps/, maps/ and the version's table folder (argoverse2: version's folder)
    )
    version: str  # v1.0-demo (generated), v1.0-mini, v1.0-trainval, or any other table folder (argoverse2: of logs)
    # "auto": the official split where the devkit knows the version, else the last quarter of the scenes
    val_scenes: Annotated[Literal["auto"] | list[str], BeforeValidator(_check_val_scenes)] = "auto"
    # between key frames, objects that only one of the two holds; never carried on where published is true
    unpaired: Literal["leave_out", "carry_on"] = "leave_out"
    skip_bad: bool = False  # leave out scenes with broken records, maps or pictures, listed in infos.json


class Conditions(Section):
    """What the network is told about a frame."""

    # BEV map cells per side (100 m), by size of the video. model.map_channels of n numbers halves them n - 2 times,
    # best to the columns of the latents, an eighth of the video's
    map_cells: dict[Size, Positive]
    # cached: drawn once for all frames; live: when a clip is read, a millisecond a frame. The same bits
    maps: Literal["cached", "live"] = "cached"


class VaeBuild(Section):
    """A small CogVideoX VAE, trained on the pictures in a DVC stage."""

    block_out_channels: list[Positive]  # at full size, a half, a quarter, an eighth
    latent_channels: Positive
    layers_per_block: Positive
    resolution: Size  # at which pictures are trained
    steps: Positive
    batch: Positive  # crops a step
    crop: Positive  # pixels a side
    clips: Positive = 48  # of nine frames, read once and cropped again and again
    clip_every: Positive = 4  # steps: one of so many sees a clip, the others see single frames
    learning_rate: PositiveFloat
    seed: Count

    @model_validator(mode="after")
    def _fits_the_linear_start(self) -> VaeBuild:
        widths, pairs = self.block_out_channels, 2 * self.latent_channels + 2
        if len(widths) != 4 or widths != sorted(widths) or widths[0] == widths[1] or widths[2] == widths[3]:
            raise ValueError(f"block_out_channels {widths} must be four numbers, rising at the first and the last step")
        if widths[0] < 8 or widths[3] < pairs:
            raise ValueError(
                f"block_out_channels {widths} must begin with 8 or more and end with {pairs} or more"
                f" for {self.latent_channels} latent_channels"
            )
        return self


class Vae(Section):
    path: str  # a from_pretrained folder
    build: VaeBuild | None = None  # null: the folder exists already (CogVideoX-2b/vae)
    chunk_frames: Positive | None = 8  # encode in chunks of this many frames (+ the first); null: whole clips
    scaling_factor: PositiveFloat | Literal["measure"] = 1.15258426  # latents = sample * factor; "measure": 1 / std


class TextBuild(Section):
    """A small T5 encoder with random weights and a tokenizer of the data's own words."""

    width: Positive
    layers: Positive
    heads: Positive
    feed_forward: Positive
    seed: Count


class Text(Section):
    path: str  # a from_pretrained folder with model and tokenizer
    build: TextBuild | None = None  # null: the folder exists already (t5-v1_1-xxl)
    max_tokens: Positive = 300
    live: bool = False  # training encodes each caption when it first comes; only class names are encoded before


class Latents(Section):
    """Encoded clips, made once before training."""

    start_stride: Positive  # a clip of several frames starts at every n-th frame; single frames are the key frames
    dtype: Literal["float16", "float32"] = "float16"
    live: bool = False  # training encodes each clip when it is read; nothing is encoded before, nothing is stored
    scaled_decoding: bool = (
        False  # of JPEG: several times as fast, 50 dB from whole decoding (benchmarks/results/data.md)
    )


class Flow(Section):
    """Rectified flow's noise levels."""

    # The size at which a single picture's levels stay as drawn. Larger videos are moved to more noise, smaller ones to
    # less; small videos need a small base, or training hardly ever sees the noise that decides what a picture shows.
    base_size: Size = "512x512"

    @property
    def base_pixels(self) -> int:
        height, width = parse_size(self.base_size)
        return height * width


class Model(Section):
    """The network's sizes. The published XL: width 1152, depth 28, heads 16, control_depth 13."""

    width: Positive
    depth: Positive
    heads: Positive
    control_depth: Positive
    temporal_heads: Positive  # of the box and ego-motion embedders
    box_widths: list[Positive]  # hidden widths of the box projection, after its first linear layer
    map_channels: list[Positive]  # of the BEV map's convolutions

    @model_validator(mode="after")
    def _divisible(self) -> Model:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must split into heads ({self.heads}) of even width")
        if self.width % self.temporal_heads or (self.width // self.temporal_heads) % 2:
            raise ValueError(f"width {self.width} must split into temporal_heads ({self.temporal_heads}) of even width")
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 (position embedding)")
        if self.control_depth > self.depth:
            raise ValueError(f"control_depth {self.control_depth} must be at most depth {self.depth}")
        return self


class Generate(Section):
    """Sampling."""

    resolution: Size
    frames: Frames
    steps: Positive = 30
    guidance: Annotated[float, Field(ge=1)] = 2.0
    # What guidance leads away from. consistent: the state that training knows, everything dropped (published: all but
    # the map). rflow, rflow-slice: the published samplers' own (decision 0003, no. 9). null: rflow where published
    unconditional: Unconditional | None = None
    use_map0: bool = True  # rflow: an empty map in it, as in the published test configurations; rflow-slice: always
    generations: Positive = 4
    # A registered model (models:/NAME@ALIAS, models:/NAME/VERSION), or the folder of magicdrive import-checkpoint.
    # null: the last stage that is trained here
    weights: str | None = None
    seed: Count = 1024
    workers: Positive = 1  # processes that share the items: on this host, or on all hosts of the task runner
    task_runner: Literal["threads", "dask", "ray"] = (
        "threads"  # of Prefect; threads: this host (docs/how-to/prefect.md)
    )
    scheduler: str | None = None  # address of Dask's or Ray's; null: one on this host, for as long as it takes
    sequence_parallel: Positive = 1  # devices that share the work on each clip, of every worker; divides model.heads
    guidance_parallel: bool = False  # guidance's two passes on devices of their own, twice as many then: the same bits
    # Blocks are passed anew only where the noise level (of 1000) has fallen by more than this since they were; between,
    # what they added last is added again. null: at every step. Saving and error: benchmarks/results/generation.md
    step_cache: PositiveFloat | None = None
    # of the network; null: as it was trained, on a CPU fp32
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    # the network's blocks by torch.compile, as in training: the same to rounding, after minutes at each start
    compile: Literal["inductor", "aot_eager"] | None = None
    # published only: the parallel size whose padding rows the patches get (its models know 4 and 8); null: the real one
    pad_patches: Positive | None = None
    offload: bool = False  # on a GPU: the VAE waits in main memory while the network samples, and the other way round
    # rows that the VAE decodes at a time: the same frames to rounding, in 12 GB at 848x1600; null: whole pictures
    stripe_rows: Positive | None = None
    edits: str | None = None  # YAML file of changes to the scenes (docs/how-to/edit-scenes.md)
    # Frames that are sampled at once; longer clips go on window by window, each from the last pictures of the one
    # before. Training gives frames from 29 on, so choose the longest trained length, 33 or more. null: clips whole.
    window: Frames | None = None
    # latent frames that a window continues from, at least: 1 is one picture, n are 4n-3
    initial_latent_frames: Positive = 1
    # What clips begin with. real: the scene's own pictures, as many as `initial_latent_frames` says. Else the folder of
    # an earlier generation (outputs/generate-...): its videos go on, as far as `frames` says. null: all is generated.
    initial_frames: str | None = None

    @property
    def devices(self) -> int:
        """That a worker takes."""
        return self.sequence_parallel * (2 if self.guidance_parallel and self.guidance > 1 else 1)

    @model_validator(mode="after")
    def _windows_go_on(self) -> Generate:
        frames = 4 * self.initial_latent_frames - 3
        if self.window is not None and self.window < frames + 4:
            raise ValueError(f"window {self.window} must be longer than the {frames} frames of initial_latent_frames")
        return self


class Video(Section):
    """The files of generated views."""

    format: Literal["mp4", "png"] = (
        "mp4"  # png: a folder of frames for each view, nothing lost; packages are mp4 always
    )
    fps: Positive = 12
    max_mbit_s: PositiveFloat | None = 4.0  # of the written file; null: the encoder decides


class LongSet(Section):
    """Round 2's long videos: folders of generated clips (outputs/generate-...), whose first generation is packed."""

    sunny: str  # its clips begin with the frames of the standard set
    rainy: str
    night: str

    def of(self, weather: str) -> str:
        """The folder of one weather."""
        return {"sunny": self.sunny, "rainy": self.rainy, "night": self.night}[weather]


class Submission(Section):
    """The W-CODA 2024 package."""

    team: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
    frames: Positive = 16  # kept of each generated clip
    long: LongSet | None = None  # null: no long set
    long_scenes: Positive = 3  # that stand in all three weathers


class I3D(Section):
    """The user's own I3D of Kinetics-400 as TorchScript: (B, 3, 16, 224, 224) in [-1, 1] -> logits (B, 400)."""

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # figures of other weights must not be compared


class Scores(Section):
    """What the package is scored with, beyond the built-in extractor; what is left out is not scored."""

    i3d: I3D | None = None  # for FVD
    # nuScenes detection results of a detector run on each generation (magicdrive export-frames), JSON
    detections: list[str] = []
    bev_masks: list[str] = []  # BEV masks predicted from each generation, npz (scores/segmentation.py)
    bev_truth: str | None = None  # npz with the true masks of the same classes; null: the project's own BEV maps


class Tracking(Section):
    uri: str = "sqlite:///tracking/mlflow.db"
    artifacts: str = "tracking/artifacts"
    experiment: str = "magicdrive"


class Config(Section):
    """The whole of params.yaml."""

    profile: str
    published: bool = False  # copy the published oddities, which its weights need: decision 0003
    synth: Synth | None = None  # null: the data is the user's own
    data: Data
    conditions: Conditions
    vae: Vae
    text: Text
    latents: Latents
    flow: Flow = Flow()
    model: Model
    training: Training
    cluster: Cluster
    generate: Generate
    video: Video
    submission: Submission
    scores: Scores = Scores()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        sizes = {bucket.resolution for stage in STAGES for bucket in self.training.stage(stage).buckets}
        for size in sorted(sizes | {self.generate.resolution}):
            if size not in self.conditions.map_cells:
                raise ValueError(f"conditions.map_cells has no entry for {size}, which is trained or generated")
        world = "cluster.ranks" if self.cluster.hosts == 1 else "cluster.hosts * cluster.ranks"
        for section, share, counts in (
            ("cluster", self.cluster.sequence_parallel, {world: self.cluster.world, "model.heads": self.model.heads}),
            ("generate", self.generate.sequence_parallel, {"model.heads": self.model.heads}),
        ):
            for name, count in counts.items():
                if count % share:
                    common = math.gcd(*counts.values())
                    fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
                    raise ValueError(
                        f"{section}.sequence_parallel {share} does not divide {name} {count}: choose one of {fits}"
                    )
        if self.generate.pad_patches and not self.published:
            raise ValueError("generate.pad_patches is for published: true; else no padding is seen")
        for stage in STAGES:
            if self.training.stage(stage).simulate_sizes and not self.published:
                raise ValueError(f"training.{stage}.simulate_sizes is for published: true; else no padding is seen")
        return self


def fingerprint(*parts: Any) -> str:
    """64 hex digits that change with any of the parts: sections of the configuration, or plain JSON values."""
    plain = [part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

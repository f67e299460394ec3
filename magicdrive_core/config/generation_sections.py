"""Settings of what is made with a trained network: clips, video files, the W-CODA submission and its scores."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from magicdrive_core.config.base import PUBLISHED, WCODA, Count, Frames, Positive, PositiveFloat, Section, Size, about

Unconditional = Literal["consistent", "rflow", "rflow-slice"]


class Generate(Section):
    """Sampling: which clips, with which network, on which devices."""

    resolution: Annotated[Size, about("Size of the generated videos.", unit="pixels", used_in="inference/sampler.py")]
    frames: Annotated[
        Frames,
        about(
            "Length of a generated clip: 8n+1, or as many frames as the scene has.",
            unit="frames at 12 Hz",
            used_in="inference/items.py",
        ),
    ]
    steps: Annotated[
        Positive, about("Sampling steps.", unit="steps", source=PUBLISHED, used_in="inference/sampler.py")
    ] = 30
    guidance: Annotated[
        float,
        Field(ge=1),
        about(
            "Scale of classifier-free guidance. 1: no guidance, one pass per step.",
            source=PUBLISHED,
            used_in="inference/sampler.py",
        ),
    ] = 2.0
    unconditional: Annotated[
        Unconditional | None,
        about(
            "Conditions of the unconditional pass. consistent: the state that training knows, everything dropped"
            " (published: all but the map). rflow, rflow-slice: those of the published samplers. null: rflow where"
            " published is true, else consistent.",
            source="decision record 0003, number 9",
            used_in="inference/sampler.py",
        ),
    ] = None
    use_map0: Annotated[
        bool,
        about(
            "Whether the unconditional pass of rflow has an empty map. That of rflow-slice always has one.",
            source=f"{PUBLISHED} for tests",
            used_in="inference/sampler.py",
        ),
    ] = True
    generations: Annotated[
        Positive,
        about("Videos of each clip, with different noise.", unit="videos", source=WCODA, used_in="inference/items.py"),
    ] = 4
    weights: Annotated[
        str | None,
        about(
            "The network: a registered model (models:/NAME@ALIAS or models:/NAME/VERSION), or a folder of"
            " magicdrive import-checkpoint. null: the last stage that is trained here.",
            used_in="experiment/run_paths.py",
        ),
    ] = None
    seed: Annotated[Count, about("Seed of the noise.", source=PUBLISHED, used_in="inference/items.py")] = 1024
    workers: Annotated[
        Positive,
        about(
            "Processes that share the items, on this host or on all hosts of the task runner.",
            unit="processes",
            used_in="../flows/generate.py",
        ),
    ] = 1
    task_runner: Annotated[
        Literal["threads", "dask", "ray"],
        about("Prefect's task runner for the workers. threads: this host.", used_in="../flows/generate.py"),
    ] = "threads"
    scheduler: Annotated[
        str | None,
        about(
            "Address of Dask's or Ray's scheduler. null: a cluster on this host for the time of the flow.",
            used_in="../flows/generate.py",
        ),
    ] = None
    sequence_parallel: Annotated[
        Positive,
        about(
            "Devices of each worker that share the tokens of a clip. Divides model.heads.",
            unit="devices",
            used_in="inference/sampler.py",
        ),
    ] = 1
    guidance_parallel: Annotated[
        bool,
        about(
            "Guidance's two passes run at the same time on different devices, twice as many as sequence_parallel."
            " The bits are the same.",
            used_in="inference/worker.py",
        ),
    ] = False
    step_cache: Annotated[
        PositiveFloat | None,
        about(
            "The blocks are computed again only where the noise level has fallen by more than this since they last"
            " were; in between, what they added last is added again. null: at every step.",
            unit="noise levels of 1000",
            source="error and saving: benchmarks/results/generation.md",
            used_in="inference/sampler.py",
        ),
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        about("Type of the network's weights. null: as it was trained; fp32 on a CPU.", used_in="inference/models.py"),
    ] = None
    compile: Annotated[
        Literal["inductor", "aot_eager"] | None,
        about(
            "Compile the network's blocks with torch.compile, as in training: equal to rounding, after minutes at each"
            " start. null: no compilation.",
            used_in="inference/models.py",
        ),
    ] = None
    pad_patches: Annotated[
        Positive | None,
        about(
            "Sequence-parallel size whose padding rows the patches get (the published networks know 4 and 8)."
            " null: the real size. Needs published: true.",
            unit="ranks",
            source=f"{PUBLISHED}: force_pad_h_for_sp_size",
            used_in="inference/sampler.py",
        ),
    ] = None
    offload: Annotated[
        bool,
        about(
            "On a GPU: the VAE waits in main memory while the network samples, and the network while the VAE decodes.",
            used_in="inference/models.py",
        ),
    ] = False
    stripe_rows: Annotated[
        Positive | None,
        about(
            "Rows of latents that the VAE decodes at a time: equal to rounding, in 12 GB at 848x1600."
            " null: whole pictures.",
            unit="latent rows",
            used_in="encoders/vae.py",
        ),
    ] = None
    edits: Annotated[str | None, about("YAML file of edits to the scenes. null: none.", used_in="data/edits.py")] = None
    window: Annotated[
        Frames | None,
        about(
            "Frames that are sampled at once. A longer clip is made window by window, each conditioned on the last"
            " frames of the one before. Conditioning frames are trained from 29 frames on, so choose the longest"
            " trained length, 33 or more. null: each clip at once.",
            unit="frames",
            used_in="inference/items.py",
        ),
    ] = None
    initial_latent_frames: Annotated[
        Positive,
        about(
            "Fewest conditioning frames that a window takes from the one before, and number of real initial frames:"
            " n latent frames are 4n-3 frames.",
            unit="latent frames",
            used_in="inference/items.py",
        ),
    ] = 1
    initial_frames: Annotated[
        str | None,
        about(
            "Initial frames of each clip. real: the scene's own pictures, as many as initial_latent_frames says."
            " A folder of an earlier generation (outputs/generate-...): its videos are continued up to frames."
            " null: every frame is generated.",
            used_in="inference/sampler.py",
        ),
    ] = None

    @property
    def devices(self) -> int:
        """Number of devices that one worker takes: ``sequence_parallel``, doubled if ranks split guidance's passes."""
        return self.sequence_parallel * (2 if self.guidance_parallel and self.guidance > 1 else 1)

    @model_validator(mode="after")
    def _windows_move(self) -> Generate:
        frames = 4 * self.initial_latent_frames - 3
        if self.window is not None and self.window < frames + 4:
            raise ValueError(f"window {self.window} must be longer than the {frames} frames of initial_latent_frames")
        return self


class Video(Section):
    """The files of generated views."""

    format: Annotated[
        Literal["mp4", "png"],
        about(
            "mp4: H.264. png: a folder of frames for each view, without loss; packages are always mp4.",
            used_in="inference/writer.py",
        ),
    ] = "mp4"
    fps: Annotated[
        Positive, about("Frame rate.", unit="frames per second", source=WCODA, used_in="inference/writer.py")
    ] = 12
    max_mbit_s: Annotated[
        PositiveFloat | None,
        about(
            "Largest average bit rate of a written file. null: the encoder decides.",
            unit="Mbit/s",
            source=WCODA,
            used_in="video/encoder.py",
        ),
    ] = 4.0


class LongSet(Section):
    """Folders of generated clips (outputs/generate-...) for round 2's long videos; generation 0 is packed."""

    sunny: Annotated[
        str, about("Clips in sun. They start with the frames of the standard set.", used_in="wcoda/long_videos.py")
    ]
    rainy: Annotated[str, about("Clips in rain.", used_in="wcoda/long_videos.py")]
    night: Annotated[str, about("Clips at night.", used_in="wcoda/long_videos.py")]

    def of(self, weather: str) -> str:
        """Returns the folder of one weather.

        Args:
            weather: "sunny", "rainy" or "night".

        Raises:
            KeyError: any other weather.
        """
        return {"sunny": self.sunny, "rainy": self.rainy, "night": self.night}[weather]


class Submission(Section):
    """The W-CODA 2024 package."""

    team: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9_-]+$"),
        about("Team name, with which the package's folders start.", source=WCODA, used_in="wcoda/package.py"),
    ]
    frames: Annotated[
        Positive,
        about(
            "Frames of each generated clip that are packed.", unit="frames", source=WCODA, used_in="wcoda/package.py"
        ),
    ] = 16
    long: Annotated[
        LongSet | None, about("The long set of round 2. null: none.", source=WCODA, used_in="wcoda/long_videos.py")
    ] = None
    long_scenes: Annotated[
        Positive,
        about(
            "Scenes of the long set; each is there in all three weathers.",
            unit="scenes",
            source=WCODA,
            used_in="wcoda/long_videos.py",
        ),
    ] = 3


class I3D(Section):
    """The user's I3D of Kinetics-400 as TorchScript: (B, 3, 16, 224, 224) in [-1, 1] to logits (B, 400)."""

    path: Annotated[str, about("The TorchScript file.", used_in="evaluation/extractors.py")]
    sha256: Annotated[
        str,
        Field(pattern=r"^[0-9a-f]{64}$"),
        about(
            "Digest of the file: distances of different weights must not be compared.",
            used_in="evaluation/extractors.py",
        ),
    ]


class Scores(Section):
    """What the package is scored with, beside the built-in extractor; what is missing is not scored."""

    i3d: Annotated[I3D | None, about("Feature extractor of FVD. null: no FVD.", used_in="evaluation/extractors.py")] = (
        None
    )
    detections: Annotated[
        list[str],
        about(
            "nuScenes detection results (JSON), one file per generation, from a detector that ran on"
            " magicdrive export-frames.",
            used_in="evaluation/score_sheet.py",
        ),
    ] = []
    bev_masks: Annotated[
        list[str],
        about(
            "BEV masks (npz) that a segmentation network predicted, one file per generation.",
            used_in="evaluation/score_sheet.py",
        ),
    ] = []
    bev_truth: Annotated[
        str | None,
        about(
            "True masks (npz) of the same classes. null: the project's own BEV maps.",
            used_in="evaluation/score_sheet.py",
        ),
    ] = None

"""The schema of params.yaml, section training: each setting with its meaning, its bounds and its default."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from magicdrive_core.config.base import Count, Frames, Positive, PositiveFloat, Probability, Section, Size, bucket_name

Stage = Literal["stage1", "stage2", "stage3"]
STAGES: tuple[Stage, ...] = ("stage1", "stage2", "stage3")


class Bucket(Section):
    """Clips of one size and length, and how many of them make a micro-batch of one rank."""

    resolution: Size  # not "size": DVC #10296, which leaves that word out when it looks for an earlier run
    frames: Frames
    batch: Positive
    # one clip a scene, from its first frame on, of the most 8n+1 frames that it has, up to ``frames``
    whole: bool = False
    repeat: Positive = 1  # each clip comes so often in an epoch

    @model_validator(mode="after")
    def _one_length(self) -> Bucket:
        if self.whole and self.batch > 1:
            raise ValueError("scenes have different lengths: whole needs batch 1")
        return self

    @property
    def name(self) -> str:
        """As in folders and metrics; clips of one size and length share their latents."""
        return bucket_name(self.resolution, self.frames)


class StageConfig(Section):
    """One of the three progressive stages."""

    buckets: list[Bucket] = Field(min_length=1)
    steps: Positive
    accumulate: Positive = 1  # micro-batches of each rank (or group that shares clips) whose gradients make a step
    learning_rate: PositiveFloat
    warmup: Count  # steps of linear warm-up, then constant
    seed: Count
    freeze_text: bool = False  # the text projection is trained in stage 1 only
    checkpoint_blocks: bool | Positive = False  # activation checkpointing: of every block, or of every n-th
    balance: bool = False  # scenes of night and rain as often as the others, and "Daytime." said of those
    mask_ratios: dict[str, Probability] = {}  # conditioning-frame masks, from 8 latent frames on
    # published only: parallel sizes whose padding rows a micro-batch may get, drawn from those not below the real one
    simulate_sizes: list[Positive] = []


class Training(Section):
    """What all stages share."""

    stage1: StageConfig
    stage2: StageConfig
    stage3: StageConfig
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"  # of weights and gradients; masters and EMA are fp32
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: PositiveFloat = 1e-15
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: PositiveFloat = 1.0  # gradient norm
    ema: Probability = 0.99
    drop_condition: Probability = 0.15  # of samples: no text, cameras, ego motion, boxes
    drop_frame: Probability = 0.4  # share of middle frames without boxes and ego motion
    hide_boxes: Probability = 0.4  # of frames between key frames: all boxes hidden
    add_boxes: Probability = 0.1  # of views and frames: up to three unseen boxes shown too
    skip_empty: bool = False  # train without the buckets that the data has no clip for, instead of refusing them
    # micro-batches of like cost come in groups of so many: choose ranks / sequence_parallel; 1: the published order
    pair_ranks: Positive = 1
    # memory of each rank for micro-batches that wait; null: a tenth of what the container leaves free
    prefetch_mbytes: Positive | None = None
    checkpoint_every: Positive  # steps
    keep_checkpoints: Positive = 2  # the newest
    keep_every: Positive | None = None  # steps: the first checkpoint of each so many is kept for good; null: none is
    # steps in a row whose loss or gradient is not finite: fewer are skipped, so many end the training
    max_skipped: Positive = 3
    # gradients travel while the backward pass goes on: faster, but suspected of the NaN of ColossalAI #6091
    overlap_communication: bool = False
    # the network's blocks by torch.compile: faster steps after minutes at each start, the same to rounding. aot_eager
    # makes no machine code; it tells whose fault a fault is
    compile: Literal["inductor", "aot_eager"] | None = None
    preview_every: Positive  # steps
    preview_clips: Positive = 3  # validation clips in a preview, of as many scenes
    log_every: Positive = 1
    peak_tflops: PositiveFloat | None = None  # of a device in this precision; null: those that resources.py knows

    def stage(self, name: Stage) -> StageConfig:
        """The settings of one stage."""
        return {"stage1": self.stage1, "stage2": self.stage2, "stage3": self.stage3}[name]

"""Settings of the network, of rectified flow's noise levels and of the three training stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from magicdrive_core.config.base import (
    PUBLISHED,
    Count,
    Frames,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Size,
    about,
    bucket_name,
    parse_size,
)

Stage = Literal["stage1", "stage2", "stage3"]
STAGES: tuple[Stage, ...] = ("stage1", "stage2", "stage3")
Pattern = Annotated[str, Field(min_length=1)]


class Flow(Section):
    """Noise levels of rectified flow."""

    base_size: Annotated[
        Size,
        about(
            "Size at which the noise levels of a single picture stay as drawn. Larger videos are shifted to more noise,"
            " smaller ones to less. Small videos need a small base: else training hardly ever sees the noise levels"
            " that decide what a picture shows.",
            unit="pixels",
            source=PUBLISHED,
            used_in="diffusion/rectified_flow.py",
        ),
    ] = "512x512"

    @property
    def base_pixels(self) -> int:
        """Pixels of ``base_size``."""
        height, width = parse_size(self.base_size)
        return height * width


class Model(Section):
    """Sizes of the network. The published XL network has width 1152, depth 28, heads 16 and control_depth 13."""

    width: Annotated[Positive, about("Width C of every token.", unit="channels", used_in="model/config.py")]
    depth: Annotated[
        Positive,
        about("Number of layers, each a spatial and a temporal block.", unit="layers", used_in="model/config.py"),
    ]
    heads: Annotated[Positive, about("Heads of every attention.", unit="heads", used_in="model/config.py")]
    control_depth: Annotated[
        Positive,
        about(
            "Layers, from the first on, that have control blocks, which bring in the BEV map.",
            unit="layers",
            used_in="model/config.py",
        ),
    ]
    temporal_heads: Annotated[
        Positive,
        about(
            "Heads of the temporal attention in the embedders of boxes and ego motion.",
            unit="heads",
            used_in="model/config.py",
        ),
    ]
    box_widths: Annotated[
        list[Positive],
        about(
            "Hidden widths of the box projection, after its first linear layer.",
            unit="channels",
            used_in="model/config.py",
        ),
    ]
    map_channels: Annotated[
        list[Positive],
        about("Channels of the BEV map's convolutions.", unit="channels", used_in="model/config.py"),
    ]
    rays: Annotated[
        Count,
        about(
            "Rays along each side of a patch of 16 x 16 pixels. Each looks up which box it meets, and what the BEV map"
            " holds where it meets the ground: the network need not learn where boxes and lanes appear in a view."
            " 0: none, as published.",
            unit="rays",
            used_in="model/rays.py",
        ),
    ] = 0

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


class Bucket(Section):
    """Clips of one size and length."""

    # The name is "resolution", not "size": DVC leaves "size" out when it looks for an earlier run (its issue 10296).
    resolution: Annotated[Size, about("Size of the videos.", unit="pixels", used_in="training/loader.py")]
    frames: Annotated[Frames, about("Length of a clip: 8n+1.", unit="frames at 12 Hz", used_in="training/loader.py")]
    batch: Annotated[Positive, about("Clips of a micro-batch of one rank.", unit="clips", used_in="training/loader.py")]
    whole: Annotated[
        bool,
        about(
            "Take one clip of each scene, from its first frame on: the most frames of the form 8n+1 that the scene has,"
            " up to frames. Needs batch 1.",
            used_in="experiment/stages.py",
        ),
    ] = False
    repeat: Annotated[
        Positive, about("How often each clip comes in an epoch.", unit="times", used_in="experiment/stages.py")
    ] = 1

    @model_validator(mode="after")
    def _one_length(self) -> Bucket:
        if self.whole and self.batch > 1:
            raise ValueError("scenes have different lengths: whole needs batch 1")
        return self

    @property
    def name(self) -> str:
        """Name in folders and metrics; buckets of one size and length share their latents."""
        return bucket_name(self.resolution, self.frames)


class StageConfig(Section):
    """One of the three progressive stages."""

    buckets: Annotated[
        list[Bucket],
        Field(min_length=1),
        about("Sizes and lengths of the clips that this stage trains on.", used_in="training/loader.py"),
    ]
    steps: Annotated[Positive, about("Optimizer steps.", unit="steps", used_in="training/loop.py")]
    accumulate: Annotated[
        Positive,
        about(
            "Micro-batches of each rank (or sequence-parallel group) whose gradients are added to one step.",
            unit="micro-batches",
            used_in="training/loop.py",
        ),
    ] = 1
    learning_rate: Annotated[
        PositiveFloat, about("Learning rate between warm-up and decay.", used_in="training/loop.py")
    ]
    warmup: Annotated[
        Count, about("Steps in which the learning rate rises linearly.", unit="steps", used_in="training/loop.py")
    ]
    decay: Annotated[
        Count,
        about(
            "Last steps, in which the learning rate falls linearly to 0. 0: it is constant to the end.",
            unit="steps",
            source=f"{PUBLISHED} has 0",
            used_in="training/loop.py",
        ),
    ] = 0
    seed: Annotated[Count, about("Seed of the initial weights and of all random numbers.", used_in="training/stage.py")]
    freeze_text: Annotated[
        bool,
        about(
            "Keep the text projection as it is. It is trained in stage 1 only.",
            source=PUBLISHED,
            used_in="training/stage.py",
        ),
    ] = False
    checkpoint_blocks: Annotated[
        bool | Positive,
        about(
            "Activation checkpointing. true: every block is computed again in the backward pass; n: every n-th block;"
            " false: none. Gradients are the same bit for bit.",
            unit="blocks",
            used_in="training/loop.py",
        ),
    ] = False
    balance: Annotated[
        bool,
        about(
            'Scenes of night and of rain come as often as the others, whose captions then start with "Daytime.".',
            source=f"{PUBLISHED}, stage 3",
            used_in="experiment/stages.py, training/loader.py",
        ),
    ] = False
    mask_ratios: Annotated[
        dict[str, Probability],
        about(
            "Probability of each kind of conditioning-frame mask, for clips of at least 8 latent frames. The rest of 1"
            " has no conditioning frames.",
            unit="probability",
            source=PUBLISHED,
            used_in="diffusion/frame_masks.py",
        ),
    ] = {}
    simulate_sizes: Annotated[
        list[Positive],
        about(
            "Sequence-parallel sizes whose padding rows a micro-batch may get, drawn from those not below the real"
            " size. Needs published: true.",
            unit="ranks",
            source=f"{PUBLISHED}: simulate_sp_size",
            used_in="training/loader.py",
        ),
    ] = []


class Lora(Section):
    """Low-rank adapters: W + alpha / rank * B A, with the weights W as they are (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[Positive, about("Rank of the adapters.", used_in="training/lora.py")] = 16
    alpha: Annotated[
        PositiveFloat,
        about("Adapters count alpha / rank times. At alpha = rank they count once.", used_in="training/lora.py"),
    ] = 16.0
    targets: Annotated[
        list[Pattern],
        Field(min_length=1),
        about(
            "Patterns of the names of linear maps that get adapters. * stands for any letters, dots too. The default"
            " is all linear maps of all blocks.",
            used_in="training/lora.py",
        ),
    ] = ["*blocks_?.*"]
    dropout: Annotated[
        float,
        Field(ge=0, lt=1),
        about(
            "Share of an adapter's input channels that are left out, drawn for each micro-batch.",
            unit="probability",
            used_in="training/lora.py",
        ),
    ] = 0.0


class Training(Section):
    """What all stages share."""

    stage1: Annotated[StageConfig, about("Stage 1: single frames.")]
    stage2: Annotated[StageConfig, about("Stage 2: short clips; adds the temporal blocks.")]
    stage3: Annotated[StageConfig, about("Stage 3: long clips of mixed sizes.")]
    start_from: Annotated[
        str | None,
        about(
            "The model that training starts from: a registered model (models:/NAME@ALIAS or models:/NAME/VERSION), the"
            " folder of a finished stage or of an imported checkpoint, or a bundle. null: training starts from initial"
            " weights.",
            used_in="experiment/stages.py",
        ),
    ] = None
    first_stage: Annotated[
        Stage,
        about(
            "The first stage that is trained. Stages before it are left out, with their data; it then needs"
            " start_from.",
            used_in="config/training_sections.py",
        ),
    ] = "stage1"
    train_only: Annotated[
        list[Pattern],
        about(
            "Patterns of the names of parameters that are trained; all others keep their values. * stands for any"
            " letters, dots too. Empty: all are trained. With lora: what is trained in full beside the adapters.",
            used_in="training/trainable.py",
        ),
    ] = []
    freeze: Annotated[
        list[Pattern],
        about(
            "Patterns of the names of parameters that keep their values, among those that train_only names.",
            used_in="training/trainable.py",
        ),
    ] = []
    lora: Annotated[
        Lora | None, about("Train adapters of low rank and keep the weights. null: the weights are trained.")
    ] = None
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        about(
            "Type of weights, activations and gradients. Master weights, moments and EMA are always fp32.",
            source=PUBLISHED,
            used_in="training/engine.py",
        ),
    ] = "bf16"
    betas: Annotated[
        tuple[Probability, Probability],
        about("Decay of Adam's two moments.", source=PUBLISHED, used_in="training/engine.py"),
    ] = (0.9, 0.999)
    eps: Annotated[
        PositiveFloat, about("Added to Adam's denominator.", source=PUBLISHED, used_in="training/engine.py")
    ] = 1e-15
    weight_decay: Annotated[
        float, Field(ge=0), about("AdamW's weight decay.", source=PUBLISHED, used_in="training/engine.py")
    ] = 0.01
    max_grad_norm: Annotated[
        PositiveFloat,
        about(
            "Largest norm of all gradients together; larger gradients are scaled down to it.",
            source=PUBLISHED,
            used_in="training/engine.py",
        ),
    ] = 1.0
    ema: Annotated[
        Probability,
        about(
            "Decay of the weights' exponential moving average, per step.", source=PUBLISHED, used_in="training/loop.py"
        ),
    ] = 0.99
    drop_condition: Annotated[
        Probability,
        about(
            "Share of samples that are trained without text, cameras, ego motion, boxes and, unless published, map.",
            unit="probability",
            source=PUBLISHED,
            used_in="training/loader.py",
        ),
    ] = 0.15
    drop_frame: Annotated[
        Probability,
        about(
            "Share of middle frames without boxes and ego motion.",
            unit="probability",
            source=PUBLISHED,
            used_in="training/loader.py",
        ),
    ] = 0.4
    hide_boxes: Annotated[
        Probability,
        about(
            "Share of frames between key frames in which all boxes are hidden.",
            unit="probability",
            source=PUBLISHED,
            used_in="training/loader.py",
        ),
    ] = 0.4
    add_boxes: Annotated[
        Probability,
        about(
            "Share of views and frames that also get up to three boxes which that view does not see.",
            unit="probability",
            source=PUBLISHED,
            used_in="training/loader.py",
        ),
    ] = 0.1
    skip_empty: Annotated[
        bool,
        about(
            "Train without the buckets for which the data has no clip, instead of refusing them.",
            used_in="training/supervise.py",
        ),
    ] = False
    pair_ranks: Annotated[
        Positive,
        about(
            "Micro-batches of similar cost come in groups of this size; choose ranks / sequence_parallel."
            " 1: the published order.",
            unit="micro-batches",
            used_in="training/loader.py",
        ),
    ] = 1
    prefetch_mbytes: Annotated[
        Positive | None,
        about(
            "Memory of each rank for micro-batches that wait. null: a tenth of what the container leaves free.",
            unit="MB",
            used_in="training/budget.py",
        ),
    ] = None
    checkpoint_every: Annotated[
        Positive,
        about(
            "Steps between checkpoints.",
            unit="steps",
            source=f"{PUBLISHED} has 2500 in stage 1, then 1250",
            used_in="training/loop.py",
        ),
    ]
    keep_checkpoints: Annotated[
        Positive, about("Newest checkpoints that are kept.", unit="checkpoints", used_in="training/loop.py")
    ] = 2
    keep_every: Annotated[
        Positive | None,
        about(
            "The first checkpoint of each n steps is kept for good. null: none is.",
            unit="steps",
            used_in="training/loop.py",
        ),
    ] = None
    max_skipped: Annotated[
        Positive,
        about(
            "Steps in a row with a non-finite loss or gradient that end the training. Fewer are skipped.",
            unit="steps",
            used_in="training/loop.py",
        ),
    ] = 3
    overlap_communication: Annotated[
        bool,
        about(
            "Reduce gradients while the backward pass still runs: faster, but suspected of the NaN of"
            " ColossalAI issue 6091.",
            used_in="training/engine.py",
        ),
    ] = False
    compile: Annotated[
        Literal["inductor", "aot_eager"] | None,
        about(
            "Compile the network's blocks with torch.compile: faster steps after minutes at each start, equal to"
            " rounding. aot_eager makes no machine code; it shows which part is at fault. null: no compilation.",
            used_in="training/loop.py",
        ),
    ] = None
    preview_every: Annotated[Positive, about("Steps between previews.", unit="steps", used_in="training/loop.py")]
    preview_clips: Annotated[
        Positive,
        about("Validation clips in a preview, each of another scene.", unit="clips", used_in="training/preview.py"),
    ] = 3
    log_every: Annotated[
        Positive, about("Steps between entries in MLflow.", unit="steps", used_in="training/recorder.py")
    ] = 1
    peak_tflops: Annotated[
        PositiveFloat | None,
        about(
            "Peak speed of one device in this precision, for the utilisation in the log. null: the data sheet's, for"
            " known devices.",
            unit="TFLOP/s",
            used_in="training/recorder.py",
        ),
    ] = None

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Training:
        if self.first_stage != "stage1" and self.start_from is None:
            raise ValueError(f"first_stage {self.first_stage} needs start_from: the model that it starts from")
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that are trained, in order: ``first_stage`` and those after it."""
        return STAGES[STAGES.index(self.first_stage) :]

    def stage(self, name: Stage) -> StageConfig:
        """Returns the settings of one stage."""
        return {"stage1": self.stage1, "stage2": self.stage2, "stage3": self.stage3}[name]

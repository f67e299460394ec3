"""Settings of what is prepared before training: data, conditions, encoders and the latents that they make."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from magicdrive_core.config.base import PUBLISHED, Count, Positive, PositiveFloat, Section, Size, about


def _check_val_scenes(value: Any) -> Any:
    if value != "auto" and not (isinstance(value, list) and value and all(isinstance(name, str) for name in value)):
        raise ValueError("write auto, or a list of scene names")
    return value


class Synth(Section):
    """The generated data set, which ``magicdrive synth`` makes."""

    seed: Annotated[Count, about("Seed of the generated city and its traffic.", used_in="synthetic/traffic.py")]
    scenes: Annotated[Positive, about("Number of generated scenes.", unit="scenes", used_in="synthetic/dataset.py")]
    seconds: Annotated[
        PositiveFloat,
        about(
            "Length of a scene. Key frames are generated at 2 Hz, camera sweeps at 12 Hz.",
            unit="seconds",
            used_in="synthetic/traffic.py",
        ),
    ]
    starts: Annotated[
        Literal["junction", "spread"],
        about(
            "Where drives start. junction: so that half of a drive is before its junction. spread: anywhere from 30 m"
            " before the junction to 20 m after its beginning, so that a caption does not say where the streets are."
            " Scenes of one key frame always start 3 to 25 m before it.",
            used_in="synthetic/traffic.py",
        ),
    ] = "junction"
    town: Annotated[
        Literal["first", "second"],
        about(
            "Which of two towns is generated. The second has other streets (longer blocks, narrower lanes, wider"
            " walkways), other colours and smaller cars, to fine-tune a model of the first on.",
            used_in="synthetic/traffic.py",
        ),
    ] = "first"


class Data(Section):
    """The data set."""

    format: Annotated[
        Literal["nuscenes", "argoverse2"],
        about("Form of the data set; each form has an adapter that reads it.", used_in="data/adapters.py"),
    ] = "nuscenes"
    root: Annotated[
        str,
        about(
            "Folder of the data set. nuscenes: it holds samples/, sweeps/, maps/ and the version's table folder."
            " argoverse2: it holds the version's folder.",
            used_in="data/adapters.py",
        ),
    ]
    version: Annotated[
        str,
        about(
            "Folder below data.root. nuscenes: the tables, such as v1.0-demo (generated), v1.0-mini or v1.0-trainval."
            " argoverse2: the logs.",
            used_in="data/infos.py",
        ),
    ]
    val_scenes: Annotated[
        Literal["auto"] | list[str],
        BeforeValidator(_check_val_scenes),
        about(
            "Names of the validation scenes. auto: the official split where the devkit knows the version,"
            " else the last quarter of the scenes.",
            used_in="data/infos.py",
        ),
    ] = "auto"
    unpaired: Annotated[
        Literal["leave_out", "carry_on"],
        about(
            "What happens between two key frames to an object that only one of them holds. leave_out: no box."
            " carry_on: it is shown in the nearer half of the interval, moved on with its velocity; not where published"
            " is true.",
            used_in="data/timeline.py",
        ),
    ] = "leave_out"
    skip_bad: Annotated[
        bool,
        about(
            "Leave out scenes with broken records, maps or pictures and list them in infos.json,"
            " instead of refusing the data set.",
            used_in="data/infos.py",
        ),
    ] = False


class Conditions(Section):
    """What the network is conditioned on, in each frame."""

    map_cells: Annotated[
        dict[Size, Positive],
        about(
            "Cells per side of the BEV map, which covers 100 m x 100 m, for each size of a video. The network halves"
            " them n - 2 times, where n is the length of model.map_channels; choose cells that end at the number of"
            " columns of the latents, an eighth of the video's.",
            unit="cells",
            source=PUBLISHED,
            used_in="data/map_cache.py",
        ),
    ]
    maps: Annotated[
        Literal["cached", "live"],
        about(
            "When BEV maps are drawn. cached: once for all frames, in a DVC stage. live: when a clip is read, which"
            " takes about a millisecond a frame. The bits are the same.",
            used_in="data/conditions.py",
        ),
    ] = "cached"


class VaeBuild(Section):
    """A small CogVideoX VAE, which a DVC stage trains on the data's pictures."""

    block_out_channels: Annotated[
        list[Positive],
        about(
            "Channels at full size, a half, a quarter and an eighth: four numbers, rising at the first and the last"
            " step.",
            unit="channels",
            used_in="encoders/small_vae.py",
        ),
    ]
    latent_channels: Annotated[
        Positive, about("Channels of the latents.", unit="channels", used_in="encoders/small_vae.py")
    ]
    layers_per_block: Annotated[Positive, about("Residual layers of each block.", used_in="encoders/small_vae.py")]
    resolution: Annotated[
        Size,
        about(
            "Size to which pictures are scaled before crops are cut from them.",
            unit="pixels",
            used_in="encoders/small_vae.py",
        ),
    ]
    steps: Annotated[Positive, about("Optimizer steps.", unit="steps", used_in="encoders/small_vae.py")]
    batch: Annotated[Positive, about("Crops of a step.", unit="crops", used_in="encoders/small_vae.py")]
    crop: Annotated[Positive, about("Side of a square crop.", unit="pixels", used_in="encoders/small_vae.py")]
    clips: Annotated[
        Positive,
        about(
            "Clips of nine frames that are read once; all steps cut their crops from them.",
            unit="clips",
            used_in="encoders/small_vae.py",
        ),
    ] = 48
    clip_every: Annotated[
        Positive,
        about(
            "Every n-th step trains on clips, the other steps on single frames.",
            unit="steps",
            used_in="encoders/small_vae.py",
        ),
    ] = 4
    learning_rate: Annotated[PositiveFloat, about("Peak learning rate.", used_in="encoders/small_vae.py")]
    seed: Annotated[Count, about("Seed of the initial weights and of the crops.", used_in="encoders/small_vae.py")]

    @model_validator(mode="after")
    def _fits_the_linear_start(self) -> VaeBuild:
        widths, pairs = self.block_out_channels, 2 * self.latent_channels + 2
        if len(widths) != 4 or widths != sorted(widths) or widths[0] == widths[1] or widths[2] == widths[3]:
            raise ValueError(f"block_out_channels {widths} must be four numbers, rising at the first and the last step")
        if widths[0] < 8 or widths[3] < pairs:
            raise ValueError(
                f"block_out_channels {widths} must start at 8 or more and end at {pairs} or more"
                f" for {self.latent_channels} latent_channels"
            )
        return self


class Vae(Section):
    """The VAE, which turns pictures into latents and back."""

    path: Annotated[str, about("Folder of the VAE, as diffusers' from_pretrained reads it.", used_in="encoders/vae.py")]
    build: Annotated[
        VaeBuild | None,
        about(
            "Train a small VAE into vae.path. null: the folder exists already, for example that of CogVideoX-2b.",
            used_in="encoders/build_encoders.py",
        ),
    ] = None
    chunk_frames: Annotated[
        Positive | None,
        about(
            "Frames that are encoded at a time, after the first frame. null: whole clips at once.",
            unit="frames",
            source=f"{PUBLISHED}, stage 3",
            used_in="encoders/vae.py",
        ),
    ] = 8
    scaling_factor: Annotated[
        PositiveFloat | Literal["measure", "stored"],
        about(
            "Factor between the VAE's samples and the network's latents. measure: one over the standard deviation of"
            " the data's samples. stored: the one in the VAE's own config.json, such as a bundle's.",
            source="CogVideoX-2b",
            used_in="encoders/build_encoders.py",
        ),
    ] = 1.15258426

    @model_validator(mode="after")
    def _has_a_factor(self) -> Vae:
        if self.build is not None and self.scaling_factor == "stored":
            raise ValueError("scaling_factor stored needs build: null; a VAE that is built here has none yet")
        return self


class TextBuild(Section):
    """A small T5 encoder with random weights and a tokenizer of the words that the data uses."""

    width: Annotated[Positive, about("Width of the features.", unit="channels", used_in="encoders/text.py")]
    layers: Annotated[Positive, about("Number of layers.", unit="layers", used_in="encoders/text.py")]
    heads: Annotated[Positive, about("Heads of its attention.", unit="heads", used_in="encoders/text.py")]
    feed_forward: Annotated[Positive, about("Width of its MLP.", unit="channels", used_in="encoders/text.py")]
    seed: Annotated[Count, about("Seed of its weights.", used_in="encoders/text.py")]


class Text(Section):
    """The text encoder, which turns captions and class names into features."""

    path: Annotated[
        str,
        about(
            "Folder of the encoder and its tokenizer, as transformers' from_pretrained reads it.",
            used_in="encoders/text.py",
        ),
    ]
    build: Annotated[
        TextBuild | None,
        about(
            "Make a small encoder in text.path. null: the folder exists already, for example that of t5-v1_1-xxl.",
            used_in="encoders/build_encoders.py",
        ),
    ] = None
    max_tokens: Annotated[
        Positive,
        about(
            "Longest caption; longer ones are cut.",
            unit="text tokens",
            source=PUBLISHED,
            used_in="encoders/text.py",
        ),
    ] = 300
    live: Annotated[
        bool,
        about(
            "Training encodes each caption when it first needs it; only class names are encoded in the DVC stage.",
            used_in="training/loader.py",
        ),
    ] = False


class Latents(Section):
    """Encoded clips, made once before training."""

    start_stride: Annotated[
        Positive,
        about(
            "Clips of several frames start at every n-th frame of a scene. Single frames are the key frames.",
            unit="frames",
            source=f"{PUBLISHED} has 1",
            used_in="data/conditions.py",
        ),
    ]
    dtype: Annotated[
        Literal["float16", "float32"],
        about("Type of the stored means and log-variances.", used_in="encoders/caches.py"),
    ] = "float16"
    live: Annotated[
        bool,
        about(
            "Training encodes each clip when it is read; nothing is encoded before and nothing is stored.",
            used_in="training/loader.py",
        ),
    ] = False
    scaled_decoding: Annotated[
        bool,
        about(
            "JPEG pictures are decoded at a lower scale: several times as fast, 50 dB from full decoding.",
            source="benchmarks/results/data.md",
            used_in="encoders/caches.py",
        ),
    ] = False

"""How a clip that is longer than what the network samples at once is cut into windows. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from magicdrive_core.config.schema import Config, fingerprint
from magicdrive_core.config.versions import generation_versions
from magicdrive_core.data.edits import chosen_edits
from magicdrive_core.data.records import Clip, Scene
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.experiment.run_paths import EXECUTION_SETTINGS
from magicdrive_core.geometry.cameras import PICTURE_HEIGHT, PICTURE_WIDTH
from magicdrive_core.tracking import lineage
from magicdrive_core.utils.files import read_json
from magicdrive_core.video.decoder import probe
from magicdrive_core.video.frames import frame_files, read_frame
from magicdrive_core.video.item_record import RECORD, ItemRecord, item_name

STRIDE = 4  # frames of a latent frame, the first excepted (the VAE's TIME_STRIDE, whose module needs torch)


@dataclass(frozen=True)
class Window:
    """Frames that are sampled at once."""

    start: int  # in the clip
    frames: int  # 8n+1
    given: int  # latent frames at its beginning that are there already: of the window before, or first frames

    @property
    def given_frames(self) -> int:
        """Pictures that the given latent frames stand for."""
        return given_frames(self.given)


def given_frames(latents: int) -> int:
    """Pictures of so many latent frames at the beginning of a window: the first one stands for one, others for four."""
    return STRIDE * (latents - 1) + 1 if latents else 0


def plan_windows(frames: int, longest: int, overlap: int, *, begun: bool = False) -> list[Window]:
    """Cuts a clip into windows of the longest length that overlap by at least ``overlap`` latent frames, evenly.

    None is shorter than the others: a network makes what it was trained on.

    Args:
        frames: of the clip, 8n+1.
        longest: frames of a window, 8n+1.
        overlap: latent frames, fewer than a window has.
        begun: whether the first window's ``overlap`` is given too.
    """
    first = overlap if begun else 0
    if frames <= longest:
        return [Window(0, frames, first)]
    count = 1 + -(-(frames - longest) // (longest - given_frames(overlap)))
    places = [(frames - longest) * n // (count - 1) for n in range(count)]
    starts = [start - start % STRIDE for start in places]
    shared = [(before + longest - start - 1) // STRIDE + 1 for before, start in pairwise(starts)]
    return [Window(start, longest, given) for start, given in zip(starts, [first, *shared], strict=True)]


# Which clips are generated, and what decides their pixels. No torch.

REAL = "real"  # generate.initial_frames: the scene's own pictures


@dataclass(frozen=True)
class Item:
    """One clip, generated once."""

    clip: Clip
    generation: int
    name: str  # and its folder's: {first sample token}_gen{generation}
    kept: int  # frames that are written of the clip's
    begun: int = 0  # frames at its beginning that are given (generate.initial_frames)
    beginning: str = ""  # what they are: a digest of an earlier item's files, or "real"


def list_items(config: Config, scenes: Sequence[Scene], project: Path = Path()) -> list[Item]:
    """Every validation scene's first clip, ``generate.generations`` times.

    A clip has ``generate.frames`` frames, or the most 8n+1 that a shorter scene has. The last frame of W-CODA's 17 is
    there only because a clip has 8n+1: it is not written. With first frames of an earlier generation 8n+1 counts from
    the first one that the network is given.

    Raises:
        MagicDriveError: no scene is for validation, or the earlier generation lacks an item or leaves nothing to do.
    """
    chosen = [scene for scene in scenes if scene.split in ("val", "both")]
    if not chosen:
        raise MagicDriveError("no scene is for validation", "name some in data.val_scenes")
    items = []
    for scene in chosen:
        frames = min(config.generate.frames, (len(scene) - 1) // 8 * 8 + 1)
        wanted = config.submission.frames
        kept = wanted if wanted <= frames < wanted + 8 else frames
        for generation in range(config.generate.generations):
            item = Item(Clip(scene.token, 0, frames), generation, item_name(scene.first_sample, generation), kept)
            items.append(_begun(config, item, project))
    return items


def _begun(config: Config, item: Item, project: Path) -> Item:
    """With its first frames, where they are given."""
    settings, shown = config.generate, given_frames(config.generate.initial_latent_frames)
    if settings.initial_frames is None:
        return item
    if settings.initial_frames == REAL:
        begun, beginning = shown, REAL
    else:
        record = ItemRecord.read(project / settings.initial_frames / item.name)
        begun, beginning = record.frames, fingerprint({view: file.sha256 for view, file in record.views.items()})
    frames = item.clip.frames
    frames -= (frames - 1 - (begun - shown)) % 8
    if begun < shown or frames <= begun:
        raise MagicDriveError(
            f"{item.name}: a clip of {item.clip.frames} frames cannot go on from {begun} first frames,"
            f" {shown} of which the network is given",
            "set generate.frames higher, or generate.initial_latent_frames lower, or use longer scenes",
        )
    kept = frames if item.kept == item.clip.frames else min(item.kept, frames)
    return replace(item, clip=replace(item.clip, frames=frames), kept=kept, begun=begun, beginning=beginning)


def item_windows(config: Config, item: Item) -> list[Window]:
    """What is sampled at once, in turn; starts are counted from the clip's."""
    settings = config.generate
    offset = item.begun - given_frames(settings.initial_latent_frames) if item.begun else 0
    frames = item.clip.frames - offset
    windows = plan_windows(frames, settings.window or frames, settings.initial_latent_frames, begun=item.begun > 0)
    return [replace(window, start=offset + window.start) for window in windows]


def input_digests(config: Config, stage_folder: Path, project: Path = Path()) -> dict[str, str]:
    """Describe everything that an item is made from, for its fingerprint and its record.

    Args:
        config: All settings; those of the edits are read.
        stage_folder: The run whose weights generate.
        project: The project's folder.

    Returns:
        By name: digests of the weights, of the edits and of the DVC stages' outputs; under ``versions`` the versions
        of the computations.

    Raises:
        MagicDriveError: The stage is not trained.
    """
    run = read_json(stage_folder / "run.json", "train the stage first: magicdrive train")
    data = {Path(path).name: digest for path, digest in lineage.input_digests(project).items()}
    data.pop("latents")  # training's own
    return {
        "model": run["weights_sha256"],
        "versions": ", ".join(f"{name} {number}" for name, number in generation_versions().items()),
        "edits": chosen_edits(config, project).digest,
        **data,
    }


def item_seed(config: Config, item: Item, part: str = "") -> int:
    """The seed of (a part of) an item's noise, the same in any order, on any worker and host."""
    return int(fingerprint(config.generate.seed, asdict(item.clip), item.generation, part)[:15], 16)


def item_fingerprint(config: Config, item: Item, digests: Mapping[str, str]) -> str:
    """Changes with everything that decides the item's files.

    Args:
        config: sampling, video and framing settings are taken from it.
        item: what is generated.
        digests: of the inputs, as ``input_digests`` gives them.
    """
    return fingerprint(_settings(config), asdict(item), dict(digests))


def _settings(config: Config) -> dict[str, Any]:
    """The settings that decide the pixels of an item that is given; how many items there are does not."""
    sampling = config.generate.model_dump(
        mode="json", exclude=EXECUTION_SETTINGS | {"generations", "frames", "weights", "edits", "initial_frames"}
    )
    if config.published:  # whose pictures depend on the padding (decision 0003, oddity 8)
        sampling["pad_patches"] = config.generate.pad_patches or config.generate.sequence_parallel
    others = {"video": config.video, "flow": config.flow}
    return {"sampling": sampling, "published": config.published} | {
        name: section.model_dump(mode="json") for name, section in others.items()
    }


# Which items are done: their fingerprint, their bytes and a look into each of their files agree. No torch.
#
# Every video was decoded whole when it was written (its PSNR is measured so), and its digest taken then. Equal bytes
# decode equally; the look into the files is for records that came by wrong digests, and for another host's decoder.

_SIZE = (PICTURE_HEIGHT, PICTURE_WIDTH)


def is_done(folder: Path, wanted: str) -> bool:
    """Whether the item's folder holds files of exactly this fingerprint, as they were written, that can be decoded."""
    if not (folder / RECORD).is_file():
        return False
    try:
        record = ItemRecord.read(folder)
        return record.fingerprint == wanted and not record.faults(folder) and _opens(record, folder)
    except MagicDriveError:
        return False


def _opens(record: ItemRecord, folder: Path) -> bool:
    """Whether each view has the record's frames, at its rate and in full size, and its first frame can be decoded.

    Raises:
        MagicDriveError: a file cannot be read.
    """
    paths = [folder / entry.file for entry in record.views.values()]
    with ThreadPoolExecutor(len(paths)) as pool:  # decoding leaves the interpreter to the others
        return all(pool.map(partial(_view_opens, record), paths))


def _view_opens(record: ItemRecord, path: Path) -> bool:
    if path.suffix == ".mp4":
        info = probe(path, first_frame=True)
        return (info.frames, info.fps, (info.height, info.width)) == (record.frames, record.fps, _SIZE)
    files = frame_files(path) if path.is_dir() else [path]
    return len(files) == record.frames and read_frame(files[0]).shape == (*_SIZE, 3)

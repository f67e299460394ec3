"""Items: the clips to generate, their windows, what decides their pixels, and whether they are finished.

An item is one clip, generated once; its folder holds a video file for each view, a contact sheet and ``item.json``.
This module imports no torch, so that planning and packing work on a machine without it.
"""

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
from magicdrive_core.inference.checked import note_checked, stamps, was_checked
from magicdrive_core.tracking import lineage
from magicdrive_core.utils.files import read_json
from magicdrive_core.video.decoder import probe
from magicdrive_core.video.frames import frame_files, read_frame
from magicdrive_core.video.item_record import RECORD, ItemRecord, item_name

REAL = "real"  # value of generate.initial_frames: the scene's own pictures
LOOKS_AT_ONCE = 8  # items whose files are looked at side by side
TIME_STRIDE = 4  # frames of a latent frame, except the first: equal to encoders.vae.TIME_STRIDE, which needs torch


@dataclass(frozen=True)
class Item:
    """One clip, generated once.

    Attributes:
        clip: scene, first frame and number of frames, initial frames included.
        generation: number of the generation of this clip, from 0.
        name: ``{first sample token}_gen{generation}``, also the name of the item's folder.
        kept: frames of the clip that are written.
        initial_frames: frames at the start of the clip that are copied, not generated (``generate.initial_frames``).
        initial_source: what the initial frames are: ``REAL``, or a digest of the earlier item's files; "" without any.
    """

    clip: Clip
    generation: int
    name: str
    kept: int
    initial_frames: int = 0
    initial_source: str = ""


@dataclass(frozen=True)
class Window:
    """Frames of a clip that are sampled at once.

    Attributes:
        start: first frame, counted from the start of the clip.
        frames: number of frames, 8n+1.
        conditioning_latents: latent frames at its start that condition the network: encoded initial frames, or the last
            frames of the window before.
    """

    start: int
    frames: int
    conditioning_latents: int

    @property
    def conditioning_frames(self) -> int:
        """Number of frames that the conditioning latent frames stand for."""
        return decoded_frames(self.conditioning_latents)


def decoded_frames(latent_frames: int) -> int:
    """Counts the frames that the first latent frames of a window decode to: 1 for the first one, 4 for each other.

    Args:
        latent_frames: number of latent frames; 0 gives 0.

    Returns:
        Number of frames.
    """
    return TIME_STRIDE * (latent_frames - 1) + 1 if latent_frames else 0


def plan_windows(frames: int, longest: int, overlap: int, *, conditioned: bool = False) -> list[Window]:
    """Cuts a clip into windows that overlap evenly, all of the longest length.

    No window is shorter than the others, so that the network samples only lengths that it was trained on.

    Args:
        frames: frames of the clip, 8n+1.
        longest: frames of a window, 8n+1.
        overlap: least number of latent frames that a window shares with the one before; less than a window has.
        conditioned: whether the first window starts with ``overlap`` conditioning latent frames too.

    Returns:
        Windows in the order in which they are sampled; the last one ends with the clip.
    """
    first = overlap if conditioned else 0
    if frames <= longest:
        return [Window(0, frames, first)]
    count = 1 + -(-(frames - longest) // (longest - decoded_frames(overlap)))
    even = [(frames - longest) * n // (count - 1) for n in range(count)]
    starts = [start - start % TIME_STRIDE for start in even]
    shared = [(before + longest - start - 1) // TIME_STRIDE + 1 for before, start in pairwise(starts)]
    return [Window(start, longest, latents) for start, latents in zip(starts, [first, *shared], strict=True)]


def list_items(config: Config, scenes: Sequence[Scene], project: Path = Path()) -> list[Item]:
    """Lists the first clip of every validation scene, ``generate.generations`` times each.

    A clip has ``generate.frames`` frames, or the most 8n+1 that a shorter scene allows. The last of W-CODA's 17 frames
    exists only because a clip has 8n+1 frames: it is not written. When a clip continues an earlier generation, 8n+1
    counts from the first frame that the network is given.

    Args:
        config: settings; sections ``generate`` and ``submission`` are read.
        scenes: all scenes of the infos.
        project: folder of the project.

    Returns:
        Items, the same list on every worker.

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
            items.append(_with_initial_frames(config, item, project))
    return items


def _with_initial_frames(config: Config, item: Item, project: Path) -> Item:
    """Returns the item with its initial frames, if ``generate.initial_frames`` asks for any."""
    settings, conditioning = config.generate, decoded_frames(config.generate.initial_latent_frames)
    if settings.initial_frames is None:
        return item
    if settings.initial_frames == REAL:
        initial, source = conditioning, REAL
    else:
        record = ItemRecord.read(project / settings.initial_frames / item.name)
        initial, source = record.frames, fingerprint({view: file.sha256 for view, file in record.views.items()})
    frames = item.clip.frames
    frames -= (frames - 1 - (initial - conditioning)) % 8
    if initial < conditioning or frames <= initial:
        raise MagicDriveError(
            f"{item.name}: a clip of {item.clip.frames} frames cannot continue from {initial} initial frames,"
            f" the last {conditioning} of which condition the network",
            "set generate.frames higher, or generate.initial_latent_frames lower, or use longer scenes",
        )
    kept = frames if item.kept == item.clip.frames else min(item.kept, frames)
    clip = replace(item.clip, frames=frames)
    return replace(item, clip=clip, kept=kept, initial_frames=initial, initial_source=source)


def item_windows(config: Config, item: Item) -> list[Window]:
    """Plans the windows of an item.

    Args:
        config: settings; ``generate.window`` (null: one window for the clip) and ``generate.initial_latent_frames``.
        item: the item, whose initial frames condition the first window.

    Returns:
        Windows in the order in which they are sampled; starts are counted from the clip's.
    """
    settings = config.generate
    overlap = settings.initial_latent_frames
    offset = item.initial_frames - decoded_frames(overlap) if item.initial_frames else 0
    frames = item.clip.frames - offset
    windows = plan_windows(frames, settings.window or frames, overlap, conditioned=item.initial_frames > 0)
    return [replace(window, start=offset + window.start) for window in windows]


def input_digests(config: Config, stage_folder: Path, project: Path = Path()) -> dict[str, str]:
    """Collects what identifies the inputs of all items, for their fingerprints and records.

    Args:
        config: settings; those of the edits are read.
        stage_folder: training run whose weights generate.
        project: folder of the project.

    Returns:
        By name: digests of the weights, of the edits and of the DVC stages' outputs; under ``versions`` the versions
        of the computations.

    Raises:
        MagicDriveError: the stage is not trained.
    """
    run = read_json(stage_folder / "run.json", "train the stage first: magicdrive train")
    data = {Path(path).name: digest for path, digest in lineage.input_digests(project).items()}
    data.pop("latents")  # read by training only
    return {
        "model": run["weights_sha256"],
        "versions": ", ".join(f"{name} {number}" for name, number in generation_versions().items()),
        "edits": chosen_edits(config, project).digest,
        **data,
    }


def item_seed(config: Config, item: Item, part: str = "") -> int:
    """Returns the seed of the noise of an item, or of a part of it: equal in any order, on any worker and host.

    Args:
        config: settings; ``generate.seed`` is read.
        item: the item; its clip and generation count.
        part: name of the part, such as "window 0"; "": the item as a whole.

    Returns:
        An integer of 60 bits.
    """
    return int(fingerprint(config.generate.seed, asdict(item.clip), item.generation, part)[:15], 16)


def item_fingerprint(config: Config, item: Item, digests: Mapping[str, str]) -> str:
    """Returns a fingerprint that changes with everything that decides the item's files.

    Args:
        config: settings; those of sampling, noise levels and video files are taken from it.
        item: what is generated.
        digests: what ``input_digests`` returned.

    Returns:
        64 hex digits.
    """
    return fingerprint(_settings(config), asdict(item), dict(digests))


def _settings(config: Config) -> dict[str, Any]:
    """Returns the settings that decide the pixels of one item; how many items there are does not."""
    sampling = config.generate.model_dump(
        mode="json", exclude=EXECUTION_SETTINGS | {"generations", "frames", "weights", "edits", "initial_frames"}
    )
    if config.published:  # whose pictures depend on the padding (decision 0003, oddity 8)
        sampling["pad_patches"] = config.generate.pad_patches or config.generate.sequence_parallel
    others = {"video": config.video, "flow": config.flow}
    return {"sampling": sampling, "published": config.published} | {
        name: section.model_dump(mode="json") for name, section in others.items()
    }


_FULL_SIZE = (PICTURE_HEIGHT, PICTURE_WIDTH)


def is_done(folder: Path, wanted: str) -> bool:
    """Tells whether an item's folder holds the files of a fingerprint, as they were written and decodable.

    Every video was decoded completely when it was written, for its PSNR, and its digest taken then; equal bytes decode
    equally. Opening each file as well catches records with wrong digests and decoders of other hosts. Files whose sizes
    and times are those of an earlier check are not read again.

    Args:
        folder: folder of the item; it may be missing.
        wanted: fingerprint that the item must have.

    Returns:
        False, too, where the record or a file cannot be read.
    """
    try:
        found = stamps(folder)
    except OSError:
        return False
    if RECORD not in found:
        return False
    if was_checked(folder, wanted, found):
        return True
    try:
        record = ItemRecord.read(folder)
        done = record.fingerprint == wanted and not record.faults(folder) and _all_views_open(record, folder)
    except MagicDriveError:
        return False
    if done:
        note_checked(folder, wanted, found)
    return done


def unfinished(config: Config, items: Sequence[Item], out: Path, digests: Mapping[str, str]) -> list[Item]:
    """Picks the items that are not finished with these settings and inputs.

    Args:
        config: settings, for the fingerprints.
        items: the items.
        out: folder of the items' folders.
        digests: what ``input_digests`` returned.

    Returns:
        Those that ``is_done`` does not find finished, in their order.
    """

    def done(item: Item) -> bool:
        return is_done(out / item.name, item_fingerprint(config, item, digests))

    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:  # a network file system answers many questions at once
        return [item for item, finished in zip(items, pool.map(done, items), strict=True) if not finished]


def _all_views_open(record: ItemRecord, folder: Path) -> bool:
    """Tells whether each view has the record's frames, rate and full size, and a first frame that can be decoded.

    Raises:
        MagicDriveError: a file cannot be read.
    """
    paths = [folder / entry.file for entry in record.views.values()]
    with ThreadPoolExecutor(len(paths)) as pool:  # decoding releases the interpreter lock
        return all(pool.map(partial(_view_opens, record), paths))


def _view_opens(record: ItemRecord, path: Path) -> bool:
    if path.suffix == ".mp4":
        info = probe(path, first_frame=True)
        return (info.frames, info.fps, (info.height, info.width)) == (record.frames, record.fps, _FULL_SIZE)
    files = frame_files(path) if path.is_dir() else [path]
    return len(files) == record.frames and read_frame(files[0]).shape == (*_FULL_SIZE, 3)

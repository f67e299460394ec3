"""Generation: items to folders of six videos, by any number of workers that share the items."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from magicdrive_core.config import Config, parse_size
from magicdrive_core.data.bev_maps import BevMaps
from magicdrive_core.data.conditions import clip_conditions
from magicdrive_core.data.edit_scene import edit_scene
from magicdrive_core.data.edits import Edits, chosen_edits
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.records import ClipConditions, Scene
from magicdrive_core.encoders.vae import latent_shape
from magicdrive_core.errors import MagicDriveError
from magicdrive_core.files import atomic_folder, sha256_file
from magicdrive_core.geometry.cameras import VIEWS
from magicdrive_core.inference.framing import full_picture
from magicdrive_core.inference.items import Item, input_digests, is_done, item_fingerprint, item_seed
from magicdrive_core.inference.locks import item_lock
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.team import Alone, Team
from magicdrive_core.model.guidance import sample_latents
from magicdrive_core.model.inputs import collate
from magicdrive_core.progress import progress_bar
from magicdrive_core.rectified_flow import RectifiedFlow
from magicdrive_core.video.colour import Picture
from magicdrive_core.video.encoder import encode_video
from magicdrive_core.video.frames import write_frames
from magicdrive_core.video.rate_search import START
from magicdrive_core.video.record import ItemRecord, ViewFile, video_name
from magicdrive_core.video.sheets import contact_sheet, six_views

SHEET = "sheet.png"
SHEET_VIEW = 400  # pixels: the widest view in the contact sheet

Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class Summary:
    """What one worker did with the items, by name."""

    made: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # done before
    elsewhere: list[str] = field(default_factory=list)  # another worker is at it


def generate_items(
    config: Config,
    items: Sequence[Item],
    stage_folder: Path,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    team: Alone | None = None,
    project: Path = Path(),
) -> Summary:
    """Generates items into ``out/<item>/``; those that are done already, byte for byte, are left alone.

    A worker begins with its own share and then helps the others; a lock an item sees to it that none is made twice.
    The result of an item depends on neither order, share nor number of workers.

    Args:
        config: sampling and video settings.
        items: all items, the same list for every worker.
        stage_folder: a finished training run, ``runs/<stage>-<fingerprint>``.
        out: folder of the items' folders.
        shard: (number of this worker, number of workers).
        team: the processes that are this worker; None: this one alone. The others ``help_generate``.
        project: the project's folder.

    Raises:
        MagicDriveError: the inputs are missing, or an item failed; the others are finished first.
    """
    edits = chosen_edits(config, project)
    digests = input_digests(config, stage_folder, project)
    maps = BevMaps(config, project)
    scenes = {scene.token: edit_scene(scene, edits) for scene in read_scenes(project / "artifacts/infos")}
    team = team or Alone()
    load = lru_cache(lambda: _models(config, stage_folder, project, team))  # only where anything is left to do
    summary = Summary()
    failed: dict[str, Exception] = {}
    with progress_bar() as bar:
        whole = bar.add_task("generate", total=len(items))
        for item in _in_turn(items, shard):
            wanted = item_fingerprint(config, item, digests)
            with item_lock(out, item.name) as mine:
                if not mine:
                    summary.elsewhere.append(item.name)
                elif is_done(out / item.name, wanted):
                    summary.skipped.append(item.name)
                else:
                    scene = scenes[item.clip.scene]
                    steps = bar.add_task(f"  {scene.name} #{item.generation}", total=config.generate.steps)
                    try:
                        work = _Work(config, load(), item, scene, edits, maps, partial(bar.track, task_id=steps))
                        work.write(out / item.name, wanted, digests, team)
                        summary.made.append(item.name)
                    except team.survives as error:
                        failed[item.name] = error
                    finally:
                        bar.remove_task(steps)
            bar.advance(whole)
    if failed:
        raise MagicDriveError(
            f"{len(failed)} of {len(items)} items failed ({', '.join(failed)}): {next(iter(failed.values()))}",
            "run again: what is done is kept",
        )
    return summary


def help_generate(config: Config, stage_folder: Path, team: Team, project: Path = Path()) -> None:
    """Samples the items that the leader of ``team`` names, until there are no more; the leader writes them."""
    edits = chosen_edits(config, project)
    scenes = {scene.token: edit_scene(scene, edits) for scene in read_scenes(project / "artifacts/infos")}
    maps = BevMaps(config, project)
    load = lru_cache(lambda: _models(config, stage_folder, project, team))
    for item in team.named():
        work = _Work(config, load(), item, scenes[item.clip.scene], edits, maps, iter)
        work.sample(*work.prepare())


def _models(config: Config, stage_folder: Path, project: Path, team: Alone) -> Models:
    models = Models.load(config, stage_folder, project)
    models.network.devices = team.devices
    return models


def _in_turn(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """This worker's own items, then those of the others, beginning with its neighbour's."""
    index, count = shard
    return [item for other in range(count) for item in items[(index + other) % count :: count]]


@dataclass(frozen=True)
class _Work:
    """One item on its way from noise to files."""

    config: Config
    models: Models
    item: Item
    scene: Scene  # edited
    edits: Edits
    maps: BevMaps
    progress: Progress

    def write(self, folder: Path, fingerprint: str, lineage: dict[str, str], team: Alone) -> None:
        """Samples, decodes view by view into the encoder, and puts the item's folder in place when all is there."""
        began = time.perf_counter()
        conditions, features = self.prepare()  # before the item is named: where this fails, nobody waits
        team.name(self.item)
        latents = self.sample(conditions, features)
        self.models.make_room_for(self.models.vae.model)
        sampled = time.perf_counter()
        with atomic_folder(folder) as partial_folder:
            shown: list[list[Picture]] = []
            views: dict[str, ViewFile] = {}
            quality = START  # of like views: each begins where the one before ended
            for v, view in enumerate(VIEWS):
                views[view], quality = self.write_view(v, latents[v], partial_folder, shown, quality)
            self.write_sheet(partial_folder / SHEET, shown, conditions.caption)
            ItemRecord(
                fingerprint=fingerprint,
                sample=self.scene.first_sample,
                scene=self.scene.token,
                scene_name=self.scene.name,
                start=self.item.clip.start,
                generated=self.item.clip.frames,
                frames=self.item.kept,
                fps=self.config.video.fps,
                generation=self.item.generation,
                caption=conditions.caption,
                seed=item_seed(self.config, self.item),
                size=self.config.generate.size,
                lineage=lineage,
                seconds={
                    "sample": round(sampled - began, 2),
                    "decode_and_encode": round(time.perf_counter() - sampled, 2),
                },
                views=views,
            ).write(partial_folder)

    def prepare(self) -> tuple[ClipConditions, Tensor]:
        """The clip's conditions and text features, and the network on its device."""
        conditions = self.conditions()
        features = self.models.features(conditions.caption)
        self.models.make_room_for(self.models.network)
        return conditions, features

    def conditions(self) -> ClipConditions:
        """What the network is told about the clip."""
        size, clip = self.config.generate.size, self.item.clip
        bits = self.maps.of_clip(self.scene, clip, size, draw=self.edits.moves_lidar(self.scene.name))
        return clip_conditions(self.scene, clip, size, bits, published=self.config.published)

    def sample(self, clip: ClipConditions, features: Tensor) -> Tensor:
        """Latents (V, C, T, h, w) on the CPU. All noise comes from the item's own generator."""
        models, settings = self.models, self.config.generate
        generator = torch.Generator().manual_seed(item_seed(self.config, self.item))
        conditions = collate([clip], [features], self.config.text.max_tokens)
        network = models.network.config
        if network.instance_latent:
            shape = (1, conditions.box_classes.shape[-1], network.class_width or network.width)
            conditions = replace(conditions, box_latent=torch.randn(shape, generator=generator))
        latents = sample_latents(
            models.network,
            conditions.to(models.device),
            latent_shape(self.item.clip.frames, *parse_size(settings.size)),
            steps=settings.steps,
            guidance=settings.guidance,
            pad_patches=settings.pad_patches,
            flow=RectifiedFlow(self.config.flow.base_pixels),
            generator=generator,
            progress=self.progress,
        )
        return latents[0].cpu()

    def write_view(
        self, v: int, latents: Tensor, folder: Path, shown: list[list[Picture]], quality: float
    ) -> tuple[ViewFile, float]:
        """Streams one view (C, T, h, w) through the decoder into its file; notes the frames for the sheet.

        The encoder starts at ``quality``; the one that it came out at is returned too.
        """
        shown.append([])
        frames = _noted(islice(self.decode(latents), self.item.kept), _moments(self.item.kept), shown[-1])
        path = folder / video_name(self.scene.first_sample, VIEWS[v])
        video, pictures = self.config.video, map(full_picture, frames)
        if self.item.kept == 1:
            path = path.with_suffix(".png")
            Image.fromarray(next(pictures)).save(path)
            return ViewFile.of_pictures(path), quality
        if video.format == "png":
            path = path.with_suffix("")
            write_frames(pictures, path)
            return ViewFile.of_pictures(path), quality
        made = encode_video(pictures, path, fps=video.fps, max_mbit_s=video.max_mbit_s, start=quality)
        return ViewFile(path.name, sha256_file(path), made.bytes, made.mbit_s, made.psnr), made.quality

    def decode(self, latents: Tensor) -> Iterator[Picture]:
        """Frames (H, W, 3) of one view, a few at a time."""
        for group in self.models.vae.decode(latents[None].to(self.models.device)):
            yield from group[0]

    def write_sheet(self, path: Path, shown: Sequence[Sequence[Picture]], caption: str) -> None:
        """A picture of all views at the first, a middle and the last frame."""
        width = min(SHEET_VIEW, shown[0][0].shape[1])
        grids = [six_views(np.stack(frames), width) for frames in zip(*shown, strict=True)]
        labels = [f"frame {moment}" for moment in _moments(self.item.kept)]
        title = f"{self.scene.name}, generation {self.item.generation}"
        Image.fromarray(contact_sheet([grids], (), labels, title, caption)).save(path)


def _moments(frames: int) -> list[int]:
    """The first, a middle and the last frame."""
    return sorted({0, frames // 2, frames - 1})


def _noted(frames: Iterable[Picture], wanted: Sequence[int], notes: list[Picture]) -> Iterator[Picture]:
    """Passes ``frames`` on and keeps those of the numbers ``wanted``."""
    for number, frame in enumerate(frames):
        if number in wanted:
            notes.append(frame)
        yield frame

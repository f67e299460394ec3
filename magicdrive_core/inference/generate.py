"""Generation: items to folders of six videos, by any number of workers that share the items."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rich.progress import Progress

from magicdrive_core.config.schema import Config
from magicdrive_core.data.edits import Edits, chosen_edits, edit_scene
from magicdrive_core.data.infos import read_scenes
from magicdrive_core.data.map_cache import BevMaps
from magicdrive_core.data.records import Scene
from magicdrive_core.inference.claims import Claim
from magicdrive_core.inference.fan_out import Summary, share_items
from magicdrive_core.inference.items import Item, input_digests, item_fingerprint
from magicdrive_core.inference.models import Models
from magicdrive_core.inference.processes import ProcessGroup, SingleProcess
from magicdrive_core.inference.sampler import Sampler
from magicdrive_core.inference.writer import FrameFile, FrameQueue, ItemWriter
from magicdrive_core.utils.progress import progress_bar


def generate_items(
    config: Config,
    items: Sequence[Item],
    stage_folder: Path,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    team: SingleProcess | None = None,
    project: Path = Path(),
) -> Summary:
    """Generates items into ``out/<item>/``; those that are done already, byte for byte, are left alone.

    The result of an item depends on neither order, share nor number of workers. While one is encoded the next one is
    sampled.

    Args:
        config: sampling and video settings.
        items: all items, the same list for every worker.
        stage_folder: a finished training run, ``runs/<stage>-<fingerprint>``.
        out: folder of the items' folders.
        shard: (number of this worker, number of workers).
        team: the processes that are this worker; None: this one alone. The others ``follow_leader``.
        project: the project's folder.

    Raises:
        MagicDriveError: the inputs are missing, or items failed twice; the others are finished first.
    """
    digests = input_digests(config, stage_folder, project)
    team = team or SingleProcess()
    work = _Work(config, stage_folder, project, team)
    prints = {item: item_fingerprint(config, item, digests) for item in items}
    with FrameQueue() as frame_queue, progress_bar() as bar:
        row = bar.add_task("generate", total=len(items))

        def make(item: Item, claim: Claim) -> Future[None]:
            began, sampler = time.perf_counter(), work.sampler(item, bar)
            caption, _ = sampler.first.caption, sampler.features  # where these fail, nobody waits yet
            beginning = sampler.beginning(project)
            team.name(item)
            latents = sampler.sample(team, beginning)
            writer = ItemWriter(
                config=config,
                item=item,
                scene=sampler.scene,
                caption=caption,
                fingerprint=prints[item],
                lineage=digests,
                given=beginning.pictures if beginning else None,
                times=(began, time.perf_counter()),
                holds=lambda: claim.holds,
            )
            views = (FrameFile(frames) for frames in sampler.frames(latents))
            return frame_queue.write(views, lambda views: writer.write(out / item.name, views))

        return share_items(
            items,
            out,
            prints.__getitem__,
            make,
            shard=shard,
            survives=team.survives,
            wait=team.wait,
            advance=lambda: bar.advance(row),
        )


def follow_leader(config: Config, stage_folder: Path, team: ProcessGroup, project: Path = Path()) -> None:
    """Samples the items that the leader of ``team`` names, until there are no more; the leader writes them."""
    work = _Work(config, stage_folder, project, team)
    for item in team.named():
        work.sampler(item).sample(team)


@dataclass(frozen=True)
class _Work:
    """What the items of a worker share, loaded when the first one is made."""

    config: Config
    stage_folder: Path
    project: Path
    team: SingleProcess

    def sampler(self, item: Item, bar: Progress | None = None) -> Sampler:
        scene = edit_scene(self._scenes[item.clip.scene], self._edits)
        progress = partial(_shown, bar, f"  {scene.name} #{item.generation}") if bar else iter
        return Sampler(self.config, self._models, item, scene, self._edits, self._maps, progress)

    @cached_property
    def _models(self) -> Models:
        return Models.load(self.config, self.stage_folder, self.project, self.team.sequence_group)

    @cached_property
    def _edits(self) -> Edits:
        return chosen_edits(self.config, self.project)

    @cached_property
    def _scenes(self) -> dict[str, Scene]:
        return {scene.token: scene for scene in read_scenes(self.project / "artifacts/infos")}

    @cached_property
    def _maps(self) -> BevMaps:
        return BevMaps(self.config, self.project)


def _shown(bar: Progress, title: str, steps: Iterable[int]) -> Iterator[int]:
    """Steps with a row of their own, as long as they take."""
    row = bar.add_task(title)
    try:
        yield from bar.track(steps, task_id=row)
    finally:
        bar.remove_task(row)

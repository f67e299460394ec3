"""Generation: items to folders of six videos, by any number of workers that share the items.

The whole way of a clip: ``generate_items`` (here) takes an item, ``sampler.Sampler`` samples its latents and decodes
them, ``writer.FrameQueue`` hands the frames to the encoder's thread, and ``writer.ItemWriter`` writes the files.
"""

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
    processes: SingleProcess | None = None,
    project: Path = Path(),
) -> Summary:
    """Generates items into ``out/<item>/``; finished ones, equal byte for byte to what was written, are skipped.

    The result of an item does not depend on the order, the shard or the number of workers. While one item is encoded
    the next one is sampled.

    Args:
        config: sampling and video settings.
        items: all items, the same list for every worker.
        stage_folder: a finished training run, ``runs/<stage>-<fingerprint>``.
        out: folder of the items' folders.
        shard: (number of this worker, number of workers).
        processes: the processes that are this worker; None: this one alone. Followers call ``follow_leader``.
        project: folder of the project.

    Returns:
        Names of the items that this worker generated and skipped.

    Raises:
        MagicDriveError: the inputs are missing, or items failed twice; the others are finished first.
    """
    digests = input_digests(config, stage_folder, project)
    processes = processes or SingleProcess()
    inputs = _Inputs(config, stage_folder, project, processes)
    fingerprints = {item: item_fingerprint(config, item, digests) for item in items}
    with FrameQueue() as frame_queue, progress_bar() as bar:
        row = bar.add_task("generate", total=len(items))

        def make(item: Item, claim: Claim) -> Future[None]:
            began, sampler = time.perf_counter(), inputs.sampler(item, bar)
            # What can fail is computed before the item is announced, while no follower waits for it.
            caption, _ = sampler.first.caption, sampler.features
            initial = sampler.initial_frames(project)
            processes.announce(item)
            latents = sampler.sample(processes, initial)
            writer = ItemWriter(
                config=config,
                item=item,
                scene=sampler.scene,
                caption=caption,
                fingerprint=fingerprints[item],
                lineage=digests,
                initial_images=initial.images if initial else None,
                times=(began, time.perf_counter()),
                is_claimed=lambda: claim.is_held,
            )
            views = (FrameFile(frames) for frames in sampler.decode_views(latents))
            return frame_queue.write(views, lambda views: writer.write(out / item.name, views))

        return share_items(
            items,
            out,
            fingerprints.__getitem__,
            make,
            shard=shard,
            recoverable=processes.recoverable,
            wait=processes.wait,
            advance=lambda: bar.advance(row),
        )


def follow_leader(config: Config, stage_folder: Path, processes: ProcessGroup, project: Path = Path()) -> None:
    """Samples the items that the leader announces, until there are no more; the leader decodes and writes them.

    Args:
        config: sampling settings, equal to the leader's.
        stage_folder: the finished training run that the leader uses.
        processes: the process group.
        project: folder of the project.
    """
    inputs = _Inputs(config, stage_folder, project, processes)
    for item in processes.announced_items():
        inputs.sampler(item).sample(processes)


@dataclass(frozen=True)
class _Inputs:
    """Inputs that all items of a worker share, loaded when the first item needs them."""

    config: Config
    stage_folder: Path
    project: Path
    processes: SingleProcess

    def sampler(self, item: Item, bar: Progress | None = None) -> Sampler:
        """Makes the sampler of an item.

        Args:
            item: the item to sample.
            bar: progress display with a row for the steps; None: no row, as on followers.

        Returns:
            The sampler, with the scene's edits applied.
        """
        scene = edit_scene(self._scenes[item.clip.scene], self._edits)
        progress = partial(_in_row, bar, f"  {scene.name} #{item.generation}") if bar else iter
        return Sampler(self.config, self._models, item, scene, self._edits, self._maps, progress)

    @cached_property
    def _models(self) -> Models:
        return Models.load(self.config, self.stage_folder, self.project, self.processes.sequence_group)

    @cached_property
    def _edits(self) -> Edits:
        return chosen_edits(self.config, self.project)

    @cached_property
    def _scenes(self) -> dict[str, Scene]:
        return {scene.token: scene for scene in read_scenes(self.project / "artifacts/infos")}

    @cached_property
    def _maps(self) -> BevMaps:
        return BevMaps(self.config, self.project)


def _in_row(bar: Progress, title: str, steps: Iterable[int]) -> Iterator[int]:
    """Yields steps and shows them in a row of the progress display that goes when they end."""
    row = bar.add_task(title)
    try:
        yield from bar.track(steps, task_id=row)
    finally:
        bar.remove_task(row)

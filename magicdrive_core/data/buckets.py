"""The micro-batches of each rank, over buckets of different video sizes and lengths.

In every epoch each bucket's clips are shuffled and cut into micro-batches, the micro-batches of all buckets are
shuffled, and dealt to the ranks in turn. The ranks of a step may work on different buckets and wait for the slowest.
With ``group``, micro-batches of similar cost stay together in the order; if the number of ranks divides ``group``, the
ranks of a step then wait less (``idle_share``).

The order depends neither on the rank nor on the number of ranks: after n micro-batches in total, training resumes at
the same point with any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from einops import rearrange

from magicdrive_core.config.schema import parse_size
from magicdrive_core.errors import UsageError

MicroBatch = tuple[int, list[int]]  # index of the bucket, indices of its clips


class BucketSampler:
    """Deal micro-batches to one of several ranks; the order depends only on the seed and the epoch.

    Args:
        counts: number of clips in each bucket.
        batches: number of clips in a micro-batch of each bucket; -1 leaves the bucket out.
        ranks: number of ranks that share the micro-batches.
        rank: index of this rank.
        seed: seed of the shuffles.
        drop_last: drop clips that do not fill a micro-batch, and micro-batches that do not go to every rank;
            otherwise the first ones are repeated.
        costs: cost of a micro-batch of each bucket, in any unit; needed with ``group``.
        group: number of micro-batches of similar cost that stay together; 1 is the published order.

    Raises:
        UsageError: the buckets hold too few clips for one micro-batch a rank.
    """

    def __init__(
        self,
        counts: Sequence[int],
        batches: Sequence[int],
        ranks: int,
        rank: int,
        seed: int,
        *,
        drop_last: bool = False,
        costs: Sequence[float] | None = None,
        group: int = 1,
    ) -> None:
        self.counts = list(counts)
        self.batches = list(batches)
        self.ranks = ranks
        self.rank = rank
        self.seed = seed
        self.drop_last = drop_last
        self.group = group
        # Costs within a tenth of each other count as equal, so that buckets of similar cost mix.
        self.levels = [round(math.log(cost) / math.log(1.1)) for cost in costs or []]
        if not len(self):
            raise UsageError(
                f"the buckets hold too few clips for {ranks} ranks: {self.counts} clips, micro-batches of"
                f" {self.batches}",
                "choose shorter clips or smaller micro-batches in params.yaml, or more scenes",
            )

    def __len__(self) -> int:
        """Return the number of micro-batches of a rank in an epoch."""
        total = sum(self._filled(bucket) // batch for bucket, batch in enumerate(self.batches) if batch > 0)
        return total // self.ranks if self.drop_last else -(-total // self.ranks)

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """List this rank's micro-batches in one epoch as published: equally many on every rank.

        Args:
            epoch: number of the epoch, from 0; added to the seed.

        Returns:
            ``len(self)`` pairs of the bucket's index and the indices of its clips. If their number in the epoch is not
            a multiple of ``ranks``, the first ones of the order are repeated in the last step; with ``drop_last`` the
            incomplete step is dropped.
        """
        dealt = self.order(epoch)
        padded = [dealt[index % len(dealt)] for index in range(len(self) * self.ranks)]
        return padded[self.rank :: self.ranks]

    def order(self, epoch: int) -> list[MicroBatch]:
        """List the micro-batches of one epoch in the order in which they are dealt to all ranks.

        Args:
            epoch: number of the epoch, from 0; added to the seed.

        Returns:
            Pairs of the bucket's index and the indices of its clips. With ``group``, the costliest ones are repeated so
            that the length is a multiple of ``group``.
        """
        generator = _TorchGenerator(self.seed + epoch)
        queues: list[list[list[int]]] = []
        for bucket, (count, batch) in enumerate(zip(self.counts, self.batches, strict=True)):
            if batch < 0:
                generator.permutation(count)  # as published: skipping a bucket keeps the order of the others
                queues.append([])
                continue
            clips = generator.permutation(self._filled(bucket)) % max(1, count)
            queues.append(rearrange(clips, "(m b) -> m b", b=batch).tolist())
        turns = np.repeat(np.arange(len(queues)), [len(queue) for queue in queues])
        waiting = [iter(queue) for queue in queues]
        dealt = [(bucket, next(waiting[bucket])) for bucket in turns[generator.permutation(len(turns))].tolist()]
        return self._grouped(dealt, generator) if self.group > 1 else dealt

    def stream(self, done: int = 0) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches without end, epoch after epoch.

        Args:
            done: micro-batches that all ranks have already consumed in total, since the start of training.

        Yields:
            The bucket's index and the indices of its clips: of the orders of all epochs, one after the other, the
            micro-batch number ``done + rank``, counted from 0, and from there every ``ranks``-th.
        """
        total = sum(self._filled(bucket) // batch for bucket, batch in enumerate(self.batches) if batch > 0)
        length = -(-total // self.group) * self.group
        epoch, index = divmod(done + self.rank, length)
        order = self.order(epoch)
        while True:
            yield order[index]
            passed, index = divmod(index + self.ranks, length)
            if passed:
                epoch += passed
                order = self.order(epoch)

    def _grouped(self, dealt: list[MicroBatch], generator: _TorchGenerator) -> list[MicroBatch]:
        """Reorder into random groups of similar cost; repeats fill the group of the highest cost."""
        rising = sorted(dealt, key=lambda batch: self.levels[batch[0]])
        missing = -len(rising) % self.group
        rising += [rising[-1 - index % len(rising)] for index in range(missing)]
        starts = generator.permutation(len(rising) // self.group) * self.group
        return [batch for start in starts.tolist() for batch in rising[start : start + self.group]]

    def _filled(self, bucket: int) -> int:
        """Return the number of clips of a bucket after dropping or repeating some: a multiple of its micro-batch."""
        count, batch = self.counts[bucket], self.batches[bucket]
        return count // batch * batch if self.drop_last else -(-count // batch) * batch


def relative_cost(size: str, frames: int, batch: int, width: int, context: int) -> float:
    """Estimate the multiply-adds of a micro-batch in the network's blocks, up to a constant factor.

    In a spatial and a temporal block, a token costs about 32 width^2 in linear layers (self-attention with its
    projections, attention to the context and to two neighbouring views, two MLPs), and width times the number of keys
    that it attends to: three frames of S tokens, T latent frames, twice the context.

    Args:
        size: height and width of the video, such as "224x400".
        frames: number of frames of a clip.
        batch: number of clips.
        width: width of the network (C).
        context: number of context tokens that every frame attends to (L).

    Returns:
        Multiply-adds of one spatial and one temporal block for one view; only ratios between micro-batches are
        meaningful.
    """
    height, pixels_wide = parse_size(size)
    tokens = math.ceil(height / 16) * math.ceil(pixels_wide / 16)  # S: the VAE's stride of 8, patches of 2
    latent_frames = frames // 4 + frames % 2  # T
    keys = 2 * (3 * tokens + latent_frames + 2 * context)
    return batch * latent_frames * tokens * (32 * width + keys) * width


def idle_share(batches: Sequence[MicroBatch], costs: Sequence[float], ranks: int) -> float:
    """Compute the share of time that ranks wait for the slowest rank of their step.

    Args:
        batches: micro-batches in the order of ``BucketSampler.order``; an incomplete last step is left out.
        costs: cost of a micro-batch of each bucket, in any unit.
        ranks: number of ranks; each step takes the next ``ranks`` micro-batches.

    Returns:
        The share, from 0 (all ranks of a step take equally long) to 1 - 1/``ranks``; NaN without a complete step.
    """
    in_steps = np.array([costs[bucket] for bucket, _ in batches[: len(batches) // ranks * ranks]])
    steps = rearrange(in_steps, "(s r) -> s r", r=ranks)
    return float(1 - steps.sum() / (ranks * steps.max(axis=1).sum()))


class _TorchGenerator:
    """``torch.randperm`` on torch's CPU generator, without torch: MT19937, Fisher-Yates over 32-bit words.

    Args:
        seed: seed of the generator, as for ``torch.Generator.manual_seed``; only its lower 32 bits count.
    """

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed % 2**32)

    def permutation(self, count: int) -> np.ndarray:
        """Draw a random permutation.

        Args:
            count: number of elements; 0 and 1 draw nothing from the generator.

        Returns:
            (count,) indices from 0 to count - 1.
        """
        indices = np.arange(count)
        if count > 1:
            words = np.frombuffer(self.state.bytes(4 * (count - 1)), "<u4").astype(np.int64)
            order = indices.tolist()
            for index, other in enumerate((indices[:-1] + words % (count - indices[:-1])).tolist()):
                order[index], order[other] = order[other], order[index]
            indices = np.array(order)
        return indices

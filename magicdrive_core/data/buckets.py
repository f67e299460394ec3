"""Which clips make the micro-batches of a rank, over buckets of unequal sizes and lengths.

Every epoch: each bucket's clips are shuffled and cut into micro-batches, the micro-batches of all buckets are
shuffled, and dealt to the ranks in turn. So each rank may work on another bucket in the same step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from magicdrive_core.errors import UsageError

MicroBatch = tuple[int, list[int]]  # bucket, clips of it


class BucketSampler:
    """Deals micro-batches to one of several ranks; the order depends on the seed and the epoch alone.

    Args:
        counts: clips in each bucket.
        batches: clips in a micro-batch of each bucket; -1 leaves the bucket out.
        ranks: that share the micro-batches.
        rank: this one.
        seed: of the shuffles.
        drop_last: leave out clips that fill no micro-batch, and micro-batches that do not go to every rank;
            otherwise repeat the first ones.

    Raises:
        UsageError: nothing to deal.
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
    ) -> None:
        self.counts = list(counts)
        self.batches = list(batches)
        self.ranks = ranks
        self.rank = rank
        self.seed = seed
        self.drop_last = drop_last
        if not len(self):
            raise UsageError(
                f"the buckets hold too few clips for {ranks} ranks: {self.counts} clips, micro-batches of"
                f" {self.batches}",
                "choose shorter clips or smaller micro-batches in params.yaml, or more scenes",
            )

    def __len__(self) -> int:
        """Micro-batches of a rank in an epoch."""
        total = sum(self._filled(bucket) // batch for bucket, batch in enumerate(self.batches) if batch > 0)
        return total // self.ranks if self.drop_last else -(-total // self.ranks)

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """The micro-batches of this rank in one epoch."""
        generator = _Generator(self.seed + epoch)
        queues: list[list[list[int]]] = []
        for bucket, (count, batch) in enumerate(zip(self.counts, self.batches, strict=True)):
            if batch < 0:
                generator.permutation(count)  # as published: a bucket that is left out leaves the others in their order
                queues.append([])
                continue
            clips = generator.permutation(self._filled(bucket)) % max(1, count)
            queues.append(clips.reshape(-1, batch).tolist())
        turns = np.repeat(np.arange(len(queues)), [len(queue) for queue in queues])
        waiting = [iter(queue) for queue in queues]
        dealt = [(bucket, next(waiting[bucket])) for bucket in turns[generator.permutation(len(turns))].tolist()]
        padded = [dealt[place % len(dealt)] for place in range(len(self) * self.ranks)]
        return padded[self.rank :: self.ranks]

    def stream(self, start: int = 0) -> Iterator[MicroBatch]:
        """Endless micro-batches of this rank, epoch after epoch, after the first ``start`` of them."""
        epoch, skip = divmod(start, len(self))
        while True:
            yield from self.epoch(epoch)[skip:]
            epoch, skip = epoch + 1, 0

    def _filled(self, bucket: int) -> int:
        """Clips of a bucket after leaving out or repeating some, a multiple of its micro-batch."""
        count, batch = self.counts[bucket], self.batches[bucket]
        return count // batch * batch if self.drop_last else -(-count // batch) * batch


class _Generator:
    """torch's CPU generator and ``torch.randperm``, without torch: MT19937, Fisher-Yates over 32-bit words."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed % 2**32)

    def permutation(self, count: int) -> np.ndarray:
        places = np.arange(count)
        if count > 1:
            words = np.frombuffer(self.state.bytes(4 * (count - 1)), "<u4").astype(np.int64)
            order = places.tolist()
            for place, other in enumerate((places[:-1] + words % (count - places[:-1])).tolist()):
                order[place], order[other] = order[other], order[place]
            places = np.array(order)
        return places

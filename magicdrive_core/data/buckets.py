"""Which clips make the micro-batches of a rank, over buckets of unequal sizes and lengths.

Every epoch: each bucket's clips are shuffled and cut into micro-batches, the micro-batches of all buckets are
shuffled, and dealt to the ranks in turn. So each rank may work on another bucket in the same step, and the ranks wait
for the slowest of them. With ``group`` the order is made of groups of like cost instead: the ranks of a step, if their
number divides it, then wait less (``idle_share``).

The order depends on neither ranks nor rank: after n micro-batches of all ranks together, any number of ranks goes on
where they stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from magicdrive_core.config.schema import parse_size
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
        costs: of a micro-batch of each bucket, in any unit; needed with ``group``.
        group: so many micro-batches of like cost come together; 1: the published order.

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
        # Costs within a tenth of each other are equal, so that buckets of like cost mix.
        self.levels = [round(math.log(cost) / math.log(1.1)) for cost in costs or []]
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
        """The micro-batches of this rank in one published epoch, which every rank ends after as many steps."""
        dealt = self.order(epoch)
        padded = [dealt[place % len(dealt)] for place in range(len(self) * self.ranks)]
        return padded[self.rank :: self.ranks]

    def order(self, epoch: int) -> list[MicroBatch]:
        """The micro-batches of all ranks together in one epoch."""
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
        return self._grouped(dealt, generator) if self.group > 1 else dealt

    def stream(self, done: int = 0) -> Iterator[MicroBatch]:
        """Endless micro-batches of this rank, epoch after epoch, after the first ``done`` of all ranks together."""
        total = sum(self._filled(bucket) // batch for bucket, batch in enumerate(self.batches) if batch > 0)
        length = -(-total // self.group) * self.group
        epoch, place = divmod(done + self.rank, length)
        order = self.order(epoch)
        while True:
            yield order[place]
            passed, place = divmod(place + self.ranks, length)
            if passed:
                epoch += passed
                order = self.order(epoch)

    def _grouped(self, dealt: list[MicroBatch], generator: _Generator) -> list[MicroBatch]:
        """Groups of like cost in random order; the one of the highest cost is filled up with repeats."""
        rising = sorted(dealt, key=lambda batch: self.levels[batch[0]])
        missing = -len(rising) % self.group
        rising += [rising[-1 - place % len(rising)] for place in range(missing)]
        starts = generator.permutation(len(rising) // self.group) * self.group
        return [batch for start in starts.tolist() for batch in rising[start : start + self.group]]

    def _filled(self, bucket: int) -> int:
        """Clips of a bucket after leaving out or repeating some, a multiple of its micro-batch."""
        count, batch = self.counts[bucket], self.batches[bucket]
        return count // batch * batch if self.drop_last else -(-count // batch) * batch


def relative_cost(size: str, frames: int, batch: int, width: int, context: int) -> float:
    """Multiply-adds of a micro-batch in the network's blocks, up to a constant factor.

    A token of a spatial and a temporal block takes about 32 width^2 in linear layers (attention with its projections,
    attention to the context and to two neighbouring views, two MLPs), and width times the keys that it looks at: three
    frames of S tokens, T frames, twice the context.

    Args:
        size: of the video, such as "224x400".
        frames: of a clip.
        batch: clips.
        width: of the network.
        context: tokens that every frame attends to.
    """
    height, pixels_wide = parse_size(size)
    tokens = math.ceil(height / 16) * math.ceil(pixels_wide / 16)  # S: the VAE's stride of 8, patches of 2
    latent_frames = frames // 4 + frames % 2  # T
    keys = 2 * (3 * tokens + latent_frames + 2 * context)
    return batch * latent_frames * tokens * (32 * width + keys) * width


def idle_share(batches: Sequence[MicroBatch], costs: Sequence[float], ranks: int) -> float:
    """The share of their time that ranks wait for the slowest one, where each step takes the next ``ranks`` of batches.

    Args:
        batches: of all ranks together; a last step that is not full is left out.
        costs: of a micro-batch of each bucket.
        ranks: that share a step.
    """
    steps = np.array([costs[bucket] for bucket, _ in batches[: len(batches) // ranks * ranks]]).reshape(-1, ranks)
    return float(1 - steps.sum() / (ranks * steps.max(axis=1).sum()))


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

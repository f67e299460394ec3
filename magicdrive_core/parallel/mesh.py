"""Which ranks share a clip: data-parallel groups x sequence-parallel groups, on ColossalAI's ProcessGroupMesh.

Ranks that share a clip are neighbours, so that they are on one host. They prepare the same micro-batches with the same
random numbers, and each computes the loss of the whole clip: the mean over all ranks of losses and gradients, which
ZeRO takes anyway, is that over the groups (sequence_parallel.py). So ZeRO shards over all ranks, whatever they share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from colossalai.cluster import ProcessGroupMesh

from magicdrive_core.parallel.sequence_parallel import RankGroup


@dataclass(frozen=True)
class Mesh:
    """This rank's position among all ranks.

    Attributes:
        groups: number of groups, each of which takes a micro-batch per step.
        group: index of this rank's group.
        sequence_group: the ranks that share this rank's clips; None: it has its own.
    """

    groups: int
    group: int
    sequence_group: RankGroup | None

    @property
    def sequence_parallel(self) -> int:
        """Number of ranks that share a clip."""
        return self.sequence_group.size if self.sequence_group else 1

    @classmethod
    def of(cls, sequence_parallel: int) -> Mesh:
        """Puts all ranks into groups of neighbours. Collective: every rank must call it.

        Args:
            sequence_parallel: number of ranks that share a clip, a divisor of the number of all ranks.

        Returns:
            This rank's position.
        """
        groups = dist.get_world_size() // sequence_parallel
        mesh = ProcessGroupMesh(groups, sequence_parallel)
        group = None if sequence_parallel == 1 else RankGroup(mesh.get_group_along_axis(1))
        return cls(groups, int(mesh.coordinate(0)), group)

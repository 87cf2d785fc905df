"""The relatives of task arithmetic: W0 + lambda * sum(w d), d = what is left of each model's difference from the base.

The methods differ in what they leave out (`trim`, in trimming.py) and in whether the models vote on the sign of each
element (`consensus`), so that only those who agree count (TIES, arXiv:2306.01708). Source: mergekit
merge_methods/generalized_task_arithmetic.py and sparsify.py, whose parameters these are. Different here:

rescale   what makes up for what was left out: `probability` divides each element by the chance it had (DARE's and
          DELLA's papers, PEFT, sd-mecha), `l1` gives the difference its old sum of magnitudes (mergekit)
vote      `sum` goes by the sum of the weighted differences, `count` by the number of models; even is plus
normalize divides by the sum of the weights, with a vote of those that count at the element. PEFT: by their number
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bake.merges.linear import added_up
from bake.merges.merge import Chunk, Job, Merge, Survey, differences
from bake.merges.sums import Sums, row_sums
from bake.merges.task_arithmetic import added
from bake.merges.trimming import TRIMS


class TaskVectors(Merge):
    """The whole family. Models: base, one or more. Fixed by the method: trim, consensus."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._weights = job.numbers("weight")
        self._rescale = job.values.get("rescale", "none")
        self._gains = [1.0] * len(self._weights)
        self._trim = TRIMS[str(job.values["trim"])](job, self.view[0] * self.view[1])

    def passes(self) -> Iterator[Survey]:
        yield from self._trim.passes()
        if self._rescale == "l1":
            sizes = Sums(self.view[0], self._sizes)
            yield sizes
            before, after = sizes.total.reshape(2, -1).tolist()
            self._gains = [old / new if new else 1.0 for old, new in zip(before, after, strict=True)]

    def blend(self, chunk: Chunk) -> Tensor:
        changes = [
            self._kept(place, change, chunk) * (self._gains[place] * self._weights[place])
            for place, change in enumerate(differences(chunk.models))
        ]
        normalize = bool(self.job.values["normalize"])
        if self.job.values["consensus"]:
            votes = [change.sign() for change in changes] if self.job.values["vote"] == "count" else changes
            total = agreed(changes, self._weights, votes, normalize)
        else:
            total = added(changes)
            if normalize:
                total = total / added_up(self._weights)
        return chunk.models[0] + total * self.job.number("lambda")

    def _kept(self, place: int, change: Tensor, chunk: Chunk) -> Tensor:
        kept, chance = self._trim.apply(place, change, chunk)
        return kept / chance if self._rescale == "probability" else kept

    def _sizes(self, chunk: Chunk) -> Tensor:
        """In each row: the sums of each difference's magnitudes, then of those that are kept."""
        changes = differences(chunk.models)
        kept = [self._kept(place, change, chunk) for place, change in enumerate(changes)]
        return torch.stack([row_sums(values.abs()) for values in changes + kept], dim=1)


def agreed(changes: Sequence[Tensor], weights: Sequence[float], votes: Sequence[Tensor], normalize: bool) -> Tensor:
    """The sum of those weighted changes that have the sign of the votes' sum, 0 being plus.

    normalize: divided by the sum of their weights.
    """
    total, divisor = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    sign = torch.where(added(votes) >= 0, 1.0, -1.0)
    for change, weight in zip(changes, weights, strict=True):
        is_counted = change.sign() == sign
        total += torch.where(is_counted, change, 0.0)
        divisor += is_counted.to(change.dtype) * weight
    return total / torch.where(divisor == 0, 1.0, divisor) if normalize else total

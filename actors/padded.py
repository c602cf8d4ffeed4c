"""Running a pack as padded batches, for architectures that cannot keep packed sequences apart.

Invariants:

- What comes back is in the pack's order, whatever batches it was run in, and so are gradients.
- Padding is bounded: sequences of similar length share a batch, and a batch has at most ``MOST_PADDED`` times its own
  tokens. Else one long sequence would pad all short ones of its pack to its length.
- Where weights are sharded every rank runs equally many batches, for each is a collective step, forward and backward.

Legend: T tokens of a pack, B sequences of a batch, L tokens of the longest one there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: Tokens and padding of a batch, in its own tokens.
MOST_PADDED = 1.5


def run_padded(
    run: Callable[[Tensor, Tensor], Tensor], tokens_T: Tensor, position_ids_T: Tensor, *, sharded: bool
) -> Tensor:
    """What ``run`` gives each token of a pack, (T, ...).

    Args:
        run: gives tokens (B, L), padded on the right, and their mask (B, L) an output (B, L, ...).
        position_ids_T: restart at 0 with each sequence.
        sharded: whether a call of ``run`` is collective. Then all ranks of the process group call this together.
    """
    starts = (position_ids_T == 0).nonzero()[:, 0].tolist()
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(tokens_T)], strict=True)]
    pieces, places = [], []
    batches = similar(lengths)
    # Before the first of them: what is collective must come in the same order on all ranks.
    num_more = _most(len(batches), tokens_T.device) - len(batches) if sharded else 0
    for rows in batches:
        place_T = torch.cat([torch.arange(starts[row], starts[row] + lengths[row]) for row in rows]).to(tokens_T.device)
        row_T = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([lengths[row] for row in rows]))
        at = (row_T.to(tokens_T.device), position_ids_T[place_T])
        shape = (len(rows), lengths[rows[0]])
        tokens = tokens_T.new_zeros(shape).index_put(at, tokens_T[place_T])
        mask = torch.zeros_like(tokens).index_put(at, torch.ones_like(place_T, dtype=tokens.dtype))
        pieces.append(run(tokens, mask)[at])
        places.append(place_T)
    outputs_T = torch.cat(pieces)[torch.cat(places).argsort()]
    for _ in range(num_more):
        # Part of the result, so that it is part of backward too.
        one = tokens_T[:1, None]
        outputs_T = outputs_T + 0 * run(one, torch.ones_like(one)).sum()
    return outputs_T


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """Sequences in batches, the longest first: each with at most ``MOST_PADDED`` times its own tokens once padded.

    >>> similar([3, 10, 3, 9])
    [[1, 3], [0, 2]]
    """
    batches: list[list[int]] = []
    held = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        held += lengths[row]
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= MOST_PADDED * held:
            batches[-1].append(row)
        else:
            batches.append([row])
            held = lengths[row]
    return batches


def _most(count: int, device: torch.device) -> int:
    """The largest ``count`` over the ranks."""
    counts = torch.tensor(count, device=device)
    torch.distributed.all_reduce(counts, op=torch.distributed.ReduceOp.MAX)
    return int(counts)

"""What can go wrong between a run and its cluster: one tree, messages that name the culprit."""

from __future__ import annotations

from collections.abc import Sequence


class ClusterError(RuntimeError):
    """Base of this package's errors."""


class SessionError(ClusterError):
    """No cluster could be joined or started."""


class PlacementFailed(ClusterError):
    """A role found no place before its deadline. The message says which bundle does not fit which node."""


class RoleFailed(ClusterError):
    """A rank of a role failed: an exception in its code, or its process or node is gone.

    ``raised`` is the exception of its code; none where the process is gone.
    """

    def __init__(
        self, role: str, rank: int, node: str, what: str, log_tail: str, raised: BaseException | None = None
    ) -> None:
        self.role = role
        self.rank = rank
        self.node = node
        self.raised = raised
        tail = f"\nThe end of its log:\n{log_tail}" if log_tail else ""
        super().__init__(f"{role} rank {rank} (node {node}): {what}{tail}")


class RoleTimeout(ClusterError):
    """Ranks of a role did not answer in time."""

    def __init__(self, role: str, method: str, silent: Sequence[int], num_ranks: int, timeout_s: float) -> None:
        self.role = role
        self.silent = tuple(silent)
        ranks = ", ".join(str(rank) for rank in silent)
        super().__init__(
            f"{role}: {method} had no answer from rank {ranks} (of {num_ranks}) within {timeout_s:g} s; it hangs, or "
            f"cluster.{'start' if method == 'start' else 'call'}_timeout_s is too short for it"
        )

"""Configuration of the session with Ray and of where a role's ranks sit. Imports neither Ray nor torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class FrozenConfig(BaseModel):
    """Base of every configuration model: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


#: Of the time of a call; the rest is for the way there and back, and to end what is late.
SHARE_TO_ANSWER = 0.9


class ClusterConfig(FrozenConfig):
    """The Ray cluster that the run uses."""

    address: str = Field(
        "auto",
        description="`auto` joins the cluster that RAY_ADDRESS or a submitted job names, else starts Ray on this "
        "machine; `local` always starts it here; anything else is a cluster's address.",
    )
    accelerator_resource: str = Field(
        "GPU",
        description="The Ray resource that one accelerator is. Any name but GPU stands for groups of a cluster "
        "whose ranks run on CPU.",
    )
    placement_timeout_s: PositiveFloat = Field(
        120.0, description="How long a role waits for its place before the run ends with the reason."
    )
    start_timeout_s: PositiveFloat = Field(
        600.0, description="How long a role's ranks may take to load their model."
    )
    call_timeout_s: PositiveFloat = Field(
        1800.0, description="How long one call to a role may take before the run ends naming the silent ranks."
    )
    object_store_bytes: PositiveInt | None = Field(
        None, description="Size of the shared-memory object store of a local Ray; none leaves it to Ray."
    )

    @property
    def answer_within_s(self) -> float:
        """How long a call to a role may take that can also answer in part, shortly before it would end the run."""
        return SHARE_TO_ANSWER * self.call_timeout_s


class PlacementConfig(FrozenConfig):
    """How many ranks a role has and what each takes. Total ranks = num_nodes * ranks_per_node."""

    num_nodes: PositiveInt = Field(1, description="Nodes that the role's ranks are laid out over.")
    ranks_per_node: PositiveInt = Field(1, description="Ranks (processes) of the role on each of these nodes.")
    gpus_per_rank: float = Field(
        0.0, ge=0, description="Accelerators a rank takes: 0 runs on CPU, a fraction shares one with a colocated role."
    )
    cpus_per_rank: float = Field(1.0, gt=0, description="CPU cores that Ray sets aside for a rank.")
    threads_per_rank: PositiveInt | None = Field(
        None, description="Threads a rank computes with; none means as many as cpus_per_rank, rounded up."
    )
    strategy: Strategy = Field(
        "PACK", description="How Ray lays the nodes' bundles out: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."
    )
    colocate: str | None = Field(
        None, description="Roles that name the same group here share one placement group, rank by rank."
    )

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.num_nodes * self.ranks_per_node

    @property
    def num_threads(self) -> int:
        """Threads of one rank."""
        return self.threads_per_rank or max(1, round(self.cpus_per_rank + 0.49))

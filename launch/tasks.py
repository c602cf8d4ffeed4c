"""Task groups that fail with the failure itself.

``asyncio.TaskGroup`` wraps what a task raised in an exception group, several deep where groups are nested. A run has
one cause to report: the first failure. The others are mostly its consequences.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group; the first task that fails cancels the others, and its exception is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failures:
        raise first_failure(failures) from None


def first_failure(error: BaseException) -> BaseException:
    """The first exception in an exception group, however deep; any other exception is itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

"""Ranks that cannot meet say where, and why."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from actors.errors import RoleError
from actors.process_group import join_ranks
from cluster.context import RankContext
try:
    join_ranks(RankContext("policy", 0, 2, 0, "127.0.0.1", int(sys.argv[1]), "cpu", 1, None, 0))
except RoleError as error:
    print(error)
"""


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [sys.executable, "-c", PROGRAM, str(port)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert f"policy: rank 0 of 2 could not meet the others at 127.0.0.1:{port}" in done.stdout, done.stderr
    assert "in use" in done.stdout

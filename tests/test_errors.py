"""The line that a user is told."""

import socket
import subprocess
import sys


def test_a_line_is_one_write():
    """Ranks share their stderr: what one of them tells in two writes, others begin amid."""
    ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)  # one write, one datagram
    with ours, theirs:
        line = [sys.executable, "-m", "aaae_dist", "train", "nowhere.toml"]
        done = subprocess.run(line, stderr=theirs, stdin=subprocess.DEVNULL, timeout=120, check=False)
        ours.setblocking(False)
        told = ours.recv(10_000).decode()
    assert done.returncode == 2
    assert told.startswith("aaae: nowhere.toml: no such file")
    assert told.endswith("\n")

"""Hosts for the tests: network namespaces on one switch, each with an interface, an address and a name of its own.

Nothing leads from them to this machine's network. A server of this machine is reached through a proxy whose listening
socket is in a namespace. It needs root, iproute2 and iptables.
"""

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

NETWORK = "198.18.7"  # of the range for benchmarks, RFC 2544
CLONE_NEWNET = 0x40000000
WRONG_CLOCK = """
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += AHEAD;
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += AHEAD;
    return failed;
}
time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Hosts 0 and so on of one network; a fault of a host is one of its link to the switch."""

    def __init__(self, name: str, count: int) -> None:
        self.switch, self.names = f"{name}-switch", [f"{name}-{host}" for host in range(count)]
        ip("netns", "add", self.switch)
        for namespace in self.names:
            ip("netns", "add", namespace)
        self.at_switch("ip", "link", "add", "bridge", "type", "bridge")
        self.at_switch("ip", "link", "set", "bridge", "up")
        for host, namespace in enumerate(self.names):
            port = ("name", f"port{host}", "netns", self.switch)
            ip("link", "add", *port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            self.at_switch("ip", "link", "set", f"port{host}", "master", "bridge", "up")
            for words in (("addr", "add", f"{self.address(host)}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                self.at(host, "ip", *words)
            self.at(host, "ip", "link", "set", "lo", "up")

    def address(self, host: int) -> str:
        return f"{NETWORK}.{host + 1}"

    def line(self, host: int, *line: str | Path) -> list[str | Path]:
        """What runs a command on a host, which is named n0 and so on; it becomes the process that is started."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname n{host}; exec "$@"', "sh"]
        return ["nsenter", f"--net=/run/netns/{self.names[host]}", *named, *line]

    def at(self, host: int, *line: str) -> None:
        ip("netns", "exec", self.names[host], *line)

    def at_switch(self, *line: str) -> None:
        ip("netns", "exec", self.switch, *line)

    def listener(self, host: int, port: int) -> socket.socket:
        """A socket of this process that is bound on a host, in whose namespace it stays."""

        def make() -> socket.socket:
            with Path(f"/run/netns/{self.names[host]}").open() as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made = socket.socket()
            made.bind((self.address(host), port))
            return made

        with ThreadPoolExecutor(1) as thread:  # whose namespace is its own
            return thread.submit(make).result()

    # --- faults

    def cut(self, host: int) -> None:
        """Pull its cable: the host sees that."""
        self.at_switch("ip", "link", "set", f"port{host}", "down")

    def join(self, host: int) -> None:
        self.at_switch("ip", "link", "set", f"port{host}", "up")

    def drop(self, host: int) -> None:
        """Lose every packet from and to it: nobody sees that."""
        for chain, side in (("INPUT", "-i"), ("OUTPUT", "-o")):
            self.at(host, "iptables", "-I", chain, side, "eth0", "-j", "DROP")

    def reset(self, host: int) -> None:
        """Answer every TCP packet to it with a reset, which only the other side sees."""
        how = ("-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
        self.at(host, "iptables", "-I", "INPUT", "-i", "eth0", *how)

    def pass_again(self, host: int) -> None:
        self.at(host, "iptables", "-F")

    def slow(self, host: int, rate: str) -> None:
        """Let no more through to it than a rate, such as 20mbit."""
        how = ("tbf", "rate", rate, "burst", "64k", "latency", "200ms")
        self.at_switch("tc", "qdisc", "replace", "dev", f"port{host}", "root", *how)


def clock_ahead(seconds: int, folder: Path) -> dict[str, str]:
    """Variables of a host whose clock is so far ahead. (No namespace has a date of its own.)"""
    library = folder / "clock.so"
    line = ["cc", "-shared", "-fPIC", f"-DAHEAD={seconds}", "-x", "c", "-o", str(library), "-"]
    subprocess.run(line, input=WRONG_CLOCK, text=True, check=True)
    return {"LD_PRELOAD": str(library)}


@contextmanager
def network(count: int) -> Iterator[Hosts]:
    """So many hosts, until the block ends."""
    name = f"aaae-{secrets.token_hex(3)}"
    with ExitStack() as stack:
        for end in ("switch", *range(count)):
            stack.callback(subprocess.run, ["ip", "netns", "del", f"{name}-{end}"], check=False, capture_output=True)
        yield Hosts(name, count)


def can_be_made() -> bool:
    """Whether this machine has what it takes, and lets us."""
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc", "iptables", "nsenter", "unshare")))

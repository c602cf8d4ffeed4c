"""Inside the sandbox: ``python -I sandbox_child.py``. Locks itself in, then runs the program that it is given.

It imports nothing of ours, for it runs by its path, without the tree on its module path. From the moment that the
program runs nothing here can be trusted but what the kernel enforces.

Standard input is one JSON object: the program, its input, the limits, and a secret. Standard output begins with the
secret on a line of its own when the walls are up, and ends with it where the program ran to its end; what stands
between is the program's. The secret is in this process's memory, where a program that looks for it finds it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER, _SECCOMP_ERRNO, _SECCOMP_ALLOW = 2, 0x00050000, 0x7FFF0000
#: Instructions of a filter: load a word of what was called, compare it, give an answer.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _ANSWER = 0x20, 0x15, 0x35, 0x06
#: How a kernel calls its machine, and the numbers of semget, msgget and shmget there.
_SYSTEM_V = {"x86_64": (0xC000003E, (64, 68, 29)), "aarch64": (0xC00000B7, (190, 186, 194))}
_CAPABILITY_VERSION_3 = 0x20080522
_NOBODY = 65534
_MOST_FILES = 1024

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Lock up, run, and say how it went by the exit code: 0 where the program ended well."""
    task: dict[str, Any] = json.load(sys.stdin)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if task["namespaces"]:
        _enter_namespaces(task["wall_s"])
        _see_only_python(task["max_output_bytes"])
    _give_up_privileges()
    _give_input(task["input"])
    _limit(task)
    _refuse_system_v()
    os.environ.update(HOME=os.getcwd(), TMPDIR=os.getcwd())
    secret = task.pop("secret")
    print(secret, flush=True)
    _run(task["program"], task["may_exit"])
    sys.stdout.flush()
    print(secret, flush=True)
    os._exit(0)


def _checked(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _enter_namespaces(wall_s: int) -> None:
    """Spaces of its own for network, processes, mounts and messages; root needs no space of users for that."""
    uid, gid = os.geteuid(), os.getegid()
    spaces = _CLONE_NEWNET | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWIPC
    if uid != 0 or _libc.unshare(spaces) < 0:
        _checked("unshare", _libc.unshare(spaces | _CLONE_NEWUSER))
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    # The first process of the new space of processes: with it, all of them end. It is not the one that runs the
    # program, which may do what it likes to be left alone.
    _fork(wall_s)
    _fork(wall_s)
    os.setsid()  # the group that it was in has processes that it must not be able to signal


def _fork(wall_s: int) -> None:
    """Go on as a child. The parent waits for its end, and brings it about when it is told to, or after ``wall_s``."""
    ends = (signal.SIGTERM, signal.SIGALRM)
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    child = os.fork()
    if child:
        for end in ends:
            signal.signal(end, lambda *_: os.kill(child, signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
        signal.alarm(wall_s)
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _see_only_python(size: int) -> None:
    """A root that holds the system's libraries and Python's, read only, and one folder in memory to write in.

    There is no /proc: in it the environment of other processes of the same user could be read.
    """
    here = os.getcwd()
    _checked("mount private", _libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
    _mount_memory(here, "mode=755,size=1m")
    folders = ["/usr", "/bin", "/lib", "/lib32", "/lib64", sys.base_prefix, sys.prefix]
    for path in [*folders, "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"]:
        _show(path, here)
    os.mkdir(f"{here}/box")
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)
    root = ctypes.create_string_buffer(here.encode())
    of_all = (_SYS_MOUNT_SETATTR, _AT_FDCWD, root, _AT_RECURSIVE, attributes, ctypes.sizeof(attributes))
    _checked("mount_setattr", _libc.syscall(*of_all))
    _mount_memory(f"{here}/box", f"mode=777,size={size},nr_inodes={_MOST_FILES}")
    os.chroot(here)
    os.chdir("/box")


def _mount_memory(where: str, options: str) -> None:
    flags = _MS_NOSUID | _MS_NODEV
    _checked(f"mount {where}", _libc.mount(b"tmpfs", where.encode(), b"tmpfs", flags, options.encode()))


def _show(path: str, root: str) -> None:
    """Make a file or folder seen below ``root`` under its own path."""
    target = root + path
    if not os.path.lexists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target, mode=0o755)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _checked(f"mount {path}", _libc.mount(path.encode(), target.encode(), None, _MS_BIND | _MS_REC, None))


def _give_up_privileges() -> None:
    """Root may go past limits, and read what is root's; in a space of users of its own anybody is as root."""
    if os.geteuid() == 0:
        os.chown(".", _NOBODY, _NOBODY)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # changing one's user clears it
    header, none = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _checked("capset", _libc.capset(header, none))
    _checked("prctl", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _limit(task: dict[str, Any]) -> None:
    memory, cpu, size = task["memory_bytes"], task["cpu_s"], task["max_output_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no further process or thread


def _refuse_system_v() -> None:
    """System V's shared memory, messages and semaphores hold memory that counts for no limit of a process.

    So asking for any is no permitted system call; nor is one by the numbers of another architecture.
    """
    machine = os.uname().machine
    if machine not in _SYSTEM_V:
        raise OSError(f"which system calls to refuse is known of {', '.join(_SYSTEM_V)}, and not of {machine}")
    architecture, refused = _SYSTEM_V[machine]
    steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 0, len(refused) + 3, architecture), (_LOAD, 0, 0, 0)]
    steps += [(_IF_AT_LEAST, len(refused) + 1, 0, 0x40000000)]  # x86_64 has a second set of numbers there
    steps += [(_IF_EQUAL, len(refused) - at, 0, number) for at, number in enumerate(refused)]
    steps += [(_ANSWER, 0, 0, _SECCOMP_ALLOW), (_ANSWER, 0, 0, _SECCOMP_ERRNO | errno.EPERM)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    _checked("seccomp", _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0))


def _give_input(text: str) -> None:
    """Before there are limits, for it may be more than the program may write."""
    file = os.memfd_create("input")
    with open(file, "wb", closefd=False) as whole:
        whole.write(text.encode())
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  the program's


def _run(program: str, may_exit: bool) -> None:
    try:
        exec(compile(program, "<response>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        if not may_exit or ended.code not in (None, 0):
            os._exit(1)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    main()

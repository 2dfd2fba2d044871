"""Isolates a process with Linux namespaces: separate file system, process ids and network. Needs no root and no
library.

`worker` loads this file by its path, and also filters system calls. `enter` moves the worker into these namespaces:

    user       one user id, without rights outside; capabilities apply only inside
    mount      an empty read-only root with Python and the system's libraries, read-only; set-user-id is ignored
    pid        processes outside have no id here, so they cannot be signalled, traced or changed
    network    no interface is up
    ipc, uts   no shared memory segments, no host name

`fork_call` starts each call alone in a new pid namespace and a new mount namespace. When the call ends, the kernel
kills the processes that it started and removes its files, which are in memory. The call has capabilities until
`syscalls` drops them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct

_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWPID | 0x10000000 | 0x40000000 | 0x08000000 | 0x04000000  # user, net, ipc, uts
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG = 1
_MOUNT_SETATTR = 442  # Linux 5.12; the same number on every architecture
_NOT_ROOT = 65534  # outside
_MANY_PROCESSES = 10_000  # more than root has on a machine, threads of the kernel included
_USER_ID = 1000  # inside; not 0, so that programs do not behave as if they were root

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, value: int) -> int:
    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return value


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _checked(f"mount on {target}", _libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]))


def enter(folder: str, readable: list[str]) -> None:
    """Fork a process into new namespaces that contain only `readable` and `folder`, and return in that process.

    Its working directory is `folder`. The calling process stays outside, waits for the new process and exits with its
    status. If one of the two exits, the kernel kills the other.
    """
    user, group = os.geteuid(), os.getegid()
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if user == 0 and (hard == resource.RLIM_INFINITY or hard >= _MANY_PROCESSES):
        # The kernel limits the threads of each user in a user namespace, except those of processes whose real user is
        # root outside. Access to files depends on the effective user. From here on, the limit of root's processes on
        # the whole machine applies too.
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
        with contextlib.suppress(OSError):  # without the right to change it
            os.setresuid(_NOT_ROOT, -1, -1)
    _checked("user namespaces are denied or used up", _libc.unshare(_NAMESPACES))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_USER_ID} {user} 1"),
        ("gid_map", f"{_USER_ID} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    inner = os.fork()
    if inner:
        for fd in (0, 1, 2):  # only the inner process has the pipes open, so they close when it exits
            os.close(fd)
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _checked("host name", _libc.sethostname(b"sandbox", ctypes.c_size_t(7)))
    _change_root(folder, readable)


def _change_root(folder: str, readable: list[str]) -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)  # mounts made here are not visible outside
    shown = os.open(folder, os.O_PATH)
    root = folder  # the mount below hides its content, in this mount namespace only
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path in sorted(readable, key=len):
        if not os.path.lexists(target := root + path):  # otherwise a parent folder is already mounted
            _bind(os.path.realpath(path), target, read_only=True)
    _bind(f"/proc/self/fd/{shown}", root + folder, read_only=False)
    os.close(shown)
    _restrict(root, 0)
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _checked("pivot_root", _libc.syscall(pivot_root, b".", b"."))
    _checked("umount", _libc.umount2(b".", _MNT_DETACH))  # the old root, below the new one
    os.chdir(folder)


def _bind(source: str, target: str, *, read_only: bool) -> None:
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    # Not recursive for the folder, because the new root is mounted on it.
    _mount(source, target, None, _MS_BIND | (_MS_REC if read_only else 0))
    if read_only:
        _restrict(target, _AT_RECURSIVE)


def _restrict(path: str, flags: int) -> None:
    """Make the mount at `path` read-only and ignore set-user-id; with `_AT_RECURSIVE`, also all mounts below it."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    value = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, len(attributes))
    _checked(f"read-only mount of {path}", value)


def fork_call() -> int:
    """Run `os.fork` into a new pid namespace. The calling process stays in its namespace."""
    own = os.pidfd_open(os.getpid())
    _checked("new pid namespace", _libc.unshare(_CLONE_NEWPID))
    pid = os.fork()
    if pid:
        _checked("own pid namespace", _libc.setns(own, _CLONE_NEWPID))
    os.close(own)
    return pid


def lock(scratch: str) -> None:
    """Give this process a private empty working directory, limited by `scratch`, the options of its tmpfs."""
    folder = os.getcwd()
    _checked("new mount namespace", _libc.unshare(_CLONE_NEWNS))
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"{scratch},mode=0700")
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))

"""A process with a file system, process ids and network of its own, made from Linux namespaces; no root, no library.

`worker` loads this file by its path, and filters system calls besides. `enter` moves the worker into

    user       one user id, without rights outside; capabilities that hold inside only
    mount      an empty read-only root with Python and the system's libraries, read-only; what is set-user-id is not
    pid        nothing outside can be named, and so not signalled, traced or changed
    network    no interface is up
    ipc, uts   no shared memory segments, no host name

and `fork_call` makes each call a process that is alone in a pid namespace and a mount namespace of its own: when it
ends the kernel ends whatever it started and drops the files it wrote, which lay in memory. Its capabilities hold until
`syscalls` takes them away.
"""

from __future__ import annotations

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
_USER_ID = 1000  # inside; an id like any other, so that nothing takes itself for root

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
    """Go on, in a forked process, in new namespaces that show `readable` and `folder`, which is the working directory.

    The calling process stays outside, waits for that process and exits as it does; each dies with the other.
    """
    user, group = os.getuid(), os.getgid()
    _checked("new namespaces", _libc.unshare(_NAMESPACES))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_USER_ID} {user} 1"),
        ("gid_map", f"{_USER_ID} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    inner = os.fork()
    if inner:
        for fd in (0, 1, 2):  # the pipes are the inner process's alone, so that its end is their end
            os.close(fd)
        _, status = os.waitpid(inner, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _checked("host name", _libc.sethostname(b"sandbox", ctypes.c_size_t(7)))
    _change_root(folder, readable)


def _change_root(folder: str, readable: list[str]) -> None:
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)  # nothing mounted here is seen outside
    shown = os.open(folder, os.O_PATH)
    root = folder  # hidden from here on, in this mount namespace alone
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=0755")
    for path in sorted(readable, key=len):
        if not os.path.lexists(target := root + path):  # else a folder above it is there already
            _bind(os.path.realpath(path), target, read_only=True)
    _bind(f"/proc/self/fd/{shown}", root + folder, read_only=False)
    os.close(shown)
    _restrict(root, 0)
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    _checked("pivot_root", _libc.syscall(pivot_root, b".", b"."))
    _checked("umount", _libc.umount2(b".", _MNT_DETACH))  # the old root, which the new one was stacked on
    os.chdir(folder)


def _bind(source: str, target: str, *, read_only: bool) -> None:
    if os.path.isdir(source):
        os.makedirs(target)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    # Without what is mounted below for the folder: on that lies the root that is being built.
    _mount(source, target, None, _MS_BIND | (_MS_REC if read_only else 0))
    if read_only:
        _restrict(target, _AT_RECURSIVE)


def _restrict(path: str, flags: int) -> None:
    """Make what is mounted there read-only and without set-user-id; mounts below it too with `_AT_RECURSIVE`."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    value = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, attributes, len(attributes))
    _checked(f"read-only mount of {path}", value)


def fork_call() -> int:
    """`os.fork` into a pid namespace of its own. The calling process stays where it is."""
    own = os.pidfd_open(os.getpid())
    _checked("new pid namespace", _libc.unshare(_CLONE_NEWPID))
    pid = os.fork()
    if pid:
        _checked("own pid namespace", _libc.setns(own, _CLONE_NEWPID))
    os.close(own)
    return pid


def lock(scratch: str) -> None:
    """Give this process an empty working directory of its own, bounded by `scratch`: options of a tmpfs."""
    folder = os.getcwd()
    _checked("new mount namespace", _libc.unshare(_CLONE_NEWNS))
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, f"{scratch},mode=0700")
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))

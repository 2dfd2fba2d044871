"""A process with a file system, process ids and network of its own, made from Linux namespaces; no root, no library.

`python_worker` loads this file by its path. `enter` moves the worker into

    user       one user id, without rights outside; capabilities that hold inside only
    mount      an empty read-only root with Python and the system's libraries, read-only; what is set-user-id is not
    pid        nothing outside can be named, and so not signalled, traced or changed
    network    no interface is up
    ipc, uts   no shared memory segments, no host name

and `fork_call` makes each call a process that is alone in a pid namespace and a mount namespace of its own: when it
ends the kernel ends whatever it started and drops the files it wrote, which lay in memory, at most `SCRATCH`. `lock`
then takes away its capabilities for good and, by seccomp, the system calls with which it could start a process, open
a socket, make namespaces, or reach rarely used parts of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

SCRATCH = "size=64m,nr_inodes=1024,mode=0700"
"""What the files of one call may take together."""

_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWPID | 0x10000000 | 0x40000000 | 0x08000000 | 0x04000000  # user, net, ipc, uts
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID = 1, 2
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_MOUNT_SETATTR = 442  # Linux 5.12; the same number on every architecture
_USER_ID = 1000  # inside; an id like any other, so that nothing takes itself for root

# System calls by their numbers on x86-64 and on arm64 (None: not there).
# fmt: off
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    # limits and priorities
    "prlimit64": (302, 261), "setrlimit": (160, 164), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "move_mount": (429, 429), "open_tree": (428, 428), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "sethostname": (170, 161),
    "setdomainname": (171, 162),
    # what outlives a call, or counts towards no limit
    "socket": (41, 198), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
    # rarely used parts of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "fanotify_init": (300, 262), "quotactl": (179, 60),
    "acct": (163, 89), "syslog": (103, 116), "personality": (135, 92), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
}
# fmt: on
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, audit id, number of clone
_CLONE3 = 435
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38

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
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(f"there is no list of system calls for {platform.machine()}")
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


def lock() -> None:
    """Take from this process, for good, every file but what is shown to it and every right but to compute.

    The working directory is then an empty one of its own, of at most `SCRATCH`.
    """
    folder = os.getcwd()
    _checked("new mount namespace", _libc.unshare(_CLONE_NEWNS))
    _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, SCRATCH)
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    _checked("capset", _libc.capset(header, bytes(24)))
    _checked("no_new_privs", _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    program = _seccomp_program()
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _checked("seccomp", _libc.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0))


def _seccomp_program() -> bytes:
    """Classic BPF over `struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}`."""
    column, audit, clone = _ARCHITECTURES[platform.machine()]
    denied = [number for numbers in _DENIED.values() if (number := numbers[column]) is not None]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, errno = 0x7FFF0000, 0x80000000, 0x00050000
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, audit),
        (give, 0, 0, kill),  # of another architecture, whose calls have other numbers
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),
        (give, 0, 0, errno | _ENOSYS),  # x32, likewise
        (equal, 0, 1, _CLONE3),
        (give, 0, 0, errno | _ENOSYS),  # its flags lie in memory, where no filter sees them; libc falls back to clone
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (any_bit, 0, 1, _CLONE_THREAD),
        (give, 0, 0, allow),
        (give, 0, 0, errno | _EPERM),
    ]
    program += [(equal, len(denied) - i, 0, number) for i, number in enumerate(denied)]
    program += [(give, 0, 0, allow), (give, 0, 0, errno | _EPERM)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


if sys.byteorder != "little":
    raise OSError("the filter of system calls is written for little-endian machines")

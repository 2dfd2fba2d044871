"""Refuses, by seccomp, the system calls that a computation has no use for and an attempt to break out has.

`python_worker` loads this file by its path and calls `deny` in each fork before it reads any code, in every tier that
isolates. What Landlock or namespaces leave open is then out of reach, and so are the parts of the kernel in which most
faults are found: there is no process to start, no socket to open, no namespace to make, and no limit to raise.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

# System calls by their numbers on x86-64 and on arm64 (None: not there).
# fmt: off
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "setpgid": (109, 154), "setsid": (112, 157),
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
    # what shows or makes more than plain files
    "inotify_add_watch": (254, 27), "fanotify_init": (300, 262), "mknod": (133, None), "mknodat": (259, 33),
    # rarely used parts of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "quotactl": (179, 60),
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
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38

_libc = ctypes.CDLL(None, use_errno=True)


def deny() -> None:
    """Refuse them to this process and what it may become, for good. Raises OSError where that cannot be had."""
    if platform.machine() not in _ARCHITECTURES or sys.byteorder != "little":
        raise OSError(f"there is no list of system calls for {platform.machine()}")
    program = _program()
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _program() -> bytes:
    """Classic BPF over `struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}`."""
    column, audit, clone = _ARCHITECTURES[platform.machine()]
    denied = [number for numbers in DENIED.values() if (number := numbers[column]) is not None]
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

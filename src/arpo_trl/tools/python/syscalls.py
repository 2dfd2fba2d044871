"""Restricts a process to the system calls that a computation needs, with seccomp, and drops its capabilities.

`worker` loads this file by its path and calls `confine` in each fork before it reads any code. This closes the gaps
that Landlock and namespaces leave, and blocks the parts of the kernel with the most bugs. The process cannot start
processes, open sockets, create namespaces, raise limits, or change the mode, owner, times or attributes of files.
`rewards.math_worker` does the same for the expressions that it evaluates.

The list contains the calls that strace showed for CPython, its standard library, numpy, sympy and pandas, and the
calls that C libraries use instead on other machines. All other calls fail with ENOSYS, as if the kernel did not
support them, so C libraries fall back to older calls. `WITH_ARGUMENTS` allows some calls only with certain arguments.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

# The numbers of a system call on x86-64 and on arm64; None: it does not exist there.
_Numbers = tuple[int | None, int | None]
# fmt: off
ALLOWED: Mapping[str, _Numbers] = {
    # open files
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "sendfile": (40, 71),
    "fsync": (74, 82), "fdatasync": (75, 83), "open": (2, None), "creat": (85, None), "openat": (257, 56),
    "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "truncate": (76, 45), "ftruncate": (77, 46),
    # names of files
    "stat": (4, None), "lstat": (6, None), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None),
    "renameat": (264, 38), "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "readlink": (89, None), "readlinkat": (267, 78),
    # memory
    "brk": (12, 214), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216),
    "msync": (26, 227),
    # threads
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96),
    "sched_yield": (24, 124), "exit": (60, 93), "exit_group": (231, 94),
    # signals
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "pause": (34, None), "alarm": (37, None), "setitimer": (38, 103),
    "getitimer": (36, 102), "wait4": (61, 260),
    # waiting; asyncio wakes itself through a pair of sockets
    "nanosleep": (35, 101), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "getsockname": (51, 204), "recvfrom": (45, 207),
    # information about the process, the time and the machine
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getrlimit": (97, 163), "getrusage": (98, 165),
    "times": (100, 153), "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278), "uname": (63, 160),
    "sysinfo": (99, 179),
}
# fmt: on


@dataclass(frozen=True)
class Rule:
    """Allows a system call only for certain values of one argument; otherwise the call fails with `errno`.

    Argument number `argument` must be one of `values`. With `mask`, it must instead have all of `bits` and no bit
    outside `mask`. The rule checks the lower 32 bits, as the kernel does for these arguments, or all 64 with
    `pointer`. With `errno` 0 other calls return 0 and do nothing.
    """

    numbers: _Numbers
    argument: int = 0
    values: tuple[int, ...] = ()
    mask: int | None = None
    bits: int = 0
    pointer: bool = False
    errno: int = 1  # EPERM


_ENOSYS, _ENOTTY = 38, 25
_OWN_PROCESS = -1  # in `values`: a placeholder for the id of the confined process
# CLONE_VM, FS, FILES, SIGHAND, THREAD: a thread with a separate descriptor table could exceed the limit of open files
_THREAD_NEEDS = 0x00010F00
# also allowed: SYSVSEM, SETTLS, PARENT_SETTID, CHILD_CLEARTID and musl's DETACHED
_THREAD_FLAGS = 0x007D0F00
_DESCRIPTOR = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
_CLOCKS = tuple(range(12))  # of the machine and this process; the clocks of other processes have negative numbers

WITH_ARGUMENTS: Mapping[str, tuple[Rule, ...]] = {
    "clone": (Rule((56, 220), 0, mask=_THREAD_FLAGS, bits=_THREAD_NEEDS),),  # no process, no namespace
    "close_range": (Rule((436, 436), 2, (0, 4), errno=22),),  # CLOEXEC, not UNSHARE
    "kill": (Rule((62, 129), 0, (_OWN_PROCESS,)),),
    "tgkill": (Rule((234, 131), 0, (_OWN_PROCESS,)),),
    "prlimit64": (Rule((302, 261), 0, (0,)), Rule((302, 261), 2, (0,), pointer=True)),  # to read its own limits
    "sched_getaffinity": (Rule((204, 123), 0, (0, _OWN_PROCESS), errno=_ENOSYS),),
    "clock_gettime": (Rule((228, 113), 0, _CLOCKS, errno=22),),
    "clock_getres": (Rule((229, 114), 0, _CLOCKS, errno=22),),
    "clock_nanosleep": (Rule((230, 115), 0, _CLOCKS, errno=22),),
    # _DESCRIPTOR: no locks, leases, signals or pipe sizes. F_SETLK and F_SETLKW return 0 without a lock, which other
    # processes could see: a process's own locks never exclude each other.
    "fcntl": (Rule((72, 25), 1, (*_DESCRIPTOR, 6, 7)), Rule((72, 25), 1, _DESCRIPTOR, errno=0)),
    # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": (Rule((16, 29), 1, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), errno=_ENOTTY),),
    "prctl": (Rule((157, 167), 0, (15, 16, 0x53564D41), errno=22),),  # names of threads and of memory
    # NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE, DONTDUMP, DODUMP
    "madvise": (Rule((28, 233), 2, (0, 1, 2, 3, 4, 8, 14, 15, 16, 17), errno=22),),
    "renameat2": (Rule((316, 276), 4, (0,), errno=22),),
    "socketpair": (Rule((53, 199), 0, (1,)),),  # AF_UNIX
    "sendto": (Rule((44, 206), 4, (0,), pointer=True),),  # only on a socket pair
    # Never allowed. For these common calls, PermissionError is clearer than "Function not implemented".
    "socket": (Rule((41, 198), 0),),
    "execve": (Rule((59, 221), 0),),
}

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By `platform.machine()`: the column of the tables, and the architecture number of the kernel's audit."""

_LOAD, _JUMP, _EQUAL, _AT_LEAST, _ANY_BIT, _GIVE = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in `struct seccomp_data`
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000

_PR_CAPBSET_DROP, _PR_SET_SECUREBITS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 28, 47, 4
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECUREBITS = 0xEF  # NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE; locks these and KEEP_CAPS
_CAPABILITY_VERSION = 0x20080522

_Instruction = tuple[int, int, int, int]  # code, instructions to skip if true, if false, operand

_libc = ctypes.CDLL(None, use_errno=True)


def drop_capabilities() -> None:
    """Drop all capabilities of this process permanently, including those that it could gain later.

    A process without CAP_SETPCAP keeps its bounding set, but `no_new_privs` makes it useless.

    Raises:
        OSError: The process keeps a capability.
    """
    _libc.prctl(_PR_SET_SECUREBITS, _SECUREBITS, 0, 0, 0)
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:  # until the last capability of this kernel
        capability += 1
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)  # this process
    if _libc.capset(header, bytes(24)) or _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"capabilities: {os.strerror(number)}")


def confine() -> None:
    """Restrict this process permanently to the system calls of the list.

    Call `drop_capabilities` first, because the list does not allow its system calls.

    Raises:
        OSError: The system or its architecture does not support this.
    """
    if platform.machine() not in ARCHITECTURES or sys.byteorder != "little":
        raise OSError(f"there is no list of system calls for {platform.machine()}")
    instructions = program(platform.machine(), os.getpid())
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(packed)
    fprog = struct.pack("@HP", len(instructions), ctypes.addressof(buffer))
    if _libc.prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def program(machine: str, pid: int) -> list[_Instruction]:
    """Return classic BPF over `struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}` for process `pid`."""
    column, audit = ARCHITECTURES[machine]
    unknown = [_give(_ENOSYS)]
    blocks: dict[int, list[_Instruction]] = {}
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            blocks[number] = [(_GIVE, 0, 0, _ALLOW)]
    for rules in WITH_ARGUMENTS.values():
        if (number := rules[0].numbers[column]) is not None:
            blocks[number] = [instruction for rule in rules for instruction in _check(rule, pid)]
            blocks[number].append((_GIVE, 0, 0, _ALLOW))
    starts: list[tuple[int, list[_Instruction]]] = []  # each block applies from its number up to the next one
    for number in sorted({0, *blocks, *(number + 1 for number in blocks)}):
        block = blocks.get(number, unknown)
        if not starts or starts[-1][1] != block:
            starts.append((number, block))
    return [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, audit),
        _give(_ENOSYS),  # a call of another architecture, where numbers differ
        (_LOAD, 0, 0, _NUMBER),
        *_search(starts),  # the numbers of x32 calls are above all numbers of the list
    ]


def _search(starts: list[tuple[int, list[_Instruction]]]) -> list[_Instruction]:
    """Return a binary search for the block of the loaded number, with about seven comparisons."""
    if len(starts) == 1:
        return starts[0][1]
    middle = len(starts) // 2
    below, above = _search(starts[:middle]), _search(starts[middle:])
    return [(_AT_LEAST, 0, 1, starts[middle][0]), (_JUMP, 0, 0, len(below)), *below, *above]


def _check(rule: Rule, pid: int) -> list[_Instruction]:
    """Return instructions that reject the call, or continue after the last instruction if the rule allows the call."""
    low = _ARGUMENTS + 8 * rule.argument
    refuse = _give(rule.errno)
    if rule.mask is not None:
        bits = [1 << place for place in range(32) if rule.bits >> place & 1]
        needed = [(_ANY_BIT, 0, len(bits) - place, bit) for place, bit in enumerate(bits)]
        outside = (_ANY_BIT, len(bits) + 1, 0, rule.mask ^ 0xFFFFFFFF)
        return [(_LOAD, 0, 0, low), outside, *needed, (_JUMP, 0, 0, 1), refuse]
    values = [pid if value == _OWN_PROCESS else value for value in rule.values]
    upper: list[_Instruction] = [(_LOAD, 0, 0, low + 4), (_EQUAL, 1, 0, 0), refuse] if rule.pointer else []
    equal = [(_EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [*upper, (_LOAD, 0, 0, low), *equal, refuse]


def _give(errno: int) -> _Instruction:
    return (_GIVE, 0, 0, _ERRNO | errno)

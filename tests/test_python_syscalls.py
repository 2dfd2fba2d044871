"""The filter of system calls, as data: its program is run here over (architecture, number, arguments).

test_escapes.py tests the filter in the kernel. This file also covers the other architecture.
"""

import errno
import re
from pathlib import Path

import pytest

from arpo_trl.tools.python.syscalls import ALLOWED, ARCHITECTURES, WITH_ARGUMENTS, program

PID = 4711
ALLOW = 0x7FFF0000
MACHINES = list(ARCHITECTURES)
NUMBERS = dict(ALLOWED) | {name: rules[0].numbers for name, rules in WITH_ARGUMENTS.items()}
PROGRAMS = {machine: program(machine, PID) for machine in MACHINES}
OTHER_ARCHITECTURES = (0x40000003, 0x40000028, 0xC0000015, 0)  # i386, 32-bit ARM, PowerPC, none


def answer(machine: str, number: int, *arguments: int, audit: int | None = None) -> int | None:
    """The error that the filter gives for a call; None where it lets it pass. Checks each jump on the way."""
    data = [number & 0xFFFFFFFF, ARCHITECTURES[machine][1] if audit is None else audit, 0, 0]
    for argument in (*arguments, *[0] * (6 - len(arguments))):
        data += [argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF]
    at, value = 0, 0
    while True:
        code, if_true, if_false, operand = PROGRAMS[machine][at]
        assert max(if_true, if_false) < 256
        assert 0 <= operand < 1 << 32
        at += 1
        if code == 0x20:
            value = data[operand // 4]
        elif code == 0x05:
            at += operand
        elif code == 0x06:
            if operand == ALLOW:
                return None
            assert operand >> 16 == 0x0005, "neither allowed nor refused with an error"
            return operand & 0xFFFF
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            at += if_true if holds else if_false


def number_of(machine: str, name: str) -> int:
    number = NUMBERS[name][ARCHITECTURES[machine][0]]
    assert number is not None
    return number


@pytest.mark.parametrize("machine", MACHINES)
def test_what_is_not_on_the_list_does_not_exist(machine: str) -> None:
    listed = {numbers[ARCHITECTURES[machine][0]] for numbers in NUMBERS.values()}
    others = {*range(2048), 0x40000000, 0x40000001, 0x40000039, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF} - listed
    assert {answer(machine, number, 1, 1, 1, 1, 1, 1) for number in others} == {errno.ENOSYS}
    plain = [numbers[ARCHITECTURES[machine][0]] for numbers in ALLOWED.values()]
    assert {answer(machine, number, *[2**64 - 1] * 6) for number in plain if number is not None} == {None}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("audit", OTHER_ARCHITECTURES)
def test_calls_of_another_architecture_do_not_exist(machine: str, audit: int) -> None:
    assert {answer(machine, number, audit=audit) for number in range(600)} == {errno.ENOSYS}
    other = next(name for name in MACHINES if name != machine)
    assert answer(machine, number_of(machine, "read"), audit=ARCHITECTURES[other][1]) == errno.ENOSYS


CLONE_THREAD = 0x3D0F00  # what glibc gives for a thread
HIGH = 1 << 32


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("name", "passes", "refused", "error"),
    [
        # fork, vfork, what shares less than a thread does; a thread in a new namespace, or told by a descriptor
        (
            "clone",
            [(CLONE_THREAD,), (CLONE_THREAD | 0x400000,)],
            [(17,), (0x4111,), *((CLONE_THREAD & ~bit,) for bit in (0x100, 0x200, 0x400, 0x800, 0x10000))]
            + [(CLONE_THREAD | 1 << bit,) for bit in (7, 12, 13, 14, 15, 17, 23, 25, 26, 27, 28, 29, 30, 31)],
            errno.EPERM,
        ),
        ("close_range", [(3, 9, 0), (3, 9, 4)], [(3, 9, 2), (3, 9, 6)], errno.EINVAL),
        ("kill", [(PID, 9)], [(0, 9), (-1, 9), (1, 9), (-PID, 9), (PID + 1, 0)], errno.EPERM),
        ("tgkill", [(PID, 5, 9)], [(1, 1, 9), (-1, PID, 9)], errno.EPERM),
        ("prlimit64", [(0, 7, 0, 99)], [(PID, 7, 0, 99), (0, 7, 99, 0), (0, 7, HIGH, 0)], errno.EPERM),
        ("sched_getaffinity", [(0, 8), (PID, 8)], [(1, 8)], errno.ENOSYS),
        ("clock_gettime", [(0,), (2,), (11,)], [(-2,), (~1 << 3 | 2,), (12,)], errno.EINVAL),
        # F_SETFL, F_GETLK, F_SETOWN, F_SETSIG, F_OFD_SETLK, F_SETLEASE, F_NOTIFY, F_SETPIPE_SZ
        ("fcntl", [(1, 0), (1, 3), (1, 1030)], [(1, n) for n in (4, 5, 8, 10, 37, 1024, 1026, 1031)], errno.EPERM),
        ("fcntl", [], [(1, 6), (1, 7)], 0),  # F_SETLK, F_SETLKW: nothing happens, without an error
        # FIOASYNC, TIOCSTI, FS_IOC_SETFLAGS, FIFREEZE, FICLONE
        (
            "ioctl",
            [(0, 0x5401), (0, 0x541B), (0, 0x802C542A), (0, HIGH | 0x5401)],
            [(0, request) for request in (0x5452, 0x5412, 0x40086602, 0xC0045877, 0x40049409, 0)],
            errno.ENOTTY,
        ),
        # PDEATHSIG, DUMPABLE, KEEPCAPS, SECCOMP, CAPBSET_DROP, SECUREBITS, MM, NO_NEW_PRIVS, TIMERSLACK, PTRACER
        ("prctl", [(15,), (16,)], [(n,) for n in (1, 4, 8, 22, 24, 28, 35, 38, 29, 0x59616D61)], errno.EINVAL),
        ("madvise", [(0, 0, 4), (0, 0, 14)], [(0, 0, 100), (0, 0, 12), (0, 0, 9)], errno.EINVAL),
        ("renameat2", [(1, 2, 3, 4, 0)], [(1, 2, 3, 4, 4)], errno.EINVAL),
        ("socketpair", [(1, 1)], [(2, 1), (16, 3), (38, 5)], errno.EPERM),
        ("sendto", [(1, 2, 3, 0, 0, 0)], [(1, 2, 3, 0, 5, 16), (1, 2, 3, 0, HIGH, 16)], errno.EPERM),
        ("socket", [], [(1, 1), (2, 1), (16, 3), (0, 0)], errno.EPERM),
        ("execve", [], [(1, 1), (0, 0)], errno.EPERM),
    ],
)
def test_a_call_passes_with_the_arguments_of_its_rule_only(
    machine: str, name: str, passes: list[tuple[int, ...]], refused: list[tuple[int, ...]], error: int
) -> None:
    number = number_of(machine, name)
    assert [answer(machine, number, *arguments) for arguments in passes] == [None] * len(passes)
    assert [answer(machine, number, *arguments) for arguments in refused] == [error] * len(refused)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_program_is_short_and_answers_after_a_few_comparisons(machine: str) -> None:
    # Some 130 calls in at most 2 × 120 stretches: a search of 8 steps, with a jump each, over fewer than 400 steps.
    assert len(PROGRAMS[machine]) < 400
    starts = sum(code == 0x35 for code, *_ in PROGRAMS[machine])
    assert starts < 2**8


@pytest.mark.parametrize(
    ("machine", "header", "pattern"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
        ("aarch64", "/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_numbers_are_those_of_the_kernels_headers(machine: str, header: str, pattern: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"this machine has no {header}")
    official = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    official.setdefault("newfstatat", official.get("fstatat", -1))  # its name in the generic table
    column = ARCHITECTURES[machine][0]
    ours = {name: numbers[column] for name, numbers in NUMBERS.items() if numbers[column] is not None}
    assert {name: official[name] for name in ours} == ours
    assert [name for name in NUMBERS.keys() - ours.keys() if machine == "x86_64" or name in official] == []

"""Attempts of model-written code to escape the sandbox, each with a check for success.

An attempt is code and an oracle. The oracle looks for what the attempt would have changed or revealed: a canary in a
file or in another process's memory or environment, a file outside, a listening socket, a killed process, the next
call. The code calls `won()` for a success that is not visible from outside, such as a system call that should have
failed.

No attempt may succeed on a tier that isolates. As a control, the harmless attempts also run in a plain process, where
each must succeed: an attempt that cannot succeed anywhere would prove nothing.
"""

import contextlib
import ctypes
import fcntl
import os
import platform
import resource
import secrets
import select
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import pytest

from arpo_trl.tools.python import syscalls as python_syscalls
from arpo_trl.tools.python import worker as python_worker
from arpo_trl.tools.python.sandbox import ISOLATING, Ending, Limits, Run, Worker, WorkerLost
from support import until, worker_of

X86 = platform.machine() == "x86_64"
LIMITS = Limits(timeout_s=60.0, cpu_s=60.0, memory_mb=256, output_bytes=10_000, file_mb=1, open_files=64)

# The token is put together in the code, so that a traceback that quotes the code does not hold it.
PRELUDE = """
import contextlib, ctypes, fcntl, os, pickle, platform, resource, shutil, signal, socket, struct, subprocess, sys
import threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
NUMBERS = dict(openat=(257, 56), process_vm_readv=(310, 270), clone=(56, 220), fork=(57, None), bpf=(321, 280),
    userfaultfd=(323, 282), add_key=(248, 217), perf_event_open=(298, 241), memfd_create=(319, 279),
    execveat=(322, 281), ioprio_set=(251, 30), prlimit64=(302, 261), setns=(308, 268), unshare=(272, 97),
    tgkill=(234, 131), io_uring_setup=(425, 425), pidfd_getfd=(438, 438), pidfd_open=(434, 434), openat2=(437, 437),
    pidfd_send_signal=(424, 424), open_tree=(428, 428), fsopen=(430, 430), setxattrat=(463, 463),
    removexattrat=(466, 466), file_setattr=(469, 469), getpriority=(140, 141), getpgid=(121, 155), getsid=(124, 156),
    ioprio_get=(252, 31), sched_getscheduler=(145, 120), statmount=(457, 457), statfs=(137, 43),
    close_range=(436, 436), capget=(125, 90))
def syscall(name, *arguments):
    number = NUMBERS[name][platform.machine() == "aarch64"]
    return libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
def won():
    os.write(1, b"ESC" + b"APED")
def child(action):
    if os.fork() == 0:
        try: action()
        finally: os._exit(0)
    won()
"""
ESCAPED = "ESCAPED"

# Something to attack: it holds the canary in its memory, environment, arguments and an open file, and does nothing.
pytestmark = pytest.mark.slow  # starts processes

TARGET = """
import ctypes, os, signal, sys, time
signal.signal(signal.SIGURG, lambda *_: os._exit(1))  # which nobody else minds
buffer = ctypes.create_string_buffer(sys.argv[1].encode())
file = open(sys.argv[2])
print(ctypes.addressof(buffer), file.fileno(), flush=True)
time.sleep(600)
"""


# The numbers that the filter does not refuse outright.
ALLOWED = sorted(
    number
    for numbers in (
        *python_syscalls.ALLOWED.values(),
        *(rules[0].numbers for rules in python_syscalls.WITH_ARGUMENTS.values()),
    )
    if (number := numbers[0 if X86 else 1]) is not None
)


def _flags(path: Path) -> int | None:
    """The inode's flags, as of chattr; None where the file system has none."""
    with open(path) as file, contextlib.suppress(OSError):
        return int(struct.unpack("I", fcntl.ioctl(file, 0x80086601, bytes(4)))[0])
    return None


@dataclass
class World:
    """Everything outside the sandbox that an attempt may reach for, and whether it was."""

    folder: Path
    canary: str
    with_target: bool

    def __enter__(self) -> "World":
        self.secret = self.folder / "secret"
        self.secret.write_text(self.canary)
        (self.folder / f"name-{self.canary}").touch()
        self.victim = self.folder / "victim"
        self.victim.write_text("as it was")
        self.victim.chmod(0o600)
        with contextlib.suppress(OSError):  # not every file system has attributes
            os.setxattr(self.victim, "user.kept", b"as it was")
        os.utime(self.victim, (1, 1))
        self.before = self._state()
        self.token = secrets.token_hex(6)  # of names in shared places
        if self.with_target:
            self._start_target()
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.folder / "socket"))
        self.unix.listen()
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0arpo-{self.token}")
        self.abstract.listen()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.with_target:
            self.target.kill()
            self.target.communicate()
        for listening in (self.tcp, self.udp, self.unix, self.abstract):
            listening.close()
        for left in self._shared_places():
            left.unlink(missing_ok=True)

    def _start_target(self) -> None:
        self.target = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", TARGET, self.canary, str(self.secret)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CANARY": self.canary},
            cwd=self.folder,
        )
        assert self.target.stdout is not None
        self.address, self.target_fd = self.target.stdout.readline().split()
        self.limits_before = self._target_limits()

    def code(self, template: str) -> str:
        names: dict[str, object] = {
            "secret": self.secret,
            "victim": self.victim,
            "folder": self.folder,
            "token": self.token,
            "trainer": os.getpid(),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "script": os.path.realpath(python_worker.__file__),
            "allowed": ALLOWED,
        }
        if self.with_target:
            names |= {"target": self.target.pid, "address": self.address, "target_fd": self.target_fd}
        return PRELUDE + Template(textwrap.dedent(template)).substitute(
            {name: str(value) for name, value in names.items()}
        )

    def _state(self) -> tuple[object, ...]:
        of = self.victim.stat()
        attributes = os.listxattr(self.victim), _flags(self.victim)
        names = sorted(entry.name for entry in self.folder.iterdir() if entry.name != "socket")
        return self.victim.read_bytes(), of.st_mode, of.st_uid, of.st_mtime_ns, of.st_nlink, attributes, names

    def _target_limits(self) -> tuple[object, ...]:
        pid = self.target.pid
        return (
            resource.prlimit(pid, resource.RLIMIT_CORE),
            os.getpriority(os.PRIO_PROCESS, pid),
            os.sched_getaffinity(pid),
            os.sched_getscheduler(pid),
            ctypes.CDLL(None).syscall(252 if X86 else 31, 1, pid),  # ioprio_get
        )

    def _shared_places(self) -> list[Path]:
        name = f"arpo-{self.token}"
        return [Path(folder) / name for folder in ("/tmp", "/var/tmp", "/dev/shm", os.path.expanduser("~"))]

    # The oracles.

    def file_changed(self) -> bool:
        return not self.victim.exists() or self._state() != self.before

    def left_outside(self) -> bool:
        return any(path.exists() for path in self._shared_places())

    def contacted(self) -> bool:
        poller = select.poll()
        for listener in (self.tcp, self.udp, self.unix, self.abstract):
            poller.register(listener, select.POLLIN)
        return bool(poller.poll(100))

    def target_hurt(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.target.wait(0.1)
            return True
        status = Path(f"/proc/{self.target.pid}/status").read_text()
        return "TracerPid:\t0\n" not in status or "\nState:\tT" in status

    def limits_changed(self) -> bool:
        return self._target_limits() != self.limits_before

    def process_left(self) -> bool:
        """One that gave itself the name `esc<token>`; ends it."""
        found = False
        for comm in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if comm.read_text().strip() == f"esc{self.token}"[:15]:
                    os.kill(int(comm.parent.name), 9)
                    found = True
        return found


@dataclass(frozen=True)
class Outcome:
    """The results of an attempt: its own call and the next one (None if the worker was lost), and the seconds."""

    ran: Run | None
    then: Run | None
    seconds: float


Oracle = Callable[[World, Outcome], bool]


SERVED = Run(output="served\n", ending=Ending.FINISHED)


def leaked(world: World, outcome: Outcome) -> bool:
    return outcome.ran is not None and world.canary in outcome.ran.output


def won(world: World, outcome: Outcome) -> bool:
    return outcome.ran is not None and ESCAPED in outcome.ran.output


def next_call(world: World, outcome: Outcome) -> bool:
    return outcome.then != SERVED


def outside(look: Callable[[World], bool]) -> Oracle:
    return lambda world, outcome: look(world)


CHANGED, LEFT, CONTACTED = outside(World.file_changed), outside(World.left_outside), outside(World.contacted)
HURT, LIMITED, SURVIVED = outside(World.target_hurt), outside(World.limits_changed), outside(World.process_left)

ANYONE, ROOT, NOBODY = "anyone", "root", "nobody"


@dataclass(frozen=True)
class Attempt:
    """`control`: who succeeds with it in a plain process; NOBODY where it would do harm, or every tier stops it."""

    name: str
    code: str
    oracle: Oracle
    control: str = ANYONE
    then: str = ""
    """What the next call runs first; for attempts on the next call."""
    deadline_s: float = LIMITS.timeout_s
    """Short for those that the deadline ends."""


ATTEMPTS = [
    # Files: reading.
    Attempt("read a file", "print(open('$secret').read())", leaked),
    Attempt(
        "read through a symbolic link",
        """
        os.symlink('$secret', 'l')
        print(open('l').read())
        """,
        leaked,
    ),
    Attempt(
        "read through a hard link",
        """
        os.link('$secret', '$folder/h')
        print(open('$folder/h').read())
        """,
        leaked,
    ),
    Attempt("read up from the own folder", "print(open('../' * 20 + '$secret').read())", leaked),
    Attempt(
        "read relative to a folder",
        """
        os.chdir('$folder')
        print(open('secret').read())
        """,
        leaked,
    ),
    Attempt(
        "read from a descriptor of the root",
        """
        root = os.open('/', os.O_PATH)
        print(os.read(os.open('$secret'[1:], os.O_RDONLY, dir_fd=root), 99))
        """,
        leaked,
    ),
    Attempt(
        "reopen a path-only descriptor",
        """
        fd = os.open('$secret', os.O_PATH)
        print(open(f'/proc/self/fd/{fd}').read())
        """,
        leaked,
    ),
    Attempt(
        "read by raw system call",
        """
        fd = syscall('openat', -100, b'$secret', 0)
        print(os.read(fd, 99))
        """,
        leaked,
    ),
    Attempt(
        "read by openat2",
        """
        import struct
        fd = syscall('openat2', -100, b'$secret', struct.pack('QQQ', 0, 0, 0), 24)
        print(os.read(fd, 99))
        """,
        leaked,
    ),
    Attempt(
        "read by libc's fopen",
        """
        libc.fopen.restype = ctypes.c_void_p
        file = libc.fopen(b'$secret', b'r')
        buffer = ctypes.create_string_buffer(99)
        assert file
        libc.fread(buffer, 1, 99, ctypes.c_void_p(file))
        print(buffer.value)
        """,
        leaked,
    ),
    Attempt("read with a full-width name", "print(ｏｐｅｎ('$secret').ｒｅａｄ())", leaked),
    Attempt(
        "read from a pickled payload",
        """
        class P:
            def __reduce__(self): return eval, ("print(open('$secret').read())",)
        pickle.loads(pickle.dumps(P()))
        """,
        leaked,
    ),
    Attempt("send a file to the output", "os.sendfile(1, os.open('$secret', os.O_RDONLY), 0, 99)", leaked),
    Attempt(
        "copy a file",
        """
        shutil.copy('$secret', 'c')
        print(open('c').read())
        """,
        leaked,
    ),
    Attempt("list a folder", "print(os.listdir('$folder'))", leaked),
    Attempt(
        "list a folder's tree by walking up",
        """
        os.chdir('/')
        print(list(os.walk('$folder')))
        """,
        leaked,
    ),
    Attempt("watch a folder", "if libc.inotify_add_watch(libc.inotify_init(), b'$folder', 0xfff) >= 0: won()", won),
    Attempt(
        "open a file by its handle",
        """
        import struct
        handle = ctypes.create_string_buffer(struct.pack('Ii', 128, 0) + bytes(128))
        mount = ctypes.c_int()
        assert libc.name_to_handle_at(-100, b'$secret', handle, ctypes.byref(mount), 0) == 0
        fd = libc.open_by_handle_at(os.open('.', os.O_RDONLY), handle, 0)
        print(os.read(fd, 99))
        """,
        leaked,
        control=NOBODY,  # works only within one file system
    ),
    # Files: writing.
    Attempt("write a file", "open('$victim', 'w').write('x')", CHANGED),
    Attempt("truncate a file", "os.truncate('$victim', 0)", CHANGED),
    Attempt("remove a file", "os.unlink('$victim')", CHANGED),
    Attempt("rename a file", "os.rename('$victim', '$victim' + '2')", CHANGED),
    Attempt("link a file", "os.link('$victim', '$victim' + '2')", CHANGED),
    Attempt("link a file into the own folder", "os.link('$victim', 'h')", CHANGED, control=NOBODY),  # one file system
    Attempt("change a file's mode", "os.chmod('$victim', 0o777)", CHANGED),
    Attempt("change a file's times", "os.utime('$victim', (2, 2))", CHANGED),
    Attempt("change a file's owner", "os.chown('$victim', 12345, 12345)", CHANGED, control=ROOT),
    Attempt(
        "give a file an attribute",
        "os.setxattr('$victim', 'user.x', b'1')",
        CHANGED,
        control=NOBODY,  # needs support
    ),
    *(
        Attempt(name, code, CHANGED, control=NOBODY)  # needs support of file system and kernel
        for name, code in {
            "open a file to everybody by an access list": """
                entry = lambda tag, rights, id=2**32 - 1: struct.pack('HHI', tag, rights, id)
                acl = struct.pack('I', 2) + entry(1, 6) + entry(2, 6, 1) + entry(4, 6) + entry(16, 6) + entry(32, 6)
                buffer = ctypes.create_string_buffer(acl, len(acl))
                args = struct.pack('QII', ctypes.addressof(buffer), len(acl), 0)
                name = b'system.posix_acl_access'
                syscall('setxattrat', -100, b'$victim', 0, name, args, 16)
                libc.setxattr(b'$victim', name, acl, len(acl), 0)
                libc.lsetxattr(b'$victim', name, acl, len(acl), 0)
                """,
            "give a file an attribute by setxattrat": """
                buffer = ctypes.create_string_buffer(b'1')
                args = struct.pack('QII', ctypes.addressof(buffer), 1, 0)
                syscall('setxattrat', -100, b'$victim', 0, b'user.new', args, 16)
                """,
            "remove a file's attribute": "os.removexattr('$victim', 'user.kept')",
            "remove a file's attribute by lremovexattr": "libc.lremovexattr(b'$victim', b'user.kept')",
            "remove a file's attribute by its path": "syscall('removexattrat', -100, b'$victim', 0, b'user.kept')",
            "set a file's flags by file_setattr": """
                attributes = struct.pack('QIIII', 0x80, 0, 0, 0, 0)
                syscall('file_setattr', -100, b'$victim', attributes, len(attributes), 0)
                """,
        }.items()
    ),
    Attempt(
        "set the flags of a file open for reading",
        """
        file = open('$script')
        flags = fcntl.ioctl(file, 0x80086601, bytes(4))
        fcntl.ioctl(file, 0x40086602, flags)
        won()
        """,
        won,
        control=NOBODY,  # needs a file system with flags
    ),
    Attempt("make a folder outside", "os.mkdir('$folder/new')", CHANGED),
    Attempt("make a symbolic link outside", "os.symlink('/', '$folder/new')", CHANGED),
    Attempt("make a pipe outside", "os.mkfifo('$folder/new')", CHANGED),
    Attempt(
        "write in shared folders",
        """
        for folder in ('/tmp', '/var/tmp', '/dev/shm', os.path.expanduser('~')):
            try: open(f'{folder}/arpo-$token', 'w').write('x')
            except OSError: pass
        """,
        LEFT,
    ),
    Attempt(
        "open the worker's script for writing",
        """
        open('$script', 'r+b')
        won()
        """,
        won,
        control=ROOT,  # or whoever owns it
    ),
    Attempt(
        "open numpy for writing",
        """
        import numpy
        open(numpy.__file__, 'r+b')
        won()
        """,
        won,
        control=ROOT,  # or whoever owns it
    ),
    # /proc and other processes' memory.
    Attempt("read another's environment", "print(open('/proc/$target/environ').read())", leaked),
    Attempt("read another's arguments", "print(open('/proc/$target/cmdline').read())", leaked),
    Attempt("read through another's root", "print(open('/proc/$target/root$secret').read())", leaked),
    Attempt("read through another's folder", "print(open('/proc/$target/cwd/secret').read())", leaked),
    Attempt("read another's open file", "print(open('/proc/$target/fd/$target_fd').read())", leaked),
    Attempt(
        "read another's memory file",
        "print(os.pread(os.open('/proc/$target/mem', os.O_RDONLY), 99, $address))",
        leaked,
    ),
    Attempt(
        "read another's memory",
        """
        import struct
        buffer = ctypes.create_string_buffer(99)
        here = struct.pack('QQ', ctypes.addressof(buffer), 40)
        syscall('process_vm_readv', $target, here, 1, struct.pack('QQ', $address, 40), 1, 0)
        print(buffer.raw)
        """,
        leaked,
    ),
    Attempt(
        "take another's descriptor",
        """
        fd = syscall('pidfd_getfd', syscall('pidfd_open', $target, 0), $target_fd, 0)
        print(os.pread(fd, 99, 0))
        """,
        leaked,
    ),
    Attempt(
        "trace another",
        """
        libc.ptrace(0x4206, $target, 0, 0)
        time.sleep(0.3)
        """,
        won,
        control=NOBODY,
    ),
    Attempt("attach to another", "if libc.ptrace(16, $target, 0, 0) == 0: won()", won),
    Attempt(
        "attach to the parent",
        "if libc.ptrace(16, os.getppid(), 0, 0) == 0: won(); os._exit(0)",
        won,
        control=NOBODY,  # the worker would stop
    ),
    Attempt(
        "write to the parent's memory",
        """
        open(f'/proc/{os.getppid()}/mem', 'r+b')
        won()
        """,
        won,
    ),
    # Environment.
    Attempt(
        "find the trainer's environment",
        "print(os.environ, open('/proc/self/environ').read())",
        leaked,
        control=NOBODY,  # every tier starts with an empty one
    ),
    Attempt(
        "find a secret in memory",
        """
        import gc
        print([o for o in gc.get_objects() if 'canary' in str(o)])
        """,
        leaked,
        control=NOBODY,
    ),
    # Network.
    Attempt("connect to this machine", "socket.create_connection(('127.0.0.1', $tcp), 1).send(b'x')", CONTACTED),
    Attempt(
        "connect with the first data",
        """
        s = socket.socket()
        s.settimeout(1)
        s.sendto(b'x', 0x20000000, ('127.0.0.1', $tcp))
        """,
        CONTACTED,
    ),
    Attempt(
        "connect by IPv6 to an IPv4 address",
        """
        s = socket.socket(socket.AF_INET6)
        s.settimeout(1)
        s.connect(('::ffff:127.0.0.1', $tcp))
        """,
        CONTACTED,
        control=NOBODY,  # there may be no IPv6
    ),
    Attempt(
        "send a datagram",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', $udp))",
        CONTACTED,
    ),
    Attempt("connect to a Unix socket", "socket.socket(socket.AF_UNIX).connect('$folder/socket')", CONTACTED),
    Attempt("connect to an abstract socket", "socket.socket(socket.AF_UNIX).connect('\\0arpo-$token')", CONTACTED),
    Attempt(
        "listen",
        """
        socket.create_server(('127.0.0.1', 0))
        won()
        """,
        won,
    ),
    Attempt("list network interfaces", "if socket.if_nameindex(): won()", won),
    Attempt(
        "open a netlink socket",
        """
        socket.socket(16, socket.SOCK_RAW, 0)
        won()
        """,
        won,
    ),
    Attempt(
        "open a raw socket",
        """
        socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "open a packet socket",
        """
        socket.socket(17, socket.SOCK_RAW, 0)
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "reach the host of a virtual machine",
        """
        socket.socket(40, socket.SOCK_STREAM)
        won()
        """,
        won,
        control=NOBODY,
    ),
    Attempt(
        "use the kernel's crypto sockets",
        """
        socket.socket(38, 5, 0)
        won()
        """,
        won,
        control=NOBODY,
    ),
    # Processes.
    Attempt("fork", "child(lambda: None)", won),
    Attempt(
        "fork by raw system call",
        """
        pid = syscall('clone', 17, 0, 0, 0, 0)
        if pid > 0: won()
        os._exit(0)
        """,
        won,
    ),
    Attempt("fork many times", "for i in range(200): child(lambda: time.sleep(1))", won, control=NOBODY),
    Attempt("start a shell", "subprocess.run(['/bin/sh', '-c', 'echo x > $victim'])", CHANGED),
    Attempt("become a shell", "os.execv('/bin/sh', ['sh', '-c', 'echo x > $victim'])", CHANGED),
    Attempt(
        "spawn",
        """
        os.posix_spawn('/bin/sh', ['sh', '-c', 'echo x > $victim'], {})
        time.sleep(1)
        """,
        CHANGED,
    ),
    Attempt(
        "start a worker pool",
        """
        import multiprocessing
        multiprocessing.Pool(2).map(abs, [1])
        won()
        """,
        won,
    ),
    Attempt(
        "leave a process in a session of its own",
        """
        def stay():
            os.setsid()
            libc.prctl(15, b'esc$token')
            os.closerange(0, 64)
            time.sleep(60)
        child(stay)
        time.sleep(0.3)
        """,
        SURVIVED,
    ),
    Attempt(
        "run a program from memory",
        """
        fd = syscall('memfd_create', b'x', 0)
        assert fd >= 0
        os.write(fd, open('/bin/true', 'rb').read())
        won()
        """,
        won,
    ),
    Attempt(
        "leave a thread that prints",
        """
        def late():
            time.sleep(0.2)
            os.write(1, b'late')
        threading.Thread(target=late, daemon=True).start()
        """,
        next_call,
        control=NOBODY,
        then="import time; time.sleep(0.5)",
    ),
    Attempt(
        "write to files of the kernel",
        """
        for name in ('self/mem', 'self/oom_score_adj', 'sys/kernel/core_pattern', 'sysrq-trigger', 'self/clear_refs'):
            try: os.open(f'/proc/{name}', os.O_WRONLY)
            except OSError: continue
            won()
        """,
        won,
    ),
    # Rights of root.
    Attempt(
        "become another user",
        """
        os.setuid(12345)
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "read a file that its mode forbids",
        """
        os.close(os.open('f', os.O_CREAT | os.O_WRONLY, 0))
        open('f').read()
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "thaw the file system of its folder",  # as harmless as it gets: it is not frozen
        """
        try: fcntl.ioctl(os.open('.', os.O_RDONLY), 0xC0045878, 0)
        except OSError as error:
            if error.errno == 22: won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "keep a capability",
        """
        data = ctypes.create_string_buffer(24)
        if syscall('capget', struct.pack('Ii', 0x20080522, 0), data) == 0 and any(data.raw): won()
        if libc.prctl(23, 21, 0, 0, 0) > 0: won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "change what the process may be asked",
        """
        for option in ((1, 0), (4, 1), (8, 1), (36, 1), (0x59616d61, -1)):  # PDEATHSIG, DUMPABLE, KEEPCAPS, SUBREAPER
            if libc.prctl(*map(ctypes.c_ulong, option), 0, 0, 0) == 0: won()
        """,
        won,
    ),
    # Facts about other processes and about the machine.
    *(
        Attempt(f"ask for another's {fact}", f"if {code} >= 0: won()", won)
        for fact, code in {
            "group": "syscall('getpgid', $target)",
            "session": "syscall('getsid', $target)",
            "priority": "syscall('getpriority', 0, $target)",
            "scheduler": "syscall('sched_getscheduler', $target)",
            "disk priority": "syscall('ioprio_get', 1, $target)",
            "limits": "resource.prlimit($target, resource.RLIMIT_AS)[0] + 2",
            "cores": "len(os.sched_getaffinity($target))",
            "processor time": "time.clock_gettime(~$target << 3 | 2)",
        }.items()
    ),
    Attempt(
        "see whether a process exists",
        """
        def answer(pid):
            libc.kill(pid, 0)
            return ctypes.get_errno()
        if answer($target) != answer(4194303): won()
        """,
        won,
    ),
    Attempt(
        "list a file's attributes",
        """
        os.listxattr('$victim')
        won()
        """,
        won,
    ),
    Attempt(
        "ask for facts of the mount",
        "if syscall('statfs', b'/', ctypes.create_string_buffer(256)) == 0: won()",
        won,
    ),
    # Signals.
    Attempt("kill another", "os.kill($target, 9)", HURT),
    Attempt("stop another", "os.kill($target, signal.SIGSTOP)", HURT),
    Attempt("kill one thread of another", "syscall('tgkill', $target, $target, 9)", HURT),
    Attempt(
        "kill through a descriptor",
        "syscall('pidfd_send_signal', syscall('pidfd_open', $target, 0), 9, 0, 0)",
        HURT,
    ),
    Attempt(
        "have the kernel kill another",
        """
        a, b = socket.socketpair()
        fcntl.fcntl(a, 8, $target)
        fcntl.fcntl(a, 10, 9)
        fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)
        b.send(b'x')
        time.sleep(0.2)
        """,
        HURT,
    ),
    Attempt(
        "kill the parent",
        """
        os.kill(os.getppid() or $trainer, 9)
        time.sleep(0.2)
        """,
        next_call,
        control=NOBODY,
    ),
    Attempt(
        "kill the own group",
        """
        signal.signal(15, signal.SIG_IGN)
        os.killpg(0, 15)
        time.sleep(0.2)
        """,
        next_call,
        control=NOBODY,
    ),
    Attempt(
        "signal every process",
        """
        os.kill(-1, signal.SIGURG)
        time.sleep(0.2)
        """,
        HURT,
    ),
    Attempt(
        "signal the first process",
        """
        assert os.getpid() != 1
        os.kill(1, signal.SIGURG)
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "stop itself",
        """
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGTSTP)
        """,
        next_call,
        control=NOBODY,
        deadline_s=1.0,
    ),
    # Limits.
    Attempt("limit another", "resource.prlimit($target, resource.RLIMIT_CORE, (0, 0))", LIMITED),
    Attempt("slow another down", "os.setpriority(os.PRIO_PROCESS, $target, 19)", LIMITED),
    Attempt(
        "move another to one core",
        "os.sched_setaffinity($target, {min(os.sched_getaffinity(0))})",
        LIMITED,
        control=NOBODY,
    ),
    Attempt("schedule another", "os.sched_setscheduler($target, os.SCHED_BATCH, os.sched_param(0))", LIMITED),
    Attempt("change another's disk priority", "syscall('ioprio_set', 1, $target, 3 << 13)", LIMITED, control=NOBODY),
    Attempt(
        "raise the own limits",
        """
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        won()
        """,
        won,
        control=NOBODY,
    ),
    Attempt(
        "raise the own limits by raw system call",
        """
        import struct
        if syscall('prlimit64', 0, 9, struct.pack('QQ', 2**64 - 1, 2**64 - 1), 0) == 0: won()
        """,
        won,
        control=NOBODY,  # a capability that root often lacks
    ),
    Attempt(
        "open more files by descriptors of a thread's own",
        """
        files = []
        def opens():
            syscall('close_range', 1000, 1001, 2)
            with contextlib.suppress(OSError):
                while True: files.append(os.open('/dev/null', os.O_RDONLY))
        for _ in range(2):
            thread = threading.Thread(target=opens)
            thread.start()
            thread.join()
        if len(files) > 64: won()
        """,
        won,
        control=NOBODY,  # where nothing limits them
    ),
    Attempt(
        "raise the own priority",
        """
        os.nice(-5)
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "take memory",
        """
        import mmap
        parts = [mmap.mmap(-1, 64 << 20) for _ in range(16)]
        won()
        """,
        won,
        control=NOBODY,
    ),
    Attempt(
        "print without end",
        "while True: os.write(1, b'x' * 65536)",
        lambda w, o: len(o.ran.output) > LIMITS.output_bytes if o.ran else True,
        control=NOBODY,
    ),
    Attempt(
        "outlast the deadline",
        """
        for n in range(1, 64):
            try: signal.signal(n, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: time.sleep(1)
        """,
        lambda w, o: o.ran is None or o.ran.ending is not Ending.TIMEOUT or o.seconds > 20,
        control=NOBODY,
        deadline_s=1.0,
    ),
    Attempt(
        "shake off the deadline by forking away",
        """
        libc.prctl(1, 0, 0, 0, 0)
        libc.prctl(15, b'esc$token')
        if os.fork(): os._exit(0)
        os.setsid()
        time.sleep(60)
        """,
        SURVIVED,
    ),
    # Devices and rarely used parts of the kernel.
    Attempt(
        "open devices",
        """
        for name in ('mem', 'kmsg', 'port', 'kvm', 'fuse', 'ptmx', 'tty', 'vda', 'sda', 'nvme0n1', 'full', 'zero'):
            try: os.open(f'/dev/{name}', os.O_RDWR)
            except OSError: continue
            won()
        """,
        won,
    ),
    Attempt(
        "make a device",
        """
        os.mknod('d', 0o20600, os.makedev(1, 5))
        open('d', 'rb').read(1)
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "mount",
        """
        os.mkdir('m')
        if libc.mount(b'none', b'm', b'tmpfs', 0, 0) == 0: libc.umount2(b'm', 2); won()
        """,
        won,
        control=ROOT,
    ),
    Attempt("copy a mount", "if syscall('open_tree', -100, b'/', 1) >= 0: won()", won, control=ROOT),
    Attempt("make a file system", "if syscall('fsopen', b'tmpfs', 0) >= 0: won()", won, control=ROOT),
    Attempt(
        "change the root",
        """
        os.chroot('.')
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt("make a user namespace", "if syscall('unshare', 0x10000000) == 0: won()", won, control=NOBODY),
    Attempt(
        "enter another's namespace",
        "if syscall('setns', os.open('/proc/$target/ns/mnt', 0), 0) == 0: won()",
        won,
        control=ROOT,
    ),
    Attempt(
        "set the host's name",
        """
        socket.sethostname(socket.gethostname())
        won()
        """,
        won,
        control=ROOT,
    ),
    Attempt(
        "read the kernel's log",
        "if libc.klogctl(3, ctypes.create_string_buffer(99), 99) >= 0: won()",
        won,
        control=ROOT,
    ),
    Attempt(
        "load a program into the kernel",
        "if syscall('bpf', 0, (ctypes.c_uint32 * 18)(2, 4, 4, 1), 72) >= 0: won()",
        won,
        control=ROOT,
    ),
    Attempt("handle page faults", "if syscall('userfaultfd', 1) >= 0: won()", won),
    Attempt(
        "use io_uring",
        "if syscall('io_uring_setup', 1, ctypes.create_string_buffer(120)) >= 0: won()",
        won,
        control=NOBODY,
    ),
    Attempt(
        "count events of the machine",
        """
        attr = (ctypes.c_uint32 * 32)(1, 128)
        if syscall('perf_event_open', attr, 0, -1, -1, 0) >= 0: won()
        """,
        won,
        control=NOBODY,
    ),
    Attempt(
        "call the kernel as a 32-bit program",
        """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes([0xb8, 2, 0, 0, 0, 0xcd, 0x80, 0xc3]))
        pid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
        if pid > 0: won()
        os._exit(0)
        """,
        won,
        control=NOBODY,  # many kernels are built without
    ),
    Attempt(
        "call the kernel as an x32 program",
        """
        pid = libc.syscall(0x40000000 | 57)
        if pid > 0: won()
        os._exit(0)
        """,
        won,
        control=NOBODY,
    ),
    Attempt(
        "ask for its id as a 32-bit program",
        """
        import mmap
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes([0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xc3]))
        if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() > 0: won()
        """,
        won,
        control=NOBODY,  # many kernels are built without
    ),
    Attempt(
        "make every system call that is not on the list",
        """
        numbers = {*range(1024), *range(0x40000000, 0x40000400), 0x7fffffff, 2**31, 2**32 - 1, -1} - {*$allowed}
        for number in sorted(numbers):
            ctypes.set_errno(0)
            if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6) != -1 or ctypes.get_errno() != 38: won()
        """,
        won,
        control=NOBODY,
    ),
    # The next call, and the worker.
    *(
        Attempt(f"set the {state}", code, won, control=ROOT if "lease" in state else ANYONE)  # or whoever owns it
        for state, code in {
            "size of a pipe": """
                for fd in (1, os.pipe()[1]):
                    with contextlib.suppress(OSError): fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20); won()
                """,
            "signal of a pipe": """
                for fd in (1, os.pipe()[1]):
                    with contextlib.suppress(OSError): fcntl.fcntl(fd, 10, signal.SIGURG); won()
                """,
            "owner of a pipe": """
                for fd in (1, os.pipe()[1]):
                    with contextlib.suppress(OSError): fcntl.fcntl(fd, 8, os.getpid()); won()
                """,
            "flags of a pipe": """
                for fd in (1, os.pipe()[1]):
                    with contextlib.suppress(OSError): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND); won()
                """,
            "time and mode of a pipe": """
                for fd in (1, os.pipe()[1]):
                    with contextlib.suppress(OSError): os.utime(fd, (1, 1)); won()
                    with contextlib.suppress(OSError): os.fchmod(fd, 0o601); won()
                """,
            "lock on a shared file": """
                file = open('$script')
                with contextlib.suppress(OSError): fcntl.flock(file, fcntl.LOCK_SH); won()
                """,
            "lock on a part of a shared file": """
                try: fcntl.lockf(open('$script'), fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno == 9: won()  # the kernel, for a file that is open for reading only
                """,
            "lock on an open description of a shared file": """
                file = open('$script')
                with contextlib.suppress(OSError): fcntl.fcntl(file, 37, struct.pack('hhqqi', 0, 0, 0, 0, 0)); won()
                """,
            "lease on a shared file": """
                file = open('$script')
                with contextlib.suppress(OSError): fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK); won()
                """,
            "watch on a shared folder": """
                folder = os.open(os.path.dirname(ctypes.__file__), os.O_RDONLY)
                with contextlib.suppress(OSError): fcntl.fcntl(folder, fcntl.F_NOTIFY, 1); won()
                """,
        }.items()
    ),
    Attempt(
        "find inherited descriptors",
        """
        for fd in range(3, 256):
            try: print(os.pread(fd, 99, 0))
            except OSError: pass
        """,
        leaked,
        control=NOBODY,
    ),
    Attempt(
        "write a reply of its own",
        """
        for fd in range(256):
            try: os.write(fd, b'D\\0\\0\\0\\0')
            except OSError: pass
        raise ValueError
        """,
        lambda w, o: o.ran is None or o.ran.ending is not Ending.RAISED or o.then != SERVED,
        control=NOBODY,
    ),
    Attempt(
        "poison the worker through its frames and objects",
        """
        import gc
        frame = sys._getframe()
        while frame := frame.f_back:
            for value in list(frame.f_locals.values()):
                if type(value).__name__ == '_Worker': value._cell.run_cells = lambda cells: won() or 0
        for value in gc.get_objects():
            if type(value).__name__ == '_Worker': value._cell.run_cells = lambda cells: won() or 0
        """,
        next_call,
        control=NOBODY,
    ),
    Attempt(
        "poison modules for the next call",
        """
        import builtins, json, sympy
        builtins.print = json.load = sympy.factor = exit
        """,
        next_call,
        control=NOBODY,
        then="import sympy; sympy.factor(sympy.Symbol('x') ** 2)",
    ),
    Attempt(
        "hook what runs after",
        """
        import atexit, gc
        atexit.register(won)
        sys.settrace(lambda *a: None)
        sys.setprofile(lambda *a: None)
        gc.callbacks.append(lambda *a: won())
        os.register_at_fork(after_in_child=won, after_in_parent=won)
        threading.setprofile(won)
        """,
        next_call,
        control=NOBODY,
        then="import gc; gc.collect()",
    ),
    Attempt(
        "leave a library to preload",
        """
        os.environ['LD_PRELOAD'] = '/x.so'
        libc.setenv(b'LD_PRELOAD', b'/x.so', 1)
        """,
        next_call,
        control=NOBODY,
        then="import os; assert 'LD_PRELOAD' not in os.environ",
    ),
    Attempt(
        "leave files",
        """
        open('left', 'w').write('x')
        os.mkdir('.hidden')
        open('sitecustomize.py', 'w').write('x')
        os.chmod('.', 0o500)
        """,
        next_call,
        control=NOBODY,
        then="import os; assert os.listdir() == []; open('x', 'w')",
    ),
    Attempt(
        "leave the cells of the next call",
        """
        os.mkdir('cells')
        open('cells/x', 'w').write('x')
        """,
        next_call,
        control=NOBODY,
    ),
    Attempt(
        "point the next call's cells elsewhere",
        "os.symlink('$victim', 'cells')",
        lambda w, o: w.file_changed() or o.then != SERVED,
        control=NOBODY,
    ),
    Attempt(
        "leave shared memory",
        """
        if libc.shmget(0x61727, 4096, 0o1777) >= 0: won()
        if libc.semget(0x61727, 1, 0o1777) >= 0: won()
        if libc.msgget(0x61727, 0o1777) >= 0: won()
        """,
        won,
        control=NOBODY,  # it would stay
    ),
    Attempt(
        "leave a message queue",
        "if libc.mq_open(b'/arpo-$token', 0o102, 0o600, 0) >= 0: libc.mq_unlink(b'/arpo-$token'); won()",
        won,
        control=NOBODY,
    ),
    Attempt("leave a key", "if syscall('add_key', b'user', b'arpo', b'x', 1, -2) >= 0: won()", won, control=NOBODY),
    Attempt(
        "make the shared pipe unreadable",
        """
        os.set_blocking(1, False)
        fcntl.fcntl(1, fcntl.F_SETFL, os.O_ASYNC)
        """,
        next_call,
        control=NOBODY,
    ),
    Attempt("close everything", "os.closerange(0, 256)", next_call, control=NOBODY),
    Attempt(
        "print what is no text",
        "os.write(1, bytes(range(256)) * 8 + b'\\xff\\xfe\\ud800')",
        next_call,
        control=NOBODY,
    ),
]


class PlainProcess:
    """Runs each piece of code in a process of its own, with the rights of this one."""

    def run(self, code: str) -> Run:
        # A file, not a pipe: that ends with the process, whatever else it started.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as output:
            command = [sys.executable, "-I", "-c", code]
            ended = subprocess.run(
                command, check=False, cwd=folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL, timeout=60
            )
            output.seek(0)
            shown = output.read().decode(errors="replace")
        return Run(output=shown, ending=Ending.RAISED if ended.returncode else Ending.FINISHED)


def needs_target(attempt: Attempt) -> bool:
    return "$target" in attempt.code or attempt.oracle in (HURT, LIMITED)


def attempt_in(worker: Worker | PlainProcess, world: World, attempt: Attempt) -> Outcome:
    began = time.monotonic()
    if isinstance(worker, Worker):
        worker._limits = replace(LIMITS, timeout_s=attempt.deadline_s)
    try:
        ran = worker.run(world.code(attempt.code))
    except WorkerLost:
        return Outcome(None, None, time.monotonic() - began)
    if isinstance(worker, Worker):
        worker._limits = LIMITS
    seconds = time.monotonic() - began
    try:
        return Outcome(ran, worker.run(f"{attempt.then}\nprint('served')"), seconds)
    except WorkerLost:
        return Outcome(ran, None, seconds)


def succeeded(attempt: Attempt, world: World, outcome: Outcome) -> bool:
    """Whether it did, or broke the worker for those who come after."""
    return outcome.ran is None or attempt.oracle(world, outcome)


@pytest.fixture(scope="module")
def inheritable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The canary of a worker: in this process's environment and in an open file that a child might inherit."""
    canary = f"canary{secrets.token_hex(8)}"
    path = tmp_path_factory.mktemp("inherited") / "file"
    path.write_text(canary)
    fd = os.open(path, os.O_RDONLY)
    os.set_inheritable(fd, True)
    os.environ["ARPO_TEST_CANARY"] = canary
    yield canary
    del os.environ["ARPO_TEST_CANARY"]
    os.close(fd)


@pytest.fixture(scope="module", params=ISOLATING)
def worker(request: pytest.FixtureRequest, inheritable: str) -> Iterator[Worker]:
    with worker_of(request.param, LIMITS) as worker:
        yield worker


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.name)
def test_no_attempt_succeeds(worker: Worker, attempt: Attempt, inheritable: str, tmp_path: Path) -> None:
    with World(tmp_path, inheritable, needs_target(attempt)) as world:
        outcome = attempt_in(worker, world, attempt)
        assert not succeeded(attempt, world, outcome), outcome
        assert outcome.then == SERVED


CONTROLS = [a for a in ATTEMPTS if a.control == ANYONE or (a.control == ROOT and os.getuid() == 0)]


@pytest.mark.parametrize("attempt", CONTROLS, ids=lambda attempt: attempt.name)
def test_an_attempt_succeeds_where_nothing_stops_it(attempt: Attempt, inheritable: str, tmp_path: Path) -> None:
    with World(tmp_path, inheritable, needs_target(attempt)) as world:
        outcome = attempt_in(PlainProcess(), world, attempt)
        until(lambda: succeeded(attempt, world, outcome), within_s=20.0)  # some leave it to another process


def test_there_are_at_least_forty_distinct_attempts_with_a_control_for_most() -> None:
    assert len({attempt.code for attempt in ATTEMPTS}) == len(ATTEMPTS) >= 40
    assert len([attempt for attempt in ATTEMPTS if attempt.control != NOBODY]) >= 40

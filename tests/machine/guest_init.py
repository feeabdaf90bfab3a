"""What runs inside the guest as process 1: it makes a system out of the host's read-only root, runs one command and
powers off. `tests.machine.guest` starts it.

Called as `guest_init.py modprobe NAME…` it is the guest's modprobe: the modules of user-mode Linux lie where no
modprobe looks, and the host may have none.

A page fault costs 100 times more in the guest than on a host, so that its imports would take most of a boot: hence
only what is there at start or written in C, and neither dataclasses nor pathlib nor subprocess.
"""

import ctypes
import fcntl
import marshal
import os
import resource
import select
import signal
import sys
import termios
from collections.abc import Iterator

# Files of the host's scratch folder, besides the streams'.
JOB, STATUS, STDIN, ASKED, STUCK = "job.json", "status", "stdin", "asked", "stuck"
STATE, OUT = "/mnt/state", "/mnt/out"
SHADOWED = {"/run": "755", "/mnt": "755", "/tmp": "1777", "/var/tmp": "1777"}  # the guest's own, and their modes

HOST_NAME = b"guest"

UDEVD = "/lib/systemd/systemd-udevd"
UDEV_LOG = "/run/guest/udevd.log"

_HOST = "/run/guest/host"  # the scratch folder, writable
_BIN = "/run/guest/bin"
_TERMINAL = "/dev/tty1"  # the kernel's con1
_MODULES = "/usr/lib/uml/modules"
# The block modes come first: dm-crypt's own dependencies ask for them while they load, and asking costs a process.
_AT_BOOT = ("ecb", "cbc", "ctr", "xts", "dm_crypt", "loop", "af_alg", "algif_skcipher")
_CIPHERS = (b"xts(aes)", b"cbc(aes)")

_LOOK_SECONDS = 5  # between two looks whether the host asks
_LAST_READS = 64  # of up to 64 KiB from a pipe, 4 KiB from a terminal: more than either can hold

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REC, _MS_SHARED = 1, 2, 4, 1 << 14, 1 << 20
_RB_POWER_OFF = 0x4321FEDC
_libc = ctypes.CDLL(None, use_errno=True)


# One output of the command: the file of the scratch folder that takes it, the descriptors of the command that write to
# it, and the rows and columns of the terminal it is to look like.
Stream = tuple[str, list[int], tuple[int, int] | None]


class Job:
    """What the host wants from this boot; `out` is a folder of the host that it may write, `own` are the guest's own
    besides SHADOWED, `shown` are those that it must see though they lie under such, `sync` asks that the disk is synced
    at the end, `udev` for a udevd. `terminal` has the rows and columns of the one that is the command's own, if any is.
    """

    def __init__(
        self,
        *,
        command: list[str],
        cwd: str,
        env: dict[str, str],
        streams: list[Stream],
        out: str | None,
        own: list[str],
        shown: list[str],
        sync: bool,
        udev: bool,
        terminal: tuple[int, int] | None,
    ) -> None:
        self.command = command
        self.cwd = cwd
        self.env = env
        self.streams = streams
        self.out = out
        self.own = own
        self.shown = shown
        self.sync = sync
        self.udev = udev
        self.terminal = terminal

    def dump(self) -> bytes:
        return marshal.dumps(vars(self))

    @classmethod
    def load(cls, path: str) -> "Job":
        with open(path, "rb") as file:
            return cls(**marshal.load(file))  # noqa: S302 - written by the process that booted us


def _check(result: int, what: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
    """The system call, on a folder that is made if it is absent; OSError."""
    if not os.path.exists(target):
        os.makedirs(target)
    call = _libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode())
    _check(call, target)


def _make_system(scratch: str, job: Job) -> None:
    _check(_libc.sethostname(HOST_NAME, len(HOST_NAME)), "sethostname")
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
    if not os.path.ismount("/dev"):  # the kernel may have done it
        mount("devtmpfs", "/dev", "devtmpfs")
    mount("devpts", "/dev/pts", "devpts", data="ptmxmode=666,mode=620")
    for target, mode in {"/dev/shm": "1777", **SHADOWED, **dict.fromkeys(job.own, "755")}.items():
        mount("tmpfs", target, "tmpfs", _MS_NOSUID, f"mode={mode}")
    for link, to in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{link}"):
            os.symlink(to, f"/dev/{link}")
    for folder in ("/run/lock", "/run/cryptsetup", _BIN):
        os.makedirs(folder)
    mount("none", _HOST, "hostfs", data=scratch)
    for folder in job.shown:
        mount("none", folder, "hostfs", _MS_RDONLY, folder)
    if job.out:
        mount("none", OUT, "hostfs", data=job.out)
    _check(_libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SHARED), None), "/")
    loopback = _libc.socket(2, 2, 0)  # AF_INET, SOCK_DGRAM
    fcntl.ioctl(loopback, 0x8914, b"lo".ljust(16, b"\0") + b"\1".ljust(16, b"\0"))  # SIOCSIFFLAGS, IFF_UP
    os.close(loopback)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16, 1 << 16))


class _Modules:
    """The modules of the running user-mode Linux kernel, by the index files that depmod wrote."""

    def __init__(self) -> None:
        self._root = f"{_MODULES}/{os.uname().release}"
        self._loaded: set[str] = set()
        self._files = {
            self._name(path): (path, needs.split())
            for path, _, needs in (line.partition(":") for line in self._index("dep"))
        }
        self._before = {
            words[1].replace("-", "_"): words[3:]
            for words in map(str.split, self._index("softdep"))
            if len(words) > 3 and words[2] == "pre:"
        }

    @staticmethod
    def _name(path: str) -> str:
        return os.path.basename(path).partition(".ko")[0].replace("-", "_")

    def _index(self, kind: str) -> Iterator[str]:
        with open(f"{self._root}/modules.{kind}") as lines:
            yield from (line.strip() for line in lines if not line.startswith("#"))

    def load(self, name: str, parameters: str = "") -> bool:
        """Load a module, or all that an alias stands for, with what it needs; False if nothing is known by that name.
        OSError if the kernel refuses it.
        """
        import fnmatch  # seldom needed

        plain = name.replace("-", "_")
        if plain in self._files:
            self._insert(plain, parameters)
            return True
        if any(self._name(path) == plain for path in self._index("builtin")):
            return True
        aliases = (line.split() for line in self._index("alias"))
        found = [module for _, pattern, module in aliases if fnmatch.fnmatchcase(name, pattern)]
        for module in found:
            self._insert(module.replace("-", "_"), parameters)
        return bool(found)

    def _insert(self, name: str, parameters: str = "") -> None:
        if name in self._loaded or name not in self._files:
            return
        self._loaded.add(name)
        path, needs = self._files[name]
        for need in self._before.get(name, []):
            self.load(need)
        for need in reversed(needs):
            self._insert(self._name(need))
        with open(f"{self._root}/{path}", "rb") as file:
            if _libc.syscall(313, file.fileno(), parameters.encode(), 0) and ctypes.get_errno() != 17:  # finit_module
                _check(-1, path)  # 17: EEXIST, it is there


def modprobe(arguments: list[str]) -> int:
    """The calls that the kernel (`-q -- ALIAS`) and people (`NAME parameter=value`, `-a NAME…`) make."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    modules = _Modules()
    if "-a" in arguments:
        return 0 if all(map(modules.load, names)) else 1
    return 0 if modules.load(names[0], " ".join(names[1:])) else 1


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _write_whole(name: str, text: str) -> None:
    """A file of the host, which sees nothing of it or all."""
    _write(f"{_HOST}/{name}.new", text)
    os.rename(f"{_HOST}/{name}.new", f"{_HOST}/{name}")


def _build_cipher(name: bytes) -> None:
    """Have the kernel put a cipher together before the first volume does: it asks for seven modules meanwhile, which
    are not there and not needed, and each question costs a process. See sockaddr_alg in linux/if_alg.h.
    """
    user = _libc.socket(38, 5, 0)  # AF_ALG, SOCK_SEQPACKET
    address = (38).to_bytes(2, sys.byteorder) + b"skcipher".ljust(14 + 8, b"\0") + name.ljust(64, b"\0")
    _check(_libc.bind(user, address, len(address)), name.decode())
    os.close(user)


def _load_modules() -> None:
    _write("/proc/sys/kernel/modprobe", "")  # what the kernel asks for meanwhile is a guess, or next on the list
    modules = _Modules()
    for name in _AT_BOOT:
        modules.load(name)
    for cipher in _CIPHERS:
        _build_cipher(cipher)
    wrapper = f"{_BIN}/modprobe"
    _write(wrapper, f'#!/bin/sh\nexec "{sys.executable}" -I -S "{os.path.abspath(__file__)}" modprobe "$@"\n')
    os.chmod(wrapper, 0o700)
    _write("/proc/sys/kernel/modprobe", wrapper)


def _start_udev() -> None:
    """As a boot does it: the daemon, then an event for each device that is there already. What it complains of goes to
    UDEV_LOG; ChildProcessError.
    """
    script = (
        f"{UDEVD} >{UDEV_LOG} 2>&1 & "
        "until udevadm control --ping 2>/dev/null; do kill -0 $! && sleep 0.1 || exit; done; "
        "udevadm trigger --type=subsystems --action=add && udevadm trigger --type=devices --action=add && "
        "until udevadm settle --timeout=10; do :; done"
    )
    process = os.posix_spawn("/bin/sh", ["sh", "-c", script], {"PATH": os.defpath})
    if os.waitpid(process, 0)[1]:
        raise ChildProcessError(UDEVD)


def _open(terminal: tuple[int, int] | None) -> tuple[int, int]:
    """The end that init reads, and the one that the command writes to: a pipe, or a terminal that changes nothing."""
    if not terminal:
        return os.pipe()
    ours, theirs = os.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    _set_size(theirs, terminal)
    return ours, theirs


def _set_size(terminal: int, shape: tuple[int, int]) -> None:
    size = b"".join(number.to_bytes(2, sys.byteorder) for number in (*shape, 0, 0))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def _copy(source: int, target: int) -> bool:
    """Carry on what can be read now; False if that is nothing, now or for good."""
    try:
        data = os.read(source, 1 << 16)
    except OSError:  # EAGAIN; EIO: nobody has the terminal any more
        return False
    written = 0
    while written < len(data):
        written += os.write(target, data[written:])
    return bool(data)


def _reap(command: int) -> int | None:
    """Take in the dead, as process 1 must; the command's exit code once it is among them."""
    code = None
    try:
        while (dead := os.waitpid(-1, os.WNOHANG))[0]:
            if dead[0] == command:
                code = os.waitstatus_to_exitcode(dead[1])
    except ChildProcessError:  # that was the last
        pass
    return code


def _tell_stuck() -> None:
    """Tell the host once it asks which threads wait in the kernel and cannot be ended (state D), and for what."""
    if not os.path.exists(f"{_HOST}/{ASKED}"):
        return
    stuck = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        folder = f"/proc/{process}/task"
        try:
            threads = os.listdir(folder)
        except OSError:  # it has ended
            continue
        for thread in threads:
            try:
                with open(f"{folder}/{thread}/stat", errors="replace") as file:
                    name, _, rest = file.read().partition(" (")[2].rpartition(") ")
                with open(f"{folder}/{thread}/wchan") as file:
                    place = file.read()
            except OSError:  # so has this
                continue
            if rest.startswith("D"):
                stuck.append(f"{name} ({thread}) in {place}")
    _write_whole(STUCK, ", ".join(stuck))
    os.unlink(f"{_HOST}/{ASKED}")


def _spawn(job: Job, writers: dict[int, int]) -> int:
    os.chdir(job.cwd)
    os.environ["PATH"] = job.env["PATH"]  # where the command is looked for
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, f"{_HOST}/{STDIN}", os.O_RDONLY, 0)
    ]
    actions += [(os.POSIX_SPAWN_DUP2, writer, descriptor) for descriptor, writer in writers.items()]
    if job.terminal:
        console = os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY)
        _set_size(console, job.terminal)
        os.close(console)
        # The leader of a session that has none gets the terminal that it opens for its own (tty(4)).
        actions = [(os.POSIX_SPAWN_OPEN, number, _TERMINAL, os.O_RDWR, 0) for number in range(3)]
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python, not by what it starts
    return os.posix_spawnp(job.command[0], job.command, job.env, file_actions=actions, setsid=True, setsigdef=ignored)


def _pump(command: int, sources: dict[int, int]) -> int:
    """Carry the command's output to the host until it ends; its exit status."""
    wakeup, woken = os.pipe()
    for end in (wakeup, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.kill(os.getpid(), signal.SIGCHLD)  # it may have ended before anybody listened
    poller = select.poll()
    for source in (wakeup, *sources):
        poller.register(source, select.POLLIN)
    while True:
        for ready, _ in poller.poll(_LOOK_SECONDS * 1000):
            if ready == wakeup:
                os.read(wakeup, 1 << 12)
                if (status := _reap(command)) is not None:
                    return status
            elif not _copy(ready, sources[ready]):
                poller.unregister(ready)
        _tell_stuck()


def run(job: Job) -> int:
    """Run the command to its end, its output going to the host as it comes. The exit code as a shell would tell it."""
    sources: dict[int, int] = {}
    writers: dict[int, int] = {}
    for file, descriptors, terminal in job.streams:
        ours, theirs = _open(terminal)
        os.set_blocking(ours, False)
        sources[ours] = os.open(f"{_HOST}/{file}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        writers |= dict.fromkeys(descriptors, theirs)
    command = status = 0
    try:
        command = _spawn(job, writers)
    except OSError as error:
        os.write(writers[2], f"{job.command[0]}: {error.strerror}\n".encode())
        status = 127 if isinstance(error, FileNotFoundError) else 126  # as a shell has it
    for writer in set(writers.values()):
        os.close(writer)
    if command:
        status = _pump(command, sources)
    for source, target in sources.items():  # what it wrote at last: bounded, a daemon it left behind may write on
        for _ in range(_LAST_READS):
            if not _copy(source, target):
                break
    return status if status >= 0 else 128 - status


def main(scratch: str) -> None:
    """Boot, run the job, tell the exit code, power off."""
    job = Job.load(f"{scratch}/{JOB}")
    _make_system(scratch, job)
    _load_modules()
    mount("/dev/ubda", STATE, "ext4", data="noinit_itable")
    if job.udev:
        _start_udev()
    code = run(job)
    if job.sync:
        _check(_libc.syncfs(os.open(STATE, os.O_RDONLY)), STATE)
    _write_whole(STATUS, str(code))
    _libc.reboot(_RB_POWER_OFF)


if __name__ == "__main__":
    if sys.argv[1] == "modprobe":
        sys.exit(modprobe(sys.argv[2:]))
    main(sys.argv[1])

"""The process that locks a server of image data up and watches over it; `csi_driver.images.qemu` starts it.

    python -m csi_driver.images.sandbox '<Sandbox as JSON>'

Two processes: this one, the warden, and its child, which becomes the program. The child is the first process of new
pid, network, ipc and mount namespaces. Its root is a tmpfs, read-only, with the image's file, the program and the
libraries that it was linked with, nothing else: no /dev, no /proc, no other file. It has no capabilities and cannot
get any, and ends with the warden (prctl(2), PR_SET_PDEATHSIG). The program listens on a unix socket in its own
network namespace, given as systemd gives sockets to services (sd_listen_fds(3)); the warden connects to it and hands
the connected ends to its parent. So no path leads to the data.

The warden ends the program when its parent closes the control socket or is gone.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, Self

from csi_driver.host.hardening import forbid_core
from csi_driver.host.syscalls import AT_FDCWD, check, libc, syscall

MESSAGE_BYTES: Final = 16 * 1024
NO_SANDBOX: Final = 70
"""Exit code of a child that could not be locked up (EX_SOFTWARE of sysexits.h; qemu-nbd has 0 and 1)."""
IMAGE: Final = "/image"
"""Where the program finds the image's file."""

# A user that no account has: its processes share a uid with nobody who could trace them.
_UID: Final = 0x4C554B53
_SOCKET: Final = 3  # sd_listen_fds(3)
_ROOT: Final = "/proc"  # is there on every host; in the new namespace the tmpfs covers it
_SAID_BYTES: Final = 4096

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWPID: Final = 0x20000000
_CLONE_NEWNET: Final = 0x40000000
_MS_RDONLY: Final = 0x1
_MS_NOSUID: Final = 0x2
_MS_NODEV: Final = 0x4
_MS_REMOUNT: Final = 0x20
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MNT_DETACH: Final = 2
_OPEN_TREE_CLONE: Final = 1
_AT_EMPTY_PATH: Final = 0x1000
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_MOUNT_ATTR: Final = struct.Struct("=4Q")  # to set, to clear, propagation, user namespace
_ATTR_RDONLY: Final = 0x1
_ATTR_NOSUID: Final = 0x2
_ATTR_NODEV: Final = 0x4
_ATTR_NOEXEC: Final = 0x8
_ATTR_IDMAP: Final = 0x00100000
_PR_SET_PDEATHSIG: Final = 1
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process (capset(2))
_KEYCTL_JOIN_SESSION_KEYRING: Final = 1


@dataclass(frozen=True)
class Sandbox:
    """What the warden is told. `control` and `image` are inherited descriptors, `parent` is the pid of who asks.

    `environment` is added to what the program gets anyway, `files` are absolute paths that it is shown. It gets
    `connections` connections, `memory` bytes of address space and `cpu_seconds` of processor time.
    """

    control: int
    image: int
    parent: int
    argv: tuple[str, ...]
    environment: dict[str, str]
    files: tuple[str, ...]
    connections: int
    memory: int
    cpu_seconds: int

    def encode(self) -> str:
        """The form that the command line takes."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Self:
        """Read what `encode` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "argv": tuple(fields["argv"]), "files": tuple(fields["files"])})


@dataclass(frozen=True)
class _Image:
    """The image's file as a detached mount, and the user and group that own it there."""

    tree: int
    uid: int
    gid: int


def main(arguments: list[str]) -> int:
    """Run the program until it ends or is no longer wanted."""
    sandbox = Sandbox.decode(arguments[0])
    for inherited in (sandbox.control, sandbox.image):  # by this process, and by none after it
        os.set_inheritable(inherited, False)
    with socket.socket(fileno=sandbox.control) as control, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        try:
            parent = os.pidfd_open(sandbox.parent)
            if os.getppid() != sandbox.parent:
                return 1
            image = _image_tree(sandbox.image)
            check(libc.unshare(_CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC), "unshare")
            listener, clients = _sockets(sandbox.connections)
            said, stderr = os.pipe()
            pid = _start(sandbox, image, listener, stderr)
        except OSError as error:
            control.send(json.dumps({"error": _words(error)}).encode())
            return 1
        os.close(stderr)
        listener.close()
        socket.send_fds(control, [b"{}"], [client.fileno() for client in clients])
        for client in clients:
            client.close()
        control.send(json.dumps(_watch(pid, control, parent, said)).encode())
    return 0


def _watch(pid: int, control: socket.socket, parent: int, said: int) -> dict[str, int | str]:
    """Wait for the end of the program, or bring it about; returns its exit code and the end of what it said."""
    child = os.pidfd_open(pid)
    poller = select.poll()
    for descriptor in (child, control.fileno(), parent, said):
        poller.register(descriptor, select.POLLIN)
    text = b""
    while True:
        ready = {descriptor for descriptor, _ in poller.poll()}
        if said in ready:
            piece = os.read(said, _SAID_BYTES)
            text = (text + piece)[-_SAID_BYTES:]
            if not piece:
                poller.unregister(said)
            continue  # all that it said is read before its end is looked at
        if child not in ready:  # nothing is ever sent to the warden: the parent hung up or is gone
            try:
                os.kill(pid, signal.SIGKILL)
            except PermissionError:  # another user's, and this one has no CAP_KILL: the kernel ends it with the warden
                return {"code": -signal.SIGKILL, "said": text.decode(errors="replace")}
        break
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "said": text.decode(errors="replace")}


def _image_tree(descriptor: int) -> _Image:
    """The open file as a mount of its own, read-only and, where its file system can, owned by a user of its own.

    Where it cannot (mount_setattr(2) names those that can), the program runs as the file's owner.
    """
    status = os.fstat(descriptor)
    tree = syscall("open_tree", descriptor, b"", _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC)
    _set_attributes(tree, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC)
    try:
        with _user_namespace(status.st_uid, status.st_gid) as namespace:
            _set_attributes(tree, _ATTR_IDMAP, namespace)
    except OSError:
        return _Image(tree, status.st_uid, status.st_gid)
    return _Image(tree, _UID, _UID)


@contextlib.contextmanager
def _user_namespace(uid: int, gid: int) -> Iterator[int]:
    """A user namespace that maps this owner to the user of the sandbox: what an id-mapped mount takes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            ours.close()
            theirs.send(b"%d" % libc.unshare(_CLONE_NEWUSER))
            theirs.recv(1)  # until the namespace is held, or the warden is gone
            os._exit(0)
        try:
            if ours.recv(2) != b"0":
                raise OSError(errno.EPERM, "unshare of a user namespace")
            for name, owner in (("uid_map", uid), ("gid_map", gid)):
                with open(f"/proc/{pid}/{name}", "wb", buffering=0) as mapping:
                    mapping.write(b"%d %d 1" % (owner, _UID))
            namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    try:
        yield namespace
    finally:
        os.close(namespace)


def _set_attributes(tree: int, attributes: int, namespace: int = 0) -> None:
    content = _MOUNT_ATTR.pack(attributes, 0, 0, namespace)
    syscall("mount_setattr", tree, b"", _AT_EMPTY_PATH, content, _MOUNT_ATTR.size)


def _sockets(count: int) -> tuple[socket.socket, list[socket.socket]]:
    """A listening socket in this network namespace, and `count` connections to it that nobody has accepted yet."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(b"")  # an abstract name of the kernel's choice (unix(7))
    listener.listen(count)
    clients = []
    for _ in range(count):
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(listener.getsockname())
        clients.append(client)
    return listener, clients


def _start(sandbox: Sandbox, image: _Image, listener: socket.socket, stderr: int) -> int:
    """Fork the child that becomes the program; returns its pid."""
    warden = os.pidfd_open(os.getpid())
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            for source, target in ((nothing, 0), (stderr, 1), (stderr, 2)):
                os.dup2(source, target)
            _change_root(sandbox.files, image.tree)
            _set_limits(sandbox)
            _drop_privileges(image)
            _end_with(warden)
            os.dup2(listener.fileno(), _SOCKET)
            os.set_inheritable(_SOCKET, True)
            os.closerange(_SOCKET + 1, os.sysconf("SC_OPEN_MAX"))
            environment = {
                **sandbox.environment,
                "LC_ALL": "C",
                "LISTEN_FDS": "1",
                "LISTEN_PID": str(os.getpid()),
            }
            os.execve(sandbox.argv[0], sandbox.argv, environment)  # noqa: S606 -- as csi_driver.host.commands: no shell
        except OSError as error:
            os.write(2, _words(error).encode())
        finally:
            os._exit(NO_SANDBOX)
    for descriptor in (image.tree, warden, nothing):
        os.close(descriptor)
    return pid


def _change_root(files: tuple[str, ...], image: int) -> None:
    """Enter a mount namespace whose root holds `files` and the image, all of it read-only."""
    check(libc.unshare(_CLONE_NEWNS), "unshare")
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    trees = {path: syscall("open_tree", AT_FDCWD, os.fsencode(path), _OPEN_TREE_CLONE | os.O_CLOEXEC) for path in files}
    for tree in trees.values():
        _set_attributes(tree, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    trees[IMAGE] = image
    os.umask(0o022)
    _mount("tmpfs", _ROOT, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m,nr_inodes=1k")
    for path, tree in trees.items():
        target = _ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        syscall("move_mount", tree, b"", AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)
    _mount(None, _ROOT, None, _MS_REMOUNT | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(_ROOT)
    check(libc.pivot_root(b".", b"."), "pivot_root")  # the old root lies on the new one then (pivot_root(2))
    check(libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def _mount(source: str | None, target: str, fs_type: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else os.fsencode(text) for text in (source, target, fs_type, data)]
    check(libc.mount(*texts[:3], flags, texts[3]), f"mount of {target}")


def _set_limits(sandbox: Sandbox) -> None:
    """Resource limits (getrlimit(2)): the program writes no file, opens few, and cannot grow or run on for ever."""
    for limit, most in (
        (resource.RLIMIT_AS, sandbox.memory),
        (resource.RLIMIT_CPU, sandbox.cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32 + sandbox.connections),
        (resource.RLIMIT_NPROC, 1024),  # of all programs in such sandboxes together
        (resource.RLIMIT_STACK, 1 << 20),  # threads get as much each
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(limit, (most, most))
    forbid_core()


def _drop_privileges(image: _Image) -> None:
    """Become the owner of the image, without capabilities now and after any exec, without the caller's keyrings."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            if ctypes.get_errno() == errno.EINVAL and capability:
                break  # past the last one that this kernel has
            check(-1, "prctl(PR_CAPBSET_DROP)")
    os.setgroups([])
    os.setresgid(image.gid, image.gid, image.gid)
    os.setresuid(image.uid, image.uid, image.uid)
    check(libc.capset(_CAPABILITY_HEADER, bytes(24)), "capset")
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    try:
        syscall("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, None)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # a kernel without keyrings
            raise


def _end_with(warden: int) -> None:
    """Be killed when the warden ends. A change of user takes that back, so it comes after."""
    check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    poller = select.poll()
    poller.register(warden, select.POLLIN)
    if poller.poll(0):  # it was gone before the kernel was asked
        os._exit(NO_SANDBOX)


def _words(error: OSError) -> str:
    """What failed, without the number."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

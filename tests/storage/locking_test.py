"""Locks on files: who excludes whom, which bytes say so, hosts without locks, and races."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from qcowkit.errors import ImageBusy, StorageError
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import FileLock, LockMode, Role, acquire
from qcowkit.units import MiB
from tests.locks import FLOCK, held_bytes

READER, WRITER, SHARED, CREATOR = Role.READER, Role.WRITER, Role.SHARED, Role.CREATOR

# What may be open side by side; everything else may not.
TOGETHER = {
    (READER, READER),
    *((SHARED, role) for role in Role),
    *((role, SHARED) for role in Role),
}
BYTES = {
    READER: [100, 201, 203],
    WRITER: [100, 101, 103, 201, 203],
    SHARED: [100],
    CREATOR: [101, 103, 201, 203],
}


class Users:
    """Opens one file again and again; closes all of it in the end."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._stack = stack

    def open(self) -> FileStorage:
        return self._stack.enter_context(FileStorage.open(self.path, writable=True, name="disk"))

    def lock(self, role: Role, **options: Any) -> FileLock:
        return acquire(self.open(), role, name="disk", **options)


@pytest.fixture
def users(tmp_path: Path) -> Iterator[Users]:
    path = tmp_path / "disk"
    path.touch()
    with ExitStack() as stack:
        yield Users(path, stack)


class Host:
    """The kernel, with something done or refused before a call.

    before: called with the number of the call, counted from 0, and its command."""

    def __init__(self, before: Callable[[int, int], None] | None = None) -> None:
        self.commands: list[tuple[int, int, int]] = []
        self._before = before

    def __call__(self, fd: int, command: int, request: bytes) -> bytes:
        number = len(self.commands)
        kind, _, byte, *_ = FLOCK.unpack(request)
        self.commands.append((command, kind, byte))
        if self._before is not None:
            self._before(number, command)
        return fcntl.fcntl(fd, command, request)

    def taken(self) -> list[int]:
        """Every byte that was asked for, in order."""
        wanted = (fcntl.F_OFD_SETLK, fcntl.F_RDLCK)
        return [byte for command, kind, byte in self.commands if (command, kind) == wanted]


def refuse(number: int) -> Host:
    """A host that answers every call with an error."""

    def fail(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    return Host(fail)


@pytest.mark.parametrize("second", Role)
@pytest.mark.parametrize("first", Role)
def test_two_users_exclude_each_other_unless_both_can_live_with_it(
    users: Users, first: Role, second: Role
) -> None:
    users.lock(first)
    if (first, second) in TOGETHER:
        users.lock(second)
    else:
        with pytest.raises(ImageBusy):
            users.lock(second)


@pytest.mark.parametrize("role", Role)
def test_a_role_holds_the_bytes_that_qemu_looks_at(users: Users, role: Role) -> None:
    users.lock(role)
    assert held_bytes(users.path) == BYTES[role]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (WRITER, READER, "is open for writing elsewhere (see -U to read it all the same)"),
        (
            WRITER,
            WRITER,
            "is open for writing elsewhere, so it cannot be written until it is closed there",
        ),
        (
            READER,
            WRITER,
            "is open for reading elsewhere, so it cannot be written until it is closed there",
        ),
        (
            READER,
            CREATOR,
            "is open for reading elsewhere, so it cannot be replaced until it is closed there",
        ),
    ],
)
def test_a_message_says_which_use_excludes_and_the_way_out(
    users: Users, first: Role, second: Role, message: str
) -> None:
    users.lock(first)
    with pytest.raises(ImageBusy) as caught:
        users.lock(second)
    assert str(caught.value) == f"disk: {message}"


@pytest.mark.parametrize("role", [READER, SHARED])
def test_a_reader_minds_a_user_that_lets_nobody_read(users: Users, role: Role) -> None:
    stranger = users.open().fileno()
    request = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 200, 1, 0)
    fcntl.fcntl(stranger, fcntl.F_OFD_SETLK, request)
    with pytest.raises(ImageBusy) as caught:
        users.lock(role)
    assert str(caught.value) == "disk: is open elsewhere, by a user that lets nobody read it"


def test_a_file_that_is_locked_as_a_whole_is_in_use(users: Users) -> None:
    fcntl.lockf(users.open().fileno(), fcntl.LOCK_EX)
    with pytest.raises(ImageBusy):
        users.lock(READER)


def test_a_single_byte_that_is_locked_exclusively_is_in_use(users: Users) -> None:
    fcntl.lockf(users.open().fileno(), fcntl.LOCK_EX, 1, 100)
    with pytest.raises(ImageBusy, match=r"^disk: is locked elsewhere$"):
        users.lock(READER)
    assert held_bytes(users.path) == [100]


def test_the_byte_of_libvirt_is_left_alone(users: Users) -> None:
    fcntl.lockf(users.open().fileno(), fcntl.LOCK_EX, 1, 0)
    users.lock(WRITER)


def test_closing_the_file_gives_everything_back(users: Users) -> None:
    storage = users.open()
    acquire(storage, WRITER, name="disk")
    storage.close()
    assert held_bytes(users.path) == []


def test_another_descriptor_of_the_file_can_be_closed_without_losing_anything(
    users: Users,
) -> None:
    users.lock(WRITER)
    users.open().close()
    assert held_bytes(users.path) == BYTES[WRITER]


def test_a_release_gives_everything_back_and_leaves_the_file_open(users: Users) -> None:
    storage = users.open()
    lock = acquire(storage, WRITER, name="disk")
    lock.release()
    assert (lock.role, lock.held, held_bytes(users.path)) == (None, False, [])
    assert storage.size() == 0


def test_a_release_after_closing_does_not_touch_a_file_that_took_the_number(users: Users) -> None:
    storage = users.open()
    lock = acquire(storage, WRITER, name="disk")
    number = storage.fileno()
    storage.close()
    other = users.open()
    assert other.fileno() == number
    acquire(other, READER, name="disk")
    lock.release()
    assert held_bytes(users.path) == BYTES[READER]


def test_a_plain_descriptor_can_be_locked(users: Users) -> None:
    with open(users.path, "rb") as file:
        lock = acquire(file.fileno(), READER, name="disk")
        assert (lock.role, lock.held) == (READER, True)
        assert held_bytes(users.path) == BYTES[READER]


def test_a_closed_file_cannot_be_locked(users: Users) -> None:
    storage = users.open()
    storage.close()
    with pytest.raises(StorageError, match=r"^disk: lock: Bad file descriptor \(EBADF\)$"):
        acquire(storage, READER, name="disk")


def test_a_lone_reader_becomes_a_writer_and_a_reader_again(users: Users) -> None:
    lock = users.lock(READER)
    lock.change(WRITER)
    assert (lock.role, held_bytes(users.path)) == (WRITER, BYTES[WRITER])
    lock.change(READER)
    assert (lock.role, held_bytes(users.path)) == (READER, BYTES[READER])
    users.lock(READER)


def test_a_reader_that_cannot_become_a_writer_stays_a_reader(users: Users) -> None:
    users.lock(READER)
    lock = users.lock(READER)
    with pytest.raises(ImageBusy):
        lock.change(WRITER)
    assert (lock.role, held_bytes(users.path)) == (READER, BYTES[READER])


def test_a_change_gives_nothing_back_before_it_has_what_it_needs(users: Users) -> None:
    host = Host()
    lock = users.lock(READER, control=host)
    host.commands.clear()
    lock.change(WRITER)
    assert host.taken() == [101, 103]
    assert fcntl.F_UNLCK not in [kind for _, kind, _ in host.commands]


REFUSALS = [errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.mark.parametrize("number", REFUSALS)
def test_auto_goes_on_where_the_host_has_no_locks(users: Users, number: int) -> None:
    lock = users.lock(WRITER, control=refuse(number))
    assert (lock.role, lock.held) == (WRITER, False)
    lock.change(READER)
    lock.release()


@pytest.mark.parametrize("number", REFUSALS)
def test_on_fails_where_the_host_has_no_locks(users: Users, number: int) -> None:
    with pytest.raises(StorageError) as caught:
        users.lock(WRITER, mode="on", control=refuse(number))
    assert caught.value.errno == number
    assert str(caught.value) == (
        "disk: lock: the host has no locks for this file, and locking=on asks for them "
        f"({errno.errorcode[number]})"
    )


def test_off_does_not_ask_the_host(users: Users) -> None:
    users.lock(WRITER)
    host = Host()
    lock = users.lock(WRITER, mode="off", control=host)
    lock.release()
    assert host.commands == []


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_any_other_failure_of_the_host_is_an_error(users: Users, mode: LockMode) -> None:
    with pytest.raises(StorageError, match=r"^disk: lock: Input/output error \(EIO\)$"):
        users.lock(READER, mode=mode, control=refuse(errno.EIO))


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_host_that_takes_locks_and_cannot_be_asked_keeps_none(
    users: Users, mode: LockMode
) -> None:
    def fail(number: int, command: int) -> None:
        if command == fcntl.F_OFD_GETLK and number > 3:
            raise OSError(errno.ENOLCK, "no")

    with ExitStack() as stack:
        if mode == "on":
            stack.enter_context(pytest.raises(StorageError))
        users.lock(READER, mode=mode, control=Host(fail))
    assert held_bytes(users.path) == []


def test_a_busy_file_is_busy_in_every_mode_that_locks(users: Users) -> None:
    users.lock(WRITER)
    with pytest.raises(ImageBusy):
        users.lock(READER, mode="on")


def test_who_is_refused_leaves_nothing_behind(users: Users) -> None:
    users.lock(READER)
    with pytest.raises(ImageBusy):
        users.lock(WRITER)
    assert held_bytes(users.path) == BYTES[READER]


def test_who_will_be_refused_disturbs_nobody_meanwhile(users: Users) -> None:
    users.lock(WRITER)
    host = Host()
    with pytest.raises(ImageBusy):
        users.lock(READER, control=host)
    assert host.taken() == []


def test_a_user_that_goes_away_in_time_is_waited_for(users: Users) -> None:
    other = users.open()
    acquire(other, WRITER, name="disk")
    host = Host(lambda number, _: other.close() if number == 2 else None)
    lock = users.lock(WRITER, control=host)
    assert lock.held


def test_who_gave_way_to_another_starter_tries_again(users: Users) -> None:
    """The other comes between the first look and the second, and goes while we give way."""
    others: list[FileLock] = []

    def meet(number: int, command: int) -> None:
        kind = host.commands[number][1]
        if command == fcntl.F_OFD_SETLK and not others:
            others.append(users.lock(READER))
        elif kind == fcntl.F_UNLCK:
            others[0].release()

    host = Host(meet)
    lock = users.lock(WRITER, control=host)
    assert host.taken() == BYTES[WRITER] * 2
    assert (lock.role, held_bytes(users.path)) == (WRITER, BYTES[WRITER])


def test_a_killed_process_leaves_no_lock(users: Users) -> None:
    script = """
import sys
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
storage = FileStorage.open(sys.argv[1], writable=True)
acquire(storage, Role.WRITER, name="disk")
print("ready", flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, users.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(ImageBusy):
            users.lock(READER)
        child.send_signal(signal.SIGKILL)
        child.wait()
        users.lock(READER)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a device of a file")
def test_a_block_device_is_locked_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(MiB)
    made = subprocess.run(
        ["losetup", "--find", "--show", path], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip("this machine makes no block devices of files")
    device = Path(made.stdout.strip())
    try:
        with FileStorage.open(device) as first, FileStorage.open(device) as second:
            acquire(first, WRITER, name="device")
            assert held_bytes(device) == BYTES[WRITER]
            with pytest.raises(ImageBusy, match="^device: is open for writing elsewhere"):
                acquire(second, READER, name="device")
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


# Comes and goes as a writer; a file of its own shows whether anybody else is in at the time.
_STARTER = """
import os, sys
from qcowkit.errors import ImageBusy
from qcowkit.storage.file import FileStorage
from qcowkit.storage.locking import Role, acquire
path, rounds = sys.argv[1], int(sys.argv[2])
entered = 0
for _ in range(rounds):
    with FileStorage.open(path, writable=True) as storage:
        try:
            acquire(storage, Role.WRITER, name="disk")
        except ImageBusy:
            continue
        os.close(os.open(path + ".inside", os.O_CREAT | os.O_EXCL))
        entered += 1
        os.unlink(path + ".inside")
print(entered)
"""


def race(path: Path, *, starters: int, rounds: int) -> list[int]:
    """How often each of some processes got in as the one writer; one that met another failed."""
    command = [sys.executable, "-c", _STARTER, str(path), str(rounds)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(starters)
    ]
    ended = [child.communicate() for child in running]
    assert [error for _, error in ended if error] == []
    return [int(out) for out, _ in ended]


def test_never_are_two_writers_in(users: Users) -> None:
    assert sum(race(users.path, starters=4, rounds=100)) > 0
    assert held_bytes(users.path) == []


@pytest.mark.soak
def test_never_are_two_writers_in_of_many_that_try_for_long(users: Users) -> None:
    assert sum(race(users.path, starters=16, rounds=1000)) > 0

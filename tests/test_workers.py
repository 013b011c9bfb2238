"""A device that tests share, and one that a test has alone."""

import multiprocessing
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.workers import shared_device

PATIENCE = 30  # seconds, in which a process starts


def use(folder: Path, alone: bool, inside: Event, leave: Event) -> None:
    with shared_device(folder, alone=alone):
        inside.set()
        leave.wait()


class User:
    """A process that uses the device."""

    def __init__(self, folder: Path, *, alone: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self.inside, self.leave = context.Event(), context.Event()
        self.process = context.Process(target=use, args=(folder, alone, self.inside, self.leave))
        self.process.start()

    def end(self) -> None:
        self.leave.set()
        self.process.join()


@pytest.fixture
def user(tmp_path):
    """Start a process that uses the device; all are ended after the test."""
    users = []

    def started(*, alone: bool) -> User:
        users.append(User(tmp_path, alone=alone))
        return users[-1]

    yield started
    for one in users:
        one.process.kill()
        one.process.join()


def test_several_processes_use_a_device_beside_each_other(user):
    one, other = user(alone=False), user(alone=False)
    assert one.inside.wait(PATIENCE)
    assert other.inside.wait(PATIENCE)


def test_one_that_wants_it_alone_waits_for_those_before_and_holds_up_those_after(user):
    before = user(alone=False)
    assert before.inside.wait(PATIENCE)
    alone = user(alone=True)
    assert not alone.inside.wait(3)
    after = user(alone=False)
    assert not after.inside.wait(3)
    before.end()
    assert alone.inside.wait(PATIENCE)
    assert not after.inside.is_set()
    alone.end()
    assert after.inside.wait(PATIENCE)


def test_a_process_that_dies_leaves_the_device(user):
    alone = user(alone=True)
    assert alone.inside.wait(PATIENCE)
    alone.process.kill()
    assert user(alone=True).inside.wait(PATIENCE)

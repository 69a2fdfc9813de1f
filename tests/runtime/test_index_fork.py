"""Processes that fork while an index is open: a child has its parent's memory, but of its threads only the one that forked."""

import os
import select
import signal
import sqlite3
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from metaembed.runtime.errors import UsageError
from metaembed.runtime.fork import Turn
from metaembed.runtime.index import Index
from metaembed.runtime.index_catalogue import CATALOGUE
from metaembed.runtime.index_layout import Layout
from metaembed.runtime.index_writer import IndexWriter

D, COUNT = 16, 300
QUERY = np.ones((2, D), np.float32)
VECTORS = np.random.default_rng(0).standard_normal((COUNT, 2, D)).astype(np.float32)
PATIENCE_S = 20  # what a child that hangs is given


@pytest.fixture
def folder(tmp_path):
    Index.create(tmp_path / "index", Layout(D, (1, 2)))
    with IndexWriter(tmp_path / "index") as writer:
        writer.add([f"i{i}" for i in range(COUNT)], VECTORS, [{"n": i} for i in range(COUNT)])
    return tmp_path / "index"


def in_child(work):
    """The exit status of a forked child that does some work: 0 when it returned True, 1 otherwise, SIGALRM when it hung."""
    if (child := os.fork()) == 0:
        signal.alarm(PATIENCE_S)
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def ids(index, k=20):
    return [hit.id for hit in index.search(QUERY, k, where=["n>=0"])]


def test_children_search_while_threads_of_their_parent_do(folder):
    """Expected: what the parent finds alone. Of such children some third hung, each on a lock that a thread had held."""
    with Index.open(folder) as index:
        alone, done = ids(index), threading.Event()

        def search():
            while not done.is_set():
                ids(index)

        threads = [threading.Thread(target=search) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            assert [in_child(lambda: ids(index) == alone) for _ in range(10)] == [0] * 10
        finally:
            done.set()
            for thread in threads:
                thread.join()


@pytest.mark.parametrize("owner", [lambda index: index, lambda index: index.ann], ids=["index", "ann"])
def test_a_lock_that_another_thread_holds_is_free_in_the_child(folder, owner):
    with Index.open(folder) as index:
        taken, done = threading.Event(), threading.Event()

        def hold():
            with owner(index)._turn:
                taken.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()

        def work():
            with owner(index)._turn:
                return len(ids(index)) == 20

        try:
            assert in_child(work) == 0
        finally:
            done.set()
            thread.join()
        assert len(ids(index)) == 20


def test_a_fork_waits_for_transactions_of_other_threads(folder):
    """In the child SQLite would count such a transaction's lock as its own, and read without one."""
    with Index.open(folder) as index:
        taken, ended = threading.Event(), []

        def read():
            with index._catalogue.reading():
                index._catalogue.segments()
                taken.set()
                time.sleep(0.3)
                ended.append(True)

        thread = threading.Thread(target=read)
        thread.start()
        taken.wait()
        assert in_child(lambda: ended == [True] and len(ids(index)) == 20) == 0
        thread.join()


def test_a_lock_that_the_forking_thread_holds_is_let_go_by_both():
    turn = Turn()

    def work():
        turn.lock.release()
        other = threading.Thread(target=turn.lock.acquire)
        other.start()
        other.join(PATIENCE_S / 2)
        return not other.is_alive()

    with turn:
        assert in_child(work) == 0
    assert in_child(lambda: turn.lock.acquire(blocking=False)) == 0


def test_a_child_has_its_own_lock_on_the_file(folder):
    """Expected: SQLite's rule that nobody commits while somebody reads, be it a child whose parent has the file open."""
    with Index.open(folder) as index:
        ids(index)
        begun, ready = os.pipe()
        stop, go_on = os.pipe()
        if (child := os.fork()) == 0:
            signal.alarm(PATIENCE_S)
            with index._catalogue.reading():
                index._catalogue.segments()
                os.write(ready, b"1")
                os.read(stop, 1)
            os._exit(0)
        assert select.select([begun], [], [], PATIENCE_S)[0]
        with closing(sqlite3.connect(folder / CATALOGUE, timeout=0)) as other:
            other.execute("INSERT INTO about VALUES ('x', 'y', 0)")
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.commit()
        os.write(go_on, b"1")
        assert os.waitpid(child, 0)[1] == 0
        for end in (begun, ready, stop, go_on):
            os.close(end)


def test_a_child_sees_what_is_added_after_the_fork_and_its_parent_too(folder):
    with Index.open(folder) as index:
        assert len(index) == COUNT
        inherited = index._catalogue._db

        def work():
            with IndexWriter(folder) as writer:
                writer.add(["new"], VECTORS[:1])
            sound = len(index) == COUNT + 1 and index.verify() == []
            return sound and index._catalogue._db is not inherited and inherited.total_changes == 0

        assert in_child(work) == 0
        assert len(index) == COUNT + 1


def test_what_was_closed_is_closed_in_the_child_and_what_the_child_closes_is_not_closed_here(folder):
    def refused():
        try:
            ids(index)
        except UsageError as error:
            return "is closed" in str(error)
        return False

    def close_both():
        index.close()
        return refused() and inherited.total_changes == 0  # which a closed connection refuses to say

    index = Index.open(folder)
    inherited = index._catalogue._db
    assert in_child(close_both) == 0
    assert len(ids(index)) == 20
    index.close()
    assert in_child(refused) == 0


def test_a_writer_remains_its_parents(folder):
    """A child can neither write through it nor, in closing it, let go of the lock by which others are kept out."""

    def work():
        said = []
        for call in (lambda: writer.delete(["i1"]), lambda: writer.known(["i1"]), writer.compact):
            try:
                call()
            except UsageError as error:
                said.append(str(error))
        writer.close()
        try:
            IndexWriter(folder)
        except UsageError as error:
            said.append(str(error))
        words = [*["before the process forked"] * 3, "another process is writing"]
        return all(word in text for word, text in zip(words, said, strict=True))

    with IndexWriter(folder) as writer:
        taken, done = threading.Event(), threading.Event()

        def hold():
            with writer._turn:
                taken.set()
                done.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()
        try:
            assert in_child(work) == 0
        finally:
            done.set()
            thread.join()
        assert writer.delete(["i1"]) == 1

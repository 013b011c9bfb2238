"""Work beside this process: the same answers, errors and progress as in it, and nothing that outlives it.

Each case runs in a fresh interpreter with one thread, since a process with threads works by itself.
"""

import os
import subprocess
import sys
import textwrap

_BEFORE = """
import os, signal, threading, time
from tnllm_export.errors import ExportError
from tnllm_export.export.forked import Forked, can_fork
"""


def run(script):
    """Run a script with one thread; return what it prints."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _BEFORE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_answer_and_the_progress_come_from_another_process():
    assert run("""
        def work(progress):
            progress("tracing", 1, 2, "graphs")
            return os.getpid()
        assert can_fork()
        with Forked(work) as forked:
            other = forked.result(lambda *told: print(*told))
        print(other != os.getpid())
    """) == ["tracing 1 2 graphs", "True"]


def test_an_error_arrives_as_it_was_raised_with_its_traceback_as_a_note():
    lines = run("""
        def work(progress):
            raise ExportError("no graph")
        try:
            with Forked(work) as forked:
                forked.result(print)
        except ExportError as error:
            print(error, "in work" in error.__notes__[0])
    """)
    assert lines == ["no graph True"]


def test_a_killed_process_is_an_export_error():
    lines = run("""
        def work(progress):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            with Forked(work) as forked:
                forked.result(print)
        except ExportError as error:
            print(error)
    """)
    assert lines == [
        "a process of the export ended with exit code -9 and no answer; expected graphs, see whether the memory is full"
    ]


def test_work_that_nobody_waits_for_is_ended():
    lines = run("""
        def work(progress):
            time.sleep(100)
        start = time.monotonic()
        try:
            with Forked(work) as forked:
                process = forked._process.pid
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(time.monotonic() - start < 50, os.path.exists(f"/proc/{process}"))
    """)
    assert lines == ["True False"]


def test_work_whose_asker_was_killed_ends_in_silence():
    """The end of the pipe is what this waits for: the grandchild holds the other end of it."""
    lines = run("""
        read, write = os.pipe()
        asker = os.fork()
        if asker == 0:
            os.close(read)
            def work(progress):
                while True:
                    time.sleep(0.01)
                    progress("waiting", 0, 1)
            with Forked(work) as forked:
                forked.result(lambda *told: os.kill(os.getpid(), signal.SIGKILL))
        os.close(write)
        os.waitpid(asker, 0)
        print(os.read(read, 1))
    """)
    assert lines == ["b''"]


def test_a_process_with_threads_works_by_itself():
    lines = run("""
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        with Forked(lambda progress: os.getpid()) as forked:
            print(can_fork(), forked.result(print) == os.getpid())
        stop.set()
        thread.join()
    """)
    assert lines == ["False True"]

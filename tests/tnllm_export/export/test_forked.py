"""Work beside this process: the same answers, errors and progress as in it, and nothing that outlives it.

Each case runs in a fresh interpreter with one thread, since a process with threads works by itself.
"""

import os
import subprocess
import sys
import textwrap

import pytest

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


def test_answers_and_progress_come_from_another_process_as_the_job_says():
    assert run("""
        def work(receive, progress):
            for number in range(receive()):
                progress("tracing", number, 2, "graphs")
                yield number, os.getpid()
        assert can_fork()
        with Forked(work) as forked:
            for number, other in forked.answers(2, lambda *told: print(*told)):
                print(number, other != os.getpid())
    """) == ["tracing 0 2 graphs", "0 True", "tracing 1 2 graphs", "1 True"]


def test_the_work_prepares_before_its_job_is_known():
    assert run("""
        read, write = os.pipe()
        def work(receive, progress):
            os.write(write, b"prepared")
            yield receive()
        with Forked(work) as forked:
            print(os.read(read, 8).decode())
            print(*forked.answers("job", print))
    """) == ["prepared", "job"]


def test_an_error_arrives_as_it_was_raised_with_its_traceback_as_a_note():
    lines = run("""
        def work(receive, progress):
            yield receive()
            raise ExportError("no graph")
        try:
            with Forked(work) as forked:
                for answer in forked.answers("one graph", print):
                    print(answer)
        except ExportError as error:
            print(error, "in work" in error.__notes__[0])
    """)
    assert lines == ["one graph", "no graph True"]


def test_an_error_before_the_job_is_asked_for_arrives_too():
    lines = run("""
        def work(receive, progress):
            raise ExportError("no tracer")
            yield
        try:
            with Forked(work) as forked:
                forked._process.join()
                list(forked.answers("job", print))
        except ExportError as error:
            print(error)
    """)
    assert lines == ["no tracer"]


def test_a_killed_process_is_an_export_error():
    lines = run("""
        def work(receive, progress):
            os.kill(os.getpid(), signal.SIGKILL)
            yield
        try:
            with Forked(work) as forked:
                list(forked.answers("job", print))
        except ExportError as error:
            print(error)
    """)
    assert lines == [
        "a process of the export ended with exit code -9 and no answer; expected graphs, see whether the memory is full"
    ]


@pytest.mark.parametrize("doing", ["time.sleep(100)", "receive()"])
def test_work_that_nobody_waits_for_is_ended(doing):
    lines = run(f"""
        def work(receive, progress):
            {doing}
            yield
        start = time.monotonic()
        try:
            with Forked(work) as forked:
                process = forked._process.pid
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(time.monotonic() - start < 50, os.path.exists(f"/proc/{{process}}"))
    """)
    assert lines == ["True False"]


@pytest.mark.parametrize("asked", [True, False])
def test_work_whose_asker_was_killed_ends_in_silence(asked):
    """The end of the pipe is what this waits for: the grandchild holds the other end of it."""
    lines = run(f"""
        read, write = os.pipe()
        asker = os.fork()
        if asker == 0:
            os.close(read)
            def work(receive, progress):
                receive()
                while True:
                    time.sleep(0.01)
                    progress("waiting", 0, 1)
                yield
            with Forked(work) as forked:
                if {asked}:
                    list(forked.answers("job", lambda *told: os.kill(os.getpid(), signal.SIGKILL)))
                os.kill(os.getpid(), signal.SIGKILL)
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
        def work(receive, progress):
            progress("tracing", 0, 1)
            yield receive(), os.getpid()
        with Forked(work) as forked:
            print(can_fork())
            [(job, process)] = forked.answers("job", print)
            print(job, process == os.getpid())
        stop.set()
        thread.join()
    """)
    assert lines == ["False", "tracing 0 1", "job True"]

"""SIGTERM, in processes of their own that import nothing heavy."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

BEGIN = """
import os, signal, sys, time
from experiments import _stopping

def ready():
    print("ready", flush=True)

def spin(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

try:
    with _stopping.listening():
"""
END = """
except _stopping.Stopped:
    print("stopped", flush=True)
    sys.exit(_stopping.EXIT_CODE)
"""


def start(body):
    script = BEGIN + textwrap.indent(textwrap.dedent(body), " " * 8) + END
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def end_of(process, seconds=20):
    begun = time.monotonic()
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err, time.monotonic() - begun


def test_whoever_does_not_ask_is_interrupted():
    process = start("""
        try:
            ready()
            time.sleep(60)
        finally:
            print("cleaned", flush=True)
        """)
    process.terminate()
    code, out, err, seconds = end_of(process)
    assert (code, out, err) == (143, "cleaned\nstopped\n", "") and seconds < 10


def test_whoever_asks_comes_to_its_end():
    process = start("""
        step = 0
        while not _stopping.asked():
            step += 1
            if step == 1:
                ready()
            spin(0.05)
        spin(0.3)
        print("saved", flush=True)
        """)
    process.terminate()
    assert end_of(process)[:3] == (0, "saved\n", "")


def test_who_asked_and_asks_no_more_is_interrupted_after_all():
    process = start("""
        _stopping.PATIENCE = 0.3
        _stopping.asked()
        ready()
        begun = time.monotonic()
        try:
            spin(60)
        finally:
            print("late" if time.monotonic() - begun > 0.3 else "early", flush=True)
        """)
    process.terminate()
    assert end_of(process)[:3] == (143, "late\nstopped\n", "")


def test_an_exception_that_is_swallowed_comes_again():
    process = start("""
        _stopping.PATIENCE = 0.2
        try:
            ready()
            spin(60)
        except BaseException:
            pass
        print("swallowed", flush=True)
        spin(60)
        """)
    process.terminate()
    assert end_of(process)[:3] == (143, "swallowed\nstopped\n", "")


def test_a_file_that_is_being_written_is_finished():
    process = start("""
        with _stopping.held():
            ready()
            spin(0.5)
            with _stopping.held():
                pass
            print("written", flush=True)
        print("went on", flush=True)
        """)
    process.terminate()
    assert end_of(process)[:3] == (143, "written\nstopped\n", "")


# Long calls that no Python handler interrupts, as compiled programs are.
DEAF = "import hashlib; ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 300_000_000)"


def test_a_second_signal_ends_a_process_that_listens_to_nothing():
    process = start(DEAF)
    time.sleep(0.5)  # by then it is in the call
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    code, _, _, seconds = end_of(process)
    assert code == 143 and seconds < 5


def test_a_child_of_a_pool_can_be_ended_and_its_parent_hears_nothing():
    process = start("""
        child = os.fork()
        if not child:
            time.sleep(60)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        ready()
        spin(0.3)
        print(os.waitstatus_to_exitcode(status), _stopping.asked(), flush=True)
        """)
    assert end_of(process)[:3] == (0, f"{-signal.SIGTERM} False\n", "")


def test_nothing_is_left_of_it_afterwards():
    from experiments import _stopping

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with pytest.raises(_stopping.Stopped):
            with _stopping.listening():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.set_wakeup_fd(-1) == -1
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
    with _stopping.listening():
        assert not _stopping.asked()

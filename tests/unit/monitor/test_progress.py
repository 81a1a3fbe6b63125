"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io

import pytest

from lmcot.monitor.progress import Progress, be_quiet, say


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lmcot.monitor.progress.time.monotonic", clock)
    return clock


def test_a_log_file_gets_few_plain_lines_with_elapsed_and_estimate(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("distil", 16, stream=stream) as bar:
        for step in range(16):
            clock.now += 6
            bar.update(1, loss=2 / (step + 1))
    lines = stream.getvalue().splitlines()
    # One every 12 s (the first update after 10 s), the last of them at the end.
    assert len(lines) == 8
    assert lines[0] == "distil: 2/16 steps (12%), elapsed 0:12, about 1:24 left, loss 1"
    assert lines[-1] == "distil: 16/16 steps (100%), elapsed 1:36, loss 0.125"


def test_a_resumed_stage_estimates_from_its_own_pace(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("refine", 100, done=90, stream=stream) as bar:
        clock.now += 400
        bar.update(1)
    assert stream.getvalue() == "refine: 91/100 steps (91%), elapsed 6:40, about 1:00:00 left\n"


def test_an_interrupted_stage_still_says_where_it_stopped(clock: Clock) -> None:
    stream = io.StringIO()
    bar = Progress("refine", 10, stream=stream)
    bar.update(1)
    assert stream.getvalue() == ""
    bar.close()
    assert stream.getvalue().startswith("refine: 1/10 steps (10%)")


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("distil", 4, stream=stream) as bar:
        bar.update(4, loss=0.5)
        bar.write("a word")
    shown = stream.getvalue()
    assert "\r" in shown
    assert "4/4" in shown
    assert "loss=0.5" in shown
    assert "a word\n" in shown


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_quiet_process_shows_no_progress(
    stream: type[io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = stream()
    be_quiet()
    try:
        with Progress("distil", 2, stream=shown) as bar:
            bar.update(loss=1.0)
            bar.write("a line")
            bar.update()
        say("a line")
    finally:
        be_quiet(False)
    assert shown.getvalue() == ""
    assert capsys.readouterr().err == ""
    say("a line")
    assert capsys.readouterr().err == "a line\n"

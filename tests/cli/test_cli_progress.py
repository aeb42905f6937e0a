"""Progress: bars on a terminal, a line now and then elsewhere."""

import io
import re

import pytest

from mixchat.base.progress import progress_bar
from mixchat.cli.output.progress import Bars, Lines, resumable, show_progress, status


class Screen(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_lines_say_the_beginning_the_end_and_at_most_one_a_minute():
    out, clock = io.StringIO(), Clock()
    lines = Lines(out, clock)
    task = lines.task("fetching [a/b]", 1000)
    for _ in range(150):
        clock.now += 1
        task.advance(1)
    task.close()
    task.close()
    task = lines.task("quantizing", 2000)
    clock.now += 5
    task.advance(2000)
    lines.close()
    lines.close()
    assert out.getvalue().splitlines() == [
        "fetching [a/b]: 1 kB",
        "fetching [a/b]: 60 bytes of 1 kB, 1 bytes/s, 16 min left",
        "fetching [a/b]: 120 bytes of 1 kB, 1 bytes/s, 15 min left",
        "fetching [a/b]: 150 bytes in 2 min",
        "quantizing: 2 kB",
        "quantizing: 2 kB in 5 s",
    ]


def test_lines_say_what_was_done_before_and_do_not_count_it_as_speed():
    out, clock = io.StringIO(), Clock()
    lines = Lines(out, clock)
    task = lines.task("fetching", 10_000, 4_000)
    clock.now = 60
    task.advance(600)
    task.close()
    assert out.getvalue().splitlines() == [
        "fetching: 10 kB, 4 kB of it already done",
        "fetching: 4.6 kB of 10 kB, 10 bytes/s, 9 min left",
        "fetching: 600 bytes in 1 min",
    ]


def test_a_thread_that_still_moves_a_closed_bar_says_nothing():
    """The one that fetches may hear only later that the work was called off."""
    out, clock = io.StringIO(), Clock()
    lines = Lines(out, clock)
    task = lines.task("fetching", 1000)
    task.close()
    before = out.getvalue()
    clock.now = 100
    task.advance(10)
    assert out.getvalue() == before


def test_a_note_is_a_line_of_its_own_and_no_markup():
    for stream in (Screen(), io.StringIO()):
        with show_progress(stream) as progress:
            progress.note("before [red]a[/red]")
            with progress_bar(progress, "fetching", 10):
                progress.note("between " + "x" * 200)
        assert "before [red]a[/red]\n" in stream.getvalue()
        assert "between " + "x" * 200 + "\n" in stream.getvalue()


def test_a_bar_shows_its_name_as_it_is_and_how_far_it_came():
    screen = Screen()
    bars = Bars(screen)
    bars.task("fetching [red]a[/red]", 2_000_000).advance(1_000_000)
    bars.close()
    assert "fetching [red]a[/red]" in screen.getvalue()
    assert "1.0/2.0 MB" in screen.getvalue()


@pytest.mark.parametrize("closed", [True, False])
def test_the_end_closes_the_bars_once_even_after_an_error(closed):
    screen = Screen()

    def work():
        with show_progress(screen) as progress:
            for task in [progress.task(name, 10) for name in ("one", "two")]:
                if closed:
                    task.close()
                    task.close()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    hide, show = screen.getvalue().count("\x1b[?25l"), screen.getvalue().count("\x1b[?25h")
    assert hide == show == 1


def test_a_status_is_for_terminals_only_and_its_text_is_no_markup():
    screen, pipe = Screen(), io.StringIO()
    for stream in (screen, pipe):
        with status("loading [red]x", stream):
            pass
    assert pipe.getvalue() == ""
    assert "loading [red]x" in screen.getvalue()


def test_a_bar_and_whole_figures_fit_80_columns(monkeypatch):
    """Below 90 columns there was no bar."""
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    bars = Bars(screen)
    bars.task("fetching mistralai/Mixtral-8x7B-Instruct-v0.1", 93_405_585_408, 11_700_000_000)
    bars.close()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).splitlines()[-1].strip()
    assert len(last) <= 80
    assert last.count("━") + last.count("╸") + last.count("╺") >= 8
    assert "11.7/93.4 GB" in last
    assert last.startswith("fetch")
    assert last.endswith("-:--:--")


@pytest.mark.parametrize("stream", [Screen(), io.StringIO()])
def test_no_name_acts_on_the_terminal(stream):
    with show_progress(stream) as progress, progress_bar(progress, "fetching \x1b[2J\u202ea", 10):
        progress.note("from \x1b]0;x\x07\nto \x9b1m")
    with status("loading \x1b[2J\x9d", stream) as update:
        update("measuring \x1b[2J\x9d")
    said = stream.getvalue()
    assert "fetching [2Ja" in said
    assert "from ]0;x\n" in said
    assert "to 1m\n" in said
    assert not {"\x07", "\x9b", "\x9d", "\u202e"} & set(said)
    assert "\x1b[2J" not in said


@pytest.mark.parametrize(
    ("how", "said"),
    [((), "the same command resumes"), (("to resume: eat",), "to resume: eat")],
)
def test_ctrl_c_says_how_to_resume(how, said):
    """It said that it was interrupted, and not that nothing was lost."""
    out = io.StringIO()
    lines = Lines(out, Clock())
    with pytest.raises(KeyboardInterrupt), resumable(lines, *how):
        raise KeyboardInterrupt
    assert out.getvalue() == f"interrupted; {said}\n"

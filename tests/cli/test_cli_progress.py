"""Progress: bars on a terminal, a line now and then elsewhere."""

import io

from mixchat.cli.progress import Bars, Lines, show_progress, status


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
    lines.begin("fetching [a/b]", 1000)
    for _ in range(150):
        clock.now += 1
        lines.advance(1)
    lines.begin("quantizing", 2000)
    clock.now += 5
    lines.advance(2000)
    lines.end()
    lines.end()
    assert out.getvalue().splitlines() == [
        "fetching [a/b]: 1 kB",
        "fetching [a/b]: 60 bytes of 1 kB",
        "fetching [a/b]: 120 bytes of 1 kB",
        "fetching [a/b]: 150 bytes in 150 s",
        "quantizing: 2 kB",
        "quantizing: 2 kB in 5 s",
    ]


def test_a_bar_shows_its_name_as_it_is_and_how_far_it_came():
    screen = Screen()
    bars = Bars(screen)
    bars.begin("fetching [red]a[/red]", 2_000_000)
    bars.advance(1_000_000)
    bars.end()
    assert "fetching [red]a[/red]" in screen.getvalue()
    assert "1.0/2.0 MB" in screen.getvalue()


def test_the_next_bar_closes_the_last_one_and_the_end_closes_it_even_after_an_error():
    screen = Screen()
    try:
        with show_progress(screen) as progress:
            progress.begin("one", 10)
            progress.begin("two", 10)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    hide, show = screen.getvalue().count("\x1b[?25l"), screen.getvalue().count("\x1b[?25h")
    assert hide == show == 2


def test_a_status_is_for_terminals_only_and_its_text_is_no_markup():
    screen, pipe = Screen(), io.StringIO()
    for stream in (screen, pipe):
        with status("loading [red]x", stream):
            pass
    assert pipe.getvalue() == ""
    assert "loading [red]x" in screen.getvalue()

"""The bottom line's text, at every width."""

import pytest
from prompt_toolkit.utils import get_cwidth

from mixchat.chat.terminal.status_line import cut, status_line

FACTS = {"speed": 31.24, "hit_rate": 0.943, "memory": 24 * 10**9}


def line(width=80, used=1234, model="demo", **facts):
    return status_line(model, used, 8192, **(facts or FACTS), width=width)


def test_it_says_model_context_speed_hits_and_memory():
    assert line() == "demo · 1,234 of 8,192 tokens (15%) · 31.2 tok/s · 94% hits · 24.0 GB experts"


def test_the_experts_of_workers_are_left_out_first():
    shown = line(120, **FACTS, on_workers=128)
    assert shown == f"{line()} · 128 on workers"
    assert line(len(shown) - 1, **FACTS, on_workers=128) == line()


def test_what_is_not_known_is_left_out():
    assert line(speed=None, hit_rate=0.5) == "demo · 1,234 of 8,192 tokens (15%) · 50% hits"
    assert status_line("demo", 0, 8192) == "demo · 0 of 8,192 tokens (0%)"
    assert status_line("", 0, 8192, speed=2) == "0 of 8,192 tokens (0%) · 2.0 tok/s"
    assert line(speed=0.0, hit_rate=0.0, memory=0).endswith("0.0 tok/s · 0% hits · 0 bytes experts")
    assert status_line("big", 1234, None, speed=31.24) == "big · 1,234 tokens · 31.2 tok/s"
    assert status_line("big", None, 8192, speed=31.24) == "big · 31.2 tok/s"
    assert status_line("big", None, None, width=2) == ""


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (77, "demo · 1,234 of 8,192 tokens (15%) · 31.2 tok/s · 94% hits · 24.0 GB experts"),
        (75, "demo · 1,234 of 8,192 tokens (15%) · 31.2 tok/s · 94% hits"),
        (57, "demo · 1,234 of 8,192 tokens (15%) · 31.2 tok/s"),
        *((46, "demo · 1,234 of 8,192 tokens (15%)"), (33, "1,234 of 8,192 tokens (15%)")),
        *((20, "1,234/8,192 (15%)"), (10, "15%"), (2, "1…"), (0, "")),
    ],
)
def test_the_least_important_goes_first_in_less_room(width, shown):
    assert line(width) == shown


@pytest.mark.parametrize("model", ["demo", "", "模型", "a" * 100])
def test_it_is_never_wider_than_the_window(model):
    assert all(get_cwidth(line(width, model=model)) <= width for width in range(130))


@pytest.mark.parametrize(("used", "mark"), [(6553, ""), (6554, "! "), (9000, "! ")])
def test_a_context_that_is_nearly_full_is_marked(used, mark):
    for width, form in ((30, f"{used:,} of"), (20, f"{used:,}/"), (7, f"{used * 100 // 8192}%")):
        assert line(width, used=used).startswith(mark + form)


def test_a_model_of_any_name_stays_one_harmless_line():
    assert line(model="a\x1b[31m\nb\t<b>&").startswith("a[31m b <b>&")


def test_wide_characters_are_not_cut_in_half():
    assert cut("模型名", 4) == "模…"
    assert cut("模型名", 6) == "模型名"

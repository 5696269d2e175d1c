"""Progress is bars on a terminal and lines elsewhere."""

import io

from planish.compiler.progress import Bars, Lines, progress_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_say_when_a_stage_is_done() -> None:
    stream = io.StringIO()
    with progress_for(stream) as progress:
        assert isinstance(progress, Lines)
        for done in (1, 2, 3):
            progress.step("quantise", done, 3)
        progress.say("resuming")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("quantise: 3/3 (")
    assert second == "resuming"


def test_bars_on_a_terminal() -> None:
    stream = Terminal()
    with progress_for(stream) as progress:
        assert isinstance(progress, Bars)
        progress.step("quantise", 1, 3)
        progress.step("quantise", 3, 3)
        progress.say("kept [red] as it is")
    shown = stream.getvalue()
    assert "quantise" in shown
    assert "3/3" in shown
    assert "kept [red] as it is" in shown

"""Progress in a terminal: a bar for every stage, and below them how far the whole run is."""

from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from convrewrite.run_stages import RunStages, about, clock_text

BAR = 12
"""Columns of a bar: a terminal of 80 has room for what is being done beside it."""


class Bars:
    """The stages, drawn anew several times a second, so that the time left counts down between two steps."""

    def __init__(self, stages: RunStages, console: Console) -> None:
        self._stages = stages
        self._bars = _Drawn(stages, console)
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()

    def change(self) -> None:
        """Draw what was reported."""
        for name, stage in self._stages.begun.items():
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(stage.text, total=stage.total, stage=name)
            self._bars.update(self._tasks[name], completed=stage.done, total=stage.total, description=stage.text)

    def end(self) -> None:
        """Draw no more; what was drawn last stays."""
        self._bars.stop()


class _Drawn(Progress):
    """Bars, and below them a line for the whole run."""

    def __init__(self, stages: RunStages, console: Console) -> None:
        self._stages = stages
        super().__init__(
            TextColumn("{task.fields[stage]}", markup=False),
            BarColumn(bar_width=BAR),
            MofNCompleteColumn(),
            _Times(stages),
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            console=console,
            expand=True,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, and how long the whole run takes: so far, and about from now on."""
        yield self.make_tasks_table(self.tasks)
        if self._stages.begun:
            parts = [clock_text(self._stages.seconds()), about(self._stages.left() or None)]
            parts += [f"then {', '.join(self._stages.to_come)}"] if self._stages.to_come else []
            yield Text(f"all: {', '.join(filter(None, parts))}", no_wrap=True, overflow="ellipsis")


class _Times(ProgressColumn):
    """How long a stage took; for one under way how long so far, and about how long it still will."""

    def __init__(self, stages: RunStages) -> None:
        self._stages = stages
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        """As ``0:50, about 0:20 left``."""
        stage, now = self._stages.begun[task.fields["stage"]], self._stages.clock()
        return Text(", ".join(filter(None, (clock_text(stage.seconds(now)), about(stage.left(now) or None)))))

"""The TensorBoard view of a run: a folder of event files for each stage, and one for the settings.

Stages are TensorBoard's "runs", so that its pages group metrics by what they measure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lmcot.monitor.catalogue import describe

EVENT_FILES = "events.out.tfevents.*"
_TIME_KEYS = frozenset({"step", "stage", "time"})
_COMPARED = (
    ("refine", "reward/mean"),
    ("refine", "kl"),
    ("refine", "policy/entropy"),
    ("refine", "response/length"),
    ("distill", "loss"),
)
"""Stage and metric of the columns by which TensorBoard compares runs."""


class Board:
    """Writes the event files below a folder; `flush` has them on disk. One process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, EventFileWriter] = {}
        self._described: set[tuple[str, str]] = set()

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings as those of one trial, anew.

        Lists are shown as text, and what is unset is left out.
        """
        old = list(self._folder.glob(EVENT_FILES))
        shown = {key: _shown(value) for key, value in settings.items() if value is not None}
        metrics = [hparams.Metric(name, group=stage) for stage, name in _COMPARED]
        columns = [hparams.HParam(key) for key in shown]
        with_events = EventFileWriter(str(self._folder))
        for summary in (
            hparams.hparams_config_pb(hparams=columns, metrics=metrics),
            hparams.hparams_pb(shown),
        ):
            with_events.add_event(Event(wall_time=time.time(), summary=summary))
        with_events.close()
        for path in old:
            path.unlink()

    def scalars(self, line: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``; null is left out."""
        stage = line["stage"]
        values = [
            self._scalar(stage, name, value)
            for name, value in line.items()
            if name not in _TIME_KEYS and value is not None
        ]
        self._add(stage, line["step"], Summary(value=values), line["time"])

    def histogram(self, stage: str, step: int, name: str, values: Sequence[float]) -> None:
        """How some numbers are spread; those that are not finite are left out."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if len(finite):
            self._add(stage, step, histogram_pb(name, finite, description=describe(name)))

    def text(self, stage: str, step: int, name: str, markdown: str) -> None:
        """Text for people, as Markdown."""
        self._add(stage, step, text_pb(name, markdown))

    def rewrite(self, stage: str, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Writes a stage's files anew: the scalars of ``lines``, and up to ``step`` the histograms
        and texts that there were.

        TensorBoard cannot forget single events.
        """
        self._close(stage)
        old = sorted((self._folder / stage).glob(EVENT_FILES))
        if not old and not lines:
            return
        kept = [event for path in old for event in _others(path) if event.step <= step]
        self._described = {one for one in self._described if one[0] != stage}
        for line in lines:
            self.scalars(line)
        for event in kept:
            self._writer(stage).add_event(event)
        self.flush()
        for path in old:
            path.unlink()

    def flush(self) -> None:
        """Everything is on disk when it returns."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for stage in list(self._writers):
            self._close(stage)

    def _scalar(self, stage: str, name: str, value: float) -> Any:
        if (stage, name) in self._described:
            return Summary.Value(tag=name, simple_value=value)
        self._described.add((stage, name))
        plugin = SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = SummaryMetadata(plugin_data=plugin, summary_description=describe(name))
        return Summary.Value(tag=name, simple_value=value, metadata=metadata)

    def _add(self, stage: str, step: int, summary: Any, wall_time: float | None = None) -> None:
        when = time.time() if wall_time is None else wall_time
        self._writer(stage).add_event(Event(wall_time=when, step=step, summary=summary))

    def _writer(self, stage: str) -> EventFileWriter:
        if stage not in self._writers:
            self._writers[stage] = EventFileWriter(str(self._folder / stage))
        return self._writers[stage]

    def _close(self, stage: str) -> None:
        writer = self._writers.pop(stage, None)
        if writer is not None:
            writer.close()


def _shown(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _others(path: Path) -> Iterator[Any]:
    """Events of a file that hold histograms and texts; what a kill has cut off is left out."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    for data in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(data)
        plugins = {value.metadata.plugin_data.plugin_name for value in event.summary.value}
        if plugins & {"histograms", "text"}:
            yield event

"""The TensorBoard view of a run has a folder of event files for each stage, and one for settings.

Stages are TensorBoard's "runs", so that its pages group metrics by what they measure.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Experiment, HParamInfo, MetricInfo, MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.metadata import create_summary_metadata
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lmcot.files import private_folder
from lmcot.monitor.catalogue import describe

EVENT_FILES = "events.out.tfevents.*"
_TIME_KEYS = frozenset({"step", "stage", "time"})

_COMPARED = (
    ("refine", "reward/mean"),
    ("refine", "kl"),
    ("refine", "policy/entropy"),
    ("refine", "response/length"),
    ("refine", "response/contains_gold"),
)
"""Stage and metric of each column by which trials are compared."""


class Board:
    """Writes the event files below a folder; `flush` puts them on disk. Only one process writes."""

    def __init__(self, folder: Path) -> None:
        private_folder(folder)  # it also holds rationales
        self._folder = folder
        self._writers: dict[str, EventFileWriter] = {}
        self._described: set[tuple[str, str]] = set()

    def settings(self, settings: Mapping[str, Any], varied: Collection[str] = ()) -> None:
        """Replaces the settings, written as those of one trial.

        Lists are shown as text, and what is unset is left out.

        Args:
            varied: settings whose values differ in the runs beside this one. If none are given,
                TensorBoard finds them, but does not know which metrics matter.
        """
        old = list(self._folder.glob(EVENT_FILES))
        shown = {key: _shown(value) for key, value in settings.items() if value is not None}
        writer = EventFileWriter(str(self._folder))
        if varied:
            writer.add_event(Event(wall_time=time.time(), summary=_experiment(shown, varied)))
        writer.add_event(Event(wall_time=time.time(), summary=hparams_pb(shown)))
        writer.close()
        for path in old:
            path.unlink()

    def scalars(self, line: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``; null is left out, and so are alarms before their first."""
        stage = line["stage"]
        values = [
            self._scalar(stage, name, value)
            for name, value in line.items()
            if name not in _TIME_KEYS and value is not None and self._worth(stage, name, value)
        ]
        self._add(stage, line["step"], Summary(value=values), line["time"])

    def histogram(self, stage: str, step: int, name: str, values: Sequence[float]) -> None:
        """Writes a histogram of the finite numbers among some.

        How some numbers are spread; those that are not finite are left out."""
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        if len(finite):
            text = f"Distribution of {name} over the step's judged rationales."
            self._add(stage, step, histogram_pb(f"spread/{name}", finite, description=text))

    def text(self, stage: str, step: int, name: str, markdown: str) -> None:
        """Writes Markdown text for people to read."""
        self._add(stage, step, text_pb(name, markdown))

    def rewrite(self, stage: str, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Rewrites a stage's files: the scalars of ``lines``, and the existing histograms and texts
        up to ``step``.

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
        """Puts everything on disk before it returns."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the files."""
        for stage in list(self._writers):
            self._close(stage)

    def _worth(self, stage: str, name: str, value: float) -> bool:
        """Whether a value is shown: an alarm is shown only from when it was first raised."""
        return not name.startswith("alarm/") or value > 0 or (stage, name) in self._described

    def _scalar(self, stage: str, name: str, value: float) -> Any:
        # Not `simple_value`, whose description TensorBoard does not show.
        tensor = TensorProto(dtype=DT_FLOAT, float_val=[value], tensor_shape=TensorShapeProto())
        if (stage, name) in self._described:
            return Summary.Value(tag=name, tensor=tensor)
        self._described.add((stage, name))
        described = create_summary_metadata(display_name=None, description=describe(name))
        return Summary.Value(tag=name, tensor=tensor, metadata=described)

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


def _experiment(settings: Mapping[str, Any], varied: Collection[str]) -> Any:
    """What TensorBoard's table of trials shows first."""
    experiment = Experiment(
        hparam_infos=[HParamInfo(name=key, differs=key in varied) for key in settings],
        metric_infos=[
            MetricInfo(name=MetricName(group=stage, tag=name)) for stage, name in _COMPARED
        ],
    )
    # Built by hand, since the plugin's own function imports TensorFlow.
    data = metadata.create_summary_metadata(HParamsPluginData(experiment=experiment))
    tag, tensor = metadata.EXPERIMENT_TAG, metadata.NULL_TENSOR
    return Summary(value=[Summary.Value(tag=tag, metadata=data, tensor=tensor)])


def _shown(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


def _others(path: Path) -> Iterator[Any]:
    """Events of a file that hold histograms and texts, without one that a kill cut off."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    for data in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(data)
        plugins = {value.metadata.plugin_data.plugin_name for value in event.summary.value}
        if plugins & {"histograms", "text"}:
            yield event

"""The `ingest` stage: outside data or the simulator in, raw contract tables out."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from components.data.simulator.config import SimulatorConfig
from components.data.source import SIMULATOR, Source, fingerprint
from components.pipeline.params_base import Params, Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    import pyarrow as pa

    from components.pipeline.artifacts import Output

EPOCH = datetime.date(1970, 1, 1)


class IngestParams(Params):
    """Where the data comes from."""

    seed: Seed = Field(0, description="seed of the simulator")
    source: str = Field(
        SIMULATOR,
        min_length=1,
        description="'simulator', or a folder of data: a path, file:///folder, s3://bucket/prefix",
    )
    format: Literal["auto", "tables", "kuairand", "amazon", "movielens"] = Field(
        "auto", description="format of the folder; auto: recognised by the files in it"
    )
    simulator: SimulatorConfig = Field(
        default_factory=SimulatorConfig, description="the platform to simulate"
    )


@stage(
    outputs=("raw_interactions", "raw_items", "raw_users", "videos", "source"),
    params=IngestParams,
    external=fingerprint,
)
def ingest(params: IngestParams, inputs: Inputs, outputs: Outputs, run: Run) -> dict[str, float]:
    """Reads outside data, or simulates a platform, into raw contract tables."""
    if params.source == SIMULATOR:
        source = _simulate(params.simulator, run, outputs["videos"].path())
    else:
        from components.data.source import open_source

        source = open_source(params.source, params.format)
    for note in source.notes:
        run.note(note)
    newest = _NewestDay(_today())
    rows = {}
    for name in source.tables:
        look = newest.look if name == "interactions" else None
        rows[name] = _copy(source, name, outputs[f"raw_{name}"], run, look)
    for note in source.findings():
        run.note(note)
    outputs["source"].write_json({**source.describe(), "newest_day": newest.day.isoformat()})
    return {name: float(count) for name, count in rows.items()}


def _simulate(config: SimulatorConfig, run: Run, folder: str) -> Source:
    from components.data.simulator.stream import simulate

    videos = min(config.video_items, config.items) if config.render_videos else 0
    with run.progress(videos, "videos") as bar:
        return simulate(config, run.seed, folder, progress=bar.advance)


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


class _NewestDay:
    """The newest day of interactions that pass by, which validation takes for today.

    Validation sets aside what lies after tomorrow. It must not ask the clock: its key holds no day,
    so that equal inputs would give other artifacts on another day. A fact of the source can be
    asked, and it is the newest day of the data rather than the day of reading, so that the same
    data read again on any later day gives the same source and nothing runs again. The verdict is
    the same: no row of the past lies after the newest day. The clock only tells the rows that lie
    in the future when they are read, which have no say.

    Args:
        today: the day of reading.
    """

    def __init__(self, today: datetime.date) -> None:
        self._today = (today - EPOCH).days
        self._newest = 0

    def look(self, interactions: pa.RecordBatch) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        for column, in_a_day in (("timestamp", 86_400_000), ("date", 1)):
            values = interactions[column]
            numbers = values.cast(pa.int64() if in_a_day > 1 else pa.int32())
            after_tomorrow = (self._today + 2) * in_a_day
            newest = pc.max(numbers.filter(pc.less(numbers, after_tomorrow))).as_py()
            if newest is not None:
                self._newest = max(self._newest, newest // in_a_day)

    @property
    def day(self) -> datetime.date:
        return EPOCH + datetime.timedelta(days=min(self._newest, self._today))


def _copy(
    source: Source,
    name: str,
    output: Output,
    run: Run,
    look: Callable[[pa.RecordBatch], None] | None,
) -> int:
    """Write one table as it streams by, showing each batch to ``look``; its rows."""
    from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, first_batch, rebatch

    most = INTERACTION_ROWS if name == "interactions" else TEXT_ROWS
    first, batches = first_batch(rebatch(source.tables[name](), most), name, source.uri)
    rows = 0
    with (
        output.writer(first.schema) as writer,
        run.progress(source.rows.get(name, 0), name) as bar,
    ):
        for batch in batches:
            if look is not None:
                look(batch)
            writer.write_batch(batch)
            rows += batch.num_rows
            bar.advance(batch.num_rows)
    return rows

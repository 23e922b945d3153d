"""The `ingest` stage: outside data or the simulator in, raw contract tables out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from components.data.simulator.config import SimulatorConfig
from components.data.source import SIMULATOR, Source, fingerprint
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    from components.pipeline.artifacts import Output


class IngestParams(BaseModel):
    """Where the data comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="seed of the simulator")
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
    rows = {name: _copy(source, name, outputs[f"raw_{name}"], run) for name in source.tables}
    outputs["source"].write_json(source.describe())
    return {name: float(count) for name, count in rows.items()}


def _simulate(config: SimulatorConfig, run: Run, folder: str) -> Source:
    from components.data.simulator.stream import simulate

    videos = min(config.video_items, config.items) if config.render_videos else 0
    with run.progress(videos, "videos") as bar:
        return simulate(config, run.seed, folder, progress=bar.advance)


def _copy(source: Source, name: str, output: Output, run: Run) -> int:
    """Write one table as it streams by; its rows."""
    from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, first_batch, rebatch

    most = INTERACTION_ROWS if name == "interactions" else TEXT_ROWS
    first, batches = first_batch(rebatch(source.tables[name](), most), name, source.uri)
    rows = 0
    with (
        output.writer(first.schema) as writer,
        run.progress(source.rows.get(name, 0), name) as bar,
    ):
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
            bar.advance(batch.num_rows)
    return rows

"""Size and laws of the simulated platform. Imports nothing heavy, so that planning stays cheap."""

from __future__ import annotations

import datetime
from typing import Self

from pydantic import Field, model_validator

from components.pipeline.params_base import DATE, Params

#: A day is cut into cells of two hours and a user opens at most one session in each: a session
#: never overlaps the next one nor midnight, whatever is watched in it.
CELLS_PER_DAY = 12
MAX_SESSION_LENGTH = 24
MEAN_SESSION_LENGTH = 8.0


class SimulatorConfig(Params):
    """What `simulate` makes; the defaults are the embedded run."""

    users: int = Field(default=800, ge=1, le=50_000_000, description="users of the platform")
    items: int = Field(default=2_000, ge=64, le=10_000_000, description="videos in the catalogue")
    interactions: int = Field(
        default=40_000, ge=1, le=1_000_000_000, description="expected number of impressions"
    )
    days: int = Field(default=30, ge=7, le=366, description="length of the log")
    start_date: datetime.date = Field(
        default=datetime.date(2025, 1, 1),
        ge=datetime.date(1995, 1, 1),
        lt=datetime.date(2100, 1, 1),
        # The same for forms and servers, which know no bounds of dates.
        json_schema_extra={"pattern": f"(?=^(?:199[5-9]|20)){DATE}"},
        description="first day of the log (UTC)",
    )
    themes: int = Field(
        default=6, ge=1, le=8, description="first level of the topic tree: backgrounds"
    )
    topics_per_theme: int = Field(
        default=6, ge=1, le=8, description="second level: shapes on a background"
    )
    motifs_per_topic: int = Field(
        default=8,
        ge=1,
        le=64,
        description="third level, at most: a colour, a direction and a speed of the shape; fewer "
        "where the catalogue has less than four items a motif",
    )
    popularity_exponent: float = Field(
        default=0.9, ge=0.0, le=1.5, description="exponent of the Zipf law of item popularity"
    )
    drift_share: float = Field(
        default=0.5, ge=0.0, le=1.0, description="share of the variance of taste that drifts"
    )
    drift_days: float = Field(
        default=10.0, gt=0.0, description="relaxation time of the drift in days"
    )
    position_bias: float = Field(
        default=0.3, ge=0.0, le=3.0, description="loss of click logit per unit of log(1 + slot)"
    )
    dirty_rate: float = Field(
        default=0.001,
        ge=0.0,
        le=0.5,
        description="share of interactions made faulty on purpose, to show the quarantine at work",
    )
    render_videos: bool = Field(default=True, description="render and encode the videos")
    video_items: int = Field(
        default=200, ge=0, description="how many items, the first by id, get a video"
    )
    video_size: int = Field(default=64, ge=32, le=512, multiple_of=16, description="pixels a side")
    fps: int = Field(
        default=12, ge=4, le=60, multiple_of=2, description="frames per second of a video"
    )
    min_duration_s: float = Field(
        default=2.0, ge=1.0, le=60.0, description="shortest video in seconds"
    )
    max_duration_s: float = Field(
        default=8.0, ge=1.0, le=60.0, description="longest video in seconds"
    )

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.min_duration_s > self.max_duration_s:
            raise ValueError(
                f"min_duration_s={self.min_duration_s} exceeds max_duration_s={self.max_duration_s}"
            )
        most = int(0.5 * self.users * self.days * CELLS_PER_DAY * MEAN_SESSION_LENGTH)
        if self.interactions > most:
            raise ValueError(
                f"{self.interactions} interactions are more than {self.users} users make in "
                f"{self.days} days; raise users or days, or ask for at most {most}"
            )
        return self

    @property
    def num_topics(self) -> int:
        return self.themes * self.topics_per_theme

    @property
    def motifs_in_topic(self) -> int:
        return max(1, min(self.motifs_per_topic, self.items // (4 * self.num_topics)))

    @property
    def valid_from(self) -> datetime.date:
        """First day of validation: the 5 % of the days before the test days."""
        return self.test_from - datetime.timedelta(days=max(1, round(0.05 * self.days)))

    @property
    def test_from(self) -> datetime.date:
        """First day of test: the last 10 % of the days."""
        return self.start_date + datetime.timedelta(days=self.days - max(1, round(0.1 * self.days)))

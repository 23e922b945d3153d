"""KuaiRand: impressions of Kuaishou with feedback, as published (csv) or re-encoded (parquet).

* The published folder of KuaiRand-Pure, -1K or -27K: the csv files themselves or their ``data``
  folder. The log of randomly exposed videos is left out: it is another exposure policy, and the
  contract has no column that would keep the two apart.
* A parquet re-encoding: ``interactions``, ``user_histories``, ``videos`` and ``users``. A history
  lists the last videos a user was shown before 2022-04-25 in order, without times. Its k-th of n
  events gets the time of the last one minus (n - 1 - k) seconds: an order, not a clock, and so
  it has no day. Histories and log must not overlap: an event would count twice, and be learnt
  from before it is predicted. ``like`` and ``long_view`` are membership of the video in the
  lists of liked and long-watched videos, so a video shown twice has both events marked;
  ``long_view`` there is a label derived by the list's author. Other signals are unknown (null).

Monthly video statistics are never read: they average over the evaluation days. Exact duplicates of
the log pass through, for validation to quarantine.

Source of fields: Gao et al., doi 10.1145/3511808.3557624, and the README of the data set.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from components.data.contracts import CONTRACTS, INTERACTIONS, ITEMS, USERS
from components.data.readers.conform import (
    CORRECT,
    Column,
    Missing,
    absent,
    conformed,
    epoch_ms,
    milliseconds,
    plan_column,
    raw_schema,
    schema_of,
    to_int64,
)
from components.data.readers.derive import derived_table
from components.data.readers.files import INTERACTION_ROWS, TEXT_ROWS, SourceFolder, rebatch
from components.data.readers.kuairand_histories import COLUMNS as HISTORY_COLUMNS
from components.data.readers.kuairand_histories import history_events
from components.data.readers.parquet import parquet_batches, parquet_footer
from components.data.readers.text import csv_batches, csv_header, estimated_rows
from components.data.source import Source, Stream
from components.pipeline.errors import DataContractError

NAME = "kuairand"
NEEDS = (
    "log_standard_*.csv with user_features_*.csv and video_features_basic_*.csv, here or in data/ "
    "(KuaiRand-Pure, -1K, -27K); or interactions.parquet, user_histories.parquet, videos.parquet "
    "and users.parquet"
)
CITATION = (
    "Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed "
    "Videos, CIKM 2022, doi 10.1145/3511808.3557624"
)
LICENCE = "CC BY-SA 4.0"
SPLIT = {"protocol": "temporal", "valid_from": "2022-04-30", "test_from": "2022-05-01"}

UNKNOWN = -124
#: First day of the log beside histories.
FIRST_DAY = datetime.date(2022, 4, 25)
LATER = f"write a day from {FIRST_DAY} on: earlier events are those of user_histories.parquet"

CSV = re.compile(
    r"(?:data/)?(?P<kind>log_standard|log_random|user_features|video_features_basic)"
    r"(?:_(?P<period>\d+_\d+_to_\d+_\d+))?_(?P<version>pure|1k|27k)(?:_part(?P<part>\d+))?\.csv"
)
#: What begins so is a published file, whatever became of the rest of its name.
LOOK_ALIKE = re.compile(r"(?:data/)?(?:log_|user_features|video_features_basic).*")
PERIODS = ("4_08_to_4_21", "4_22_to_5_08")
#: Of each period of KuaiRand-27K.
PARTS = ("1", "2")

#: Column of the contract → column of the log.
LOG = {
    "user_id": "user_id",
    "item_id": "video_id",
    "timestamp": "time_ms",
    "date": "date",
    "watch_time_s": "play_time_ms",
    "duration_s": "duration_ms",
    "click": "is_click",
    "long_view": "long_view",
    "like": "is_like",
    "follow": "is_follow",
    "forward": "is_forward",
    "comment": "is_comment",
    "profile_enter": "is_profile_enter",
    "dislike": "is_hate",
}
RANGES = tuple(
    f"{name}_range"
    for name in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
)
CODES = tuple(f"onehot_feat{i}" for i in range(18))
#: Raw counts are left out: their ranges are the categories.
USER_FEATURES = {
    "user_active_degree": pa.string(),
    **dict.fromkeys(("is_lowactive_period", "is_live_streamer", "is_video_author"), pa.int64()),
    **dict.fromkeys(RANGES + CODES, pa.string()),
}


def recognise(folder: SourceFolder) -> bool:
    return is_reencoded(folder) or any(kind == "log_standard" for kind, _ in _csv_files(folder))


def is_reencoded(folder: SourceFolder) -> bool:
    """Whether it has tables of the re-encoding by name, even if one of them is missing."""
    own = folder.has("user_histories.parquet") or folder.has("videos.parquet")
    return own and folder.has("interactions.parquet") and not folder.has("items.parquet")


def read(folder: SourceFolder) -> Source:
    """Open the folder; see ``open_source`` for what is raised."""
    strays = _Strays(folder)
    missing = {name: Missing(name) for name in CONTRACTS}
    if is_reencoded(folder):
        tables, rows, notes = _open_parquet(folder, missing)
    else:
        tables, rows, notes = _open_csv(folder, strays, missing)
    tables = {name: _watched(missing[name], stream) for name, stream in tables.items()}
    return Source(
        format=NAME,
        uri=folder.uri,
        citation=CITATION,
        licence=LICENCE,
        split=SPLIT,
        tables=tables,
        rows=rows,
        notes=tuple(notes),
        findings=lambda: (*strays.notes(), *(n for m in missing.values() for n in m.notes())),
    )


def _watched(missing: Missing, stream: Stream) -> Stream:
    return lambda: missing.watch(stream)


class _Strays:
    """Rows of published logs whose day is not among those that the file's name says."""

    def __init__(self, folder: SourceFolder) -> None:
        self._folder = folder
        self._found: dict[str, tuple[int, int]] = {}

    def watch(self, name: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """``batches`` of the log file ``name``, looked at as they pass."""
        self._found.pop(name, None)
        days = re.search(r"_(\d+)_(\d+)_to_(\d+)_(\d+)_", name)
        row = 0
        for batch in batches:
            if days:
                month_day = pc.add(
                    pc.multiply(pc.month(batch["date"]), 100), pc.day(batch["date"])
                ).to_numpy(zero_copy_only=False)
                first, last = (int(days[i]) * 100 + int(days[i + 1]) for i in (1, 3))
                # NaN, the day of a row without one, compares false.
                outside = np.flatnonzero((month_day < first) | (month_day > last))
                if len(outside):
                    count, at = self._found.get(name, (0, row + int(outside[0])))
                    self._found[name] = (count + len(outside), at)
            row += batch.num_rows
            yield batch

    def notes(self) -> tuple[str, ...]:
        return tuple(
            f"interactions: {count:,} rows have a day that is not among those of the file's name, "
            f"the first is row {row} of {self._folder.where(name)}: are files exchanged?"
            for name, (count, row) in self._found.items()
        )


Opened = tuple[dict[str, Stream], dict[str, int], list[str]]


def _csv_files(folder: SourceFolder) -> dict[tuple[str, str], list[str]]:
    """Names of csv files by (kind, version), sorted: earlier days and parts come first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in folder.sizes:
        if match := CSV.fullmatch(name):
            found.setdefault((match["kind"], match["version"]), []).append(name)
    return found


def _require_all_read(folder: SourceFolder) -> None:
    """Refuse what is a published file by the start of its name, and would not be read."""
    for name in folder.names:
        if not LOOK_ALIKE.fullmatch(name) or CSV.fullmatch(name):
            continue
        plain = re.sub(r"\.(gz|zip|zst|bz2|xz)$", "", name)
        if plain != name and folder.has(plain):
            continue
        packed = "unpack it" if plain != name else "give it the name that it was published under"
        raise DataContractError(
            "this looks like a file of KuaiRand, and would not be read",
            where=folder.where(name),
            remedy=f"{packed} (such as log_standard_4_08_to_4_21_pure.csv), or move it away",
        )


def _absent_logs(logs: list[str]) -> Iterator[str]:
    """Published logs that are not there, one line each."""
    found = [match for name in logs if (match := CSV.fullmatch(name))]
    if not all(match["period"] for match in found):
        return
    for period in PERIODS:
        parts = {match["part"] for match in found if match["period"] == period}
        for part in PARTS if parts - {None} else (None,):
            if part not in parts:
                ending = f"_part{part}" if part else ""
                yield (
                    f"interactions: there is no log_standard_{period}_{found[0]['version']}"
                    f"{ending}.csv: a part of the published log is missing"
                )


def _open_csv(folder: SourceFolder, strays: _Strays, missing: dict[str, Missing]) -> Opened:
    _require_all_read(folder)
    files = _csv_files(folder)
    versions = sorted({version for _, version in files})
    if len(versions) > 1:
        raise DataContractError(
            f"files of several versions are here: {', '.join(versions)}; their ids differ",
            where=folder.uri,
            remedy="give the folder of one version",
        )
    by_kind = {kind: names for (kind, _), names in files.items()}
    logs = by_kind.get("log_standard", [])
    if not logs:
        raise DataContractError(
            f"there is no log here: {folder.listing()}", where=folder.uri, remedy=f"needed: {NEEDS}"
        )
    notes = list(_absent_logs(logs))
    if "log_random" in by_kind:
        notes.append("interactions: the log of random exposure is left out")
    for name in logs:
        csv_header(folder, name, tuple(LOG.values()))
    types = {source: pa.int64() for source in LOG.values()}

    def interactions() -> Iterator[pa.RecordBatch]:
        parts = (
            strays.watch(
                name, _csv_table(folder, name, types, _log_columns(), missing["interactions"])
            )
            for name in logs
        )
        return rebatch((batch for part in parts for batch in part), INTERACTION_ROWS)

    tables: dict[str, Stream] = {"interactions": interactions}
    rows = {"interactions": sum(estimated_rows(folder, name) for name in logs)}
    for table, kind, key in (
        ("items", "video_features_basic", "video_id"),
        ("users", "user_features", "user_id"),
    ):
        names = by_kind.get(kind, [])
        if not names:
            tables[table] = _derived(table, _watched(missing["interactions"], interactions))
            notes.append(f"{table}: no {kind}_*.csv, ids are taken from the interactions")
            continue
        headers = [csv_header(folder, name, (key,)) for name in names]
        tables[table] = _csv_features(folder, table, names, headers[0], missing[table])
        rows[table] = sum(estimated_rows(folder, name) for name in names)
    return tables, rows, notes


def _csv_features(
    folder: SourceFolder, table: str, names: list[str], header: list[str], missing: Missing
) -> Stream:
    # Integers with missing values are published as 1.0 and empty: read as float, then narrowed.
    text = {"user_active_degree", "tag", *RANGES}
    exact = {"user_id", "video_id"}
    wanted = [c for c in header if c in USER_FEATURES or c in ("user_id", *VIDEO)]
    types = {
        c: pa.string() if c in text else pa.int64() if c in exact else pa.float64() for c in wanted
    }
    kinds = pa.schema(types)
    columns = _item_columns(kinds) if table == "items" else _user_columns(kinds)

    def stream() -> Iterator[pa.RecordBatch]:
        parts = (_csv_table(folder, name, types, columns, missing) for name in names)
        return rebatch((batch for part in parts for batch in part), TEXT_ROWS)

    return stream


def _csv_table(
    folder: SourceFolder,
    name: str,
    types: dict[str, pa.DataType],
    columns: list[Column],
    missing: Missing,
) -> Iterator[pa.RecordBatch]:
    batches = csv_batches(folder, name, types, missing)
    where = folder.where(name)
    return conformed(batches, columns, schema_of(columns), where=where, missing=missing)


def _derived(table: str, interactions: Stream) -> Stream:
    contract = ITEMS if table == "items" else USERS

    def ids() -> Iterator[pa.Array]:
        for batch in interactions():
            yield batch.column(contract.key[0])

    return derived_table(contract, ids)


def _open_parquet(folder: SourceFolder, missing: dict[str, Missing]) -> Opened:
    needed: dict[str, tuple[str, ...]] = {
        "interactions": tuple(LOG.values()),
        "user_histories": HISTORY_COLUMNS,
        "videos": tuple(VIDEO),
        "users": ("user_id",),
    }
    footers = {}
    for name, columns in needed.items():
        if not folder.has(f"{name}.parquet"):
            raise DataContractError(
                f"{name}.parquet is missing", where=folder.uri, remedy=f"needed: {NEEDS}"
            )
        footers[name] = parquet_footer(folder, f"{name}.parquet", columns)
    log = [
        Column("date", "date", pa.date32(), _day_of_log, LATER) if column.name == "date" else column
        for column in _log_columns(footers["interactions"].schema)
    ]
    tables: dict[str, Stream] = {
        "interactions": lambda: rebatch(
            _chained(
                history_events(folder),
                _parquet_table(folder, "interactions", log, missing["interactions"]),
            ),
            INTERACTION_ROWS,
        ),
        "items": _parquet_features(
            folder, "videos", _item_columns(footers["videos"].schema), missing["items"]
        ),
        "users": _parquet_features(
            folder, "users", _user_columns(footers["users"].schema), missing["users"]
        ),
    }
    rows = {
        "interactions": footers["interactions"].rows
        + footers["user_histories"].values["watch_seq"],
        "items": footers["videos"].rows,
        "users": footers["users"].rows,
    }
    notes = [
        "interactions: events before 2022-04-25 come from histories, whose times keep the order "
        "only and whose long_view is derived"
    ]
    return tables, rows, notes


def _chained(*parts: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for part in parts:
        yield from part


def _parquet_features(
    folder: SourceFolder, table: str, columns: list[Column], missing: Missing
) -> Stream:
    return lambda: rebatch(_parquet_table(folder, table, columns, missing), TEXT_ROWS)


def _parquet_table(
    folder: SourceFolder, table: str, columns: list[Column], missing: Missing
) -> Iterator[pa.RecordBatch]:
    name = f"{table}.parquet"
    sources = [column.source for column in columns if column.source is not None]
    batches = parquet_batches(folder, name, sources)
    where = folder.where(name)
    return conformed(batches, columns, schema_of(columns), where=where, missing=missing)


def _log_columns(schema: pa.Schema | None = None) -> list[Column]:
    """Columns of the contract from a log; csv files have int64 throughout."""
    special = {
        "timestamp": epoch_ms,
        "date": _yyyymmdd,
        "watch_time_s": milliseconds,
        "duration_s": milliseconds,
    }
    columns = []
    for field in raw_schema(INTERACTIONS):
        source = LOG.get(field.name)
        if source is None:
            columns.append(absent(field.name, field.type))
            continue
        kind = schema.field(source).type if schema is not None else pa.int64()
        if field.name not in special:
            columns.append(plan_column(field.name, source, kind, field.type))
        else:
            cast = special[field.name]
            columns.append(Column(field.name, source, field.type, cast, CORRECT))
    return columns


#: Columns read of the video features.
VIDEO = ("video_id", "author_id", "video_duration", "tag")


def _item_columns(schema: pa.Schema) -> list[Column]:
    columns = []
    for field in raw_schema(ITEMS):
        if field.name in ("item_id", "author_id"):
            source = "video_id" if field.name == "item_id" else "author_id"
        else:
            source = {"duration_s": "video_duration", "tags": "tag"}.get(field.name, "")
        if source not in schema.names:
            columns.append(absent(field.name, field.type))
        elif field.name == "duration_s":
            columns.append(Column("duration_s", source, field.type, milliseconds, CORRECT))
        elif field.name == "tags":
            columns.append(Column("tags", source, field.type, _comma_separated, CORRECT))
        else:
            kind = schema.field(source).type
            columns.append(plan_column(field.name, source, kind, field.type))
    return columns


def _user_columns(schema: pa.Schema) -> list[Column]:
    columns = [plan_column("user_id", "user_id", schema.field("user_id").type, pa.int64())]
    for name, kind in USER_FEATURES.items():
        if name in schema.names:
            cast = _code if pt.is_integer(kind) else _category
            columns.append(Column(name, name, kind, cast, CORRECT))
    return columns


def _yyyymmdd(values: pa.Array) -> pa.Array:
    """Days from integers such as 20220501."""
    missing = values.is_null().to_numpy(zero_copy_only=False)
    number = to_int64(values).fill_null(19700101).to_numpy()
    year, month, day = number // 10_000, number // 100 % 100, number % 100
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    real = (month >= 1) & (month <= 12) & (day >= 1) & (days.astype("datetime64[M]") == months)
    if not real.all():
        raise pa.ArrowInvalid("not a day")
    return pa.array(days.astype(np.int32), pa.int32(), mask=missing).view(pa.date32())


def _day_of_log(values: pa.Array) -> pa.Array:
    """Days from integers such as 20220501, none before histories end."""
    days = _yyyymmdd(values)
    if pc.any(pc.less(days, pa.scalar(FIRST_DAY, pa.date32())), min_count=0).as_py():
        raise pa.ArrowInvalid("a day of the histories")
    return days


def _code(values: pa.Array) -> pa.Array:
    """Integers, with the sentinel of unknown as null."""
    whole = to_int64(values)
    return pc.if_else(pc.equal(whole, UNKNOWN), pa.scalar(None, pa.int64()), whole)


def _category(values: pa.Array) -> pa.Array:
    """Text of a category; a code is a name and not a quantity."""
    if pt.is_integer(values.type) or pt.is_floating(values.type):
        values = _code(values)
    return pc.cast(values, pa.string())


def _comma_separated(values: pa.Array) -> pa.Array:
    parts = pc.split_pattern(pc.cast(values, pa.string()), ",")
    trimmed = pc.utf8_trim_whitespace(parts.values)
    return pa.ListArray.from_arrays(parts.offsets, trimmed, mask=parts.is_null())

"""Settings of the user service: `TIDINGS_USERS_*`."""

from __future__ import annotations

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from servicekit.settings import ServerSettings


class UserServiceSettings(ServerSettings):
    """Read once at start; times in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix="TIDINGS_USERS_")

    database_url: SecretStr = Field(description="libpq URL of the users database")
    listen: str = Field("127.0.0.1:50051", description="address to serve gRPC on; port 0 takes a free one")

    batch_limit: int = Field(100, ge=1, le=1000, description="changes in one group commit at most")
    linger: float = Field(
        0.006, ge=0, le=0.1, description="longest wait of a group commit for changes it expects, seconds"
    )
    queue_limit: int = Field(10_000, ge=100, description="changes waiting for a group commit at most; more are refused")
    max_imports: int = Field(16, ge=1, description="open imports at most; more are refused for the time being")
    queue_limit_per_caller: int = Field(
        5_000, ge=1, description="changes of one caller waiting at most, where callers are known"
    )
    unknown_outcome_wait: float = Field(
        15.0, gt=0, description="how long the outcome of a commit is asked for after a lost connection, seconds"
    )

    window_bytes: int = Field(64 << 20, ge=1 << 20, description="newest events kept in memory, bytes")
    page_cache_bytes: int = Field(32 << 20, ge=0, description="messages of older events kept for other streams, bytes")
    catch_up_readers: int = Field(8, ge=1, le=64, description="connections that read older events at most")
    query_connections: int = Field(8, ge=1, le=64, description="connections for reads of users at most")
    poll_interval: float = Field(1.0, gt=0, le=60, description="longest time between reads of the feed's head, seconds")
    max_streams: int = Field(2000, ge=1, description="open streams at most; more are refused for the time being")
    max_streams_per_caller: int = Field(
        200, ge=1, description="open streams of one caller at most, where callers are known"
    )
    max_stream_age: float = Field(
        1800.0, ge=1, description="a stream is asked to reconnect after this, jittered, seconds"
    )

    answers_kept: float = Field(86_400.0, ge=3600, description="how long an answer to a request_id is kept, seconds")
    deleted_kept: float = Field(30 * 86_400.0, ge=60, description="how long a soft-deleted user is kept, seconds")

    events_kept: float = Field(
        30 * 86_400.0,
        gt=0,
        le=100 * 365 * 86_400.0,
        description="how long events are kept, seconds; none is kept for ever: 100 years is the most",
    )
    events_kept_bytes: int | None = Field(
        None,
        ge=1,
        description="sealed events kept at most, bytes; a full log breaks subscribers' tokens early [no limit]",
    )
    retention_interval: float = Field(60.0, gt=0, le=3600, description="time between removals of old events, seconds")
    segment_events: int = Field(1000, ge=1, le=10_000, description="events in a sealed segment")
    segment_span: float = Field(
        86_400.0,
        gt=0,
        le=30 * 86_400.0,
        description="time that a segment covers at most, seconds; or events_kept if less",
    )
    unsealed_events: int = Field(
        10_000, ge=0, description="the newest events are not sealed before they are segment_span old"
    )
    seal_interval: float = Field(5.0, gt=0, le=3600, description="time between looks for events to seal, seconds")

    drain_time: float = Field(5.0, ge=0, le=300, description="what streams get to end at a shutdown, seconds")
    reconnect_spread: float = Field(
        3.0, ge=0, le=300, description="drained clients reconnect spread over this, seconds"
    )
    grace: float = Field(10.0, ge=0, le=300, description="what running calls get at a shutdown, seconds")

"""The channels of this process: what the settings and the operator's files make of writers, routes and policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from notification_service import policies, providers
from notification_service.breaker import Breaker, Patience
from notification_service.channels import Writer
from notification_service.channels.email import EmailChannel, EmailWriter
from notification_service.channels.webhook import WebhookChannel, WebhookWriter
from notification_service.destinations import Destination
from notification_service.dispatcher import Lane
from notification_service.domain import EMAIL, WEBHOOK
from notification_service.limits import Bucket
from notification_service.providers import Provider
from notification_service.registry import Endpoints
from notification_service.retries import Policy
from notification_service.routes import Providers, Route, Target, Targets
from notification_service.settings import NotificationServiceSettings


@dataclass(frozen=True, slots=True)
class Sending:
    """What the operator's files say of sending."""

    policies: Mapping[str, Policy]
    providers: Sequence[Provider]


def writers(sender: str, endpoints: Iterable[Destination]) -> dict[str, Writer]:
    """What makes deliveries, by the names of the channels. `sender` is a mailbox."""
    return {EMAIL: EmailWriter(sender), WEBHOOK: WebhookWriter(endpoints)}


def read(settings: NotificationServiceSettings) -> Sending:
    """Reads the files. Raises InvalidConfigError."""
    policy = Policy(
        settings.tries,
        settings.retry_base,
        settings.retry_factor,
        settings.retry_cap,
        settings.send_timeout,
        settings.max_age,
    )
    smtp = Provider(
        name="smtp",
        host=settings.smtp_host,
        port=settings.smtp_port,
        tls=settings.smtp_tls,
        username=settings.smtp_username,
        password=settings.smtp_password if settings.smtp_username else None,
    )
    return Sending(
        policies.load(settings.policies_file, policy, settings.lease), providers.load(settings.providers_file, smtp)
    )


def webhook(settings: NotificationServiceSettings, sending: Sending, endpoints: Endpoints) -> WebhookChannel:
    """The channel of all webhooks; inside the event loop that runs it."""
    return WebhookChannel(
        endpoints,
        connections=settings.webhook_slots,
        timeout=sending.policies[WEBHOOK].timeout,
        networks=settings.webhook_networks_allowed,
    )


def make(
    settings: NotificationServiceSettings, sending: Sending, endpoints: Endpoints, calls: WebhookChannel
) -> dict[str, Lane]:
    """The lanes by the names of their channels; inside the event loop that runs them."""
    patience = Patience(settings.breaker_failures, settings.breaker_pause, settings.breaker_cap)
    email, webhooks = sending.policies[EMAIL], sending.policies[WEBHOOK]
    routes = [_route(settings, one, email, patience) for one in sending.providers]

    def enabled() -> dict[str, Target]:
        return {one.target: Target(one.name, one.rate_limit) for one in endpoints}

    targets = Targets(calls, enabled, endpoints.paused_targets, settings.webhook_slots, patience)
    return {
        EMAIL: Lane(Providers(routes), email, settings.email_slots),
        WEBHOOK: Lane(targets, webhooks, settings.webhook_slots),
    }


def _route(settings: NotificationServiceSettings, provider: Provider, policy: Policy, patience: Patience) -> Route:
    channel = EmailChannel(
        provider.host,
        provider.port,
        sender=settings.mail_from,
        tls=provider.tls,
        username=provider.username,
        password=provider.secret,
        timeout=policy.timeout,
    )
    bucket = Bucket(provider.rate) if provider.rate else None
    return Route(provider.name, channel, Breaker(patience), settings.email_slots, bucket)

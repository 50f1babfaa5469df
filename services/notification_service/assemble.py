"""From plans to notifications: their words, all rendered at once, and their deliveries.

Pure, and the same for what events, sends and digests make. What cannot be rendered stops no notification: its delivery
is made without content and says why, and an in-app notification leaves that channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from notification_service.channels import Draft, Says, Writer
from notification_service.domain import EMAIL, IN_APP, Notification
from notification_service.plans import Plan, Say
from notification_service.templates import Asked, Loaded, Rendered, RenderError
from servicekit import logs

log = logs.get(__name__)


def assemble(plans: Sequence[Plan], templates: Loaded, writers: Mapping[str, Writer]) -> list[Notification]:
    """The notifications of plans, each as if it were the only one. One that is in-app alone and cannot be rendered is
    left without a channel. Takes its time.
    """
    said = _render(
        templates,
        {
            (number, which): plan.asked(which, _link(plan, which))
            for number, plan in enumerate(plans)
            for which in plan.told()
        },
    )
    # A link that speaks for its reader is for mails alone.
    shown = _render(
        templates,
        {
            (number, "current"): plan.asked("current", "")
            for number, plan in enumerate(plans)
            if plan.is_shown and _has(said.get((number, "current")), _link(plan, "current"))
        },
    )
    shown = {**said, **shown}
    return [
        _assembled(plan, templates, writers, partial(_say, plan, number, said), partial(_say, plan, number, shown))
        for number, plan in enumerate(plans)
    ]


_Said = Mapping[tuple[int, str], Rendered | RenderError]


def _render(templates: Loaded, asked: Mapping[tuple[int, str], Asked]) -> _Said:
    return dict(zip(asked, templates.render_all(list(asked.values())), strict=True))


def _say(plan: Plan, number: int, said: _Said, which: str) -> Rendered:
    rendered = RenderError(plan.problem) if plan.problem else said[number, which]
    if isinstance(rendered, RenderError):
        raise rendered
    return rendered


def _link(plan: Plan, which: str) -> str:
    return plan.addressees[which].unsubscribe_url


def _has(said: Rendered | RenderError | None, url: str) -> bool:
    return bool(url) and isinstance(said, Rendered) and url in said.text


def _assembled(plan: Plan, templates: Loaded, writers: Mapping[str, Writer], say: Say, show: Say) -> Notification:
    planned = plan.notification
    channels, subject, body = planned.channels, "", ""
    version = locale = ""
    if plan.says:
        version = templates.version
        locale = templates.locale(planned.template, plan.language, plan.says is Says.HTML)
    if plan.is_shown:
        try:
            shown = show("current")
            subject, body = shown.subject, shown.text
        except RenderError as error:
            log.error("in-app notification dropped", **_origin(planned), reason=str(error))
            channels = tuple(channel for channel in channels if channel != IN_APP)
    draft = Draft(
        planned.id,
        planned.category,
        plan.kind,
        [plan.addressees[which] for which in plan.recipients],
        say,
        plan.payload,
    )
    carried = [name for name in channels if name != IN_APP and not (plan.items and name == EMAIL)]
    return replace(
        planned,
        template_version=version,
        locale=locale,
        channels=channels,
        subject=subject,
        body=body,
        deliveries=tuple(one for name in carried for one in writers[name].compose(draft)),
        items=tuple(plan.items(say)) if plan.items else (),
    )


def _origin(one: Notification) -> dict[str, str]:
    """What a notification is of, for the log."""
    return {"send_id": str(one.send_id)} if one.send_id else {"rule": one.rule, "event_id": str(one.event_id)}

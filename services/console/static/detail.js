// The pane beside the list: an event, a notification, a delivery or a trace, each with what belongs to it.

import { get } from "./api.js";
import { badge, typeName } from "./events.js";
import { confirm } from "./dialog.js";
import { h, refill } from "./dom.js";
import { refreshing } from "./fetched.js";
import * as format from "./format.js";
import { state } from "./stream.js";
import { deliveryBlock, stateChip } from "./timeline.js";
import { noTrace, waterfall } from "./trace.js";

function facts(...pairs) {
  return h("dl.facts", {}, pairs.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

function when(iso) {
  return iso ? h("time", { datetime: iso }, format.fullTime(iso)) : null;
}

function section(title, ...children) {
  return h("section", {}, h("h3", {}, title), ...children);
}

async function trace(id) {
  if (!id || !state.config.keeps_spans) return null;
  return (await get(`api/traces/${encodeURIComponent(id)}`)).trace;
}

function traceSection(found, id, view, redraw) {
  return section("Trace", found ? waterfall(found, view, redraw) : noTrace(id));
}

function fields(event) {
  const changed = new Set(event.changed);
  const both = event.type === "UPDATED";
  const rows = event.fields.map((field) => {
    const name = field.name.split(".")[0];
    const marks = both && changed.has(name) && field.before !== field.after;
    return h("tr", { "data-changed": marks || undefined }, h("th", { scope: "row" }, field.name.replace("_", " ")), both ? h("td", {}, field.before) : null, h("td", {}, field.after));
  });
  return h("table.fields", {}, h("caption.unseen", {}, "Fields of the user"), h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Field"), both ? h("th", { scope: "col" }, "Before") : null, h("th", { scope: "col" }, both ? "After" : "Value"))), h("tbody", {}, rows));
}

function notificationBlock(one) {
  const ways = one.deliveries.map((delivery) => deliveryBlock(delivery));
  if (one.channels.includes("in_app")) ways.push(h("section.delivery", {}, h("h4", {}, "in app ", h("span.chip", { "data-level": "good" }, "Shown"))));
  return h("div.notification", {}, h("p.notification-title", {}, h("strong", {}, one.subject || one.rule), h("span.muted", {}, ` rule ${one.rule}, ${one.category}`)), ways);
}

const KINDS = {
  event: {
    title: (data) => [data?.event ? `${typeName(data.event.type)} ${data.event.username}` : "Change"],
    async load([position]) {
      const answer = await get(`api/events/${encodeURIComponent(position)}`);
      if (!answer.event) return null;
      const [listed, found] = await Promise.all([get("api/notifications", { event_id: answer.event.id }), trace(answer.event.trace_id)]);
      return { ...answer, ...listed, trace: found };
    },
    missing: "This change is not among the newest that the console keeps.",
    draw({ event, notifications, trace: found }, view, redraw) {
      return [
        facts(["change", h("span", {}, badge(event.type), ` at position ${format.number(event.position)}`)], ["when", when(event.time)], ["by", event.actor], ["user", event.user_id], ["version", String(event.version)], ["event", event.id], ["removed for good", when(event.purge_time)]),
        section("User", fields(event)),
        section("Notifications", notifications.length ? notifications.map(notificationBlock) : h("p.muted", {}, "No rule made one of this change, or it is not processed yet.")),
        traceSection(found, event.trace_id, view, redraw),
      ];
    },
  },
  notification: {
    title: (data) => [data?.one?.subject || "Notification"],
    async load([eventId, id]) {
      const { notifications } = await get("api/notifications", { event_id: eventId });
      const one = notifications.find((other) => other.id === id);
      return one ? { one, trace: await trace(one.trace_id) } : null;
    },
    missing: "There is no such notification any more.",
    draw({ one, trace: found }, view, redraw) {
      return [
        facts(["rule", one.rule], ["category", one.category], ["when", when(one.time)], ["change", h("a", { href: `#/events/event/${one.event_position}` }, `position ${format.number(one.event_position)}`)], ["user", one.user_id]),
        one.body ? section("As shown in the app", h("pre.message", {}, one.body)) : null,
        section("Deliveries", one.deliveries.length ? one.deliveries.map((delivery) => deliveryBlock(delivery)) : h("p.muted", {}, "In the app only.")),
        traceSection(found, one.trace_id, view, redraw),
      ];
    },
  },
  delivery: {
    title: (data) => (data?.one ? [`${data.one.channel} to ${data.one.target} `, stateChip(data.one.state)] : ["Delivery"]),
    async load([notificationId, id]) {
      const { deliveries } = await get("api/deliveries", { notification_id: notificationId });
      const one = deliveries.find((other) => other.id === id);
      return one ? { one, trace: await trace(one.trace_id) } : null;
    },
    missing: "There is no such delivery any more.",
    draw({ one, trace: found }, view, redraw, again) {
      const act = (kind, word, style) => {
        const button = h(`button${style}`, { type: "button", "data-key": kind }, word);
        button.addEventListener("click", async () => (await confirm(kind, [one])) && again());
        return button;
      };
      const actions = one.state === "PARKED" ? [act("replay", "Replay", ".primary"), act("discard", "Discard", "")] : [];
      return [
        deliveryBlock(one, ...actions),
        facts(["key", one.key], ["user", one.user_id], ["notification", h("a", { href: `#/notifications/notification/${one.event_id}/${one.notification_id}` }, one.notification_id)]),
        traceSection(found, one.trace_id, view, redraw),
      ];
    },
  },
  trace: {
    title: () => ["Trace"],
    async load([id]) {
      return { id, trace: await trace(id) };
    },
    missing: "",
    draw({ id, trace: found }, view, redraw) {
      return [facts(["trace", id], ["began", found ? when(new Date(found.start).toISOString()) : null]), found ? waterfall(found, view, redraw) : noTrace(id)];
    },
  },
};

/** Shows one thing in the pane. Gives what to call after each message of the stream, and at the end. */
export function show(place, detail, view, names) {
  const kind = KINDS[detail.kind];
  const heading = h("h2", { tabindex: -1 }, kind.title(null));
  const body = h("div.detail-body");
  const close = h("a.button.close", { href: `#/${view}`, "data-key": "close" }, h("span.wide", {}, "Close"), h("span.narrow", {}, `Back to ${names[view]}`));
  const pane = refreshing(load, () => `${state.changes.deliveries} ${state.changes.spans}`);
  let shown = null;
  let data;

  async function load() {
    data = await kind.load(detail.ids);
    const text = JSON.stringify(data);
    if (text === shown) return;
    shown = text;
    draw();
  }

  function draw() {
    heading.replaceChildren(...kind.title(data));
    refill(body, data ? kind.draw(data, view, draw, pane.refresh) : h("p.muted", {}, kind.missing));
  }

  body.replaceChildren(h("p.muted", {}, "Loading"));
  place.replaceChildren(h("div.detail-head", {}, heading, close), pane.problem, body);
  pane.refresh();
  return { update: pane.update, stop: pane.stop };
}

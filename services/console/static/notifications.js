// The list of notifications, newest first, each with how its deliveries stand.

import { get } from "./api.js";
import { command, empty, h, roving } from "./dom.js";
import { refreshing } from "./fetched.js";
import * as format from "./format.js";
import { state } from "./stream.js";
import { stateChip } from "./timeline.js";

const STEP = 50;
const MOST = 500;

// What needs somebody stands first: there may be room for one only.
const URGENCY = ["PARKED", "PENDING"];

function urgency(delivery) {
  return URGENCY.includes(delivery.state) ? URGENCY.indexOf(delivery.state) : URGENCY.length;
}

function row(one) {
  const chips = one.deliveries.toSorted((first, second) => urgency(first) - urgency(second)).map((delivery) => h("span.way", { title: delivery.target }, h("span", {}, delivery.channel), stateChip(delivery.state)));
  if (one.channels.includes("in_app")) chips.push(h("span.way", {}, h("span", {}, "in app")));
  return h(
    "tr",
    { "data-id": one.id },
    h("td.time", {}, h("time", { datetime: one.time, title: format.fullTime(one.time) }, format.time(one.time))),
    h("td.user", {}, h("a.row-link", { href: `#/notifications/notification/${one.event_id}/${one.id}`, tabindex: -1, "data-key": one.id }, one.subject || one.rule)),
    h("td.rule", {}, one.rule),
    h("td.ways", {}, chips),
  );
}

export function mount(place) {
  let limit = STEP;
  let shown = "";
  const body = h("tbody");
  const table = h("table.list.notifications", { hidden: true }, h("caption.unseen", {}, "Notifications, newest first"), h("thead", {}, h("tr", {}, h("th.time", { scope: "col" }, "Time"), h("th.user", { scope: "col" }, "Notification"), h("th.rule", { scope: "col" }, "Rule"), h("th.ways", { scope: "col" }, "Deliveries"))), body);
  const none = h("div");
  const older = h("button.more", { type: "button", hidden: true }, "Show older");
  const list = refreshing(load, () => state.changes.deliveries);
  place.replaceChildren(list.problem, h("div.scroller", {}, table, none, older));
  const rove = roving(body, "a.row-link");
  let selected = null;

  async function load() {
    const { notifications, more } = await get("api/notifications", { limit });
    older.hidden = !more || limit >= MOST;
    const text = JSON.stringify(notifications);
    if (text === shown) return;
    shown = text;
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    body.replaceChildren(...notifications.map(row));
    if (focused) body.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    table.hidden = notifications.length === 0;
    none.replaceChildren(...(notifications.length ? [] : [empty("Nobody has been notified yet.", h("p", {}, "By the built-in rules a new user is welcomed by mail. Create one:"), command(state.config.create_command ?? ""))]));
    rove();
    mark();
  }

  function mark() {
    for (const one of body.children) one.toggleAttribute("data-selected", one.dataset.id === selected);
  }

  older.addEventListener("click", () => {
    limit = Math.min(MOST, limit + STEP * 2);
    list.refresh();
  });
  return {
    update: list.update,
    stop: list.stop,
    select(detail) {
      selected = detail?.kind === "notification" ? detail.ids[1] : null;
      mark();
    },
  };
}

// The strip at the top: how each service stands, the feed, the inbox.

import { announce, h, svg } from "./dom.js";
import * as format from "./format.js";
import { state } from "./stream.js";

const WORDS = {
  unknown: "Not known yet",
  up: "Up",
  "not ready": "Not ready",
  "no answer": "Does not answer",
  refused: "Refuses the console",
  down: "Down",
};
const LEVELS = { up: "good", unknown: "unknown", "not ready": "warn", "no answer": "bad", refused: "warn", down: "bad" };

const told = new Map();

function card(title) {
  const body = h("div.card-body");
  const note = h("p.note");
  return { element: h("article.card", {}, h("h2", {}, title), body, note), body, note };
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function serviceCard() {
  const made = card("");
  const title = made.element.firstChild;
  const word = h("span.word");
  const since = h("span.since");
  const checks = h("p.checks");
  const live = h("span.check");
  const ready = h("span.check");
  checks.append(live, ready);
  const reason = h("p.reason", { hidden: true });
  made.body.append(h("p.headline", {}, h("span.dot", { "aria-hidden": "true" }), word, since), checks, reason);
  const check = (element, name, value) => {
    setText(element, value === true ? name : value === false ? `not ${name}` : `${name}: not known`);
    element.dataset.value = String(value);
  };
  return {
    element: made.element,
    update(service) {
      setText(title, service.name);
      made.element.dataset.level = state.connected ? LEVELS[service.state] : "unknown";
      setText(word, WORDS[service.state]);
      setText(since, service.state === "unknown" ? "" : `for ${format.ago(service.since)}`);
      since.title = `since ${format.fullTime(service.since)}`;
      check(live, "live", service.live);
      check(ready, "ready", service.ready);
      const well = service.state === "up" || service.state === "unknown";
      const last = service.answered ? ` · last answer ${format.time(service.answered)}` : "";
      setText(made.note, well ? service.address : `since ${format.time(service.since)}${last}`);
      checks.hidden = Boolean(service.reason);
      reason.hidden = !service.reason;
      setText(reason, service.reason);
      reason.title = service.reason;
    },
  };
}

function sparkline() {
  const ground = svg("line", { x1: 0, x2: 60, y1: 19, y2: 19, "vector-effect": "non-scaling-stroke" });
  const line = svg("polyline", { points: "", "vector-effect": "non-scaling-stroke" });
  const area = svg("polygon", { points: "", "vector-effect": "non-scaling-stroke" });
  const element = svg("svg", { class: "spark", viewBox: "0 0 60 20", preserveAspectRatio: "none", role: "img" });
  element.append(ground, area, line);
  return {
    element,
    update(rates) {
      const most = Math.max(4, ...rates);
      const from = 60 - rates.length;
      const points = rates.map((rate, index) => `${from + index + 0.5},${(19 - (17 * rate) / most).toFixed(2)}`);
      line.setAttribute("points", points.join(" "));
      area.setAttribute("points", points.length ? `${from + 0.5},20 ${points.join(" ")} 59.5,20` : "");
      element.setAttribute("aria-label", `Changes a second over the last minute, ${format.number(Math.max(0, ...rates))} at most`);
    },
  };
}

function figure(label) {
  const value = h("dd.figure");
  return { element: h("div", {}, h("dt", {}, label), value), value };
}

function feedCard() {
  const made = card("Feed");
  const head = figure("head");
  const minute = figure("last minute");
  const spark = sparkline();
  made.body.append(h("dl.figures", {}, head.element, minute.element), spark.element);
  return {
    element: made.element,
    update(feed, service) {
      const stale = !state.connected || service.state !== "up";
      made.element.dataset.stale = String(stale);
      setText(head.value, feed ? format.number(feed.head) : "–");
      setText(minute.value, feed ? `+${format.number(feed.rates.reduce((sum, rate) => sum + rate, 0))}` : "–");
      spark.update(feed?.rates ?? []);
      if (stale && service.answered) setText(made.note, `as of ${format.time(service.answered)}`);
      else if (feed?.problem) setText(made.note, feed.problem);
      else setText(made.note, feed?.head_time ? `last change ${format.ago(feed.head_time)} ago` : "no change yet");
    },
  };
}

function inboxCard() {
  const made = card("Deliveries");
  const behind = figure("behind");
  const pending = figure("pending");
  const parked = figure("parked");
  const delivered = figure("delivered");
  made.body.append(h("dl.figures", {}, behind.element, pending.element, parked.element, delivered.element));
  behind.element.title = "Changes of the feed that the notification service has not processed yet";
  return {
    element: made.element,
    update(inbox, feed, service) {
      const stale = !state.connected || service.state !== "up";
      made.element.dataset.stale = String(stale);
      const lag = inbox && feed ? Math.max(0, feed.head - inbox.position) : null;
      setText(behind.value, lag === null ? "–" : format.number(lag));
      setText(pending.value, inbox ? format.number(inbox.pending) : "–");
      setText(parked.value, inbox ? format.number(inbox.parked) : "–");
      parked.value.dataset.level = inbox?.parked ? "warn" : "";
      setText(delivered.value, inbox ? format.number(inbox.delivered) : "–");
      if (stale && service.answered) setText(made.note, `as of ${format.time(service.answered)}`);
      else if (inbox?.oldest_pending_time) setText(made.note, `oldest due for ${format.ago(inbox.oldest_pending_time)}`);
      else setText(made.note, inbox ? `position ${format.number(inbox.position)} of the feed` : "");
    },
  };
}

export function mount(place) {
  const cards = { users: serviceCard(), notifications: serviceCard(), feed: feedCard(), inbox: inboxCard() };
  place.append(...Object.values(cards).map((one) => one.element));
  const connection = document.getElementById("connection");
  const parked = document.getElementById("parked-count");
  const parkedNumber = h("span");
  parked.append(" ", parkedNumber, h("span.word-parked", {}, " parked"));
  return () => {
    const text = state.connected
      ? "Live"
      : state.full
        ? "Too many pages are open: close one"
        : state.status
          ? `Console not reachable since ${format.time(new Date(state.lostAt + format.now() - Date.now()).toISOString())}; what is shown is old`
          : "Connecting";
    setText(connection, text);
    connection.dataset.state = state.connected ? "live" : state.status || state.full ? "lost" : "connecting";
    document.body.dataset.connected = String(state.connected);
    if (!state.status) return;
    const { services, feed, inbox } = state.status;
    for (const key of ["users", "notifications"]) {
      cards[key].update(services[key]);
      const word = WORDS[services[key].state].toLowerCase();
      if (told.has(key) && told.get(key) !== word) announce(`${services[key].name}: ${word}`);
      told.set(key, word);
    }
    cards.feed.update(feed, services.users);
    cards.inbox.update(inbox, feed, services.notifications);
    const count = inbox?.parked ?? 0;
    parked.hidden = count === 0;
    setText(parkedNumber, format.number(count));
  };
}

// The list of changes: newest first, live, held still while somebody reads or points at it.

import { announce, command, empty, h, roving } from "./dom.js";
import * as format from "./format.js";
import { state } from "./stream.js";

const SHOWN = 200;
const TYPES = { CREATED: "Created", UPDATED: "Updated", DELETED: "Deleted", UNDELETED: "Undeleted" };

// What is chosen stays when another view is looked at.
const chosen = { text: "", type: "", paused: false };

export function typeName(type) {
  return TYPES[type] ?? type;
}

export function badge(type) {
  return h("span.badge", { "data-type": type }, typeName(type));
}

function matches(event) {
  if (event.skipped) return !chosen.text && !chosen.type;
  if (chosen.type && event.type !== chosen.type) return false;
  if (!chosen.text) return true;
  const words = [event.position, event.username, event.email, event.display_name, event.actor, event.user_id, event.trace_id, ...event.changed];
  return words.join("\n").toLowerCase().includes(chosen.text);
}

function row(event) {
  if (event.skipped) {
    const text = `${format.some(event.skipped, "change")} came too fast to be shown here`;
    return h("tr.skipped", { "data-position": event.position }, h("td", { colspan: 6 }, text));
  }
  const name = event.display_name ? h("span.name", {}, event.display_name) : null;
  return h(
    "tr",
    { "data-position": event.position },
    h("td.position", {}, format.number(event.position)),
    h("td.time", {}, h("time", { datetime: event.time, title: format.fullTime(event.time) }, format.time(event.time))),
    h("td.type", {}, badge(event.type)),
    h("td.user", {}, h("a.row-link", { href: `#/events/event/${event.position}`, tabindex: -1 }, h("span.username", {}, event.username), " ", name)),
    h("td.changed", {}, event.type === "UPDATED" ? event.changed.join(", ") : event.email),
    h("td.actor", {}, event.actor),
  );
}

function nothing() {
  if (chosen.text || chosen.type) return empty("No change matches.", h("p", {}, "Of the newest changes only those that are shown here are looked at."));
  if (!state.status?.feed) return empty("Waiting for the user service.", h("p", {}, "Changes appear as soon as it answers."));
  if (state.status.feed.head === 0) {
    return empty("No user has been changed yet.", h("p", {}, "Create one, and it appears here:"), command(state.config.create_command ?? ""));
  }
  return empty("No change is kept any more.", h("p", {}, "New ones appear here by themselves. Make one:"), command(state.config.create_command ?? ""));
}

export function mount(place) {
  const search = h("input", { type: "search", id: "events-text", placeholder: "name, address, field, position", autocomplete: "off", spellcheck: "false", value: chosen.text });
  const type = h("select", { id: "events-type" }, h("option", { value: "" }, "all"), Object.entries(TYPES).map(([value, name]) => h("option", { value }, name.toLowerCase())));
  type.value = chosen.type;
  const pause = h("button", { type: "button", "aria-pressed": String(chosen.paused) }, "Pause");
  const fresh = h("button.fresh", { type: "button" }, "");
  const body = h("tbody");
  const head = ["Position", "Time", "Change", "User", "What", "By"];
  const classes = ["position", "time", "type", "user", "changed", "actor"];
  const table = h("table.list.events", {}, h("caption.unseen", {}, "Changes of users, newest first"), h("thead", {}, h("tr", {}, head.map((text, index) => h(`th.${classes[index]}`, { scope: "col" }, text)))), body);
  const none = h("div");
  const scroller = h("div.scroller", {}, table, none);
  place.replaceChildren(
    h("div.toolbar", {}, h("label", { for: "events-text" }, "Find"), search, h("label", { for: "events-type" }, "Change"), type, pause, fresh),
    scroller,
  );
  const rove = roving(body, "a.row-link");
  let shown = [];
  let pointed = false;
  let selected = null;

  const held = () => chosen.paused || scroller.scrollTop > 4 || place.getBoundingClientRect().top < -40 || pointed || body.querySelector(":focus-visible") !== null;

  function fill(events, generationChanged) {
    const before = generationChanged ? new Map() : new Map([...body.children].map((one) => [Number(one.dataset.position), one]));
    const newest = shown[0]?.position ?? Infinity;
    const rows = events.map((event) => {
      const known = before.get(event.position);
      const made = known ?? row(event);
      if (!known && event.position > newest) made.classList.add("arrived");
      made.toggleAttribute("data-selected", event.position === selected);
      return made;
    });
    body.replaceChildren(...rows);
    shown = events;
    table.classList.toggle("no-actor", !events.some((event) => event.actor));
    table.hidden = events.length === 0;
    none.replaceChildren(...(events.length ? [] : [nothing()]));
    rove();
  }

  function update(what = {}) {
    const events = state.events.filter(matches).slice(0, SHOWN);
    if (what.reset || what.asked || !held() || !shown.length) {
      fresh.classList.remove("some");
      fresh.textContent = "";
      fresh.removeAttribute("aria-label");
      const same = events.length === shown.length && events[0]?.position === shown[0]?.position;
      if (!same || what.reset || what.asked || !events.length) fill(events, what.reset);
      return;
    }
    const more = events.findIndex((event) => event.position <= shown[0].position);
    const count = more < 0 ? events.length : more;
    fresh.classList.toggle("some", count > 0);
    fresh.textContent = count ? `${count < SHOWN ? format.number(count) : `${SHOWN}+`} new` : "";
    fresh.setAttribute("aria-label", count ? `Show ${format.some(count, "new change")}` : "");
  }

  search.addEventListener("input", () => {
    chosen.text = search.value.trim().toLowerCase();
    update({ asked: true });
  });
  type.addEventListener("change", () => {
    chosen.type = type.value;
    update({ asked: true });
  });
  const setPaused = (paused) => {
    chosen.paused = paused;
    pause.setAttribute("aria-pressed", String(paused));
    update(paused ? {} : { asked: true });
  };
  pause.addEventListener("click", () => {
    setPaused(!chosen.paused);
    announce(chosen.paused ? "Paused: new changes are counted and not shown" : "Live");
  });
  fresh.addEventListener("click", () => {
    scroller.scrollTop = 0;
    if (place.getBoundingClientRect().top < 0) place.scrollIntoView();
    update({ asked: true });
  });
  body.addEventListener("pointerenter", (event) => (pointed = event.pointerType === "mouse"));
  body.addEventListener("pointerleave", () => (pointed = false));
  update({ asked: true });
  return {
    update,
    select(detail) {
      selected = detail?.kind === "event" ? Number(detail.ids[0]) : null;
      for (const one of body.children) one.toggleAttribute("data-selected", Number(one.dataset.position) === selected);
    },
  };
}

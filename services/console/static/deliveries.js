// The list of deliveries by their state. Parked ones can be chosen, and replayed or discarded together.

import { get } from "./api.js";
import { empty, h, roving } from "./dom.js";
import { confirm } from "./dialog.js";
import { refreshing } from "./fetched.js";
import * as format from "./format.js";
import { state } from "./stream.js";
import { stateChip } from "./timeline.js";

const STEP = 100;
const MOST = 500;
const STATES = { parked: "Parked", pending: "Pending", delivered: "Delivered", discarded: "Discarded", cancelled: "Cancelled", "": "All" };
const NONE = {
  parked: ["Nothing is parked.", "A delivery is parked when the other side refuses it for good, or after its last attempt."],
  pending: ["Nothing is waiting.", "Deliveries are here between two attempts."],
  delivered: ["Nothing has been delivered yet.", "Create a user, and a mail is sent."],
  discarded: ["Nothing has been discarded.", "Parked deliveries that an operator gives up are kept here."],
  cancelled: ["Nothing has been cancelled.", "Deliveries that nobody wants any more are kept here, with the reason."],
  "": ["There is no delivery yet.", "Create a user, and a mail is sent."],
};

const chosen = { state: "parked" };

function lastAttempt(one) {
  const last = one.attempts.at(-1);
  if (!last) return "";
  return [last.outcome.toLowerCase(), last.code || "", last.detail].filter(Boolean).join(" ");
}

export function mount(place) {
  let limit = STEP;
  let shown = "";
  let deliveries = [];
  const marked = new Set();
  const all = h("input", { type: "checkbox", "aria-label": "Choose all that are shown" });
  const body = h("tbody");
  const table = h(
    "table.list.deliveries",
    { hidden: true },
    h("caption.unseen", {}, "Deliveries, newest first"),
    h("thead", {}, h("tr", {}, h("th.pick", { scope: "col" }, all), h("th.time", { scope: "col" }, "Made"), h("th.user", { scope: "col" }, "To"), h("th.state", { scope: "col" }, "State"), h("th.tries", { scope: "col" }, "Tries"), h("th.last", { scope: "col" }, "Last attempt"))),
    body,
  );
  const none = h("div");
  const older = h("button.more", { type: "button", hidden: true }, "Show older");
  const everything = h("p.muted.more", { hidden: true }, "All that are parked, at once: ", h("code", {}, "tidings deliveries replay --all-parked --reason '...'"));
  const states = h(
    "fieldset.choice",
    {},
    h("legend.unseen", {}, "State"),
    Object.entries(STATES).map(([value, name]) => h("label", {}, h("input", { type: "radio", name: "state", value, checked: value === chosen.state }), h("span", {}, name))),
  );
  const count = h("span.muted", {}, "");
  const replay = h("button", { type: "button", disabled: true }, "Replay");
  const discard = h("button", { type: "button", disabled: true }, "Discard");
  const list = refreshing(load, () => state.changes.deliveries);
  place.replaceChildren(h("div.toolbar", {}, states, h("div.chosen", {}, count, replay, discard)), list.problem, h("div.scroller", {}, table, none, older, everything));
  const rove = roving(body, "a.row-link");
  let selected = null;

  function row(one) {
    const canChoose = one.state === "PARKED";
    const box = h("input", { type: "checkbox", "aria-label": `Choose the ${one.channel} delivery to ${one.target}`, "data-key": `pick-${one.id}`, checked: marked.has(one.id) });
    box.addEventListener("change", () => {
      if (box.checked) marked.add(one.id);
      else marked.delete(one.id);
      countChosen();
    });
    return h(
      "tr",
      { "data-id": one.id },
      h("td.pick", {}, canChoose ? h("label.hit", {}, box) : null),
      h("td.time", {}, h("time", { datetime: one.time, title: format.fullTime(one.time) }, format.time(one.time))),
      h("td.user", {}, h("a.row-link", { href: `#/deliveries/delivery/${one.notification_id}/${one.id}`, tabindex: -1, "data-key": one.id }, h("span.channel", {}, one.channel), " ", one.target)),
      h("td.state", {}, stateChip(one.state)),
      h("td.tries", {}, one.attempts.length),
      h("td.last", { title: lastAttempt(one) }, lastAttempt(one)),
    );
  }

  function countChosen() {
    const parked = deliveries.filter((one) => one.state === "PARKED");
    const picked = parked.filter((one) => marked.has(one.id));
    count.textContent = picked.length ? `${format.number(picked.length)} chosen` : "";
    for (const button of [replay, discard]) button.disabled = picked.length === 0;
    all.checked = parked.length > 0 && picked.length === parked.length;
    all.indeterminate = picked.length > 0 && picked.length < parked.length;
    all.disabled = parked.length === 0;
    return picked;
  }

  async function load() {
    const wanted = chosen.state;
    const answer = await get("api/deliveries", { state: wanted, limit });
    if (wanted !== chosen.state) return;
    deliveries = answer.deliveries;
    older.hidden = !answer.more || limit >= MOST;
    everything.hidden = !answer.more || wanted !== "parked";
    const text = wanted + JSON.stringify(deliveries);
    if (text === shown) return;
    shown = text;
    const here = new Set(deliveries.filter((one) => one.state === "PARKED").map((one) => one.id));
    for (const id of marked) if (!here.has(id)) marked.delete(id);
    const focused = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    body.replaceChildren(...deliveries.map(row));
    if (focused) {
      const again = body.querySelector(`[data-key="${CSS.escape(focused)}"]`);
      (again ?? states.querySelector("input:checked")).focus({ preventScroll: true });
    }
    table.hidden = deliveries.length === 0;
    const [title, explain] = NONE[wanted];
    none.replaceChildren(...(deliveries.length ? [] : [empty(title, h("p", {}, explain))]));
    rove();
    countChosen();
    mark();
  }

  function mark() {
    for (const one of body.children) one.toggleAttribute("data-selected", one.dataset.id === selected);
  }

  async function act(kind) {
    const picked = countChosen();
    if (picked.length && (await confirm(kind, picked))) {
      marked.clear();
      await list.refresh();
      states.querySelector("input:checked").focus();
    }
  }

  states.addEventListener("change", (event) => {
    chosen.state = event.target.value;
    limit = STEP;
    marked.clear();
    list.refresh();
  });
  all.addEventListener("change", () => {
    for (const one of deliveries) if (one.state === "PARKED" && all.checked) marked.add(one.id);
    if (!all.checked) marked.clear();
    for (const box of body.querySelectorAll("input[type=checkbox]")) box.checked = all.checked;
    countChosen();
  });
  replay.addEventListener("click", () => act("replay"));
  discard.addEventListener("click", () => act("discard"));
  older.addEventListener("click", () => {
    limit = Math.min(MOST, limit + STEP * 2);
    list.refresh();
  });
  countChosen();
  return {
    update: list.update,
    stop: list.stop,
    select(detail) {
      selected = detail?.kind === "delivery" ? detail.ids[1] : null;
      mark();
    },
  };
}

// Which list and which detail are shown, by the address after the #: `#/VIEW`, or `#/VIEW/KIND/ID...` with a detail.

import * as deliveries from "./deliveries.js";
import * as detail from "./detail.js";
import * as events from "./events.js";
import * as notifications from "./notifications.js";
import * as status from "./status.js";
import { listen, start } from "./stream.js";

const VIEWS = { events, notifications, deliveries };
const NAMES = { events: "changes", notifications: "notifications", deliveries: "deliveries" };
const KINDS = { event: 1, notification: 2, delivery: 2, trace: 1 };

const main = document.getElementById("main");
const aside = document.getElementById("detail");

// As the style sheet has it: the detail stands in the place of the list.
const narrow = matchMedia("(max-width: 59.99rem)");

let view = null;
let list = null;
let pane = null;
let shownDetail = "";

function route() {
  const [, name, kind, ...ids] = location.hash.split("/").map(decodeURIComponent);
  const known = Object.hasOwn(VIEWS, name ?? "") ? name : "events";
  return { view: known, detail: KINDS[kind] === ids.length ? { kind, ids } : null };
}

function navigate() {
  if (location.hash === "#main") return;
  const to = route();
  if (to.view !== view) {
    list?.stop?.();
    view = to.view;
    list = VIEWS[view].mount(main);
    for (const link of document.querySelectorAll(".tabs a")) {
      if (link.dataset.view === view) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }
  const key = to.detail ? [to.detail.kind, ...to.detail.ids].join("/") : "";
  if (key !== shownDetail) {
    const before = shownDetail;
    shownDetail = key;
    pane?.stop();
    pane = null;
    aside.hidden = !to.detail;
    setLandmark();
    document.body.toggleAttribute("data-detail", Boolean(to.detail));
    if (to.detail) {
      pane = detail.show(aside, to.detail, view, NAMES);
      aside.scrollTop = 0;
      aside.querySelector("h2").focus({ preventScroll: true });
      if (getComputedStyle(main).display === "none") scrollTo(0, 0);
    } else if (before) {
      aside.replaceChildren();
      const link = main.querySelector("tr[data-selected] a.row-link");
      (link ?? main).focus({ preventScroll: true });
    }
  }
  list.select(to.detail);
  list.update();
  pane?.update();
}

function setLandmark() {
  if (narrow.matches && shownDetail) aside.setAttribute("role", "main");
  else aside.removeAttribute("role");
}

const updateStatus = status.mount(document.getElementById("status"));
listen((what) => {
  updateStatus();
  list.update(what);
  pane?.update();
});
addEventListener("hashchange", navigate);
narrow.addEventListener("change", setLandmark);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && shownDetail && !document.querySelector("dialog")) location.hash = `#/${view}`;
});
navigate();
updateStatus();
start();

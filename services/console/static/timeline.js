// A delivery as a timeline: made, each attempt with its outcome, what an operator did, what comes next.

import { h } from "./dom.js";
import * as format from "./format.js";

const OUTCOMES = {
  SUCCEEDED: ["Accepted", "good"],
  FAILED: ["Failed", "warn"],
  REFUSED: ["Refused", "bad"],
  UNKNOWN: ["Outcome unknown", "warn"],
};
const STATES = {
  PENDING: ["Pending", "info"],
  DELIVERED: ["Delivered", "good"],
  PARKED: ["Parked", "warn"],
  DISCARDED: ["Discarded", "unknown"],
};
const OPERATIONS = { REPLAYED: "Replayed", DISCARDED: "Discarded" };

export function stateChip(state) {
  const [word, level] = STATES[state] ?? [state.toLowerCase(), "unknown"];
  return h("span.chip", { "data-level": level }, word);
}

function when(iso) {
  return h("time", { datetime: iso, title: format.fullTime(iso) }, format.time(iso));
}

function attempt(one) {
  const [word, level] = OUTCOMES[one.outcome] ?? [one.outcome, "unknown"];
  const took = one.end_time ? Date.parse(one.end_time) - Date.parse(one.start_time) : null;
  return {
    at: one.start_time,
    level,
    element: [
      h("p.step", {}, h("strong", {}, `${word}`), one.code ? h("span.code", {}, one.code) : null, h("span.muted", {}, `attempt ${one.number}`), took === null ? null : h("span.muted", {}, format.duration(took))),
      one.detail ? h("p.detail-text", {}, one.detail) : null,
    ],
  };
}

function operation(one) {
  const by = one.actor ? ` by ${one.actor}` : "";
  return {
    at: one.time,
    level: "info",
    element: [h("p.step", {}, h("strong", {}, `${OPERATIONS[one.kind] ?? one.kind}${by}`)), one.reason ? h("p.detail-text", {}, one.reason) : null],
  };
}

/** The steps of a delivery, oldest first. */
export function timeline(delivery) {
  const steps = [
    { at: delivery.time, level: "info", element: [h("p.step", {}, h("strong", {}, "Made"))] },
    ...delivery.attempts.map(attempt),
    ...delivery.operations.map(operation),
  ];
  steps.sort((one, other) => Date.parse(one.at) - Date.parse(other.at));
  if (delivery.state === "PENDING" && delivery.next_attempt_time) {
    const due = Date.parse(delivery.next_attempt_time) <= format.now();
    steps.push({ at: delivery.next_attempt_time, level: "unknown", element: [h("p.step", {}, h("strong", {}, due ? "Next attempt is due" : "Next attempt"))] });
  }
  return h("ol.timeline", {}, steps.map((step) => h("li", { "data-level": step.level }, h("p.at", {}, when(step.at)), h("div.what", {}, step.element))));
}

/** A delivery: where to, how it stands, its timeline. */
export function deliveryBlock(delivery, ...actions) {
  return h(
    "section.delivery",
    { "data-delivery": delivery.id },
    h("h4", {}, h("span", {}, delivery.channel), " ", stateChip(delivery.state)),
    h("p.target", {}, delivery.target),
    timeline(delivery),
    actions.length ? h("div.actions", {}, actions) : null,
  );
}

// A trace as a waterfall: a row for each span, its bar where it was in time. A row opens to what the span says.

import { h } from "./dom.js";
import * as format from "./format.js";
import { state } from "./stream.js";

const TICKS = 4;

/** Colours by service: the same in every trace. */
const colours = new Map([["tidings-users", 0], ["tidings-notifications", 1]]);

function colour(service) {
  if (!colours.has(service)) colours.set(service, 2 + (colours.size % 2));
  return colours.get(service);
}

/** Rows that are open, by span: they stay open when more spans come. */
const open = new Set();

/** Of an RPC without the package. */
function shortName(name) {
  return name.replace(/^[\w.]+\.(\w+\/\w+)$/, "$1");
}

function title(trace) {
  const spans = format.some(trace.spans.length, "span");
  const left = trace.left_out ? `, ${format.number(trace.left_out)} more not kept` : "";
  return `${format.duration(trace.duration)} in all, ${spans}${left}`;
}

function facts(pairs) {
  return pairs.length ? h("dl.facts", {}, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))) : null;
}

function more(span) {
  const attributes = Object.entries(span.attributes).sort();
  return h(
    "div.span-more",
    {},
    span.failed ? h("p.span-error", {}, `Failed${span.message ? `: ${span.message}` : ""}`) : null,
    facts([["span", span.name], ["service", span.service], ["kind", span.kind.toLowerCase()], ["begins after", format.duration(span.offset)], ["takes", format.duration(span.duration)], ...attributes]),
    span.events.map((event) => h("p.span-event", {}, `${format.duration(event.offset)}  ${event.name}`, facts(Object.entries(event.attributes)))),
  );
}

function links(span, view) {
  const others = new Map(span.links.map((link) => [link.trace_id, link]));
  if (!others.size) return null;
  const all = [...others.values()];
  const items = all.slice(0, 10).map((link) =>
    h("li", {}, h("a", { href: `#/${view}/trace/${link.trace_id}`, "data-key": `link-${span.span_id}-${link.trace_id}` }, link.name || "a span that is not kept", " ", h("span.muted", {}, `in trace ${format.shortId(link.trace_id)}`))),
  );
  const rest = all.length > 10 ? h("li.muted", {}, `and ${format.number(all.length - 10)} more`) : null;
  return h("div.span-links", {}, h("span.muted", {}, "linked to"), h("ul", {}, items, rest));
}

function row(span, trace, view, redraw) {
  const total = trace.duration || 1;
  const bar = h("span.bar", { "data-service": colour(span.service), "data-failed": span.failed || undefined });
  bar.style.left = `${(100 * span.offset) / total}%`;
  bar.style.width = `${(100 * span.duration) / total}%`;
  const length = h("span.length", {}, format.duration(span.duration));
  // The figure stands on the side where there is room.
  if (span.offset + span.duration > total * 0.6) {
    length.style.right = `calc(${100 - (100 * span.offset) / total}% + 6px)`;
    if (span.offset < total * 0.3) {
      length.style.right = "auto";
      length.style.left = `calc(${(100 * span.offset) / total}% + 6px)`;
      length.classList.add("inside");
    }
  } else length.style.left = `calc(${(100 * (span.offset + span.duration)) / total}% + 8px)`;
  const expanded = open.has(span.span_id);
  const name = h("span.span-name", {}, h("span.service-mark", { "data-service": colour(span.service), "aria-hidden": "true" }), h("span", { title: span.name }, shortName(span.name)));
  name.style.paddingInlineStart = `${Math.min(span.depth, 8) * 12}px`;
  const button = h(
    "button.span",
    { type: "button", "aria-expanded": String(expanded), "data-key": `span-${span.span_id}` },
    name,
    h("span.track", { "aria-hidden": "true" }, bar, length),
    h("span.unseen", {}, `, ${span.service}, begins after ${format.duration(span.offset)}, takes ${format.duration(span.duration)}${span.failed ? ", failed" : ""}`),
  );
  button.addEventListener("click", () => {
    if (!open.delete(span.span_id)) open.add(span.span_id);
    redraw();
  });
  return h("li", { "data-span": span.name, "data-failed": span.failed || undefined }, button, links(span, view), expanded ? more(span) : null);
}

function axis(trace) {
  const ticks = Array.from({ length: TICKS + 1 }, (_, index) => {
    const tick = h("span", {}, format.duration((trace.duration * index) / TICKS));
    tick.style.left = `${(100 * index) / TICKS}%`;
    return tick;
  });
  return h("div.axis", { "aria-hidden": "true" }, h("span"), h("span.track", {}, ticks));
}

/** The waterfall of a trace. `view` is the list beside it; `redraw` is called when a row was opened or closed. */
export function waterfall(trace, view, redraw) {
  const services = [...new Set(trace.spans.map((span) => span.service))];
  const legend = h("ul.legend", {}, services.map((service) => h("li", {}, h("span.service-mark", { "data-service": colour(service), "aria-hidden": "true" }), service)));
  return h(
    "div.waterfall",
    { "data-trace": trace.trace_id },
    h("p.muted", {}, title(trace)),
    legend,
    axis(trace),
    h("ol.spans", {}, trace.spans.map((span) => row(span, trace, view, redraw))),
  );
}

/** What is shown instead of a waterfall. */
export function noTrace(traceId) {
  if (!traceId) return h("p.muted", {}, "The call that made the change was not traced.");
  const jaeger = state.config.jaeger_url;
  if (jaeger) return h("p", {}, h("a", { href: `${jaeger}/trace/${traceId}`, target: "_blank", rel: "noopener noreferrer" }, "Open the trace in Jaeger"));
  if (!state.config.keeps_spans) return h("p.muted", {}, `Trace ${traceId}. The console takes no spans here: set TIDINGS_CONSOLE_OTLP_LISTEN, or TIDINGS_CONSOLE_JAEGER_URL to link to them.`);
  return h("p.muted", {}, `No span of trace ${format.shortId(traceId)} is kept. The newest are kept in memory; they come about a second after the call.`);
}

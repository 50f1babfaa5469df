// The live stream of the console and what is known by it. Listeners are called after each message, and each second.

import { setClock } from "./format.js";

const EVENTS_KEPT = 1000;
const SILENCE = 12000;

export const state = {
  connected: false,
  // Since when it is not, milliseconds.
  lostAt: Date.now(),
  full: false,
  config: {},
  status: null,
  changes: { deliveries: 0, spans: 0 },
  // Newest first: rows of events, and { skipped, position } where events were left out.
  events: [],
};

const listeners = new Set();
let source = null;
let heard = Date.now();

export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell(what) {
  for (const listener of [...listeners]) listener(what);
}

function take(message) {
  heard = Date.now();
  state.connected = true;
  state.full = false;
  state.status = message.status;
  setClock(message.status.now);
  state.changes = message.changes;
  if (message.reset) state.events = [];
  const known = state.events[0]?.position ?? 0;
  const fresh = message.events.filter((event) => event.position > known);
  const oldest = fresh[0]?.position;
  if (message.skipped && oldest) state.events.unshift({ skipped: message.skipped, position: oldest - 1 });
  if (fresh.length) state.events = [...fresh.reverse(), ...state.events].slice(0, EVENTS_KEPT);
  tell({ message: true, reset: message.reset });
}

function lost() {
  if (state.connected) {
    state.connected = false;
    state.lostAt = Date.now();
  }
  tell({ message: false });
}

function open() {
  source?.close();
  source = new EventSource("api/live");
  heard = Date.now();
  source.addEventListener("config", (event) => (state.config = JSON.parse(event.data)));
  source.addEventListener("update", (event) => take(JSON.parse(event.data)));
  source.addEventListener("full", () => {
    state.full = true;
    lost();
  });
  source.addEventListener("error", lost);
}

export function start() {
  open();
  setInterval(() => {
    // A browser gives up on a stream that was refused; and a connection can die without a word.
    if (source.readyState === EventSource.CLOSED || Date.now() - heard > SILENCE) {
      lost();
      open();
    }
    tell({ message: false });
  }, 1000);
}

// Numbers and times as they are shown.

const count = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "long" });
const minutes = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });

// What the console's clock is ahead of this browser's, milliseconds.
let ahead = 0;

/** Notes the console's time. */
export function setClock(iso) {
  ahead = Date.parse(iso) - Date.now();
}

/** The console's time, milliseconds. */
export function now() {
  return Date.now() + ahead;
}

export function number(value) {
  return count.format(value);
}

/** "1 change", "2 changes". */
export function some(value, word, plural = `${word}s`) {
  return `${count.format(value)} ${value === 1 ? word : plural}`;
}

/** Time of day; of another day the day, and no seconds. */
export function time(iso) {
  const date = new Date(iso);
  const today = date.toDateString() === new Date(now()).toDateString();
  return today ? clock.format(date) : `${day.format(date)} ${minutes.format(date)}`;
}

export function fullTime(iso) {
  return full.format(new Date(iso));
}

/** How long ago, in one unit. */
export function ago(iso) {
  return span(Math.max(0, now() - Date.parse(iso)));
}

/** How long, in one unit; milliseconds. */
export function span(ms) {
  const seconds = Math.floor(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return some(Math.floor(seconds / 86400), "day");
}

/** A duration to be compared with others; milliseconds. */
export function duration(ms) {
  if (ms < 10) return `${ms.toFixed(2)} ms`;
  if (ms < 1000) return `${ms.toFixed(1)} ms`;
  if (ms < 60000) return `${(ms / 1000).toFixed(2)} s`;
  return span(ms);
}

/** The first letters of an id, which are its time, say little: the last ones tell ids apart. */
export function shortId(id) {
  return id.length > 12 ? `…${id.slice(-8)}` : id;
}

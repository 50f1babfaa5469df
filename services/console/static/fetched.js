// A list that the console is asked for, again whenever it says that something changed, once a second at most.

import { h } from "./dom.js";
import { state } from "./stream.js";

const PACE = 1000;

/** Calls `load` when `tick()` is another number; shows its failure in `problem` and leaves what is shown. */
export function refreshing(load, tick) {
  const problem = h("p.problem", { role: "status", hidden: true });
  let seen = null;
  let busy = false;
  let stopped = false;
  let last = 0;

  async function refresh() {
    if (busy || stopped) return;
    busy = true;
    last = Date.now();
    const at = tick();
    try {
      await load();
      seen = at;
      problem.hidden = true;
    } catch (error) {
      // Asked again by and by: the next message of the stream finds the number still to be another.
      problem.textContent = error.message;
      problem.hidden = false;
    } finally {
      busy = false;
    }
  }

  return {
    problem,
    refresh,
    /** After each message of the stream. */
    update() {
      if (state.connected && tick() !== seen && Date.now() - last >= PACE) return refresh();
      return undefined;
    },
    stop() {
      stopped = true;
    },
  };
}

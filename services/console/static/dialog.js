// Asks before parked deliveries are sent again or given up, and for the reason that is kept with them.

import { announce, h } from "./dom.js";
import * as format from "./format.js";
import { post } from "./api.js";

const KINDS = {
  replay: {
    title: (count) => `Replay ${count}?`,
    explain: "They are sent again with the same key, by which a receiver recognises what it has already.",
    button: "Replay",
    done: (count) => `${count} replayed`,
  },
  discard: {
    title: (count) => `Discard ${count}?`,
    explain: "They are given up for good and cannot be replayed.",
    button: "Discard",
    done: (count) => `${count} discarded`,
  },
};

/** Asks and does it. Resolves to whether it was done. */
export function confirm(kind, deliveries) {
  const words = KINDS[kind];
  const count = format.some(deliveries.length, "delivery", "deliveries");
  const reason = h("input", { id: "reason", type: "text", maxlength: 500, required: true, autocomplete: "off", "aria-describedby": "reason-help" });
  const problem = h("p.problem", { role: "alert", hidden: true });
  const yes = h(`button.${kind === "discard" ? "danger" : "primary"}`, { type: "submit" }, words.button);
  const no = h("button", { type: "button" }, "Cancel");
  const targets = deliveries.slice(0, 5).map((one) => h("li", {}, `${one.channel} to ${one.target}`));
  const rest = deliveries.length > 5 ? h("li.muted", {}, `and ${format.number(deliveries.length - 5)} more`) : null;
  const form = h(
    "form",
    {},
    h("h2", { id: "dialog-title" }, words.title(count)),
    h("ul.targets", {}, targets, rest),
    h("p", {}, words.explain),
    h("label", { for: "reason" }, "Reason"),
    reason,
    h("p.muted", { id: "reason-help" }, "Kept with each delivery, for whoever looks at it later."),
    problem,
    h("div.actions", {}, yes, no),
  );
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    let done = false;
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    });
    no.addEventListener("click", () => dialog.close());
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (!reason.value.trim()) {
        reason.focus();
        return;
      }
      yes.disabled = true;
      problem.hidden = true;
      try {
        const answer = await post(`api/deliveries/${kind}`, { ids: deliveries.map((one) => one.id), reason: reason.value });
        done = true;
        const others = answer.asked - answer.done;
        announce(words.done(format.some(answer.done, "delivery", "deliveries")) + (others ? `; ${others} no longer parked` : ""));
        dialog.close();
      } catch (error) {
        problem.textContent = error.message;
        problem.hidden = false;
        yes.disabled = false;
      }
    });
    dialog.showModal();
    reason.focus();
  });
}

// Elements are made of text nodes and attributes that this file names; nothing is ever parsed as HTML.

/** An element: `h("a.row", { href: "#/events" }, "text", child)`. Absent attributes and children are left out. */
export function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked" || key === "indeterminate") element[key] = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/** Replaces what is in an element and puts the focus back on what has the same `data-key`. */
export function refill(element, ...children) {
  const key = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  const top = element.scrollTop;
  element.replaceChildren(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  element.scrollTop = top;
  if (key) [...element.querySelectorAll("[data-key]")].find((one) => one.dataset.key === key)?.focus({ preventScroll: true });
}

/** Tells a screen reader, once. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** A button that copies a command; without a clipboard the text can still be selected. */
export function command(text) {
  const button = h("button.quiet", { type: "button", "data-key": "copy" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      announce("Copied");
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling);
    }
  });
  return h("div.command", {}, h("code", {}, text), button);
}

/** What is shown where there is nothing to show, and what to do next. */
export function empty(title, ...rest) {
  return h("div.empty", {}, h("p.empty-title", {}, title), ...rest);
}

/** Arrow keys move among the links of a list, of which one is in the tab order. */
export function roving(container, selector) {
  const all = () => [...container.querySelectorAll(selector)];
  const choose = (link) => {
    for (const other of all()) other.tabIndex = other === link ? 0 : -1;
  };
  container.addEventListener("focusin", (event) => event.target.matches(selector) && choose(event.target));
  container.addEventListener("keydown", (event) => {
    const links = all();
    const at = links.indexOf(event.target);
    if (at < 0) return;
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: links.length - 1 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    links[Math.max(0, Math.min(links.length - 1, to))]?.focus();
  });
  /** To be called after the list changed: one of it is in the tab order. */
  return () => {
    const links = all();
    choose(links.find((link) => link === document.activeElement) ?? links.find((link) => link.tabIndex === 0) ?? links[0]);
  };
}
